"""train.stages: what rests keeps every bit, its moments too; schedules one after the other; borders, growth and mistakes."""

import collections
import copy
import functools
import json
import pathlib

import factory
import hypothesis
import hypothesis.strategies as st
import in_process
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nests import nest
from orbax.checkpoint import v1 as ocp

from cpt_jax import config as config_lib, exits, journal, trees
from cpt_jax.config import ConfigError
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import expansion, pretrained, spec as spec_lib, transformer
from cpt_jax.preview import dry_run
from cpt_jax.training import inputs as inputs_lib, loop, optimizer, schedule, start, state
from cpt_jax.vocab import initialise
from cpt_jax.vocab.initialise import OldRows, replaced
from tools.bench import bench_endurance

ROWS = range(5, 7)  # of the table's 8; the last is padding
SHAPES = {"embedding": (8, 4), "layers.attn_norm": (3, 4), "layers.wq": (3, 4, 2, 2), "final_norm": (4,), "head": (4, 8)}
RULES = {"decay_rules": ((r".*norm", 0.0), (r".*", 1.0)), "rate_rules": ((r"embedding", 0.5), (r".*", 1.0)), "layer_rates": ()}
THREE = ("new_rows", ("head:new", "layers.*", "embedding"), "all")  # the table of inputs before that of outputs is whole


def random_tree(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  return nest({path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()})


def trained_mask(what, path):
  """Which elements of a leaf a stage of THREE trains, by hand."""
  is_new = np.isin(np.arange(8), ROWS)
  new = {"embedding": is_new[:, None], "head": is_new[None]}
  if what == "all" or (what != "new_rows" and (path.startswith("layers") or path == "embedding")):
    return np.ones(SHAPES[path], bool)
  if path in new:
    return np.broadcast_to(new[path], SHAPES[path])
  return np.zeros(SHAPES[path], bool)


# ---- the update ----


@functools.cache
def three_stages(mu_dtype):
  """The beginning, and the update of each stage of THREE."""
  numbers = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, clip_norm=0.7)
  made = [
    factory.optimizer(random_tree(0), **numbers, **RULES, mu_dtype=mu_dtype, stages=THREE, stage=i, new_rows=ROWS)
    for i in range(3)
  ]
  return made[0].init, [jax.jit(one.update) for one in made]


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
@hypothesis.given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 2**20))
@hypothesis.settings(max_examples=6)
def test_each_element_follows_adamw_by_the_updates_that_it_had(mu_dtype, order, seed):
  """Float64, element by element, whatever the order of the stages."""
  params = random_tree(seed)
  init, update = three_stages(mu_dtype)
  state_now, now = init(params), params
  p = {path: leaf.astype(np.float64) for path, leaf in trees.paths(params).items()}
  m, v, n = ({path: np.zeros(leaf.shape) for path, leaf in p.items()} for _ in range(3))
  for i, stage in enumerate(order):
    grads = random_tree(seed + 1 + i)
    for path, g in trees.paths(grads).items():  # what must not reach anything
      g[~trained_mask(THREE[stage], path)] = np.nan
    before = now
    updates, state_now = update[stage](grads, state_now, now, rate=0.05)
    now = optax.apply_updates(now, updates)
    g = {
      path: np.where(trained_mask(THREE[stage], path), leaf, 0.0).astype(np.float64) for path, leaf in trees.paths(grads).items()
    }
    shrink = min(1.0, 0.7 / np.sqrt(sum((leaf**2).sum() for leaf in g.values())))
    for path, leaf in g.items():
      on = trained_mask(THREE[stage], path)
      n[path] += on
      m_new = 0.9 * m[path] + 0.1 * shrink * leaf
      v[path] = np.where(on, 0.95 * v[path] + 0.05 * (shrink * leaf) ** 2, v[path])
      with np.errstate(invalid="ignore"):
        move = (m_new / (1 - 0.9 ** n[path])) / (np.sqrt(v[path] / (1 - 0.95 ** n[path])) + 1e-8)
      decay, rate = 0.0 if "norm" in path else 0.3, 0.5 if path == "embedding" else 1.0
      p[path] = np.where(on, p[path] - 0.05 * rate * (move + decay * p[path]), p[path])
      kept = m_new if mu_dtype == "float32" else m_new.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
      m[path] = np.where(on, kept, m[path])
      found, was = np.asarray(trees.paths(now)[path]), np.asarray(trees.paths(before)[path])
      np.testing.assert_array_equal(found.view(np.int32)[~on], was.view(np.int32)[~on], err_msg=path)
  rtol = 2e-5 if mu_dtype == "float32" else 2e-2
  for path, leaf in trees.paths(now).items():
    np.testing.assert_allclose(leaf, p[path], rtol=rtol, atol=rtol, err_msg=path)
    np.testing.assert_allclose(np.asarray(state_now.mu[path], np.float64), m[path], rtol=1e-2, atol=1e-3, err_msg=path)
    np.testing.assert_allclose(state_now.nu[path], v[path], rtol=2e-5, atol=1e-7, err_msg=path)
  for path, dim in {"embedding": 0, "head": 1}.items():
    np.testing.assert_array_equal(state_now.count[path], np.take(n[path], 0, axis=1 - dim))


def test_what_no_stage_trains_is_frozen_and_frozen_wins():
  leaves = optimizer.apply_rules(random_tree(0), **RULES, frozen=("layers.wq",), stages=("embeddings", ("layers.*",)), stage=0)
  found = {path: (leaf.trains.name, leaf.is_frozen) for path, leaf in leaves.items()}
  assert found == {
    "embedding": ("ALL", False),
    "head": ("ALL", False),
    "layers.attn_norm": ("NOTHING", False),
    "layers.wq": ("NOTHING", True),
    "final_norm": ("NOTHING", True),
  }
  kept = factory.optimizer(random_tree(0), **RULES, frozen=("layers.wq",), stages=("embeddings", ("layers.*",))).init(
    random_tree(0)
  )
  assert set(kept.mu) == {"embedding", "head", "layers.attn_norm"}


@pytest.mark.parametrize(
  ("stages", "more", "message"),
  [
    (("new_rows",), {"new_rows": None}, r"train.stages\[0\] trains the rows of new pieces, but the model has none"),
    ((("layers.wq:new",),), {}, "layers.wq has no rows of pieces; only embedding and head have"),
    (("all", ("layer.wq",)), {}, r"train.stages\[1\]: 'layer.wq' matches the whole path of no parameter. Did you mean layers.wq"),
    (
      ("embeddings",),
      {"frozen": ("embedding", "head")},
      r"train.stages\[0\]='embeddings': all that it trains is in optimizer.frozen",
    ),
  ],
)
def test_stages_that_train_nothing_are_refused(stages, more, message):
  with pytest.raises(ConfigError, match=message):
    factory.optimizer(random_tree(0), **RULES, stages=stages, **{"new_rows": ROWS, **more})


@pytest.fixture(scope="module")
def grown_spec(tiny_hf_config):
  return spec_lib.from_hf(tiny_hf_config | {"true_vocab_size": 300, "base_vocab_size": 280, "tie_word_embeddings": False})


def steps_of(spec):
  """The state at the beginning, and the step of each stage."""
  stages = ("new_rows", "embeddings", "all")
  make = functools.partial(
    dict, decay_rules=((".*", 1.0),), rate_rules=((".*", 1.0),), layer_rates=(), frozen=(), stages=stages, new_rows=spec.new_rows
  )
  settings = factory.SETTINGS._replace(attention="plain")
  params = transformer.init(spec, jax.random.key(0))
  tx = [factory.optimizer(params, **make(), stage=i, eps=1e-3) for i in range(3)]
  leaves = [optimizer.apply_rules(params, **make(), stage=i) for i in range(3)]
  steps = [
    jax.jit(
      factory.train_step(
        spec,
        tx[i],
        settings=settings,
        source_weights=(1.0, 1.0),
        microbatches=2,
        z_loss=0.0,
        hold=functools.partial(optimizer.hold, leaves=leaves[i], new_rows=spec.new_rows),
      )
    )
    for i in range(3)
  ]
  return state.create(params, tx[0]), steps


def updates_of(begin, steps, batches, place=lambda b: b, *, order):
  """The state after each step of the stages in `order`, and what norm its gradient had."""
  now, found, norms = begin, [], []
  for stage, batch in zip(order, batches, strict=True):
    now, metrics = steps[stage](now, place(batch), 1e-2)
    found.append(jax.device_get(now))
    norms.append(float(metrics.grad_norm))
  return found, norms


def test_a_step_trains_its_stage_alone_and_every_mesh_agrees(grown_spec, random_batch):
  batches = [random_batch(seed, vocab_size=300) for seed in range(3)]
  before = trees.paths(jax.device_get(transformer.init(grown_spec, jax.random.key(0))))
  begin, steps = steps_of(grown_spec)
  found, norms = updates_of(begin, steps, batches, order=(0, 1, 2))
  tables, whole = (updates_of(begin, steps, batches[:1], order=(stage,))[1][0] for stage in (1, 2))
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, context=1, tensor=2)
  with jax.set_mesh(mesh):
    place = functools.partial(mesh_lib.to_global, mesh)
    divided, divided_norms = updates_of(*steps_of(grown_spec), batches[:1], place, order=(0,))
  first, second, third = (trees.paths(now.params) for now in found)
  is_new = np.zeros(320, bool)
  is_new[280:300] = True
  for path in before:
    changed = first[path] != before[path]
    if path in ("embedding", "head"):
      by_row = (changed if path == "embedding" else changed.T).any(axis=1)
      np.testing.assert_array_equal(by_row[~is_new], False)
      assert by_row[is_new].all(), path
      assert ((second[path] != first[path]) if path == "embedding" else (second[path] != first[path]).T)[:280].any()
    else:
      assert not changed.any() and not (second[path] != first[path]).any() and (third[path] != second[path]).any(), path
  assert norms[0] < 0.5 * tables and tables < whole and norms[1] < norms[2]  # of what is trained alone
  np.testing.assert_allclose(divided_norms, norms[:1], rtol=1e-4)
  for (path, leaf), one in zip(trees.paths(divided[-1]).items(), jax.tree.leaves(found[0]), strict=True):
    np.testing.assert_allclose(np.asarray(leaf, np.float32), np.asarray(one, np.float32), rtol=2e-4, atol=2e-5, err_msg=path)


# ---- the config ----


def staged(*stages, length="100 steps", **keys):
  c = config_lib.default()
  c.start.hf = "base"
  c.data.sources.domain = config_lib.source(store="store")
  c.train.length, c.train.stages = length, stages
  for key, value in keys.items():
    c.schedule[key] = value
  return c


def test_borders_and_rates_are_those_of_each_stage_as_a_run():
  stages = (
    ("new_rows", "33.3%", 2e-3, {"name": "constant", "warmup": "10 steps"}),
    ("embeddings", "33.3%", 1e-3),
    ("all", "rest", 4e-4),
  )
  c = config_lib.resolve(staged(*stages, name="rewarm", lr_peak=8e-4, lr_start=8e-5, lr_final=8e-6, warmup="10%"))
  assert [(s.describe(), s.first, s.end) for s in config_lib.stages(c)] == [
    ("new_rows", 0, 33),
    ("embeddings", 33, 67),
    ("all", 67, 100),
  ]
  rates = schedule.from_config(c)
  found = rates(np.arange(100))
  one = factory.schedule("constant", num_steps=33, warmup_steps=10, lr_peak=2e-3, lr_start=2e-4)
  two = factory.schedule("rewarm", num_steps=34, warmup_steps=4, lr_peak=1e-3, lr_start=1e-4, lr_final=1e-5)
  three = factory.schedule("rewarm", num_steps=33, warmup_steps=4, lr_peak=4e-4, lr_start=4e-5, lr_final=4e-6)
  np.testing.assert_allclose(found, np.concatenate([one(np.arange(33)), two(np.arange(34)), three(np.arange(33))]), rtol=1e-6)
  assert all(isinstance(rates(i), np.float32) and rates(i) == found[i] for i in (0, 32, 33, 99))
  rows = schedule.table(rates, num_steps=100)
  assert ("stage 2: end of warm-up", 36, float(found[36])) in rows and rows[-1][:2] == ("stage 3: last update", 99)
  read_again = json.loads(c.to_json())  # as runs keep it
  assert read_again["train"]["stages"][0] == ["new_rows", "33.3%", 2e-3, {"name": "constant", "warmup": "10 steps"}]


def test_without_stages_the_run_is_one():
  c = config_lib.resolve(staged(length="50 steps"))
  assert config_lib.stages(c) == [("all", 0, 50, {})]


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    ((("new_row", "20%", 1e-3), ("all", "rest", 1e-4)), r"train.stages\[0\]: 'new_row': choose one of .*Did you mean new_rows"),
    ((("all", "20%"),), r"train.stages\[0\]: \('all', '20%'\) is no stage; write \(what is trained, how long, lr_peak\)"),
    (("all",), "is no stage"),
    (((5, "20%", 1e-3), ("all", "rest", 1e-4)), "5 names nothing to train"),
    ((((), "20%", 1e-3), ("all", "rest", 1e-4)), "names nothing to train"),
    ((("all", "rest", 0.0),), "lr_peak=0.0: must be above 0"),
    ((("all", "half", 1e-3),), r"train.stages\[0\]: 'half' is no duration.*may be as long as the 'rest'"),
    ((("all", "rest", 1e-3), ("all", "20%", 1e-3)), "'rest' is no duration"),
    ((("all", "20%", 1e-3), ("all", "30%", 1e-3)), "take 50 steps, the run has 100"),
    ((("all", "80%", 1e-3), ("all", "40%", 1e-3)), "take 120 steps, the run has 100"),
    ((("all", "100%", 1e-3), ("all", "rest", 1e-3)), r"train.stages\[1\]: from step 100 to 100: there is no step in it"),
    ((("all", "rest", 1e-3, {"warm_up": "5%"}),), "schedule has no key warm_up. Did you mean warmup"),
    ((("all", "rest", 1e-3, {"lr_peak": 1e-3}),), "lr_peak stands twice"),
    ((("all", "rest", 1e-3, {"lr_final": "low"}),), "lr_final='low': expected float"),
    (
      (("all", "rest", 1e-3, {"name": "cosin"}),),
      r"train.stages\[0\]: schedule.name='cosin': choose one of .*Did you mean cosine",
    ),
    ((("all", "rest", 1e-3, {"lr_start": 1.0}),), r"train.stages\[0\]: schedule.lr_start=1: above schedule.lr_peak"),
    ((("all", "rest", 1e-3, {"warmup": "soon"}),), r"train.stages\[0\]: warmup: 'soon' is no duration"),
  ],
)
def test_mistakes(stages, message):
  with pytest.raises(ConfigError, match=message):
    config_lib.resolve(staged(*stages))


def test_a_schedule_longer_than_its_stage_is_named():
  c = config_lib.resolve(staged(("new_rows", "10%", 1e-3), ("all", "rest", 1e-4), warmup="20 steps"))
  with pytest.raises(ConfigError, match=r"train.stages\[0\]: schedule.warmup take 20 steps, the run has 10"):
    schedule.from_config(c)


# ---- whole runs ----


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory, fixtures, tiny_hf_config):
  """12 steps in three stages of 4; the last 20 of the tokenizer's 300 pieces stand for new ones."""
  where = tmp_path_factory.mktemp("staged")
  hf_config = tiny_hf_config | {"true_vocab_size": 300, "base_vocab_size": 280}
  model = spec_lib.from_hf(hf_config)
  params = transformer.init(model, jax.random.key(0))
  pretrained.save_params(params, model, where / "base", source_dir=fixtures / "tokenizer", hf_config=hf_config)
  c = config_lib.default()
  c.start.hf = str(where / "base")
  c.data.row_len = 32
  c.data.heldout_frac = 0.1
  c.data.sources.domain = config_lib.source(store=str(where / "store"), text=str(fixtures / "corpus.jsonl"))
  c.train.length = "12 steps"
  c.train.batch_rows = 4
  c.train.stages = (("new_rows", "4 steps", 1e-2), ("embeddings", "4 steps", 5e-3), ("all", "rest", 3e-3))
  c.eval.every, c.eval.tokens = "6 steps", 300
  c.checkpoint.every, c.checkpoint.keep_last = "2 steps", 9
  c.checkpoint.export_hf = True
  c.log.every = 1
  c.mesh.data = 1
  return c


def whole_state(workdir, at):
  """Every leaf of a checkpoint, as numpy."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  saved = ocp.checkpointables_metadata(str(workdir / "ckpt" / str(at))).metadata["state"]
  wanted = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in saved.items()}
  return {
    path: np.asarray(x) for path, x in ocp.load(str(workdir / "ckpt" / str(at)), wanted, checkpointable_name="state").items()
  }


@pytest.fixture(scope="module")
def watched(staged_run, tmp_path_factory):
  """The run without a stop, on one device, and which programs it compiled."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  with in_process.one_device():
    found = bench_endurance.watched(copy.deepcopy(staged_run), workdir, every=1)
  return workdir, [program for _, program in found.compiled]


@pytest.fixture(scope="module")
def straight(watched):
  return watched[0]


def test_stages_follow_each_other_and_rest_what_they_do_not_train(straight):
  at = {number: whole_state(straight, number) for number in (2, 4, 6, 8, 12)}
  np.testing.assert_array_equal(at[4]["params.embedding"][:280], at[2]["params.embedding"][:280])
  assert (at[4]["params.embedding"][280:300] != at[2]["params.embedding"][280:300]).any()
  assert not at[4]["opt_state.mu.embedding"][:280].any() and not at[4]["opt_state.nu.layers.wq"].any()
  np.testing.assert_array_equal(at[8]["opt_state.count.embedding"], [4] * 280 + [8] * 20 + [4] * 20)
  assert at[8]["opt_state.count.layers.wq"] == 0 and at[12]["opt_state.count.layers.wq"] == 4
  np.testing.assert_array_equal(at[8]["params.layers.wq"], at[2]["params.layers.wq"])
  assert (at[12]["params.layers.wq"] != at[8]["params.layers.wq"]).any()


def test_a_run_stopped_before_on_and_behind_borders_is_the_same_run(staged_run, straight, one_device, tmp_path, capsys):
  for stop in (3, 4, 9, 0):
    c = copy.deepcopy(staged_run)
    c.debug.stop_after = stop
    assert loop.run(c, tmp_path / "run") == exits.DONE
  found, wanted = whole_state(tmp_path / "run", 12), whole_state(straight, 12)
  for path, leaf in wanted.items():
    np.testing.assert_array_equal(found[path], leaf, err_msg=path)
  said = " ".join(capsys.readouterr().out.split())
  assert "stage 1 of 3, steps 0 to 3: new_rows, lr_peak 0.01" in said
  assert "stage 2 of 3, steps 4 to 7: embeddings, lr_peak 0.005" in said and "stage 3 of 3, steps 8 to 11: all" in said


def test_another_list_of_stages_is_another_run(staged_run, straight, one_device):
  c = copy.deepcopy(staged_run)
  c.train.stages = (("new_rows", "3 steps", 1e-2), ("all", "rest", 3e-3))
  c.train.length = "20 steps"
  with pytest.raises(ConfigError, match=r"train\.stages: "):
    loop.run(c, straight)


def test_each_stage_is_compiled_once(watched):
  count = collections.Counter(watched[1])
  assert count["jit(train_step)"] == 3 and count["jit(eval_step)"] == 1, count


def test_the_dry_run_says_what_each_stage_trains(staged_run, tmp_path, capsys):
  assert dry_run.describe(copy.deepcopy(staged_run), tmp_path / "run") == 0
  said = capsys.readouterr().out
  words = " ".join(said.split())
  assert "parameter groups (AdamW), stage 1 of 3, steps 0 to 3: new_rows, lr_peak 0.01" in words
  assert "embedding 640 1, new rows 0.1" in words and "rests" in words and "stage 3: last update" in words


def test_a_base_that_was_not_grown_has_no_rows_to_train(staged_run, tmp_path):
  c = copy.deepcopy(staged_run)
  hf_config = spec_lib.load_hf_config(c.start.hf)
  (tmp_path / "base").mkdir()
  for file in pathlib.Path(c.start.hf).iterdir():
    (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
  (tmp_path / "base" / "config.json").write_text(json.dumps(hf_config | {"base_vocab_size": 0}))
  c.start.hf = str(tmp_path / "base")
  with pytest.raises(ConfigError, match=r"the model has none .*start from what cpt vocab grow wrote"):
    inputs_lib.open_inputs(c)


def test_the_operations_of_a_stage_leave_out_what_it_does_not_compute(straight, staged_run):
  spec = spec_lib.from_hf(spec_lib.load_hf_config(staged_run.start.hf))
  full, _ = spec_lib.flops_per_token(spec, 32, frozen=())
  weights = 2.0 * (sum(spec_lib.matmul_leaves(spec).values()) - 320 * 32)  # the layers' gradients, in the first two stages
  evals = {record["step"]: record["flops"] for record in journal.read(straight / "metrics.jsonl") if record["kind"] == "eval"}
  assert evals == {0: 0, 6: 6 * 128 * (full - weights), 12: 12 * 128 * full - 8 * 128 * weights}


# ---- growth in the middle ----


def grow(directory, output, *, num_old=300, vocab_size=330, rows=384):
  model = expansion.open_model(directory, vocab_size=num_old)
  pieces = replaced([[10 + i, 11 + i] for i in range(vocab_size - num_old)])
  new = expansion.make_rows(initialise.mean, lambda old_VD: OldRows(old_VD, pieces), num_padding=rows - vocab_size)
  output.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    if (model.directory / name).exists():
      (output / name).write_bytes((model.directory / name).read_bytes())
  expansion.write(model, output, num_old=num_old, vocab_size=vocab_size, rows=rows, new=dict.fromkeys(model.tables, new))
  return output


def test_moments_of_what_was_there_survive_growth(staged_run, straight, one_device, tmp_path, capsys):
  c = copy.deepcopy(staged_run)
  c.start.hf, c.start.moments = str(grow(straight / "hf", tmp_path / "grown")), str(straight)
  c.data.sources.domain.store = str(tmp_path / "store")
  c.optimizer.mu_dtype = "bfloat16"  # another one than then
  inputs = inputs_lib.open_inputs(c, tmp_path / "run")
  spec = inputs.spec
  assert spec.new_rows == range(300, 330)
  params = start.base_params(inputs.base, spec, seed=0)
  begun = start.initial_state(inputs.begin, params, spec, inputs.tx, keep_optimizer=True, moments=c.start.moments)
  found, before = trees.paths(jax.device_get(begun)), whole_state(straight, 12)
  assert int(begun.step) == 0
  for path, leaf in before.items():
    if path.startswith("opt_state.") and not path.endswith("embedding"):
      expected = leaf.astype(jnp.bfloat16) if ".mu." in path else leaf
      np.testing.assert_array_equal(found[path], expected, err_msg=path)
  for name in ("mu", "nu", "count"):
    rows, old = found[f"opt_state.{name}.embedding"], before[f"opt_state.{name}.embedding"]
    np.testing.assert_array_equal(rows[:300], old[:300].astype(rows.dtype))
    assert old[:300].any() and not rows[300:].any()  # rows 300 to 319 were padding, and had been counted
  c.debug.stop_after = 1
  assert loop.run(c, tmp_path / "run") == exits.DONE
  assert f"parameters; moments of {straight} for what it had" in " ".join(capsys.readouterr().out.split())
  np.testing.assert_array_equal(
    whole_state(tmp_path / "run", 1)["opt_state.count.embedding"], [8] * 280 + [12] * 20 + [1] * 30 + [0] * 54
  )


def test_moments_that_do_not_belong_are_refused(staged_run, straight, tiny_hf_config, fixtures, tmp_path):
  def refused(message, **keys):
    c = copy.deepcopy(staged_run)
    for key, value in keys.items():
      c.start[key] = value
    with pytest.raises(ConfigError, match=message):
      inputs_lib.open_inputs(c)

  refused("only with start.hf", moments=str(straight), hf="", weights=str(straight))
  refused("no checkpoint there", moments=str(tmp_path))
  twice = grow(grow(straight / "hf", tmp_path / "once"), tmp_path / "twice", num_old=330, vocab_size=340)
  refused(r"it has 300 ids, the vocabulary of .*twice grew from 330", moments=str(straight), hf=str(twice))
  other = tiny_hf_config | {"intermediate_size": 96, "true_vocab_size": 300}
  model = spec_lib.from_hf(other)
  pretrained.save_params(
    transformer.init(model, jax.random.key(0)), model, tmp_path / "other", source_dir=fixtures / "tokenizer", hf_config=other
  )
  refused("of another model: mlp_width 64 there, 96 in ", moments=str(straight), hf=str(tmp_path / "other"))
