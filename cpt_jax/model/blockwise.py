"""Queries, keys and values in pairs of blocks -> attended values, memory linear in the row length; plain XLA, for any backend.

Invariant: the recurrences of FlashAttention-2 (2307.08691): a running maximum and sum forward, probabilities recomputed from the
saved log-sum-exp backward; the same values as attention.plain.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model.visible import HIDDEN, KEPT, segment_starts, visible

# Queries are in I blocks of P positions, keys in J blocks of Q; R = G * P query rows share a key head, so that grouped
# queries need no repeated keys.


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
  first_I = start + jnp.arange(num_q) * q_block
  earliest_I = jnp.min(jnp.take(segment_starts(k_segments_BS), first_I, axis=1, mode="clip"), axis=0)
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
    block = (64 if length <= 512 else 128) if mesh_lib.platform() == "cpu" else 512
  num_blocks = math.ceil(length / block)
  return math.ceil(length / num_blocks), num_blocks


def _split(x_BTx: jax.Array, num_blocks: int, block: int, *, fill: int = 0) -> jax.Array:
  """[B, T, ...] -> [blocks, B, block, ...], the last block filled up."""
  padding = [(0, 0), (0, num_blocks * block - x_BTx.shape[1])] + [(0, 0)] * (x_BTx.ndim - 2)
  x = jnp.pad(x_BTx, padding, constant_values=fill)
  return x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]).swapaxes(0, 1)


def _scores(q_BKRH: jax.Array, k_BKQH: jax.Array, blocks: _Blocks, i: jax.Array, j: jax.Array) -> jax.Array:
  """Scaled float32 scores of a pair of blocks, hidden ones at HIDDEN; [B, K, R, Q]."""
  scores_BKRQ = jnp.einsum("BKRH,BKQH->BKRQ", q_BKRH, k_BKQH, preferred_element_type=jnp.float32)
  q_segments_BP, k_segments_BQ = blocks.q_segments_IBP[i], blocks.k_segments_JBQ[j]
  q_P = blocks.start + i * q_segments_BP.shape[1] + jnp.arange(q_segments_BP.shape[1])
  k_Q = j * k_segments_BQ.shape[1] + jnp.arange(k_segments_BQ.shape[1])
  mask_BPQ = visible(q_segments_BP, k_segments_BQ, q_P, k_Q, window=blocks.window)
  mask_BRQ = jnp.tile(mask_BPQ, (1, q_BKRH.shape[2] // mask_BPQ.shape[1], 1))
  return jnp.where(mask_BRQ[:, None], scores_BKRQ / math.sqrt(q_BKRH.shape[-1]), HIDDEN)


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
    carry = (jnp.full(q_BKRH.shape[:-1], HIDDEN, jnp.float32), empty_BKRH[..., 0], empty_BKRH)
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
