"""Checkpoints: whole, strict, and kept by the rules asked for."""

import os
import threading

import factory
import jax
import numpy as np
import pytest

from cpt_jax import config as config_lib, trees
from cpt_jax.config import ConfigError
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import spec as spec_lib, transformer
from cpt_jax.training import checkpoint, state
from cpt_jax.training.perplexity import SourceLoss

RULES = dict(decay_rules=((".*", 1.0),), rate_rules=((".*", 1.0),), layer_rates=(), frozen=())


def make_tx(params, mu_dtype="float32"):
  return factory.optimizer(params, b1=0.9, b2=0.95, eps=1e-8, mu_dtype=mu_dtype, weight_decay=0.1, clip_norm=1.0, **RULES)


def make_state(spec, *, step=0, mu_dtype="float32"):
  params = transformer.init(spec, jax.random.key(step))
  return state.create(params, make_tx(params, mu_dtype))._replace(step=jax.numpy.int32(step))


def loss(value):
  return {"domain": SourceLoss(value, 1.0, 1, 1, 1)}


def assert_equal(found, expected):
  assert not trees.diff(found, expected)
  for (path, a), b in zip(trees.paths(found).items(), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=path)


def test_what_is_restored_is_what_was_saved_on_any_mesh(tiny_spec, tmp_path):
  checkpoints = factory.checkpoints(tmp_path, keep_last=9)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=4, context=1, tensor=2)):
    saved = make_state(tiny_spec, step=3)
    checkpoints.save(saved, 3, meta={"loader": {"next_row": 12}}, losses={})
    checkpoints.wait()
  with jax.set_mesh(mesh_lib.make_mesh(data=2, fsdp=2, context=1, tensor=1, devices=jax.devices()[:4])):
    wanted = state.abstract(tiny_spec, make_tx(saved.params))
    restored = checkpoints.restore(3, wanted)
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True))
  assert_equal(jax.device_get(restored), jax.device_get(saved))
  assert checkpoints.meta(3)["loader"] == {"next_row": 12}
  checkpoints.close()


def test_bfloat16_moments_come_back_bit_for_bit_and_are_not_taken_for_float32(tiny_spec, tmp_path):
  checkpoints = factory.checkpoints(tmp_path, keep_last=9)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    saved = make_state(tiny_spec, mu_dtype="bfloat16")
    tx = make_tx(saved.params, "bfloat16")
    _, opt_state = jax.jit(tx.update)(saved.params, saved.opt_state, saved.params, rate=0.1)
    saved = saved._replace(opt_state=opt_state)
    checkpoints.save(saved, 0, meta={}, losses={})
    checkpoints.wait()
    assert_equal(jax.device_get(checkpoints.restore(0, state.abstract(tiny_spec, tx))), jax.device_get(saved))
    with pytest.raises(ConfigError, match=r"mu\.embedding: found bfloat16.*, expected float32") as error:
      checkpoints.restore(0, state.abstract(tiny_spec, make_tx(saved.params)))
    assert "optimizer.mu_dtype" in str(error.value)
  checkpoints.close()


def test_a_thousand_saves_hold_no_more_threads_and_files_than_one(tiny_spec, tmp_path):
  checkpoints = factory.checkpoints(tmp_path, keep_last=1)
  held = []
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    saved = make_state(tiny_spec)
    for step in range(6):
      checkpoints.save(saved, step, meta={}, losses={})
      checkpoints.wait()
      held.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
  checkpoints.close()
  assert held[-1] <= held[2], held


def test_saving_does_not_see_what_happens_to_the_state_afterwards(tiny_spec, tmp_path):
  # The step donates its state; the writer must have its own copy by then.
  checkpoints = factory.checkpoints(tmp_path, keep_last=9)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    saved = make_state(tiny_spec)
    before = jax.device_get(saved)
    checkpoints.save(saved, 0, meta={}, losses={})
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(saved))
    checkpoints.wait()
    restored = checkpoints.restore(0, state.abstract(tiny_spec, make_tx(before.params)))
  assert_equal(jax.device_get(restored), before)
  checkpoints.close()


def test_a_checkpoint_of_another_model_is_refused_with_every_leaf_that_differs(tiny_spec, tiny_hf_config, tmp_path):
  other = spec_lib.from_hf({**tiny_hf_config, "intermediate_size": 96, "tie_word_embeddings": False})
  checkpoints = factory.checkpoints(tmp_path, keep_last=9)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    checkpoints.save(make_state(tiny_spec), 0, meta={}, losses={})
    checkpoints.wait()
    with pytest.raises(ConfigError) as error:
      checkpoints.restore(0, state.abstract(other, make_tx(transformer.abstract_params(other))))
    with pytest.raises(ConfigError, match=r"missing: params\.head"):
      checkpoints.restore_params(0, transformer.abstract_params(other))
  checkpoints.close()
  text = str(error.value)
  assert "missing: params.head" in text and "float32[2, 32, 64], expected float32[2, 32, 96]" in text


def test_a_state_of_an_older_form_is_refused_with_the_way_out(tiny_spec, tmp_path):
  checkpoints = factory.checkpoints(tmp_path, keep_last=9)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    now = make_state(tiny_spec)
    checkpoints.save(now._replace(opt_state=(now.opt_state,)), 0, meta={}, losses={})
    checkpoints.wait()
    with pytest.raises(ConfigError, match=r"extra: opt_state.0.mu.embedding\n(.*\n)*.*start.weights goes on with its parameters"):
      checkpoints.restore(0, state.abstract(tiny_spec, make_tx(now.params)))
  checkpoints.close()


@pytest.mark.parametrize(
  "rules, kept",
  [
    (dict(keep_last=2), [4, 5]),
    (dict(keep_last=1, keep_every_steps=2), [0, 2, 4, 5]),
    (dict(keep_last=1, best_metric="eval/domain/loss"), [2, 5]),
  ],
)
def test_old_checkpoints_are_kept_by_the_rules(tiny_spec, tmp_path, rules, kept):
  checkpoints = factory.checkpoints(tmp_path, **rules)
  small = state.TrainState(jax.numpy.int32(0), {"w": jax.numpy.ones(3)}, ())
  for step, value in enumerate([3.0, 2.0, 1.0, 2.0, 3.0, 4.0]):
    checkpoints.save(small, step, meta={}, losses=loss(value))
  checkpoints.wait()
  assert checkpoints.steps() == kept
  checkpoints.close()


def test_parameters_alone_can_be_loaded_by_step(tiny_spec, tiny_hf_config, tmp_path):
  checkpoints = factory.checkpoints(tmp_path, keep_last=5)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=2, context=1, tensor=1, devices=jax.devices()[:2])):
    for step in (3, 6):
      checkpoints.save(make_state(tiny_spec, step=step), step, meta={"hf_config": tiny_hf_config}, losses={})
    checkpoints.close()
    with pytest.raises(ConfigError, match="not a run"):
      checkpoint.load_params(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    params, spec, step = checkpoint.load_params(tmp_path)
    assert step == 6 and spec == tiny_spec
    assert_equal(jax.device_get(params), jax.device_get(make_state(tiny_spec, step=6).params))
    with pytest.raises(ConfigError, match="it has 3, 6"):
      checkpoint.load_params(tmp_path, step=4)


def test_keys_that_change_no_number_may_change_between_starts():
  config = config_lib.default().to_dict()
  free = {**config, "log": {"every": 7, "tensorboard": True}, "mesh": {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}}
  checkpoint.check_same_run(config, free)
  with pytest.raises(ConfigError, match=r"eval\.tokens"):  # the base was measured on other documents
    checkpoint.check_same_run(config, {**config, "eval": {**config["eval"], "tokens": 7}})
  for group, name in (("optimizer", "mu_dtype"), ("train", "accumulate_dtype")):
    with pytest.raises(ConfigError, match=rf'{group}\.{name}: "float32" -> "bfloat16"'):
      checkpoint.check_same_run(config, {**config, group: {**config[group], name: "bfloat16"}})
  with pytest.raises(ConfigError, match="seed: 0 -> 1"):
    checkpoint.check_same_run(config, {**config, "seed": 1})
  older = {**config, "eval": {key: value for key, value in config["eval"].items() if key != "tokens"}}
  checkpoint.check_same_run(older, config)  # a key that came later had the value that is its default now
  with pytest.raises(ConfigError, match=r"eval.tokens: 100000 -> 7"):
    checkpoint.check_same_run(older, {**config, "eval": {**config["eval"], "tokens": 7}})
