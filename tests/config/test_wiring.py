"""Every key of the table is changed from its default, and what it is for is seen to change, or it is refused by name.

A value that is written down twice, or lost on its way from the config to its function, turns a line of this red.
"""

import ast
import functools
import json
import pathlib
import tempfile
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from store_writer import StoreWriter

from cpt_jax import config as config_lib, exits
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.store import prepare
from cpt_jax.stream import pipeline, sources
from cpt_jax.training import checkpoint, guard, inputs as inputs_lib, loop, optimizer, schedule, start, step
from cpt_jax.training.stack import Stack


@pytest.fixture(scope="module")
def world(tmp_path_factory, fixtures, tiny_hf_config):
  """The files that the configs of this test name, and the directory that {world} stands for in them."""
  where = tmp_path_factory.mktemp("world")
  (where / "config.json").write_text(json.dumps(tiny_hf_config))
  wider = where / "wider"
  wider.mkdir()
  (wider / "config.json").write_text(json.dumps(tiny_hf_config | {"hidden_size": 48}))
  (where / "run" / "ckpt" / "7").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ("a", "b", "c"):
    with StoreWriter(where / name, vocab_size=300, eos_id=2) as writer:
      for i in range(40):
        writer.add(rng.integers(3, 300, rng.integers(2, 60)).tolist(), text=f"{name} {i}")
  return where


def config_of(world, fixtures, **changes):
  """A resolved config of two sources, with these keys changed."""
  c = config_lib.default()
  values = {"model.scratch": "{world}/config.json", "data.tokenizer": str(fixtures / "tokenizer"), "data.row_len": 32}
  values |= {"data.heldout_frac": 0.2, "train.length": "20 steps", "train.batch_rows": 8, "train.microbatches": 2}
  for name, role in (("a", "replay"), ("b", "domain")):
    c.data.sources[name] = config_lib.source(store=str(world / name), role=role, share=0.5)
  with c.ignore_type():
    for key, value in (values | changes).items():
      group, _, leaf = key.rpartition(".")
      (config_lib.get(c, group) if group else c)[leaf] = value.format(world=world) if isinstance(value, str) else value
  return config_lib.resolve(c)


# ---- what a key changes: config -> something to compare ----


def spec_of(config):
  return start.load_spec(start.choose_base(config))[0]


def starts(config):
  problems = config_lib.Problems()
  start.check_moments(config, None, problems)  # without start.hf no model is looked at
  problems.raise_if_any()
  return start.choose_base(config), start.tokenizer_path(config)


def rates(config):
  return schedule.from_config(config)(np.arange(config_lib.num_steps(config))).tolist()


def settings(config):
  return step.settings_from_config(config)


def given(owner, name, call, *, num_positional=0, but=()):
  """What `call` gives the function of that name: the first arguments, and those by name but for some."""
  asked = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      owner, name, lambda *args, **more: asked.append((args[:num_positional], {k: v for k, v in more.items() if k not in but}))
    )
    call()
  return asked


def adam(config):
  return given(optimizer, "make", lambda: optimizer.from_config(config, spec_of(config)), num_positional=1)


def step_of(config):
  call = functools.partial(step.from_config, config, spec_of(config), source_weights=(1.0, 1.0))
  return given(step, "make_train_step", call, but=("hold",))


def loader(config):
  problems = config_lib.Problems()
  found = sources.from_config(config, problems)
  problems.raise_if_any()
  return pipeline.from_config(config, found)


def rows(config):
  """What is read, held out, and how."""
  made = loader(config)
  batch = [leaf.tolist() for leaf in made._batch(0, 3 * made.batch_rows)]
  return batch, made.num_steps, made.eval_batch_rows, made.num_threads, made.loss_weights, made.order.ends, made.order.shares(5)


def opened(config):
  return [
    (source.name, source.role, str(source.store.path), source.share, source.at_end, source.max_epochs)
    for source in sources.from_config(config, config_lib.Problems())
  ]


def watch(config):
  made = guard.from_config(config, loader(config), [], {}, state=None, first_step=0)
  return made.settings, [made.reads_at(at) for at in range(20)]


def mesh(config):
  return dict(Stack(1).make_mesh(config).shape)


def kept(config):
  """What the run's checkpoints are asked to keep."""
  return given(checkpoint, "Checkpoints", lambda: checkpoint.from_config(config, pathlib.Path("run")))


def preparing(config):
  """What a store is prepared with."""
  asked = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare, "prepare", lambda inputs, **options: asked.append((inputs, options)) or SimpleNamespace(lines=list))
    inputs_lib._prepare_missing_stores(config)
  return asked


def until(config, owner, name):
  """What a run gives the function of that name, at which it is stopped, and how many programs it has wrapped for jax before."""
  wrapped = []

  def stop(*_, **options):
    raise StopIteration(sorted(options.items(), key=str), len(wrapped))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(owner, name, stop)
    patch.setattr(jax, "jit", lambda f, **_: wrapped.append(f) or f)
    with pytest.raises(StopIteration) as stopped:
      run(config)
  return stopped.value.args


def run(config):
  """As one device does it."""
  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as workdir:
    patch.setattr(mesh_lib, "make_mesh", functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1]))
    loop.run(config, pathlib.Path(workdir))


def events(config):
  """The steps at which a run evaluates, saves and ends; nothing is computed."""
  done = []
  fake = MagicMock(missing=(), diverged="")
  fake.watch.decide.return_value, fake.watch.saves.return_value, fake.watch.reads_at.return_value = None, False, False
  fake.checkpoints.steps.return_value = []
  for name in ("evaluated", "save", "finish"):
    getattr(fake, name).side_effect = lambda now, *_, name=name, **__: done.append((name, now))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.recorder, "Recorder", lambda *_, **__: fake)
    patch.setattr(loop.recorder, "load_base", lambda *_, **__: None)
    patch.setattr(loop.perplexity, "evaluate", lambda *_, **__: [{}])
    patch.setattr(start, "initial_state", lambda *_, **__: MagicMock())
    patch.setattr(step, "from_config", lambda *_, **__: lambda state, *_: (state, None))
    patch.setattr(jax, "jit", lambda f, **_: f)
    run(config)
  return done


def held(config):
  return until(config, pipeline.Loader, "heldout_rows")


def wrapped(config):
  return until(config, loop, "_say_start")


A = "data.sources.a"
RAW = {f"{A}.store": "{world}/raw", f"{A}.text": "raw.jsonl"}
RESUMED = {"model.scratch": "", "start.resume": "{world}/run"}
CLOSE = {"guard.spike_mads": 15.0}
STAGES = (("embeddings", "25%", 1e-3), ("all", "rest", 3e-4, {"name": "constant"}))
# Key -> a value that is not its default; what must change; what else must be set for that, before and after.
WIRED = {
  "seed": (1, rows),
  "start.resume": ("{world}/run", starts),
  "start.hf": ("{world}/wider", starts),
  "start.weights": ("{world}/run", starts),
  "start.moments": ("{world}/run", starts),
  "start.optimizer": ("reset", starts, RESUMED),
  "model.scratch": ("{world}/wider/config.json", spec_of),
  "model.compute_dtype": ("bfloat16", settings),
  "model.remat": ("dots", settings),
  "model.attention": ("plain", settings),
  "model.scan": (False, settings),
  "model.loss_chunk": (17, settings),
  "data.tokenizer": ("{world}", starts),
  "data.row_len": (16, rows),
  "data.packing": ("pad", rows),
  "data.cross_documents": (True, rows),
  "data.split_positions": ("continue", rows),
  "data.heldout_frac": (0.5, rows),
  "data.prefetch": (3, rows),
  "data.shares": (((0, {"a": 0.9, "b": 0.1}), ("50%", {"b": 1.0})), rows, {f"{A}.share": 1.0, "data.sources.b.share": 1.0}),
  "data.on_bad": ("fail", preparing, RAW),
  "data.max_bad": (5, preparing, RAW),
  "train.length": ("30 steps", rows),
  "train.batch_rows": (4, rows),
  "train.microbatches": (4, step_of),
  "train.accumulate_dtype": ("bfloat16", step_of),
  "train.stages": (STAGES, rates),
  "train.z_loss": (1e-4, step_of),
  "schedule.name": ("wsd", rates),
  "schedule.lr_peak": (1e-3, rates),
  "schedule.lr_start": (1e-4, rates, {"schedule.warmup": "50%"}),
  "schedule.lr_const": (2e-4, rates, {"schedule.name": "infinite"}),
  "schedule.lr_final": (1e-5, rates),
  "schedule.warmup": ("50%", rates),
  "schedule.cooldown": ("40%", rates, {"schedule.name": "infinite"}),
  "schedule.anneal": ("40%", rates, {"schedule.name": "infinite"}),
  "schedule.shape": ("linear", rates, {"schedule.name": "wsd"}),
  "optimizer.b1": (0.8, adam),
  "optimizer.b2": (0.9, adam),
  "optimizer.eps": (1e-3, adam),
  "optimizer.mu_dtype": ("bfloat16", adam),
  "optimizer.weight_decay": (0.3, adam),
  "optimizer.clip_norm": (0.5, adam),
  "optimizer.decay_rules": (((".*", 1.0),), adam),
  "optimizer.rate_rules": (((".*", 0.5),), adam),
  "optimizer.layer_rates": ((0.5, 1.0), adam),
  "optimizer.frozen": (("embedding",), adam),
  "eval.every": ("25%", events),
  "eval.tokens": (300, held),
  "eval.bytes": (40, held),
  "eval.batch_rows": (5, rows),
  "guard.nonfinite_steps": (5, watch),
  "guard.general_loss_rise": (0.5, watch),
  "guard.on_collapse": ("hold", watch),
  "guard.spike_mads": (15.0, watch),
  "guard.spike_records": (7, watch),
  "guard.on_spike": ("stop", watch),
  "guard.max_rewinds": (5, watch),
  "checkpoint.every": ("25%", events),
  "checkpoint.keep_last": (5, kept),
  "checkpoint.keep_every": ("50%", kept),
  "checkpoint.best_metric": ("eval/b/loss", kept),
  "mesh.data": (2, mesh, {"mesh.fsdp": -1, "mesh.data": 1}),
  "mesh.fsdp": (2, mesh),
  "mesh.context": (2, mesh),
  "mesh.tensor": (2, mesh),
  "log.every": (4, watch, CLOSE),
  "debug.stop_after": (7, events),
  "debug.no_jit": (True, wrapped),
  f"{A}.store": ("{world}/c", opened),
  f"{A}.role": ("domain", opened),
  f"{A}.share": (0.1, rows),
  f"{A}.at_end": ("stop", rows, {"train.length": "400 steps"}),
  f"{A}.max_epochs": (2.0, rows, {"train.length": "400 steps", f"{A}.at_end": "renormalise"}),
  f"{A}.loss_weight": (0.5, rows),
  f"{A}.min_tokens": (20, rows),
  f"{A}.max_tokens": (20, rows),
  f"{A}.length_shares": (((0, 0.2), (30, 0.8)), rows),
  f"{A}.text": ("other.jsonl", preparing, RAW),
  f"{A}.records": ("messages", preparing, RAW),
  f"{A}.text_field": ("body", preparing, RAW),
  f"{A}.answer_field": ("reply", preparing, RAW),
  f"{A}.train_on": ("answers", preparing, {**RAW, f"{A}.records": "messages"}),
}
# Keys whose effect is what a run leaves behind: one run below changes them all at once.
IN_A_RUN = {
  "checkpoint.export_hf": False,
  "log.tensorboard": True,
  "plan.losses": (("b", 5.0, 4.0, 6.0),),
  "plan.made_by": "plans/one",
}


def test_no_key_is_left_out():
  fields = {f"{A}.{field}" for field in config_lib.FIELDS}
  assert set(WIRED) | set(IN_A_RUN) == set(config_lib.KEYS) | fields


def test_no_function_repeats_the_default_of_a_key(root):
  names: dict[str, list] = {}
  for name, key in {**config_lib.KEYS, **config_lib.FIELDS}.items():
    names.setdefault(name.rpartition(".")[2], []).append(key.default)
  for name in ("seed", "bytes"):  # also of a fit or of new rows, and of a tally
    del names[name]
  for file in [f for f in (root / "cpt_jax").rglob("*.py") if f.parent.name not in ("laws", "planning")]:  # names of laws' own
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
      pairs = []
      if isinstance(node, ast.FunctionDef):
        plain = [*node.args.posonlyargs, *node.args.args]
        pairs = [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
        pairs += zip(plain[len(plain) - len(node.args.defaults) :], node.args.defaults, strict=True)
      elif isinstance(node, ast.ClassDef):  # the fields of a record
        pairs = [(ast.arg(ast.unparse(field.target)), field.value) for field in node.body if isinstance(field, ast.AnnAssign)]
      for arg, default in pairs:
        if isinstance(default, (ast.Constant, ast.Tuple, ast.UnaryOp)) and arg.arg in names:
          value = ast.literal_eval(default)
          assert value not in names[arg.arg] or value is None, f"{file.name}: {node.name}({arg.arg}={value!r})"


def outcome(make, world, fixtures, changes):
  """What is built, or the refusal."""
  try:
    return make(config_of(world, fixtures, **changes))
  except config_lib.ConfigError as error:
    return f"refused: {error}"


@pytest.mark.parametrize("key", WIRED)
def test_what_a_key_is_for_changes_with_it(world, fixtures, key):
  value, make, *more = WIRED[key]
  plain = more[0] if more else {}
  before, again, after = (outcome(make, world, fixtures, plain | change) for change in ({}, {}, {key: value}))
  assert str(again) == str(before), "what is compared differs by itself"
  assert str(after) != str(before), f"{key}={value!r} changes nothing"
  assert not str(before).startswith("refused") and (not str(after).startswith("refused") or key in str(after)), after


def test_what_a_run_leaves_behind(world, fixtures, tmp_path, one_device):
  config = config_of(world, fixtures, **IN_A_RUN, **{"train.length": "1 steps", "train.microbatches": 1, "schedule.warmup": "0%"})
  assert loop.run(config, tmp_path) == exits.DONE
  assert list(tmp_path.rglob("*tfevents*")), "log.tensorboard"
  assert not (tmp_path / "hf").exists(), "checkpoint.export_hf"
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert [source.get("predicted", {}).get("high") for source in summary["sources"]] == [None, 6.0], "plan.losses"
  assert json.loads((tmp_path / "config.json").read_text())["plan"]["made_by"] == "plans/one", "plan.made_by"
