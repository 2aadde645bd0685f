"""One update: state and batch -> state and what was measured on the way.

Invariant: sums over microbatches, devices and hosts, then ONE division by the number of weighted tokens; the rate that is
reported is the rate that was used. Called by train.loop, tools.bench.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cpt_jax import trees
from cpt_jax.data.batch import Batch
from cpt_jax.model import loss, transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.train.state import TrainState


class StepMetrics(NamedTuple):
  """Measured by one step; stays on the device until train.metrics reads it."""

  sums: loss.Sums  # over the step's batch, before the update
  grad_norm: jax.Array  # of the mean gradient, before clipping
  rate: jax.Array  # the schedule's value in this update


class ModelSettings(NamedTuple):
  """How the model is computed; none of it changes what is computed, but for rounding."""

  compute_dtype: Any
  remat: str
  attention: str
  loss_chunk: int


def settings_from_config(config: Any) -> ModelSettings:
  """`auto` computes in bfloat16 where the chip has units for it: GPU and TPU."""
  dtype = config.model.compute_dtype
  if dtype == "auto":
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return ModelSettings(jnp.dtype(dtype), config.model.remat, config.model.attention, config.model.loss_chunk)


def from_config(
  config: Any, spec: ModelSpec, optimizer: optax.GradientTransformation, schedule: Callable, *, num_sources: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """The update that a config asks for."""
  return make_train_step(
    spec,
    optimizer,
    schedule,
    settings=settings_from_config(config),
    num_sources=num_sources,
    microbatches=config.train.microbatches,
    z_loss=config.train.z_loss,
    frozen=config.optimizer.frozen,
  )


def batch_sums(params: Any, batch: Batch, spec: ModelSpec, *, settings: ModelSettings, num_sources: int) -> loss.Sums:
  """Loss sums of a batch, in all and per source."""
  hidden_BTD = transformer.apply(
    params,
    spec,
    batch.tokens_BT,
    batch.positions_BT,
    batch.segments_BT,
    compute_dtype=settings.compute_dtype,
    remat=settings.remat,
    attention=settings.attention,
  )
  return loss.sums(params, spec, hidden_BTD, batch, num_sources=num_sources, chunk=settings.loss_chunk)


def make_train_step(
  spec: ModelSpec,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[jax.Array], jax.Array],
  *,
  settings: ModelSettings,
  num_sources: int,
  microbatches: int,
  z_loss: float,
  frozen: Sequence[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """The update as a pure function; the caller jits it and donates the state.

  Leaves whose path a pattern of `frozen` matches get no gradient: it is not computed, and not part of the norm.
  """

  def objective(params, batch):
    params = trees.map_with_path(lambda path, p: jax.lax.stop_gradient(p) if is_frozen(path) else p, params)
    sums = batch_sums(params, batch, spec, settings=settings, num_sources=num_sources)
    return sums.loss + z_loss * sums.z_loss, sums

  def is_frozen(path):
    return any(re.fullmatch(pattern, path) for pattern in frozen)

  gradient = jax.grad(objective, has_aux=True)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    grads, sums = accumulate(gradient, state.params, batch, microbatches=microbatches)
    # A batch without a single weighted token would divide by zero; its gradient is zero and so is the update's.
    scale = 1.0 / jnp.maximum(sums.tokens, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    rate = schedule(state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(sums, optax.tree.norm(grads), rate)
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def accumulate(gradient: Callable, params: Any, batch: Batch, *, microbatches: int) -> tuple[Any, loss.Sums]:
  """Sums of gradients and losses over `microbatches` parts of the batch, one after the other."""
  if microbatches == 1:
    return gradient(params, batch)
  # Strided, so that each device's rows stay on it: part a holds rows a, a + A, a + 2A, ...
  parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, gradient(params, part)), None

  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
  zeros = (jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1]))
  total, _ = jax.lax.scan(add_part, zeros, parts)
  return total


def make_eval_step(spec: ModelSpec, *, settings: ModelSettings, num_sources: int) -> Callable[[Any, Batch], loss.Sums]:
  """Loss sums without an update."""

  def eval_step(params: Any, batch: Batch) -> loss.Sums:
    return batch_sums(params, batch, spec, settings=settings, num_sources=num_sources)

  return eval_step
