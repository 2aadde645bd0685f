"""Queries, keys and values -> attended values by a fused kernel for NVIDIA GPUs, written in Pallas for Triton.

Invariant: FlashAttention-2 (2307.08691) that visits only the blocks that see each other, so that packed short documents cost what
they hold, not the square of the row; grouped queries read their key head in place.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cpt_jax.model.visible import HIDDEN, KEPT, segment_ends, segment_starts

_LOG2_E = math.log2(math.e)  # GPUs have an instruction for powers of 2


class Tiles(NamedTuple):
  """Positions in a block of queries and of keys, and how the compiler schedules a kernel."""

  q: int
  k: int
  warps: int
  stages: int


class Tuning(NamedTuple):
  """Tiles of the three kernels."""

  forward: Tiles
  keys: Tiles  # gradient of keys and values
  queries: Tiles  # gradient of queries


def tuning(head_dim: int) -> Tuning:
  """Fast on an H200, and compared with float32 there (docs/results/gpu.md); bench_gpu.py --parts=tiles:... tries others."""
  if head_dim <= 64:
    return Tuning(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3))
  return Tuning(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2))


def flash(
  q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, *, start, window, tiles: Tuning | None = None, interpret: bool = False
) -> jax.Array:
  """As attention.plain; row lengths are multiples of 128 and the head size is a power of 2."""
  tiles = tiles or tuning(q_BTNH.shape[-1])
  place = jnp.stack([jnp.asarray(start, jnp.int32), jnp.asarray(window, jnp.int32)])
  static = _Static(tiles, interpret)
  return _flash(static, q_BTNH, k_BSKH, v_BSKH, _Places(q_segments_BT, k_segments_BS, place))


class _Static(NamedTuple):
  tiles: Tuning
  interpret: bool


class _Places(NamedTuple):
  """Integers that say what sees what; they have no gradient."""

  q_segments_BT: jax.Array
  k_segments_BS: jax.Array
  place: jax.Array  # position of the first query, and the window


def key_ranges(places: _Places, tile: Tiles) -> jax.Array:
  """For each block of queries, int32 [B, I, 4]: the blocks of keys [0] to [3] hold all that it sees, [1] to [2] nothing else."""
  start, window = places.place
  starts_BS = segment_starts(places.k_segments_BS)
  first_I = start + jnp.arange(places.q_segments_BT.shape[1] // tile.q) * tile.q
  last_I = first_I + tile.q - 1
  low_BI = jnp.maximum(starts_BS[:, first_I], (first_I - window + 1)[None]) // tile.k
  full_low_BI = _ceil_div(jnp.maximum(starts_BS[:, last_I], (last_I - window + 1)[None]), tile.k)
  return _ranges(low_BI, full_low_BI, ((first_I + 1) // tile.k)[None], (last_I // tile.k + 1)[None])


def query_ranges(places: _Places, tile: Tiles) -> jax.Array:
  """For each block of keys, int32 [B, J, 4]: the blocks of queries [0] to [3] hold all that see it, [1] to [2] see all of it."""
  start, window = places.place
  ends_BS = segment_ends(places.k_segments_BS)
  first_J = jnp.arange(places.k_segments_BS.shape[1] // tile.k) * tile.k
  last_J = first_J + tile.k - 1
  high_BJ = (jnp.minimum(ends_BS[:, last_J], (last_J + window - 1)[None]) - start) // tile.q + 1
  full_high_BJ = (jnp.minimum(ends_BS[:, first_J], (first_J + window - 1)[None]) + 1 - start) // tile.q
  ranges_BJ4 = _ranges(((first_J - start) // tile.q)[None], _ceil_div(last_J - start, tile.q)[None], full_high_BJ, high_BJ)
  return jnp.clip(ranges_BJ4, 0, places.q_segments_BT.shape[1] // tile.q)


def _ceil_div(a, b: int):
  return -(-a // b)


def _ranges(low, full_low, full_high, high) -> jax.Array:
  """Four bounds in rising order, [B, blocks, 4]; nothing is whole where full_low would be above full_high."""
  low, full_low, full_high, high = jnp.broadcast_arrays(jnp.maximum(low, 0), full_low, full_high, high)
  full_low = jnp.clip(full_low, low, jnp.maximum(high, low))
  full_high = jnp.clip(full_high, full_low, jnp.maximum(high, full_low))
  return jnp.stack([low, full_low, full_high, jnp.maximum(high, full_high)], axis=-1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, q_BTNH, k_BSKH, v_BSKH, places: _Places) -> jax.Array:
  return _forward(static, q_BTNH, k_BSKH, v_BSKH, places)[0]


def _forward(static: _Static, q_BTNH, k_BSKH, v_BSKH, places: _Places):
  (rows, num_queries, num_heads, head_dim), tile = q_BTNH.shape, static.tiles.forward
  groups = num_heads // k_BSKH.shape[2]
  block = pl.BlockSpec((None, tile.q, None, head_dim), lambda i, n, b: (b, i, n, 0))
  whole = pl.BlockSpec((None, k_BSKH.shape[1], None, head_dim), lambda i, n, b: (b, 0, n // groups, 0))
  out_BTNH, log_total_BNT = pl.pallas_call(
    functools.partial(_forward_kernel, tile=tile),
    grid=(num_queries // tile.q, num_heads, rows),
    in_specs=[block, whole, whole, *_place_specs(places, tile, by_queries=True)],
    out_specs=[block, pl.BlockSpec((None, None, tile.q), lambda i, n, b: (b, n, i))],
    out_shape=[
      jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
      jax.ShapeDtypeStruct((rows, num_heads, num_queries), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    interpret=static.interpret,
    name="flash_forward",
  )(q_BTNH, k_BSKH, v_BSKH, *places, key_ranges(places, tile))
  out_BTNH, log_total_BNT = checkpoint_name(out_BTNH, KEPT), checkpoint_name(log_total_BNT, KEPT)
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, places, out_BTNH, log_total_BNT)


def _place_specs(places: _Places, tile: Tiles, *, by_queries: bool) -> list[pl.BlockSpec]:
  """Of q_segments, k_segments, place and the ranges; the side that the grid walks over comes in blocks, the other whole."""
  if by_queries:
    q_segments = pl.BlockSpec((None, tile.q), lambda i, n, b: (b, i))
    k_segments = pl.BlockSpec((None, places.k_segments_BS.shape[1]), lambda i, n, b: (b, 0))
  else:
    q_segments = pl.BlockSpec((None, places.q_segments_BT.shape[1]), lambda i, n, b: (b, 0))
    k_segments = pl.BlockSpec((None, tile.k), lambda i, n, b: (b, i))
  return [
    q_segments,
    k_segments,
    pl.BlockSpec((2,), lambda i, n, b: (0,)),
    pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0)),
  ]


def _over(ranges_ref, body: Callable[..., Any], carry: Any) -> Any:
  """The blocks of a range: with a mask, without one where all is seen, with a mask."""
  for part, is_masked in enumerate((True, False, True)):
    carry = jax.lax.fori_loop(ranges_ref[part], ranges_ref[part + 1], functools.partial(body, is_masked=is_masked), carry)
  return carry


def _seen_QK(place_ref, q_segments, k_segments, q_first, k_first):
  """visible.visible of one pair of blocks, from a kernel's references."""
  q_Q = place_ref[0] + q_first + jnp.arange(q_segments.shape[0])
  behind_QK = q_Q[:, None] - (k_first + jnp.arange(k_segments.shape[0]))[None, :]
  near_QK = (behind_QK >= 0) & (behind_QK < place_ref[1])
  return near_QK & (q_segments[:, None] == k_segments[None, :])


def _forward_kernel(q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref, place_ref, ranges_ref, out_ref, log_total_ref, *, tile):
  q_first = pl.program_id(0) * tile.q
  q_QH, q_segments_Q = q_ref[...], q_segments_ref[...]
  scale = _LOG2_E / math.sqrt(q_QH.shape[-1])

  def add_keys(j, carry, *, is_masked):
    maximum_Q, total_Q, out_QH = carry
    here = pl.ds(j * tile.k, tile.k)
    scores_QK = plgpu.dot(q_QH, k_ref[here, :].T) * scale
    if is_masked:
      seen_QK = _seen_QK(place_ref, q_segments_Q, k_segments_ref[here], q_first, j * tile.k)
      scores_QK = jnp.where(seen_QK, scores_QK, HIDDEN)
    new_maximum_Q = jnp.maximum(maximum_Q, jnp.max(scores_QK, axis=1))
    shrink_Q = jnp.exp2(maximum_Q - new_maximum_Q)
    unnormalised_QK = jnp.exp2(scores_QK - new_maximum_Q[:, None])
    total_Q = total_Q * shrink_Q + jnp.sum(unnormalised_QK, axis=1)
    product_QH = plgpu.dot(unnormalised_QK.astype(v_ref.dtype), v_ref[here, :])
    return new_maximum_Q, total_Q, out_QH * shrink_Q[:, None] + product_QH

  zeros_QH = jnp.zeros(q_QH.shape, jnp.float32)
  carry = (jnp.full(tile.q, HIDDEN, jnp.float32), jnp.zeros(tile.q, jnp.float32), zeros_QH)
  maximum_Q, total_Q, out_QH = _over(ranges_ref, add_keys, carry)
  out_ref[...] = (out_QH / total_Q[:, None]).astype(out_ref.dtype)
  log_total_ref[...] = maximum_Q + jnp.log2(total_Q)


def _backward(static: _Static, saved, d_out_BTNH):
  q_BTNH, k_BSKH, v_BSKH, places, out_BTNH, log_total_BNT = saved
  # Softmax: d_scores = probs * (d_probs - sum(d_probs * probs)), and that sum is d_out . out.
  mean_BTN = jnp.sum(d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
  arrays = (q_BTNH, k_BSKH, v_BSKH, d_out_BTNH, log_total_BNT, mean_BTN.swapaxes(1, 2))
  d_k_BSKH, d_v_BSKH = _key_gradients(static, *arrays, places)
  return _query_gradients(static, *arrays, places), d_k_BSKH, d_v_BSKH, None


def _key_gradients(static: _Static, q_BTNH, k_BSKH, v_BSKH, d_out_BTNH, log_total_BNT, mean_BNT, places):
  (rows, num_queries, num_heads, head_dim), tile = q_BTNH.shape, static.tiles.keys
  num_keys, num_kv_heads = k_BSKH.shape[1:3]
  groups = num_heads // num_kv_heads
  block = pl.BlockSpec((None, tile.k, None, head_dim), lambda j, k, b: (b, j, k, 0))
  group = pl.BlockSpec((None, num_queries, groups, head_dim), lambda j, k, b: (b, 0, k, 0))
  sums = pl.BlockSpec((None, groups, num_queries), lambda j, k, b: (b, k, 0))
  return pl.pallas_call(
    functools.partial(_key_gradients_kernel, tile=tile, groups=groups),
    grid=(num_keys // tile.k, num_kv_heads, rows),
    in_specs=[group, block, block, group, sums, sums, *_place_specs(places, tile, by_queries=False)],
    out_specs=[block, block],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKH)],
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    interpret=static.interpret,
    name="flash_key_gradients",
  )(q_BTNH, k_BSKH, v_BSKH, d_out_BTNH, log_total_BNT, mean_BNT, *places, query_ranges(places, tile))


def _key_gradients_kernel(
  q_ref, k_ref, v_ref, d_out_ref, log_total_ref, mean_ref, q_segments_ref, k_segments_ref, place_ref, ranges_ref,
  d_k_ref, d_v_ref, *, tile, groups
):  # fmt: skip
  k_first = pl.program_id(0) * tile.k
  k_KH, v_KH, k_segments_K = k_ref[...], v_ref[...], k_segments_ref[...]
  scale = 1 / math.sqrt(k_KH.shape[-1])

  def add_queries(i, carry, *, head, is_masked):
    d_k_KH, d_v_KH = carry
    here = pl.ds(i * tile.q, tile.q)
    q_QH, d_out_QH = q_ref[here, head, :], d_out_ref[here, head, :]
    # Keys first: the products that follow then take both factors as they lie in registers.
    probs_KQ = jnp.exp2(plgpu.dot(k_KH, q_QH.T) * (scale * _LOG2_E) - log_total_ref[head, here][None, :])
    if is_masked:
      seen_QK = _seen_QK(place_ref, q_segments_ref[here], k_segments_K, i * tile.q, k_first)
      probs_KQ = jnp.where(seen_QK.T, probs_KQ, 0.0)
    d_v_KH = d_v_KH + plgpu.dot(probs_KQ.astype(d_out_QH.dtype), d_out_QH)
    d_probs_KQ = plgpu.dot(v_KH, d_out_QH.T)
    d_scores_KQ = probs_KQ * (d_probs_KQ - mean_ref[head, here][None, :])
    return d_k_KH + plgpu.dot(d_scores_KQ.astype(q_QH.dtype), q_QH), d_v_KH

  zeros_KH = jnp.zeros(k_KH.shape, jnp.float32)
  carry = (zeros_KH, zeros_KH)
  carry = jax.lax.fori_loop(0, groups, lambda g, carry: _over(ranges_ref, functools.partial(add_queries, head=g), carry), carry)
  d_k_ref[...] = (carry[0] * scale).astype(d_k_ref.dtype)
  d_v_ref[...] = carry[1].astype(d_v_ref.dtype)


def _query_gradients(static: _Static, q_BTNH, k_BSKH, v_BSKH, d_out_BTNH, log_total_BNT, mean_BNT, places):
  (rows, num_queries, num_heads, head_dim), tile = q_BTNH.shape, static.tiles.queries
  groups = num_heads // k_BSKH.shape[2]
  block = pl.BlockSpec((None, tile.q, None, head_dim), lambda i, n, b: (b, i, n, 0))
  whole = pl.BlockSpec((None, k_BSKH.shape[1], None, head_dim), lambda i, n, b: (b, 0, n // groups, 0))
  sums = pl.BlockSpec((None, None, tile.q), lambda i, n, b: (b, n, i))
  return pl.pallas_call(
    functools.partial(_query_gradients_kernel, tile=tile),
    grid=(num_queries // tile.q, num_heads, rows),
    in_specs=[block, whole, whole, block, sums, sums, *_place_specs(places, tile, by_queries=True)],
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    interpret=static.interpret,
    name="flash_query_gradients",
  )(q_BTNH, k_BSKH, v_BSKH, d_out_BTNH, log_total_BNT, mean_BNT, *places, key_ranges(places, tile))


def _query_gradients_kernel(
  q_ref, k_ref, v_ref, d_out_ref, log_total_ref, mean_ref, q_segments_ref, k_segments_ref, place_ref, ranges_ref, d_q_ref, *, tile
):
  q_first = pl.program_id(0) * tile.q
  q_QH, d_out_QH, q_segments_Q = q_ref[...], d_out_ref[...], q_segments_ref[...]
  log_total_Q, mean_Q = log_total_ref[...], mean_ref[...]
  scale = 1 / math.sqrt(q_QH.shape[-1])

  def add_keys(j, d_q_QH, *, is_masked):
    here = pl.ds(j * tile.k, tile.k)
    k_KH = k_ref[here, :]
    probs_QK = jnp.exp2(plgpu.dot(q_QH, k_KH.T) * (scale * _LOG2_E) - log_total_Q[:, None])
    if is_masked:
      seen_QK = _seen_QK(place_ref, q_segments_Q, k_segments_ref[here], q_first, j * tile.k)
      probs_QK = jnp.where(seen_QK, probs_QK, 0.0)
    d_scores_QK = probs_QK * (plgpu.dot(d_out_QH, v_ref[here, :].T) - mean_Q[:, None])
    return d_q_QH + plgpu.dot(d_scores_QK.astype(k_KH.dtype), k_KH)

  d_q_QH = _over(ranges_ref, add_keys, jnp.zeros(q_QH.shape, jnp.float32))
  d_q_ref[...] = (d_q_QH * scale).astype(d_q_ref.dtype)


_flash.defvjp(_forward, _backward)
