"""Hidden states and targets -> sums of cross-entropy over positions, by source.

Invariant: sums only, never a division; float32, but counts are whole numbers; logits exist for one chunk of positions at a time.
Called by train.step and evals.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpt_jax import mesh
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec


class Sums(NamedTuple):
  """Sums over the positions of each source that are in the loss; add them over batches, then divide once.

  Without the sources' weights in the objective: those are `train.step`'s.
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

  `chunk`: positions of each row (on a mesh: of each device's part of a row) whose logits exist at once; 0 = all. With several
  chunks the logits are computed again in the backward pass.
  """
  head_DV = transformer.head(params, spec, dtype=hidden_BTD.dtype)

  def chunk_sums(hidden_BCPD, targets_BCP, weights_BCP):
    logits = jnp.einsum("...D,DV->...V", mesh.merge_positions(hidden_BCPD), head_DV, preferred_element_type=jnp.float32)
    logits_BCPV = mesh.reshape(logits, (*targets_BCP.shape, spec.vocab_size), to=("batch", "seq", None, "vocab"))
    log_partition_BCP = jax.nn.logsumexp(logits_BCPV, axis=-1)
    # A masked sum, not a gather: the vocabulary may be divided over devices.
    is_target_BCPV = jnp.arange(spec.vocab_size)[None, None, None] == targets_BCP[..., None]
    target_logits_BCP = jnp.sum(jnp.where(is_target_BCPV, logits_BCPV, 0.0), axis=-1)
    loss_B = jnp.sum(weights_BCP * (log_partition_BCP - target_logits_BCP), axis=(1, 2))
    return loss_B, jnp.sum(weights_BCP * jnp.square(log_partition_BCP), axis=(1, 2))

  targets_BT, weights_BT = (mesh.constrain(x, "batch", "seq") for x in (batch.targets_BT, batch.weights_BT))
  tokens_B = jnp.sum(weights_BT, axis=1, dtype=jnp.int32)
  pieces = [_in_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT)]
  if pieces[0].shape[0] == 1:
    loss_B, z_loss_B = chunk_sums(*(piece[0] for piece in pieces))
  else:
    step = jax.checkpoint(lambda total, piece: (jax.tree.map(jnp.add, total, chunk_sums(*piece)), None), prevent_cse=False)
    zeros = (jnp.zeros_like(tokens_B, dtype=jnp.float32),) * 2
    (loss_B, z_loss_B), _ = jax.lax.scan(step, zeros, tuple(pieces))
  is_of_source_BM = mesh.constrain(batch.source_B, "batch")[:, None] == jnp.arange(num_sources)[None]
  # A masked sum, not a product: GPUs and TPUs round the factors of a product of float32 to fewer bits.
  return Sums(*(jnp.sum(jnp.where(is_of_source_BM, x_B[:, None], 0), axis=0) for x_B in (loss_B, z_loss_B, tokens_B)))


def _in_chunks(x_BTx: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] -> [chunks, B, C, P, ...]: C parts of a row held by C devices, in chunks of P positions, padded with zeros."""
  rows, row_len, *rest = x_BTx.shape
  parts = mesh.axis_size("context")
  local_len = row_len // parts
  num_chunks = math.ceil(local_len / chunk) if chunk else 1
  size = math.ceil(local_len / num_chunks)
  x = mesh.reshape(x_BTx, (rows, parts, local_len, *rest), to=("batch", "seq", *[None] * (1 + len(rest))))
  x = jnp.pad(x, [(0, 0), (0, 0), (0, num_chunks * size - local_len)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(x.reshape(rows, parts, num_chunks, size, *rest), 2, 0)
