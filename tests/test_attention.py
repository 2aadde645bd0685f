"""Attention against an independent float64 one, and blockwise against plain: values, gradients, memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.model import attention


def reference(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, window=None) -> np.ndarray:
  """One query at a time, in float64."""
  num_rows, row_len, num_heads, head_dim = q_BTNH.shape
  groups = num_heads // k_BSKH.shape[2]
  out_BTNH = np.zeros(q_BTNH.shape)
  for b, t, n in np.ndindex(num_rows, row_len, num_heads):
    seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t] and (window is None or t - s < window)]
    scores = k_BSKH[b, seen, n // groups].astype(np.float64) @ q_BTNH[b, t, n].astype(np.float64) / math.sqrt(head_dim)
    probs = np.exp(scores - scores.max())
    out_BTNH[b, t, n] = (probs / probs.sum()) @ v_BSKH[b, seen, n // groups].astype(np.float64)
  return out_BTNH


attend = jax.jit(attention.attend, static_argnames="kind")


def inputs(*, rows=2, row_len=13, heads=4, kv_heads=2, head_dim=6, seed=0, scale=1.0, dtype=np.float32):
  """Queries, keys, values and segments; the rows are packed differently and end in padding, but for the first."""
  random = np.random.default_rng(seed)
  q, k, v = ((scale * random.normal(size=(rows, row_len, n, head_dim))).astype(dtype) for n in (heads, kv_heads, kv_heads))
  segments_BT = np.zeros((rows, row_len), np.int32)
  for b in range(rows):
    ends = sorted(random.integers(1, row_len, size=2)) + [row_len if b == 0 else row_len - 2]
    start = 0
    for number, end in enumerate(ends, start=1):
      segments_BT[b, start:end] = number
      start = max(start, end)
  return q, k, v, segments_BT


CASES = {
  "one document": dict(row_len=8, rows=1),
  "packed": dict(row_len=13),
  "no shared keys": dict(row_len=9, heads=3, kv_heads=3),
  "one key head": dict(row_len=11, heads=4, kv_heads=1, head_dim=5),
}


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("case", CASES)
def test_plain_equals_the_float64_reference(case, window):
  q, k, v, segments_BT = inputs(**CASES[case])
  found = attend(q, k, v, segments_BT, kind="plain", window=window)
  np.testing.assert_allclose(found, reference(q, k, v, segments_BT, window=window), rtol=2e-5, atol=2e-6)


def value_and_gradients(q, k, v, segments_BT, *, window, block=None):
  """Output and the gradients of a weighted sum of it; by blocks if `block` is given."""
  weights = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
  window = q.shape[1] if window is None else window

  def run(q, k, v):
    keywords = {"start": 0, "window": window}
    if block is None:
      out = attention.plain(q, k, v, segments_BT, segments_BT, **keywords)
    else:
      out = attention.blockwise(q, k, v, segments_BT, segments_BT, **keywords, block=block)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *gradients


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("row_len", "block"), [(13, 4), (13, 13), (16, 4), (24, 5)])
def test_blockwise_equals_plain_forward_and_backward(row_len, block, window):
  arrays = inputs(row_len=row_len, rows=3, seed=row_len)
  expected = value_and_gradients(*arrays, window=window)
  found = value_and_gradients(*arrays, window=window, block=block)
  for name, a, b in zip(("out", "d_q", "d_k", "d_v"), found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=name)


def test_blockwise_stays_finite_and_right_for_large_scores():
  q, k, v, segments_BT = inputs(row_len=12, scale=30.0)
  out, *gradients = value_and_gradients(q, k, v, segments_BT, window=None, block=4)
  np.testing.assert_allclose(out, reference(q, k, v, segments_BT), rtol=1e-3, atol=1e-3)
  assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("kind", ["plain", "blockwise"])
def test_bfloat16_stays_close_to_float64(kind):
  q, k, v, segments_BT = inputs(row_len=13)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  found = attend(*low, segments_BT, kind=kind)
  assert found.dtype == jnp.bfloat16
  expected = reference(*(np.asarray(x, np.float64) for x in low), segments_BT)
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2e-2, atol=2e-2)


def test_queries_that_start_inside_the_row_see_what_lies_before_them():
  q, k, v, segments_BT = inputs(row_len=16)
  expected = reference(q, k, v, segments_BT)[:, 8:]
  for function in (attention.plain, attention.blockwise):
    found = jax.jit(function)(q[:, 8:], k, v, segments_BT[:, 8:], segments_BT, start=8, window=16)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_blockwise_memory_is_linear_in_the_row_length():
  def temp_bytes(row_len):
    q, k, v, _ = inputs(rows=1, row_len=row_len, head_dim=8)
    segments_BT = np.ones((1, row_len), np.int32)

    def run(q, k, v):
      return jnp.sum(attention.blockwise(q, k, v, segments_BT, segments_BT, start=0, window=row_len, block=128) ** 2)

    return jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

  assert temp_bytes(4096) < 2.2 * temp_bytes(2048)
