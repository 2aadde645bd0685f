"""Queries, keys, values and segments -> attended values; the one place that chooses an implementation.

Invariant: every implementation computes causal attention inside a segment, softmax in float32; `plain` is what the others are
held to. A padded position (segment 0) attends to padding, so no row of the mask is empty. Called by model.transformer.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpt_jax import mesh

# What the "dots" remat policy keeps of attention, so that the backward pass does not attend again.
KEPT = "attended"
# Finite, so that a block without a visible key gives numbers (that the next block's larger maximum wipes out), not NaN.
_HIDDEN = -1e30


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  *,
  kind: str,
  window: jax.Array | int | None = None,
) -> jax.Array:
  """Causal attention inside segments, [B, T, N, H]; query head n reads key head n // (N / K).

  Equal segment numbers are neighbours in their row. `kind` is "auto", "plain" or "blockwise"; with a `window` a position sees
  itself and the window - 1 before it.
  """
  row_len = k_BSKH.shape[1]
  whole = ("batch", None, "kv_heads", None)
  run = mesh.per_device(
    functools.partial(_local, implementation=choose(kind, row_len=row_len)),
    inputs=(("batch", "seq", "heads", None), whole, whole, ("batch", "seq"), ("batch", None), ()),
    output=("batch", "seq", "heads", None),
  )
  window = jnp.asarray(row_len if window is None else window, jnp.int32)
  keys = (mesh.constrain(k_BSKH, *whole), mesh.constrain(v_BSKH, *whole))
  return run(q_BTNH, *keys, segments_BT, mesh.constrain(segments_BT, "batch", None), window)


def choose(kind: str, *, row_len: int) -> str:
  """The implementation behind "auto".

  On CPU (2 cores, B16 T256 N4 K2 H32, forward and backward) `plain` takes 96-128 ms, `jax.nn.dot_product_attention` 140 ms and
  `blockwise` 27 ms, since it skips what causality hides and its scores stay in the cache.
  """
  if kind != "auto":
    return kind
  return "plain" if jax.default_backend() != "cpu" and row_len <= 1024 else "blockwise"


def _local(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, window, *, implementation: str) -> jax.Array:
  start = mesh.first_position(q_BTNH.shape[1])
  function = {"plain": plain, "blockwise": blockwise}[implementation]
  return function(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, start=start, window=window)


def plain(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, *, start, window) -> jax.Array:
  """All scores at once. `start` is the position of the first query in the row."""
  num_kv_heads, head_dim = k_BSKH.shape[2:]
  q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], num_kv_heads, -1, head_dim)
  scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  q_T, k_S = start + jnp.arange(q_segments_BT.shape[1]), jnp.arange(k_segments_BS.shape[1])
  mask_BTS = visible(q_segments_BT, k_segments_BS, q_T, k_S, window=window)
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS / math.sqrt(head_dim), _HIDDEN)
  probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(q_BTNH.shape), KEPT)


def visible(q_segments_BT, k_segments_BS, q_T, k_S, *, window) -> jax.Array:
  """Which keys a query may see: those of its segment, not after it, not `window` or more before it. Bool [B, T, S]."""
  behind_TS = q_T[:, None] - k_S[None, :]
  near_TS = (behind_TS >= 0) & (behind_TS < window)
  return near_TS[None] & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])


# Blockwise: queries in I blocks of P positions, keys in J blocks of Q; R = G * P query rows share a key head, so that grouped
# queries need no repeated keys. The recurrences are those of FlashAttention-2 (2307.08691): a running maximum and sum forward,
# probabilities recomputed from the saved log-sum-exp backward, so that memory is linear in the row length both ways.


class _Blocks(NamedTuple):
  """Integers that say what is where; they have no gradient."""

  q_segments_IBP: jax.Array
  k_segments_JBQ: jax.Array
  low_I: jax.Array  # key blocks [low, high) hold every key that a query block sees
  high_I: jax.Array
  start: jax.Array
  window: jax.Array


def blockwise(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, *, start, window, block: int | None = None) -> jax.Array:
  """Attention over pairs of blocks that see each other, memory linear in the row length."""
  num_rows, num_queries, num_heads, head_dim = q_BTNH.shape
  num_kv_heads = k_BSKH.shape[2]
  q_block, num_q = _block_size(num_queries, block)
  k_block, num_k = _block_size(k_BSKH.shape[1], block)
  groups = num_heads // num_kv_heads
  q_IBPNH, k_JBQKH, v_JBQKH = _split(q_BTNH, num_q, q_block), _split(k_BSKH, num_k, k_block), _split(v_BSKH, num_k, k_block)
  q_IBKGPH = q_IBPNH.reshape(num_q, num_rows, q_block, num_kv_heads, groups, head_dim).transpose(0, 1, 3, 4, 2, 5)
  q_IBKRH = q_IBKGPH.reshape(num_q, num_rows, num_kv_heads, groups * q_block, head_dim)
  k_S = jnp.arange(k_segments_BS.shape[1])
  changes_BS = jnp.diff(k_segments_BS, axis=1, prepend=k_segments_BS[:, :1]) != 0
  segment_start_BS = jax.lax.cummax(jnp.where(changes_BS, k_S[None], 0), axis=1)
  first_I = start + jnp.arange(num_q) * q_block
  earliest_I = jnp.min(jnp.take(segment_start_BS, first_I, axis=1, mode="clip"), axis=0)
  blocks = _Blocks(
    # Unequal paddings: a padded query sees nothing and a padded key is seen by none.
    q_segments_IBP=_split(q_segments_BT, num_q, q_block, fill=-1),
    k_segments_JBQ=_split(k_segments_BS, num_k, k_block, fill=-2),
    low_I=jnp.maximum(earliest_I, first_I - window + 1) // k_block,
    high_I=jnp.minimum((first_I + q_block - 1) // k_block + 1, num_k),
    start=jnp.asarray(start),
    window=jnp.asarray(window),
  )
  out_IBKRH = _attend_blocks(q_IBKRH, k_JBQKH.swapaxes(2, 3), v_JBQKH.swapaxes(2, 3), blocks)
  out_IBKGPH = out_IBKRH.reshape(q_IBKGPH.shape)
  out_BIPKGH = out_IBKGPH.transpose(1, 0, 4, 2, 3, 5)
  return out_BIPKGH.reshape(num_rows, num_q * q_block, num_heads, head_dim)[:, :num_queries]


def _block_size(length: int, block: int | None) -> tuple[int, int]:
  """Positions in a block and how many blocks, for little padding."""
  if block is None:
    # Measured on CPU: 64 is best at 256 positions, 64 to 128 at 1024, 128 at 4096. An accelerator wants larger products.
    block = (64 if length <= 512 else 128) if jax.default_backend() == "cpu" else 512
  num_blocks = math.ceil(length / block)
  return math.ceil(length / num_blocks), num_blocks


def _split(x_BTx: jax.Array, num_blocks: int, block: int, *, fill: int = 0) -> jax.Array:
  """[B, T, ...] -> [blocks, B, block, ...], the last block filled up."""
  padding = [(0, 0), (0, num_blocks * block - x_BTx.shape[1])] + [(0, 0)] * (x_BTx.ndim - 2)
  x = jnp.pad(x_BTx, padding, constant_values=fill)
  return x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]).swapaxes(0, 1)


def _scores(q_BKRH: jax.Array, k_BKQH: jax.Array, blocks: _Blocks, i: jax.Array, j: jax.Array) -> jax.Array:
  """Scaled float32 scores of a pair of blocks, hidden ones at _HIDDEN; [B, K, R, Q]."""
  scores_BKRQ = jnp.einsum("BKRH,BKQH->BKRQ", q_BKRH, k_BKQH, preferred_element_type=jnp.float32)
  q_segments_BP, k_segments_BQ = blocks.q_segments_IBP[i], blocks.k_segments_JBQ[j]
  q_P = blocks.start + i * q_segments_BP.shape[1] + jnp.arange(q_segments_BP.shape[1])
  k_Q = j * k_segments_BQ.shape[1] + jnp.arange(k_segments_BQ.shape[1])
  mask_BPQ = visible(q_segments_BP, k_segments_BQ, q_P, k_Q, window=blocks.window)
  mask_BRQ = jnp.tile(mask_BPQ, (1, q_BKRH.shape[2] // mask_BPQ.shape[1], 1))
  return jnp.where(mask_BRQ[:, None], scores_BKRQ / math.sqrt(q_BKRH.shape[-1]), _HIDDEN)


@jax.custom_vjp
def _attend_blocks(q_IBKRH: jax.Array, k_JBKQH: jax.Array, v_JBKQH: jax.Array, blocks: _Blocks) -> jax.Array:
  return _forward(q_IBKRH, k_JBKQH, v_JBKQH, blocks)[0]


def _forward(q_IBKRH, k_JBKQH, v_JBKQH, blocks: _Blocks):
  def of_query_block(_, query):
    i, q_BKRH = query

    def add_key_block(j, carry):
      maximum_BKR, total_BKR, out_BKRH = carry
      scores_BKRQ = _scores(q_BKRH, k_JBKQH[j], blocks, i, j)
      new_maximum_BKR = jnp.maximum(maximum_BKR, jnp.max(scores_BKRQ, axis=-1))
      unnormalised_BKRQ = jnp.exp(scores_BKRQ - new_maximum_BKR[..., None])
      shrink_BKR = jnp.exp(maximum_BKR - new_maximum_BKR)
      product_BKRH = jnp.einsum(
        "BKRQ,BKQH->BKRH", unnormalised_BKRQ.astype(v_JBKQH.dtype), v_JBKQH[j], preferred_element_type=jnp.float32
      )
      total_BKR = total_BKR * shrink_BKR + jnp.sum(unnormalised_BKRQ, axis=-1)
      return new_maximum_BKR, total_BKR, out_BKRH * shrink_BKR[..., None] + product_BKRH

    empty_BKRH = jnp.zeros(q_BKRH.shape, jnp.float32)
    carry = (jnp.full(q_BKRH.shape[:-1], _HIDDEN, jnp.float32), empty_BKRH[..., 0], empty_BKRH)
    maximum_BKR, total_BKR, out_BKRH = jax.lax.fori_loop(blocks.low_I[i], blocks.high_I[i], add_key_block, carry)
    out_BKRH = (out_BKRH / total_BKR[..., None]).astype(q_BKRH.dtype)
    return None, (out_BKRH, maximum_BKR + jnp.log(total_BKR))

  _, (out_IBKRH, log_total_IBKR) = jax.lax.scan(of_query_block, None, (jnp.arange(q_IBKRH.shape[0]), q_IBKRH))
  out_IBKRH, log_total_IBKR = checkpoint_name(out_IBKRH, KEPT), checkpoint_name(log_total_IBKR, KEPT)
  return out_IBKRH, (q_IBKRH, k_JBKQH, v_JBKQH, blocks, out_IBKRH, log_total_IBKR)


def _backward(saved, d_out_IBKRH):
  q_IBKRH, k_JBKQH, v_JBKQH, blocks, out_IBKRH, log_total_IBKR = saved
  dtype = q_IBKRH.dtype

  def of_query_block(d_keys, query):
    i, q_BKRH, d_out_BKRH, out_BKRH, log_total_BKR = query
    # Softmax: d_scores = probs * (d_probs - sum(d_probs * probs)), and that sum is d_out . out.
    mean_BKR = jnp.sum(d_out_BKRH.astype(jnp.float32) * out_BKRH.astype(jnp.float32), axis=-1)

    def add_key_block(j, carry):
      d_q_BKRH, d_k_JBKQH, d_v_JBKQH = carry
      probs_BKRQ = jnp.exp(_scores(q_BKRH, k_JBKQH[j], blocks, i, j) - log_total_BKR[..., None])
      d_v_BKQH = _product("BKRQ,BKRH->BKQH", probs_BKRQ.astype(dtype), d_out_BKRH)
      d_probs_BKRQ = _product("BKRH,BKQH->BKRQ", d_out_BKRH, v_JBKQH[j])
      d_scores_BKRQ = (probs_BKRQ * (d_probs_BKRQ - mean_BKR[..., None])).astype(dtype)
      d_k_BKQH = _product("BKRQ,BKRH->BKQH", d_scores_BKRQ, q_BKRH)
      d_q_BKRH = d_q_BKRH + _product("BKRQ,BKQH->BKRH", d_scores_BKRQ, k_JBKQH[j])
      return d_q_BKRH, d_k_JBKQH.at[j].add(d_k_BKQH), d_v_JBKQH.at[j].add(d_v_BKQH)

    carry = (jnp.zeros(q_BKRH.shape, jnp.float32), *d_keys)
    d_q_BKRH, *d_keys = jax.lax.fori_loop(blocks.low_I[i], blocks.high_I[i], add_key_block, carry)
    return tuple(d_keys), d_q_BKRH

  nothing = (jnp.zeros(k_JBKQH.shape, jnp.float32), jnp.zeros(v_JBKQH.shape, jnp.float32))
  queries = (jnp.arange(q_IBKRH.shape[0]), q_IBKRH, d_out_IBKRH, out_IBKRH, log_total_IBKR)
  (d_k_JBKQH, d_v_JBKQH), d_q_IBKRH = jax.lax.scan(of_query_block, nothing, queries)
  scale = 1 / math.sqrt(q_IBKRH.shape[-1])
  return (d_q_IBKRH * scale).astype(dtype), (d_k_JBKQH * scale).astype(dtype), d_v_JBKQH.astype(dtype), None


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_attend_blocks.defvjp(_forward, _backward)
