"""Hidden states and targets -> sums of cross-entropy over positions, by source, and the gradient of what training minimises.

Invariant: sums only, never a division; float32, but counts are whole numbers; logits exist for one chunk of positions at a time,
and those of padding rows (spec.num_ids) are in no softmax.

Two more dimensions here: J parts of the batch, as many as the devices that hold different positions, and P positions of a chunk.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model.spec import ModelSpec


class Sums(NamedTuple):
  """Sums over the positions of each source that are in the loss; add them over batches, then divide once.

  Without the sources' weights in the objective: those are `objective`'s.
  """

  loss_M: jax.Array  # nats, float32
  z_loss_M: jax.Array  # squared log-partition, not yet times its weight in the loss, float32
  tokens_M: jax.Array  # int32: float32 leaves out whole numbers from 2^24, and one step may hold more tokens

  @property
  def loss(self) -> jax.Array:
    """Nats of all sources, []."""
    return self.loss_M.sum()

  @property
  def z_loss(self) -> jax.Array:
    """Squared log-partition of all sources, []."""
    return self.z_loss_M.sum()

  @property
  def tokens(self) -> jax.Array:
    """Positions of all sources, []."""
    return self.tokens_M.sum()


def sums(params: dict[str, Any], spec: ModelSpec, hidden_BTD: jax.Array, batch: Any, *, num_sources: int, chunk: int) -> Sums:
  """Cross-entropy of `batch.targets_BT` given the hidden states, where `batch.weights_BT` is 1 and not 0.

  To be evaluated, not differentiated, which is an error. `chunk` as in `objective`.
  """
  return objective(params, spec, hidden_BTD, batch, source_weights=(0.0,) * num_sources, z_loss=0.0, chunk=chunk)[1]


def objective(
  params: dict[str, Any],
  spec: ModelSpec,
  hidden_BTD: jax.Array,
  batch: Any,
  *,
  source_weights: Sequence[float] | np.ndarray,
  z_loss: float,
  chunk: int,
) -> tuple[jax.Array, Sums]:
  """`sum_m source_weights[m] * (loss_m + z_loss * z_loss_m)`, float32 [], and the sums that it is made of.

  Its gradient is computed along with it, chunk by chunk, so that no logits are kept or computed twice. The sums are measured
  only: a gradient through them is an error. `chunk`: positions of each device whose logits exist at once; 0 = all.
  """
  weights_M = np.asarray(source_weights, np.float32)
  targets_BT, weights_BT = (mesh_lib.constrain(x, "batch", "seq") for x in (batch.targets_BT, batch.weights_BT))
  # Masked sums, not products: GPUs and TPUs round the factors of a product of float32 to fewer bits.
  is_of_source_BM = mesh_lib.constrain(batch.source_B, "batch")[:, None] == jnp.arange(len(weights_M))[None]
  pull_BT = weights_BT * jnp.sum(jnp.where(is_of_source_BM, weights_M[None], 0.0), axis=1)[:, None]
  stored = params["embedding"] if spec.tied else params["head"]
  static = _Static(spec.tied, spec.num_ids, z_loss, chunk)
  found: Any = _objective(static, hidden_BTD, stored, targets_BT, pull_BT)
  value, loss_BT, log_partition_BT = found
  of_rows = (
    jnp.sum(weights_BT * loss_BT, axis=1),
    jnp.sum(weights_BT * jnp.square(log_partition_BT), axis=1),
    jnp.sum(weights_BT, axis=1, dtype=jnp.int32),
  )
  return value, Sums(*(jnp.sum(jnp.where(is_of_source_BM, x_B[:, None], 0), axis=0) for x_B in of_rows))


class _Static(NamedTuple):
  """What a program is made for."""

  tied: bool
  num_ids: int
  z_loss: float
  chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _objective(static: _Static, hidden_BTD, stored, targets_BT, pull_BT) -> Any:
  """The sum of `pull_BT * (loss_BT + z_loss * log_partition_BT^2)`, and the two in it; `stored` is the head's parameter."""
  (loss_BT, log_partition_BT), _ = _by_chunk(static, hidden_BTD, stored, targets_BT, pull_BT, wants=(False, False))
  return _weighted(pull_BT, loss_BT, log_partition_BT, static.z_loss), loss_BT, log_partition_BT


def _forward(static: _Static, hidden_BTD, stored, targets_BT, pull_BT):
  # A gradient that nobody asks for (of a frozen head, of hidden states below which all is frozen) is not computed.
  wants = hidden_BTD.perturbed, stored.perturbed
  hidden_BTD, stored, targets_BT, pull_BT = (x.value for x in (hidden_BTD, stored, targets_BT, pull_BT))
  (loss_BT, log_partition_BT), gradients = _by_chunk(static, hidden_BTD, stored, targets_BT, pull_BT, wants=wants)
  return (_weighted(pull_BT, loss_BT, log_partition_BT, static.z_loss), loss_BT, log_partition_BT), gradients


def _backward(static: _Static, gradients, cotangents):
  del static
  scale, *of_measured = cotangents
  if not all(isinstance(x, SymbolicZero) for x in of_measured):
    raise TypeError("a gradient through loss.Sums, which are measured only; differentiate the value of loss.objective")
  return *(None if g is None else (scale * g.astype(jnp.float32)).astype(g.dtype) for g in gradients), None, None


_objective.defvjp(_forward, _backward, symbolic_zeros=True)


def _weighted(pull_BT, loss_BT, log_partition_BT, z_loss):
  return jnp.sum(pull_BT * (loss_BT + z_loss * jnp.square(log_partition_BT)))


def _by_chunk(static: _Static, hidden_BTD, stored, targets_BT, pull_BT, *, wants: tuple[bool, bool]) -> Any:
  """Loss and log-partition of every position, [B, T] each, and the gradients with respect to `hidden_BTD` and `stored`, each
  None unless wanted: three products with the head in all."""
  tied, num_ids, z_loss, chunk = static
  axes = ("vocab", "embed") if tied else ("embed", "vocab")
  dims = "VD" if tied else "DV"
  head = mesh_lib.gathered(stored.astype(hidden_BTD.dtype), *axes)
  wants_hidden, wants_head = wants

  def step(d_head, piece):
    hidden_JPD, targets_JP, pull_JP = piece
    where = ("positions", None)
    logits_JPV = mesh_lib.einsum(f"JPD,{dims}->JPV", hidden_JPD, head, to=(*where, "vocab"), preferred_element_type=jnp.float32)
    ids_V = jnp.arange(head.shape[axes.index("vocab")])[None, None]
    if num_ids < head.shape[axes.index("vocab")]:  # rows that fill the vocabulary up stand for nothing
      logits_JPV = jnp.where(ids_V < num_ids, logits_JPV, -jnp.inf)
    is_target_JPV = ids_V == targets_JP[..., None]
    target_logits_JP = _picked(logits_JPV, targets_JP, is_target_JPV)
    largest_JP = jnp.max(logits_JPV, axis=-1)
    powers_JPV = jnp.exp(logits_JPV - largest_JP[..., None])
    partition_JP = jnp.sum(powers_JPV, axis=-1)
    log_partition_JP = largest_JP + jnp.log(partition_JP)
    terms = log_partition_JP - target_logits_JP, log_partition_JP
    if not any(wants):
      return d_head, (terms, None)
    of_powers_JP = pull_JP * (1 + 2 * z_loss * log_partition_JP) / partition_JP
    d_logits_JPV = powers_JPV * of_powers_JP[..., None] - jnp.where(is_target_JPV, pull_JP[..., None], 0.0)
    d_logits_JPV = d_logits_JPV.astype(hidden_JPD.dtype)
    d_hidden_JPD = mesh_lib.einsum(f"JPV,{dims}->JPD", d_logits_JPV, head, to=(*where, None)) if wants_hidden else None
    if wants_head:  # for each device's positions alone: what devices have is added once, after the last chunk
      d_head += jnp.einsum(f"JPD,JPV->J{dims}", hidden_JPD, d_logits_JPV, preferred_element_type=jnp.float32)
    return d_head, (terms, d_hidden_JPD)

  of_part = [None if name == "embed" else name for name in axes]
  shape = mesh_lib.num_parts("positions"), *head.shape
  d_head = jnp.zeros(shape, jnp.float32, out_sharding=mesh_lib.out("positions", *of_part)) if wants_head else None
  pieces = tuple(_in_chunks(x, chunk) for x in (hidden_BTD, targets_BT, pull_BT))
  d_head, (terms, d_hidden) = jax.lax.scan(step, d_head, pieces)
  d_hidden_BTD = None if d_hidden is None else _from_chunks(d_hidden, hidden_BTD.shape)
  d_stored = None if d_head is None else mesh_lib.constrain(jnp.sum(d_head, axis=0), *axes)
  return [_from_chunks(x, targets_BT.shape) for x in terms], (d_hidden_BTD, d_stored)


def _picked(logits_JPV: jax.Array, targets_JP: jax.Array, is_target_JPV: jax.Array) -> jax.Array:
  """The targets' logits, [J, P]."""
  if mesh_lib.num_parts("vocab") > 1:  # no device has them all
    return jnp.sum(jnp.where(is_target_JPV, logits_JPV, 0.0), axis=-1)
  pick = lambda logits_JPV, targets_JP: jnp.take_along_axis(logits_JPV, targets_JP[..., None], axis=-1)[..., 0]  # noqa: E731
  where = ("positions", None)
  return mesh_lib.per_device(pick, inputs=((*where, "vocab"), where), output=where)(logits_JPV, targets_JP)


def _in_chunks(x_BTx: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] -> [chunks, J, P, ...]: each device's positions in chunks of at most `chunk`, padded with zeros."""
  rows, row_len, *rest = x_BTx.shape
  row_parts, seq_parts, num_rows, num_seq = _divided(rows, row_len)
  of_rest, num_local = (None,) * len(rest), num_rows * num_seq
  num_chunks = math.ceil(num_local / chunk) if chunk else 1
  size = math.ceil(num_local / num_chunks)
  # Every place is told, not found out: JAX may divide another dimension where an axis has one device.
  x = mesh_lib.reshape(x_BTx, (row_parts, num_rows, seq_parts, num_seq, *rest), to=("batch", None, "seq", None, *of_rest))
  x = mesh_lib.reshape(x.swapaxes(1, 2), (row_parts * seq_parts, num_local, *rest), to=("positions", None, *of_rest))
  x = jnp.pad(x, [(0, 0), (0, num_chunks * size - num_local)] + [(0, 0)] * len(rest))
  x = mesh_lib.reshape(x, (row_parts * seq_parts, num_chunks, size, *rest), to=("positions", None, None, *of_rest))
  return jnp.moveaxis(x, 1, 0)


def _from_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[chunks, J, P, ...], as `_in_chunks` made it of an array of this shape -> that array, [B, T, ...]."""
  rows, row_len, *rest = shape
  row_parts, seq_parts, num_rows, num_seq = _divided(rows, row_len)
  of_rest, num_padded = (None,) * len(rest), x.shape[0] * x.shape[2]
  x = mesh_lib.reshape(jnp.moveaxis(x, 0, 1), (x.shape[1], num_padded, *rest), to=("positions", None, *of_rest))
  x = x[:, : num_rows * num_seq]
  x = mesh_lib.reshape(x, (row_parts, seq_parts, num_rows, num_seq, *rest), to=("batch", "seq", None, None, *of_rest))
  return mesh_lib.reshape(x.swapaxes(1, 2), shape, to=("batch", "seq", *of_rest))


def _divided(rows: int, row_len: int) -> tuple[int, int, int, int]:
  """Parts of the rows and parts of a row, then rows and positions of each part."""
  row_parts, seq_parts = mesh_lib.num_parts("batch"), mesh_lib.num_parts("seq")
  return row_parts, seq_parts, rows // row_parts, row_len // seq_parts
