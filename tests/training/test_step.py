"""The update: accumulation, meshes, padding, the sources' weights and the division that is done once."""

import dataclasses
import functools
import math

import factory
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import RULES, SETTINGS, build

from cpt_jax import trees
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.stream.batch import Batch
from cpt_jax.training import state, step


def train(spec, batches, place=lambda b: b, **kwargs):
  now, update, rates = build(spec, **kwargs)
  measured = []
  for batch in batches:
    now, metrics = update(now, place(batch), rates(int(now.step)))
    measured.append(jax.device_get(metrics))
  return jax.device_get(now), measured


@functools.cache
def compiled_gradient(spec, **options):
  """(optimizer that keeps the newest gradient, the jitted step)."""
  tx = optax.trace(0.0)
  return tx, jax.jit(factory.train_step(spec, tx, **options))


def gradient(spec, batch, *, params=None, **changes):
  """What the optimizer is given for one batch, and what the step measured."""
  options = dict(settings=SETTINGS, source_weights=(1.0, 1.0), microbatches=1, z_loss=1e-2)
  tx, update = compiled_gradient(spec, **(options | changes))
  now = state.create(transformer.init(spec, jax.random.key(0)) if params is None else params, tx)
  now, metrics = update(now, batch, 1.0)
  return jax.device_get(now.opt_state.trace), jax.device_get(metrics)


def masked(batch, seed=0):
  """With a loss mask that leaves the sources uneven numbers of tokens, and a row without any."""
  random = np.random.default_rng(seed)
  kept_BT = random.random(batch.weights_BT.shape) < np.where(batch.source_B, 0.3, 0.8)[:, None]
  kept_BT[1] = False
  return batch._replace(weights_BT=batch.weights_BT * kept_BT.astype(np.float32))


def only(batch, source):
  """The batch with the rows of one source in the loss."""
  return batch._replace(weights_BT=batch.weights_BT * (batch.source_B == source).astype(np.float32)[:, None])


def assert_close(found, expected, *, rtol=2e-5, atol=2e-6):
  for (path, a), b in zip(trees.paths(found).items(), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


def test_accumulation_equals_the_big_batch_even_when_parts_hold_unequal_tokens(tiny_spec, random_batch):
  batches = [random_batch(seed) for seed in range(3)]
  for batch in batches:
    batch.weights_BT[0] = 0.0  # a row without a single target: a mean of means would be wrong
  whole, one = train(tiny_spec, batches, z_loss=1e-2)
  parts, four = train(tiny_spec, batches, z_loss=1e-2, microbatches=4)
  assert_close(parts.params, whole.params)
  assert_close(four, one)


# Grouped queries, and heads that 8 devices divide.
MESH_SPEC = ModelSpec(
  "qwen3", 64, 16, 2, 16, 8, 2, 24, max_positions=64, qk_norm=True, qkv_bias=True, windows=(0, 5), init_std=0.3
)
ALONE = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8)]
MIXED = [(2, 4, 1, 1), (4, 1, 2, 1), (2, 1, 1, 4), (1, 2, 4, 1), (1, 4, 1, 2), (1, 1, 2, 4)]
MIXED += [(2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 2, 2), (1, 2, 2, 2)]


@pytest.fixture(scope="module")
def two_updates(random_batch):
  """Parameters and batches, and what two updates of two microbatches each make of them on one device."""
  batches = [masked(random_batch(seed, rows=16, vocab_size=64), seed) for seed in range(2)]
  params = transformer.init(MESH_SPEC, jax.random.key(0))
  return params, batches, train(MESH_SPEC, batches, params=params, microbatches=2, z_loss=1e-2)


@pytest.mark.parametrize("axes", [*ALONE, *(pytest.param(axes, marks=pytest.mark.slow) for axes in MIXED)], ids=str)
def test_every_mesh_trains_as_one_device_does(two_updates, axes):
  params, batches, expected = two_updates
  mesh = mesh_lib.make_mesh(**dict(zip(mesh_lib.AXES, axes, strict=True)))
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, transformer.abstract_params(MESH_SPEC))
    found = train(MESH_SPEC, batches, place=lambda b: mesh_lib.to_global(mesh, b), params=params, microbatches=2, z_loss=1e-2)
  # Parameters, both moments, counts; and of each update the sums per source, the norm and the rate.
  assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_moments_and_sums_train_as_float32_does_within_half_a_percent(tiny_spec, random_batch):
  batches = [random_batch(seed % 3) for seed in range(30)]  # three batches, learnt by heart
  _, full = train(tiny_spec, batches, microbatches=4)
  now, half = train(tiny_spec, batches, microbatches=4, mu_dtype="bfloat16", sums="bfloat16")
  full, half = (np.array([m.sums.loss_M.sum() / m.sums.tokens_M.sum() for m in each]) for each in (full, half))
  assert full[-1] < 0.97 * full[0]
  np.testing.assert_allclose(half, full, rtol=5e-3)
  assert (half != full).any() and {str(x.dtype) for x in jax.tree.leaves(now.params)} == {"float32"}


def test_rows_of_padding_change_nothing(tiny_spec, random_batch):
  batch = random_batch(5, rows=6)
  short, measured = train(tiny_spec, [batch])
  padding = [np.zeros((2, *x.shape[1:]), x.dtype) for x in batch]
  filled = Batch(*(np.concatenate(both) for both in zip(batch, padding, strict=True)))
  padded, measured_padded = train(tiny_spec, [filled])
  assert_close(padded.params, short.params)
  assert_close(measured_padded, measured)


def test_the_objective_and_its_division_equal_the_float64_reference(tiny_spec, random_batch):
  # Of the whole gradient the output head's can be had from the hidden states alone, by numpy.
  weights_M, z_weight = np.array([0.3, 2.0]), 0.1
  spec, batch = dataclasses.replace(tiny_spec, tied=False), masked(random_batch(11))
  params = transformer.init(spec, jax.random.key(3))
  hidden_BTD = factory.hidden(
    params, spec, batch.tokens_BT, batch.positions_BT, batch.segments_BT, compute_dtype=jnp.float32, attention="plain"
  )
  hidden_BTD, head_DV = (np.asarray(x, np.float64) for x in (hidden_BTD, params["head"]))
  logits_BTV = hidden_BTD @ head_DV
  log_partition_BT = np.log(np.exp(logits_BTV).sum(-1))
  is_target_BTV = np.arange(spec.vocab_size) == batch.targets_BT[..., None]
  nll_BT = log_partition_BT - (logits_BTV * is_target_BTV).sum(-1)
  probs_BTV = np.exp(logits_BTV - log_partition_BT[..., None])
  d_logits_BTV = probs_BTV * (1 + 2 * z_weight * log_partition_BT[..., None]) - is_target_BTV
  weights_BT = weights_M[batch.source_B][:, None] * batch.weights_BT
  expected_DV = np.einsum("BT,BTD,BTV->DV", weights_BT, hidden_BTD, d_logits_BTV) / weights_BT.sum()

  found, metrics = gradient(
    spec,
    batch,
    params=params,
    settings=SETTINGS._replace(loss_chunk=5),
    source_weights=tuple(weights_M),
    microbatches=2,
    z_loss=z_weight,
  )
  np.testing.assert_allclose(found["head"], expected_DV, rtol=1e-5, atol=1e-6 * np.abs(expected_DV).max())
  for m, (loss_sum, num_tokens) in enumerate(zip(metrics.sums.loss_M, metrics.sums.tokens_M, strict=True)):
    is_counted_BT = only(batch, m).weights_BT > 0
    assert num_tokens == is_counted_BT.sum() > 0
    np.testing.assert_allclose(loss_sum, nll_BT[is_counted_BT].sum(), rtol=1e-5)  # without the source's weight


def test_the_whole_gradient_is_that_of_each_source_by_its_weight_and_its_tokens(tiny_spec, random_batch):
  batch = masked(random_batch(12))
  found, metrics = gradient(tiny_spec, batch, source_weights=(0.25, 3.0))
  of_source = [gradient(tiny_spec, only(batch, m))[0] for m in range(2)]
  parts_M = np.array([0.25, 3.0]) * metrics.sums.tokens_M
  parts_M /= parts_M.sum()
  assert_close(found, jax.tree.map(lambda a, b: parts_M[0] * a + parts_M[1] * b, *of_source))


def test_equal_weights_are_the_mean_over_all_tokens(tiny_spec, random_batch):
  batch = masked(random_batch(13))

  @jax.grad
  def mean(params):
    hidden_BTD = step.hidden_states(params, batch, tiny_spec, settings=SETTINGS)
    logits_BTV = transformer.logits(params, tiny_spec, hidden_BTD)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
    terms_BT = nll_BT + 1e-2 * jnp.square(jax.nn.logsumexp(logits_BTV, axis=-1))
    return jnp.sum(batch.weights_BT * terms_BT) / batch.weights_BT.sum()

  found, _ = gradient(tiny_spec, batch)
  assert_close(found, jax.device_get(jax.jit(mean)(transformer.init(tiny_spec, jax.random.key(0)))), atol=1e-7)


def test_a_factor_of_all_weights_changes_nothing(tiny_spec, random_batch):
  batch = masked(random_batch(14))
  found, metrics = gradient(tiny_spec, batch, source_weights=(0.3, 2.0))
  for factor in (1e-30, 1e300):
    again = gradient(tiny_spec, batch, source_weights=(0.3 * factor, 2.0 * factor))
    jax.tree.map(np.testing.assert_array_equal, again, (found, metrics))


def test_a_source_of_weight_zero_is_measured_and_pulls_nothing(tiny_spec, random_batch):
  batch = masked(random_batch(15))
  found, metrics = gradient(tiny_spec, batch, source_weights=(0.0, 0.1))
  without, _ = gradient(tiny_spec, only(batch, 1))
  _, whole = gradient(tiny_spec, batch)
  assert_close(found, without, atol=1e-7)
  assert_close(metrics.sums, whole.sums, rtol=1e-6)
  assert (metrics.sums.tokens_M > 0).all()
  nothing, metrics = gradient(tiny_spec, only(batch, 0), source_weights=(0.0, 0.1))
  assert not any(leaf.any() for leaf in jax.tree.leaves(nothing)) and metrics.grad_norm == 0 and metrics.sums.loss > 0


def test_few_tokens_of_a_small_weight_are_divided_by_all_the_same(tiny_spec, random_batch):
  # The weighted number of tokens may lie far below 1.
  batch = only(random_batch(16), 1)
  found, _ = gradient(tiny_spec, batch, source_weights=(1.0, 1e-6))
  expected, _ = gradient(tiny_spec, batch)
  assert_close(found, expected)


@pytest.mark.parametrize(
  "weights", [(0.0, 0.0), (), (1.0, -1.0), (-1.0, -1.0), (1.0, np.nan), (np.inf, 1.0), (1.0, 1e-13)], ids=str
)
def test_weights_that_make_no_objective_are_refused(tiny_spec, weights):
  with pytest.raises(ValueError, match=r"source_weights=.*one of them more than 0"):
    gradient(tiny_spec, None, source_weights=weights)


def test_a_batch_that_cannot_be_counted_is_refused(tiny_spec):
  tx = optax.identity()
  update = factory.train_step(tiny_spec, tx, settings=SETTINGS, source_weights=(1.0,), microbatches=1, z_loss=0.0)
  arrays = [jax.ShapeDtypeStruct((2**15, 2**16), np.dtype(np.int32))] * 5
  with pytest.raises(ValueError, match=r"train.batch_rows x data.row_len = \(32768, 65536\)"):
    jax.eval_shape(update, None, Batch(*arrays, jax.ShapeDtypeStruct((2**15,), np.dtype(np.int32))), 1.0)


UNEVEN = (0.25, 3.0)


@pytest.fixture(scope="module")
def on_one_device(tiny_spec, random_batch):
  batch = masked(random_batch(17, rows=16))
  return batch, *gradient(tiny_spec, batch, source_weights=UNEVEN)


@pytest.mark.parametrize(
  ("axes", "microbatches"),
  [((1, 1, 1, 1), 4), ((1, 1, 4, 2), 4)]
  + [pytest.param(*case, marks=pytest.mark.slow) for case in (((8, 1, 1, 1), 2), ((1, 8, 1, 1), 1), ((2, 2, 1, 2), 2))],
  ids=str,
)
def test_uneven_weights_give_the_gradient_of_one_device_on_every_mesh_and_by_parts(tiny_spec, on_one_device, axes, microbatches):
  batch, expected, one = on_one_device
  mesh = mesh_lib.make_mesh(**dict(zip(mesh_lib.AXES, axes, strict=True)), devices=jax.devices()[: math.prod(axes)])
  with jax.set_mesh(mesh):
    found, many = gradient(tiny_spec, mesh_lib.to_global(mesh, batch), source_weights=UNEVEN, microbatches=microbatches)
  assert_close(found, expected, rtol=1e-4, atol=1e-7)
  assert_close(many, one, rtol=1e-5)
  np.testing.assert_array_equal(many.sums.tokens_M, one.sums.tokens_M)


def test_the_reported_rate_is_the_one_that_moved_the_parameters(tiny_spec, random_batch):
  # With a gradient of zero AdamW's update is rate * decay * parameter, so the rate can be read off the change.
  now, update, rates = build(tiny_spec)
  empty = random_batch(0)._replace(weights_BT=np.zeros((8, 16), np.float32))
  for count in range(4):
    before = np.asarray(now.params["embedding"], np.float64)
    now, metrics = update(now, empty, rates(count))
    moved = 1 - np.asarray(now.params["embedding"], np.float64).ravel() @ before.ravel() / (before.ravel() @ before.ravel())
    assert float(metrics.rate) == float(rates(count))
    np.testing.assert_allclose(moved / 0.1, float(metrics.rate), rtol=1e-3)


def test_a_batch_without_targets_gives_finite_numbers(tiny_spec, random_batch):
  empty = random_batch(0)._replace(weights_BT=np.zeros((8, 16), np.float32), segments_BT=np.zeros((8, 16), np.int32))
  now, [metrics] = train(tiny_spec, [empty])
  assert metrics.sums.tokens == 0 and metrics.grad_norm == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(now))


def test_the_abstract_state_is_the_real_one(tiny_spec):
  mesh = mesh_lib.make_mesh(data=1, fsdp=4, context=1, tensor=2)
  with jax.set_mesh(mesh):
    now, _, _ = build(tiny_spec)
    tx = factory.optimizer(now.params, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip_norm=1.0, **RULES)
    planned = state.abstract(tiny_spec, tx)
  assert not trees.diff(now, planned)
  for (path, leaf), wanted in zip(trees.paths(now).items(), jax.tree.leaves(planned), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), path


def test_frozen_leaves_stay_and_do_not_count_in_the_gradient_norm(tiny_spec, random_batch):
  before = transformer.init(tiny_spec, jax.random.key(0))
  frozen, [metrics] = train(tiny_spec, [random_batch(2)], frozen=("embedding", r"layers\.w[qkv]"))
  _, [whole] = train(tiny_spec, [random_batch(2)])
  for path in ("embedding", "layers.wq", "layers.wk", "layers.wv"):
    np.testing.assert_array_equal(trees.paths(frozen.params)[path], trees.paths(before)[path])
  assert not np.array_equal(frozen.params["layers"]["w_up"], before["layers"]["w_up"])
  assert 0 < metrics.grad_norm < whole.grad_norm
