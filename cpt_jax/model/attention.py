"""Queries, keys, values and segments -> attended values; the one place that chooses a kernel.

Invariant: every implementation computes causal attention inside a segment, softmax in float32; `plain` is what the others are
held to. A padded position (segment 0) attends to padding, so no row of the mask is empty. Called by model.transformer.
"""

import functools
import math

import jax
import jax.numpy as jnp

from cpt_jax import mesh

_PLAIN_POSITIONS = 1024  # up to here the [T, S] scores are small and one product is fastest


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array, *, kind: str, window: jax.Array | int | None = None
) -> jax.Array:
  """Causal attention inside segments, [B, T, N, H]; query head n reads key head n // (N / K).

  `kind` is "auto", "plain" or "blockwise"; `window`: a position sees itself and the window - 1 before it (None = all).
  """
  local = functools.partial(_local, implementation=choose(kind, row_len=k_BSKH.shape[1]))
  whole = ("batch", None, "kv_heads", None)
  window = jnp.asarray(k_BSKH.shape[1] if window is None else window, jnp.int32)
  run = mesh.per_device(
    local,
    inputs=(("batch", "seq", "heads", None), whole, whole, ("batch", "seq"), ("batch", None), ()),
    output=("batch", "seq", "heads", None),
  )
  keys = (mesh.constrain(k_BSKH, *whole), mesh.constrain(v_BSKH, *whole))
  return run(q_BTNH, *keys, segments_BT, mesh.constrain(segments_BT, "batch", None), window)


def choose(kind: str, *, row_len: int) -> str:
  """The implementation behind "auto"."""
  if kind != "auto":
    return kind
  return "plain" if row_len <= _PLAIN_POSITIONS else "blockwise"


def _local(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, window, *, implementation):
  start = mesh.first_position(q_BTNH.shape[1])
  return plain(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, start=start, window=window)


def plain(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, *, start, window) -> jax.Array:
  """All scores at once. `start` is the position of the first query in the row."""
  num_kv_heads, head_dim = k_BSKH.shape[2:]
  q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], num_kv_heads, -1, head_dim)
  scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  mask_BTS = visible(q_segments_BT, k_segments_BS, start=start, window=window)
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS / math.sqrt(head_dim), -jnp.inf)
  probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(q_BTNH.shape)


def visible(q_segments_BT, k_segments_BS, *, start, window) -> jax.Array:
  """Which keys a query may see: its own segment's, not after it, not `window` or more before it. Bool [B, T, S]."""
  q_T = start + jnp.arange(q_segments_BT.shape[1])
  behind_TS = q_T[:, None] - jnp.arange(k_segments_BS.shape[1])[None, :]
  near_TS = (behind_TS >= 0) & (behind_TS < window)
  return near_TS[None] & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
