"""One update: state and batch -> state and what was measured on the way.

Invariant: sums over microbatches, devices and hosts, then ONE division by the weighted number of tokens; the rate that is
reported is the rate that was used; an update with a number that is not finite is not made.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import loss, transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.stream.batch import Batch
from cpt_jax.training import optimizer
from cpt_jax.training.state import TrainState


class StepMetrics(NamedTuple):
  """Measured by one step; stays on the device until training.metrics reads it."""

  sums: loss.Sums  # over the step's batch, before the update, without the sources' weights
  grad_norm: jax.Array  # of the objective's gradient, before clipping
  rate: jax.Array  # of this update


# Each chunk reads and writes the head's float32 gradient once more: 8 bytes for 6 operations times the chunk's positions, so with
# 4096 of them it is 7% of the products' time on an H100 and less on TPUs. A CPU computes slower than it reads, and holds the
# logits of few positions in its cache; 256 by measurement (docs/results/performance.md).
_LOSS_CHUNK = {"cpu": 256}


def settings_from_config(config: Any, *, max_documents: int | None = None) -> transformer.Settings:
  """`auto` computes in bfloat16 where the chip has units for it: GPU and TPU. What cannot be offloaded stays on the device."""
  c, platform = config.model, mesh_lib.platform()
  dtype = c.compute_dtype
  if dtype == "auto":
    dtype = "float32" if platform == "cpu" else "bfloat16"
  remat, chunk = transformer.on_platform(c.remat, platform), c.loss_chunk or _LOSS_CHUNK.get(platform, 4096)
  return transformer.Settings(jnp.dtype(dtype), remat, c.attention, chunk, max_documents, c.scan)


def remat_note(config: Any) -> str:
  """A line for people where model.remat is not what is run; empty where it is."""
  asked, run = config.model.remat, settings_from_config(config).remat
  return "" if run == asked else f"{asked}: a CPU's memory is the host's, so what would be sent there stays, as with {run}"


TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, StepMetrics]]


def from_config(
  config: Any, spec: ModelSpec, *, source_weights: Sequence[float], max_documents: int | None = None, stage: int = -1
) -> TrainStep:
  """The update that a config asks for in one of its train.stages; `source_weights` as in `make_train_step`, `max_documents` as in
  `transformer.Settings`."""
  leaves = optimizer.leaves_from_config(config, spec, stage=stage)
  return make_train_step(
    spec,
    optimizer.from_config(config, spec, stage=stage),
    settings=settings_from_config(config, max_documents=max_documents),
    source_weights=source_weights,
    microbatches=config.train.microbatches,
    accumulate_dtype=config.train.accumulate_dtype,
    z_loss=config.train.z_loss,
    hold=functools.partial(optimizer.hold, leaves=leaves, new_rows=spec.new_rows),
  )


def hidden_states(params: Any, batch: Batch, spec: ModelSpec, *, settings: transformer.Settings) -> jax.Array:
  """Hidden states of a batch, [B, T, D]."""
  return transformer.apply(params, spec, batch.tokens_BT, batch.positions_BT, batch.segments_BT, settings=settings)


def make_train_step(
  spec: ModelSpec,
  tx: optax.GradientTransformation,
  *,
  settings: transformer.Settings,
  source_weights: Sequence[float],
  microbatches: int,
  accumulate_dtype: str,
  z_loss: float,
  hold: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
  """The update `train_step(state, batch, rate)` as a pure function; the caller jits it and donates the state.

  It goes down the gradient of `sum_m w_m (loss_m + z_loss * z_loss_m) / sum_m w_m tokens_m`, with the step's sums `loss.Sums` of
  each source m and its weight w_m, whatever share of the rows it has. A batch in which that divides by 0 has gradient 0.

  Where the loss or the gradient's norm is not finite the update is skipped: parameters, moments and the optimizer's own counts
  (Adam's bias correction) keep every bit; `state.step` rises all the same, for the batch is consumed and the rate moves on.

  Args:
    source_weights: for each source 1e-12 of the largest or more, or 0: its rows are measured, no more. Only their ratios count.
    hold: the parameters through which gradients reach those alone that are trained, as optimizer.hold: the others' gradients are
      not computed, and not part of the norm.

  Raises:
    ValueError: other weights; when the update is traced, a batch of 2^31 positions or more.
  """
  weights_M = _relative(source_weights)

  def objective(params, batch):
    params = hold(params)
    hidden_BTD = hidden_states(params, batch, spec, settings=settings)
    chunk = settings.loss_chunk
    with jax.named_scope("loss"):  # preview.memory finds it by this name
      return loss.objective(params, spec, hidden_BTD, batch, source_weights=weights_M, z_loss=z_loss, chunk=chunk)

  gradient = jax.grad(objective, has_aux=True)

  def train_step(state: TrainState, batch: Batch, rate: Any) -> tuple[TrainState, StepMetrics]:
    if batch.weights_BT.size > np.iinfo(np.int32).max:
      raise ValueError(f"train.batch_rows x data.row_len = {batch.weights_BT.shape}: a step counts up to 2^31 - 1 positions")
    grads, sums = accumulate(gradient, state.params, batch, microbatches=microbatches, dtype=accumulate_dtype)
    tokens = jnp.sum(weights_M * sums.tokens_M.astype(jnp.float32))
    # A batch in which nothing has weight would divide by zero; its gradient is zero already.
    scale = 1.0 / jnp.where(tokens > 0, tokens, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    rate = jnp.asarray(rate, jnp.float32)
    with jax.named_scope("update"):
      updates, opt_state = optax.with_extra_args_support(tx).update(grads, state.opt_state, state.params, rate=rate)
      params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    # A choice, not a branch: it joins the pass over the parameters that the update makes anyway.
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss_M).all()
    old, new = (state.params, state.opt_state), (params, opt_state)
    with jax.named_scope("update"):
      params, opt_state = jax.tree.map(lambda a, b: jnp.where(is_finite, b, a), old, new)
    return TrainState(state.step + 1, params, opt_state), StepMetrics(sums, grad_norm, rate)

  return train_step


def _relative(source_weights: Sequence[float]) -> np.ndarray:
  """The weights over the largest of them, float32: a factor that all have in common is gone before anything is rounded to it."""
  weights_M = np.asarray(source_weights, np.float64)
  largest = weights_M.max(initial=0.0)
  # Less than that part of the largest (chosen by hand), and gradients that are times the weight would leave float32's range.
  is_right_M = (weights_M == 0) | (weights_M >= 1e-12 * largest)
  if not (0 < largest < np.inf and is_right_M.all()):
    raise ValueError(
      f"source_weights={tuple(source_weights)}: give each source 0 or a finite number no less than 1e-12 of the largest, and"
      " one of them more than 0"
    )
  return (weights_M / largest).astype(np.float32)


def accumulate(gradient: Callable, params: Any, batch: Batch, *, microbatches: int, dtype: str) -> tuple[Any, loss.Sums]:
  """Sums of gradients and losses over `microbatches` parts of the batch, one after the other.

  Gradients are float32 and added in float32; their sum waits for the next part in `dtype`. Each rounding to bfloat16 is off by up
  to 1/256 of the sum, so after A parts a gradient may be off by about sqrt(A)/512 of its size, more where parts cancel.
  """
  if microbatches == 1:
    return gradient(params, batch)

  # Strided, so that each device's rows stay on it: part a holds rows a, a + A, a + 2A, ...
  def split(x):
    shape = (x.shape[0] // microbatches, microbatches, *x.shape[1:])
    # Told, not found out: JAX divides the parts, too, where an axis of one device is left over.
    return mesh_lib.reshape(x, shape, to=("batch", None, "seq")[: len(shape)]).swapaxes(0, 1)

  parts = jax.tree.map(split, batch)

  def add_part(total, part):
    return jax.tree.map(lambda t, g: (t.astype(g.dtype) + g).astype(t.dtype), total, gradient(params, part)), None

  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
  no_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1])
  zeros = (jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params), no_sums)
  (grads, sums), _ = jax.lax.scan(add_part, zeros, parts)
  return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), sums


def make_eval_step(spec: ModelSpec, *, settings: transformer.Settings, num_sources: int) -> Callable[[Any, Batch], loss.Sums]:
  """Loss sums without an update."""

  def eval_step(params: Any, batch: Batch) -> loss.Sums:
    hidden_BTD = hidden_states(params, batch, spec, settings=settings)
    return loss.sums(params, spec, hidden_BTD, batch, num_sources=num_sources, chunk=settings.loss_chunk)

  return eval_step
