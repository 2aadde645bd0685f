"""Attention against an independent float64 one, the other implementations against plain (kernels in interpret mode): values,
gradients, memory; and who is chosen when."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from cpt_jax.model import attention, blockwise, cudnn, flash, splash, visible


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


attend = jax.jit(attention.attend, static_argnames=("kind", "windows"))


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
  found = attend(q, k, v, segments_BT, kind="plain", windows=() if window is None else (window,))
  np.testing.assert_allclose(found, reference(q, k, v, segments_BT, window=window), rtol=2e-5, atol=2e-6)


def value_and_gradients(q, k, v, segments_BS, *, window, implementation=attention.plain, start=0, **keywords):
  """Output and the gradients of a weighted sum of it."""
  weights = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
  window = k.shape[1] if window is None else window

  def run(q, k, v):
    segments_BT = segments_BS[:, start : start + q.shape[1]]
    out = implementation(q, k, v, segments_BT, segments_BS, start=start, window=window, **keywords)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *gradients


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("row_len", "block"), [(13, 4), (13, 13), (16, 4), (24, 5)])
def test_blockwise_equals_plain_forward_and_backward(row_len, block, window):
  arrays = inputs(row_len=row_len, rows=3, seed=row_len)
  expected = value_and_gradients(*arrays, window=window)
  assert_alike(value_and_gradients(*arrays, window=window, implementation=blockwise.blockwise, block=block), expected)


def assert_alike(found, expected):
  for name, a, b in zip(("out", "d_q", "d_k", "d_v"), found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6, err_msg=name)


SMALL_TILES = flash.Tuning(flash.Tiles(64, 32, 4, 2), flash.Tiles(32, 64, 4, 2), flash.Tiles(64, 32, 4, 2))


@pytest.mark.parametrize(
  ("shape", "start", "window", "tiles"),
  [
    (dict(row_len=256, head_dim=16), 0, None, None),
    (dict(row_len=256, head_dim=16, heads=3, kv_heads=1), 0, 37, SMALL_TILES),
    (dict(row_len=256, head_dim=16), 128, 100, SMALL_TILES),  # queries of the row's second half
  ],
  ids=["packed", "window", "start"],
)
def test_flash_equals_plain_forward_and_backward(shape, start, window, tiles):
  q, k, v, segments_BS = inputs(**shape, seed=5)
  arrays = (q[:, start:], k, v, segments_BS)
  found = value_and_gradients(*arrays, window=window, start=start, implementation=flash.flash, interpret=True, tiles=tiles)
  assert_alike(found, value_and_gradients(*arrays, window=window, start=start))


@hypothesis.given(
  st.integers(0, 10_000), st.sampled_from([0, 32, 64]), st.integers(1, 140), st.sampled_from([(16, 32), (32, 16)])
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_flash_visits_every_pair_that_is_seen_and_masks_every_other(seed, start, window, sizes):
  _, _, _, segments_BS = inputs(row_len=128, seed=seed, heads=1, kv_heads=1)
  segments_BT = segments_BS[:, start:]
  tile = flash.Tiles(*sizes, 4, 2)
  seen_BTS = np.asarray(visible.visible(segments_BT, segments_BS, start + np.arange(128 - start), np.arange(128), window=window))
  blocks_BIPJQ = seen_BTS.reshape(2, -1, tile.q, 128 // tile.k, tile.k)
  some_BIJ, all_BIJ = blocks_BIPJQ.any((2, 4)), blocks_BIPJQ.all((2, 4))
  places = flash._Places(jnp.asarray(segments_BT), jnp.asarray(segments_BS), jnp.asarray([start, window]))
  for ranges, some, whole in (
    (flash.key_ranges(places, tile), some_BIJ, all_BIJ),
    (flash.query_ranges(places, tile), some_BIJ.swapaxes(1, 2), all_BIJ.swapaxes(1, 2)),
  ):
    at = np.arange(some.shape[2])
    low, full_low, full_high, high = np.moveaxis(np.asarray(ranges), -1, 0)[..., None]
    assert (np.diff(ranges, axis=-1) >= 0).all() and (high <= len(at)).all()
    assert not (some & ~((low <= at) & (at < high))).any()
    assert (whole | ~((full_low <= at) & (at < full_high))).all()


@pytest.mark.parametrize("window", [None, 37])
def test_splash_equals_plain_forward_and_backward(window):
  q, k, v, segments_BT = inputs(row_len=256, head_dim=16, seed=6)

  def run(q, k, v, segments_BT, segments_BS, *, start, window):
    return splash.splash(q, k, v, segments_BS, window=window, interpret=True)

  arrays = (q, k, v, segments_BT)
  assert_alike(value_and_gradients(*arrays, window=window, implementation=run), value_and_gradients(*arrays, window=window))


@hypothesis.given(st.integers(0, 10_000), st.integers(0, 3))
def test_cudnn_is_told_where_every_segment_is(seed, more):
  _, _, _, segments_BT = inputs(rows=3, row_len=13, seed=seed, heads=1, kv_heads=1)
  expected = []
  for b, row in enumerate(segments_BT):
    starts = [t for t in range(13) if t == 0 or row[t] != row[t - 1]]
    expected += [(13 * b + t, end - t) for t, end in zip(starts, [*starts[1:], 13], strict=True)]
  lengths, starts = cudnn._packed(jnp.asarray(segments_BT), places=4 + more)
  assert lengths.shape == starts.shape == (3, 4 + more)
  found = list(zip(starts.reshape(-1).tolist(), lengths.reshape(-1).tolist(), strict=True))
  assert found[: len(expected)] == expected
  assert set(found[len(expected) :]) <= {(39, 0)}


def test_this_jax_has_the_cudnn_attention_that_is_called():
  assert cudnn.why_not() == ""


def test_blockwise_stays_finite_and_right_for_large_scores():
  q, k, v, segments_BT = inputs(row_len=12, scale=30.0)
  out, *gradients = value_and_gradients(q, k, v, segments_BT, window=None, implementation=blockwise.blockwise, block=4)
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
  for function in (attention.plain, blockwise.blockwise):
    found = jax.jit(function)(q[:, 8:], k, v, segments_BT[:, 8:], segments_BT, start=8, window=16)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_blockwise_memory_is_linear_in_the_row_length():
  def temp_bytes(row_len):
    q, k, v, _ = inputs(rows=1, row_len=row_len, head_dim=8)
    segments_BT = np.ones((1, row_len), np.int32)

    def run(q, k, v):
      return jnp.sum(blockwise.blockwise(q, k, v, segments_BT, segments_BT, start=0, window=row_len, block=128) ** 2)

    return jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

  assert temp_bytes(4096) < 2.2 * temp_bytes(2048)


GPU = attention.Call("gpu", "bfloat16", 4096, 64, windows=(), max_documents=8, num_elements=2**25, is_whole=True)


@pytest.mark.parametrize(
  ("kind", "call", "chosen"),
  [
    ("auto", GPU, "cudnn"),
    ("auto", GPU._replace(max_documents=200), "flash"),
    ("auto", GPU._replace(max_documents=None), "flash"),
    ("auto", GPU._replace(num_elements=2**31), "flash"),
    ("auto", GPU._replace(num_elements=2**31, max_documents=1), "cudnn"),
    ("auto", GPU._replace(is_whole=False), "flash"),
    ("auto", GPU._replace(windows=(512, 4096)), "flash"),
    ("auto", GPU._replace(windows=(512,)), "cudnn"),
    ("flash", GPU, "flash"),
    ("plain", GPU, "plain"),
    ("auto", GPU._replace(platform="tpu"), "splash"),
    ("auto", GPU._replace(platform="cpu"), "blockwise"),
  ],
)
def test_the_fastest_that_can_run_is_chosen(kind, call, chosen):
  assert attention.choose(kind, call) == chosen


@pytest.mark.parametrize(
  ("kind", "call", "chosen", "words"),
  [
    (
      "cudnn",
      GPU._replace(head_dim=66),
      "blockwise",
      r"cudnn cannot run here: the head size 66.*flash cannot run here: the head size",
    ),
    ("auto", GPU._replace(dtype="float32"), "blockwise", "computes in bfloat16 and model.compute_dtype is float32"),
    ("auto", GPU._replace(row_len=1000, max_documents=100), "blockwise", "data.row_len=1000 is no multiple of 128"),
    ("splash", GPU, "cudnn", "it is for TPUs and this is a GPU"),
    ("flash", GPU._replace(platform="cpu"), "blockwise", "it is for GPUs and this is a CPU"),
  ],
)
def test_an_implementation_that_cannot_run_gives_way_and_says_why_once(kind, call, chosen, words):
  attention._warn.cache_clear()
  with pytest.warns(UserWarning, match=words):
    assert attention.choose(kind, call) == chosen
  assert attention.choose(kind, call) == chosen


def test_layers_may_have_different_windows():
  q, k, v, segments_BT = inputs(row_len=13)
  for index, window in enumerate((3, 7)):
    found = attend(q, k, v, segments_BT, kind="auto", windows=(3, 7), layer_window=index)
    np.testing.assert_allclose(found, reference(q, k, v, segments_BT, window=window), rtol=2e-5, atol=2e-6)


def kernels_run(jaxpr) -> list[str]:
  """Names of the kernels whose results a program reads, those inside of what it calls too; XLA drops the others."""
  names = []
  read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
  for equation in jaxpr.eqns:
    if not read & {id(x) for x in equation.outvars}:
      continue
    if equation.primitive.name == "pallas_call":
      names.append(equation.params["name"] or "")
    elif equation.primitive.name.startswith("dot_product_attention"):
      names.append(equation.primitive.name)
    else:
      names += [name for inner in jaxprs_in_params(equation.params) for name in kernels_run(getattr(inner, "jaxpr", inner))]
  return names


@pytest.mark.parametrize("kind", ["flash", "cudnn", "splash"])
@pytest.mark.parametrize(("kept", "times"), [((visible.KEPT,), 1), ((), 2)])
def test_where_what_was_attended_is_kept_the_backward_pass_does_not_attend_again(kind, kept, times):
  q, k, v, segments_BT = inputs(row_len=256, head_dim=16)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))

  def attended(q, k, v):
    if kind == "flash":
      return flash.flash(q, k, v, segments_BT, segments_BT, start=0, window=256)
    if kind == "cudnn":
      return cudnn.attend(q, k, v, jnp.asarray(segments_BT), window=None, max_documents=3)
    return splash.splash(q, k, v, jnp.asarray(segments_BT), window=None)

  policy = jax.checkpoint_policies.save_only_these_names(*kept)
  layer = jax.checkpoint(lambda *x: jnp.sin(attended(*x)), policy=policy)
  gradient = jax.grad(lambda *x: jnp.sum(layer(*x).astype(jnp.float32)), argnums=(0, 1, 2))
  names = kernels_run(jax.make_jaxpr(gradient)(q, k, v).jaxpr)
  assert len([name for name in names if "forward" in name or "fwd" in name]) == times, names
  assert any("gradients" in name or "bwd" in name or "dkv" in name for name in names), names
