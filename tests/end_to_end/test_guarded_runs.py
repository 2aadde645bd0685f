"""Guards in the real program: a jump that forgets too fast and a ramp that does not, kills, numbers that are not finite."""

import gzip
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import factory
import jax
import numpy as np
import pytest

from cpt_jax import journal
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.stream import pipeline
from cpt_jax.training import checkpoint, guard
from cpt_jax.training.state import TrainState

CONFIG = """
from cpt_jax import config

def get_config():
  c = config.default()
  c.start.hf = {base!r}
  c.data.row_len = 64
  c.data.heldout_frac = 0.1
  for name, role in (("general", "replay"), ("poetry", "domain")):
    c.data.sources[name] = config.source(store={where!r} + "/" + name, text={where!r} + "/" + name + ".jsonl", role=role)
  c.train.length = "40 steps"
  c.train.batch_rows = 8
  c.schedule.lr_peak = 2e-3
  c.schedule.lr_final = 2e-4
  c.schedule.warmup = "10%"
  c.eval.every = "10 steps"
  c.eval.tokens = 1500
  c.checkpoint.every = "10 steps"
  c.log.every = 2
  c.guard.general_loss_rise = {rise}
  return c
"""
# Both end with a tenth of general text.
JUMP = ["[(0, 0.95), ('10 steps', 0.1, 'hold')]", "[(0, 0.05), ('10 steps', 0.9, 'hold')]"]
RAMP = ["[(0, 0.95), ('40 steps', 0.1)]", "[(0, 0.05), ('40 steps', 0.9)]"]
RISE = 0.35


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
  """A directory with the config and parts of the example's corpora."""
  where = tmp_path_factory.mktemp("guarded")
  for name, corpus, num_documents in (("general", "english", 60), ("poetry", "poetry_ci", 1500)):
    with gzip.open(root / "examples" / "corpora" / f"{corpus}.jsonl.gz", "rt", encoding="utf-8") as file:
      (where / f"{name}.jsonl").write_text("".join(itertools.islice(file, num_documents)), encoding="utf-8")
  (where / "config.py").write_text(CONFIG.format(base=str(root / "examples" / "base"), where=str(where), rise=RISE))
  return where


def command(place, workdir, *options, shares=JUMP):
  mixed = [f"--config.data.sources.{name}.share={knots}" for name, knots in zip(("general", "poetry"), shares, strict=True)]
  return [sys.executable, "-m", "cpt_jax.main", f"--config={place}/config.py", f"--workdir={workdir}", *mixed, *options]


@pytest.fixture
def run(root, place):
  """Runs the program; with `until`, kills it as soon as that is so."""

  def start(workdir, *options, until=None, **more):
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}
    log = pathlib.Path(f"{workdir}.out")
    with log.open("w") as out:
      process = subprocess.Popen(
        command(place, workdir, *options, **more), cwd=place, env=env, stdout=out, stderr=subprocess.STDOUT
      )
      while until is not None and process.poll() is None and not until():
        time.sleep(0.002)
      if until is not None:
        process.send_signal(signal.SIGKILL)
      code = process.wait(timeout=300)
    return code, log.read_text()

  return start


def weights(workdir):
  return (workdir / "hf" / "model.safetensors").read_bytes()


def told(workdir):
  """All that a run keeps of its past, but for its speed and the places of its files."""
  files = {name: journal.read(workdir / name) for name in ("metrics.jsonl", "ledger.jsonl", guard.FILE)}
  speed = {"tokens_per_sec", "mfu"}
  files["metrics.jsonl"] = [{k: v for k, v in r.items() if k not in speed} for r in files["metrics.jsonl"]]
  return {**files, "periods": json.loads((workdir / "periods.json").read_text())}


def reached(workdir, step):
  return any(record["step"] >= step for record in journal.read(workdir / "metrics.jsonl"))


def periods_begun(workdir):
  file = workdir / "periods.json"
  return len(json.loads(file.read_text())["periods"]) if file.exists() else 0


def passes_over(workdir):
  file = workdir / "periods.json"
  return file.exists() and "skipped" in json.loads(file.read_text())["periods"][-1]


@pytest.mark.slow
def test_a_jump_goes_back_and_a_ramp_does_not_and_kills_change_nothing(run, tmp_path):
  rewind = "--config.guard.on_collapse=rewind"
  code, said = run(tmp_path / "ramp", rewind, shares=RAMP)
  assert code == 0, said
  assert not (tmp_path / "ramp" / guard.FILE).exists() and periods_begun(tmp_path / "ramp") == 1

  whole = tmp_path / "whole"
  code, said = run(whole, rewind)
  assert code == 0, said
  first, *_ = found = guard.read(whole)
  assert (first["step"], first["act"], first["to_step"], first["guard"]) == (20, "rewind", 10, "collapse")
  assert first["rise"]["general"] > RISE and "back to step 10, from where the shares move at half their speed" in said
  record = told(whole)["periods"]
  assert [period["start_step"] for period in record["periods"]][:2] == [0, 10]
  assert record["periods"][1]["sources"]["general"]["share"] == first["shares"]["general"]
  # The model saw the rows that the record says: the shares of the ramp that the jump became, not those of the jump.
  reader = pipeline.from_periods(record, 12)
  assert 0.1 < reader.order.shares(12)["general"] < 0.95
  ledger = told(whole)["ledger.jsonl"]
  assert sum(source["rows"] for source in ledger[-1]["sources"]) == 40 * 8

  # Killed when the decision is on disk, then in the middle of what it led to.
  workdir = tmp_path / "killed"
  code, _ = run(workdir, rewind, until=lambda: (workdir / guard.FILE).exists())
  assert code == -signal.SIGKILL
  code, _ = run(workdir, rewind, until=lambda: periods_begun(workdir) > 1 and reached(workdir, 14))
  assert code == -signal.SIGKILL
  code, said = run(workdir, rewind)
  assert code == 0, said
  assert weights(workdir) == weights(whole) and told(workdir) == told(whole) and guard.read(workdir) == found


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_to_go_on_and_one_that_is_held_keeps_its_shares(run, tmp_path):
  workdir = tmp_path / "stopped"
  for _ in range(2):  # the same command comes to the same decision, which is written once
    code, said = run(workdir)
    assert code == 88 and "Raise guard.general_loss_rise" in said, said
    (found,) = guard.read(workdir)
    assert (found["act"], found["step"]) == ("stop", 20) and checkpoint.saved_steps(workdir)[-1] == 20
  code, said = run(workdir, "--config.guard.general_loss_rise=9.0", "--config.debug.stop_after=23")
  assert code == 0 and "decided before: step 20" in said and checkpoint.saved_steps(workdir)[-1] == 23, said

  hold, steep = "--config.guard.on_collapse=hold", ["[(0, 0.95), ('20 steps', 0.0)]", "[(0, 0.05), ('20 steps', 1.0)]"]
  options = (hold, "--config.guard.general_loss_rise=0.15")
  code, said = run(tmp_path / "held", *options, shares=steep)
  assert code == 0 and "nothing to hold" in said, said
  (found,) = guard.read(tmp_path / "held")
  record = told(tmp_path / "held")["periods"]
  assert found["act"] == "hold" and record["periods"][1]["start_step"] == found["to_step"] == found["step"] < 20
  shares = [pipeline.from_periods(record, step).order.shares(step)["general"] for step in (found["step"] - 1, found["step"], 39)]
  np.testing.assert_allclose(shares, shares[0])
  killed = tmp_path / "killed"
  code, _ = run(killed, *options, shares=steep, until=lambda: (killed / guard.FILE).exists())
  assert code == -signal.SIGKILL
  code, said = run(killed, *options, shares=steep)
  assert code == 0 and weights(killed) == weights(tmp_path / "held") and told(killed) == told(tmp_path / "held"), said


@pytest.mark.slow
def test_rows_of_a_spike_are_passed_over_and_a_kill_changes_nothing(run, tmp_path):
  # No batch of these texts makes a real spike: the band is so narrow that ordinary noise leaves it.
  options = ["--config.guard.general_loss_rise=0.0", "--config.guard.spike_mads=1.0", "--config.guard.spike_records=1"]
  options += ["--config.guard.max_rewinds=1", "--config.log.every=1"]
  even = ["0.5", "0.5"]
  whole, workdir = tmp_path / "whole", tmp_path / "killed"
  code, said = run(whole, *options, shares=even)
  first, *_ = guard.read(whole)
  assert first["act"] == "skip" and first["to_step"] < min(first["outside_since"].values()), said
  record = told(whole)["periods"]
  assert record["periods"][-1]["skipped"] == {name: [window] for name, window in first["source_rows"].items()}
  # All rows of the run in order: none twice, and those that are missing are the ones that are listed.
  last = checkpoint.saved_steps(whole)[-1]
  reader = pipeline.from_periods(record, last - 1)
  rows = [reader.order.locate(i) for i in range(last * 8)]
  for name, (begin, stop) in first["source_rows"].items():
    read = [nth for source, nth in rows if source == name]
    assert read == [*range(begin), *range(stop, stop + len(read) - begin)]
  code_killed, _ = run(
    workdir, *options, shares=even, until=lambda: passes_over(workdir) and reached(workdir, first["to_step"] + 1)
  )
  assert code_killed == -signal.SIGKILL
  assert run(workdir, *options, shares=even)[0] == code
  assert told(workdir) == told(whole) and checkpoint.saved_steps(workdir)[-1] == last


@pytest.fixture(scope="module")
def tiny(fixtures, tiny_hf_config, tmp_path_factory):
  """A directory with a config, the fixture's texts and a tiny base without a tied head."""
  where = tmp_path_factory.mktemp("tiny")
  hf_config = {**tiny_hf_config, "tie_word_embeddings": False}
  model = spec_lib.from_hf(hf_config)
  params = transformer.init(model, jax.random.key(0))
  pretrained.save_params(params, model, where / "base", source_dir=fixtures / "tokenizer", hf_config=hf_config)
  for name in ("general", "poetry"):
    shutil.copy(fixtures / "corpus.jsonl", where / f"{name}.jsonl")
  text = CONFIG.format(base=str(where / "base"), where=str(where), rise=0.0).replace("row_len = 64", "row_len = 32")
  (where / "config.py").write_text(text.replace("batch_rows = 8", "batch_rows = 2"))
  return where


def params_of(workdir):
  """Of a run's newest checkpoint, with its step."""
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    params, _, at = checkpoint.load_params(workdir)
  return jax.device_get(params), at


def save_with_infinity(clean, where, *, token):
  """A run whose parameters are those of another's, but for the embedding of one token."""
  params, at = params_of(clean)
  embedding = params["embedding"].copy()
  embedding[token] = np.inf
  params = jax.tree.map(jax.numpy.asarray, {**params, "embedding": embedding})
  saved = factory.checkpoints(where, keep_last=1)
  saved.save(TrainState(jax.numpy.int32(0), params, ()), 0, meta=checkpoint.read_meta(clean, at), losses={})
  saved.close()
  shutil.copy(clean / "config.json", where)


@pytest.mark.slow
def test_updates_with_numbers_that_are_not_finite_are_skipped_and_listed_and_too_many_end_the_run(root, tiny, tmp_path):
  def start(workdir, *options):
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}
    all_options = command(tiny, workdir, "--config.checkpoint.export_hf=False", *options, shares=["0.5", "0.5"])
    done = subprocess.run(all_options, cwd=tiny, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr

  code, said = start(tmp_path / "clean")
  assert code == 0 and not (tmp_path / "clean" / guard.FILE).exists(), said
  # A token of the base that only a few steps read, no two of them in a row.
  reader = pipeline.from_periods(json.loads((tmp_path / "clean" / "periods.json").read_text()), 39)
  seen = [set(np.unique(reader._batch(2 * step, 2).tokens_BT)) for step in range(40)]
  steps_of = {token: [step for step in range(40) if token in seen[step]] for token in set.union(*seen)}
  alone = lambda steps: len(steps) > 1 and all(b - a > 1 for a, b in itertools.pairwise(steps)) and steps[0] > 1  # noqa: E731
  token, steps = min((token, steps) for token, steps in steps_of.items() if alone(steps))
  save_with_infinity(tmp_path / "clean", tmp_path / "bad", token=token)

  options = ["--config.start.hf=", f"--config.start.weights={tmp_path / 'bad'}"]
  code, said = start(tmp_path / "skipped", *options, "--config.guard.nonfinite_steps=2")
  assert code == 0, said
  notes = guard.read(tmp_path / "skipped")
  assert [note["step"] for note in notes] == steps and all(note["in_a_row"] == 1 for note in notes)
  assert [note["rows"] for note in notes] == [[2 * step, 2 * step + 2] for step in steps]
  trained = [record for record in journal.read(tmp_path / "skipped" / "metrics.jsonl") if record["kind"] == "train"]
  assert [r["skipped"] for r in trained] == [sum(r["step"] - 2 <= step < r["step"] for step in steps) for r in trained]
  assert f"{len(notes)} updates skipped, not finite" in said and "its rows: " in said
  # The infinite row is what it was, and no other number has become infinite.
  params, at = params_of(tmp_path / "skipped")
  assert at == 40 and set(np.argwhere(~np.isfinite(params.pop("embedding")))[:, 0]) == {token}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))

  # One is too many: the run ends, with the checkpoint of the step before.
  code, said = start(tmp_path / "lost", *options, "--config.guard.nonfinite_steps=1", "--config.checkpoint.every=1 steps")
  assert code == 86 and f"up to step {steps[0] + 1}" in said and "guard.jsonl" in said, said
  assert checkpoint.saved_steps(tmp_path / "lost")[-1] == steps[0]
