"""The update: accumulation, meshes, padding and the division that is done once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax import mesh as mesh_lib
from cpt_jax import trees
from cpt_jax.data.batch import Batch
from cpt_jax.model import transformer
from cpt_jax.train import optimizer, schedule, state, step

SETTINGS = step.ModelSettings(jnp.dtype("float32"), "none", "plain", 0)
RULES = dict(decay_rules=((".*norm", 0.0), (".*", 1.0)), rate_rules=((".*", 1.0),), layer_rates=(), frozen=())


# A large eps: with a small one Adam turns the rounding of a gradient near zero into a whole step.
def build(spec, *, microbatches=1, z_loss=0.0, clip_norm=1.0, frozen=()):
  rates = schedule.make(
    "rewarm",
    num_steps=10,
    warmup_steps=2,
    lr_peak=1e-2,
    lr_start=0.0,
    lr_const=0.0,
    lr_final=1e-3,
    cooldown_steps=0,
    anneal_steps=0,
    shape="linear",
  )
  params = transformer.init(spec, jax.random.key(0))
  tx = optimizer.make(
    rates, params, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip_norm=clip_norm, **{**RULES, "frozen": frozen}
  )
  update = step.make_train_step(
    spec, tx, rates, settings=SETTINGS, num_sources=2, microbatches=microbatches, z_loss=z_loss, frozen=frozen
  )
  return state.create(params, tx), jax.jit(update), rates


def train(spec, batches, place=lambda b: b, **kwargs):
  now, update, _ = build(spec, **kwargs)
  measured = []
  for batch in batches:
    now, metrics = update(now, place(batch))
    measured.append(jax.device_get(metrics))
  return jax.device_get(now), measured


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


@pytest.mark.parametrize("axes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_every_mesh_trains_as_one_device_does(tiny_spec, random_batch, axes):
  batches = [random_batch(seed, rows=8) for seed in range(2)]
  alone, one = train(tiny_spec, batches)
  mesh = mesh_lib.make_mesh(**dict(zip(mesh_lib.AXES, axes, strict=True)))
  with jax.set_mesh(mesh):
    spread, eight = train(tiny_spec, batches, place=lambda b: mesh_lib.to_global(mesh, b))
  assert_close(spread.params, alone.params, rtol=1e-4, atol=1e-5)
  assert_close(eight, one, rtol=1e-4, atol=1e-5)


def test_accumulation_on_a_mesh(tiny_spec, random_batch):
  batches = [random_batch(3, rows=16)]
  alone, _ = train(tiny_spec, batches)
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, context=1, tensor=2)
  with jax.set_mesh(mesh):
    spread, _ = train(tiny_spec, batches, place=lambda b: mesh_lib.to_global(mesh, b), microbatches=2)
  assert_close(spread.params, alone.params, rtol=1e-4, atol=1e-5)


def test_rows_of_padding_change_nothing(tiny_spec, random_batch):
  batch = random_batch(5, rows=6)
  short, measured = train(tiny_spec, [batch])
  padding = [np.zeros((2, *x.shape[1:]), x.dtype) for x in batch]
  filled = Batch(*(np.concatenate(both) for both in zip(batch, padding, strict=True)))
  padded, measured_padded = train(tiny_spec, [filled])
  assert_close(padded.params, short.params)
  assert_close(measured_padded, measured)


def test_source_sums_add_up_to_the_whole(tiny_spec, random_batch):
  _, [metrics] = train(tiny_spec, [random_batch(7)])
  np.testing.assert_allclose(metrics.sums.source_loss_M.sum(), metrics.sums.loss, rtol=1e-6)
  assert metrics.sums.source_tokens_M.sum() == metrics.sums.tokens


def test_the_reported_rate_is_the_one_that_moved_the_parameters(tiny_spec, random_batch):
  # With a gradient of zero AdamW's update is rate * decay * parameter, so the rate can be read off the change.
  now, update, rates = build(tiny_spec)
  empty = random_batch(0)._replace(weights_BT=np.zeros((8, 16), np.float32))
  for count in range(4):
    before = np.asarray(now.params["embedding"], np.float64)
    now, metrics = update(now, empty)
    moved = 1 - np.asarray(now.params["embedding"], np.float64).ravel() @ before.ravel() / (before.ravel() @ before.ravel())
    assert float(metrics.rate) == float(rates(count))
    np.testing.assert_allclose(moved / 0.1, float(metrics.rate), rtol=1e-3)


def test_a_batch_without_targets_gives_finite_numbers(tiny_spec, random_batch):
  empty = random_batch(0)._replace(weights_BT=np.zeros((8, 16), np.float32), segments_BT=np.zeros((8, 16), np.int32))
  now, [metrics] = train(tiny_spec, [empty])
  assert metrics.sums.tokens == 0 and metrics.grad_norm == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(now))


def test_a_few_steps_learn_one_batch(tiny_spec, random_batch):
  _, measured = train(tiny_spec, [random_batch(1)] * 10)
  assert measured[-1].sums.loss < 0.8 * measured[0].sums.loss


def test_the_abstract_state_is_the_real_one(tiny_spec):
  mesh = mesh_lib.make_mesh(data=1, fsdp=4, context=1, tensor=2)
  with jax.set_mesh(mesh):
    now, _, rates = build(tiny_spec)
    tx = optimizer.make(rates, now.params, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip_norm=1.0, **RULES)
    planned = state.abstract(tiny_spec, tx)
  assert not trees.diff(now, planned)
  for (path, leaf), wanted in zip(trees.paths(now).items(), jax.tree.leaves(planned), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), path


def test_the_step_compiles_once(tiny_spec, random_batch):
  now, update, _ = build(tiny_spec)
  for seed in range(3):
    now, _ = update(now, Batch(*map(jnp.asarray, random_batch(seed))))
  assert update._cache_size() == 1


def test_frozen_leaves_stay_and_do_not_count_in_the_gradient_norm(tiny_spec, random_batch):
  before = transformer.init(tiny_spec, jax.random.key(0))
  frozen, [metrics] = train(tiny_spec, [random_batch(2)], frozen=("embedding", r"layers\.w[qkv]"))
  _, [whole] = train(tiny_spec, [random_batch(2)])
  for path in ("embedding", "layers.wq", "layers.wk", "layers.wv"):
    np.testing.assert_array_equal(trees.paths(frozen.params)[path], trees.paths(before)[path])
  assert not np.array_equal(frozen.params["layers"]["w_up"], before["layers"]["w_up"])
  assert 0 < metrics.grad_norm < whole.grad_norm
