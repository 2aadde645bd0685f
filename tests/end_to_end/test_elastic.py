"""A run whose mixture and number of processes change on the way, by the program's own command: its ledger is the planned one."""

import itertools
import json
import signal

import factory
import in_process
import jax
import numpy as np
import oracle
import pytest
from fleet import Fleet, trained

from cpt_jax import config as config_lib, journal
from cpt_jax.config import ConfigError
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.store import prepare, tokenization
from cpt_jax.store.token_store import open_store
from cpt_jax.stream import pipeline
from cpt_jax.stream.shuffle import Shuffle
from cpt_jax.training import checkpoint, inputs as inputs_lib

CONFIG = """
from cpt_jax import config

def get_config():
  c = config.default()
  c.start.hf = {base!r}
  c.data.row_len = 32
  c.data.heldout_frac = 0.2
  for name, more in {sources!r}.items():
    c.data.sources[name] = config.source(store={where!r} + "/" + name, text={where!r} + "/" + name + ".jsonl", **more)
  c.train.length = "{steps} steps"
  c.train.batch_rows = 12
  c.schedule.lr_peak = 3e-3
  c.eval.every = "40 steps"
  c.eval.tokens = 300
  c.checkpoint.every = "10 steps"
  c.log.every = 1
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
"""
DOCUMENTS = {"general": 80, "small": 20, "poetry": 60, "added": 40}  # of the fixture's 200

FIRST = {
  "general": dict(role="replay", share=0.5),
  "small": dict(share=0.2, at_end="renormalise", max_epochs=0.25),
  "poetry": dict(share=[(0, 0.1), (150, 0.9)]),
}
SECOND = {  # small leaves, general and poetry have other shares, added joins
  "general": dict(role="replay", share=[(0, 0.5), (300, 0.2, "log")]),
  "poetry": dict(share=0.4),
  "added": dict(share=0.3, at_end="renormalise"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, fixtures, tiny_hf_config):
  """Texts and stores of four sources, and a base whose sizes 1 to 4 processes divide."""
  where = tmp_path_factory.mktemp("elastic")
  hf_config = {**tiny_hf_config, "hidden_size": 48, "intermediate_size": 96}
  model = spec_lib.from_hf(hf_config)
  params = transformer.init(model, jax.random.key(0))
  pretrained.save_params(params, model, where / "base", source_dir=fixtures / "tokenizer", hf_config=hf_config)
  lines = iter((fixtures / "corpus.jsonl").read_text().splitlines(keepends=True))
  for name, num_documents in DOCUMENTS.items():
    text = where / f"{name}.jsonl"
    text.write_text("".join(itertools.islice(lines, num_documents)))
    prepare.prepare([str(text)], tokenizer=str(where / "base"), output=str(where / name), progress=False)
  return where


def with_units(mixed):
  """The sources with the knots of their shares as a config has them, in steps."""
  knots = {name: fields["share"] for name, fields in mixed.items() if isinstance(fields.get("share"), list)}
  written = {name: [(f"{step} steps", *rest) for step, *rest in share] for name, share in knots.items()}
  return {name: fields | ({"share": written[name]} if name in written else {}) for name, fields in mixed.items()}


@pytest.fixture(scope="module")
def write_config(place):
  """A directory with the config of these sources."""

  def write(name, mixed, *, steps):
    (place / name).mkdir()
    text = CONFIG.format(base=str(place / "base"), where=str(place), sources=with_units(mixed), steps=steps)
    (place / name / "config.py").write_text(text)
    return place / name

  return write


@pytest.fixture
def fleet(root):
  """Starts processes; kills what a failed test leaves."""
  started = []

  def start(directory, workdir, *options, **more):
    started.append(Fleet(root, directory, workdir, *options, **more))
    return started[-1]

  yield start
  for each in started:
    each.kill()


# ---- the plan on paper ----


def plan_on_paper(segments, limits, *, num_steps, batch_rows):
  """For each step, the (source, row of the source) of its rows. `segments`: (start, {source: knots}); `limits`: rows of a source
  that ends, after which the others share."""
  run, given = [], {}
  for (start, mixed), stop in zip(segments, [*(start for start, _ in segments[1:]), num_steps], strict=True):
    names, begin = list(mixed), {name: given.get(name, 0) for name in mixed}
    left = [max(limits[name] - begin[name], 0) if name in limits else None for name in names]
    knots = [[(0, share)] if isinstance(share, float) else share for share in mixed.values()]
    steps = oracle.rows(knots, num_steps=stop, batch_rows=batch_rows, start_step=start, limits_M=left)
    run += [[(names[m], begin[names[m]] + nth) for m, nth in step] for step in steps]
    given |= {name: max([begin[name], *(nth + 1 for step in run[start:] for who, nth in step if who == name)]) for name in names}
  return run


class Recount:
  """What a source's rows hold, from its store."""

  def __init__(self, path, name):
    source = factory.source(name, open_store(path), role="", heldout_frac=0.2)
    documents = source.train_documents
    self.plan = factory.rows(source.store.lengths, row_len=32, policy="best_fit", documents=documents)
    self.order = Shuffle(self.plan.num_rows, name=name, seed=0)

  def row(self, nth):
    """(targets, documents that begin)."""
    pieces = self.plan.pieces(self.order[nth])
    return sum(num for _, _, num in pieces), sum(start == 0 for _, start, _ in pieces)


@pytest.mark.slow
def test_killed_and_changed_on_the_way_it_ends_with_the_ledger_of_the_plan(fleet, write_config, place, tmp_path):
  first, second = write_config("first", FIRST, steps=200), write_config("second", SECOND, steps=240)
  workdir = tmp_path / "run"

  def stage(directory, num, *, more):
    """Starts, and waits until so many more steps are done and one of them is saved."""
    begin = ([0] + checkpoint.saved_steps(workdir))[-1]
    running = fleet(directory, workdir, num=num)
    running.until(lambda: ([0] + checkpoint.saved_steps(workdir))[-1] > begin and ([0] + steps_of(workdir))[-1] >= begin + more)
    return running

  stage(first, 4, more=23).kill()
  alone = stage(first, 1, more=31)
  alone.processes[0].send_signal(signal.SIGTERM)
  assert alone.codes() == [75], str(alone)
  changed_at = checkpoint.saved_steps(workdir)[-1]
  changed = stage(second, 2, more=27)
  changed.kill()
  assert f"period 2 begins at step {changed_at}: added joins; small leaves" in changed.out(0)
  assert changed_at < checkpoint.saved_steps(workdir)[-1] < 240
  last = fleet(second, workdir, num=3)
  assert last.codes() == [0] * 3, str(last)

  # What the oracle says, and what the run says.
  recounts = {name: Recount(place / name, name) for name in DOCUMENTS}
  limits = {"small": int(0.25 * recounts["small"].plan.num_rows), "added": recounts["added"].plan.num_rows}
  mixtures = [{name: mixed[name]["share"] for name in sorted(mixed)} for mixed in (FIRST, SECOND)]  # as a ConfigDict has them
  run = plan_on_paper([(0, mixtures[0]), (changed_at, mixtures[1])], limits, num_steps=240, batch_rows=12)
  kept = json.loads((workdir / "periods.json").read_text())
  assert [(s["start_step"], sorted(s["sources"])) for s in kept["periods"]] == [(0, sorted(FIRST)), (changed_at, sorted(SECOND))]
  read, read_after = {}, {0: {}}  # source -> rows, targets, documents
  for step, rows in enumerate(run):
    for name, nth in rows:
      assert nth == read.setdefault(name, [0, 0, 0])[0]  # the next one
      read[name] = [n + m for n, m in zip(read[name], (1, *recounts[name].row(nth)), strict=True)]
    read_after[step + 1] = {name: list(entry) for name, entry in read.items()}
  assert all(read[name][0] == limit for name, limit in limits.items()), "both were to run out"
  ledger = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
  assert ledger[-1]["step"] == 240 and len({record["step"] for record in ledger}) == len(ledger)
  for record in ledger:
    found = {s["source"]: [s["rows"], s["tokens"], s["documents"]] for s in record["sources"]}
    assert {name: entry for name, entry in found.items() if entry[0]} == read_after[record["step"]]
    for entry in record["sources"]:
      assert entry["epochs"] == entry["rows"] / recounts[entry["source"]].plan.num_rows
  for name, entry in read.items():
    windows = [s["window"] for record in ledger for s in record["sources"] if s["source"] == name]
    assert [sum(window[key] for window in windows) for key in ("rows", "tokens", "documents")] == entry
    assert sum(window["epochs"] for window in windows) == pytest.approx(entry[0] / recounts[name].plan.num_rows)
  recorded = {name: [r["rows"], r["tokens"], r["documents"]] for name, r in kept["periods"][1]["read"].items()}
  assert recorded == read_after[changed_at]

  # Each step was trained on once, and on these rows.
  assert steps_of(workdir) == [*range(1, 241)]
  for record, rows in zip(trained(workdir), run, strict=True):
    assert record["tokens"] == sum(recounts[name].row(nth)[0] for name, nth in rows), record["step"]
    assert set(record["source_loss"]) == {name for name, _ in rows}
  summary = json.loads((workdir / "summary.json").read_text())
  assert [source["source"] for source in summary["sources"]] == sorted(SECOND) and (workdir / "hf").exists()


def steps_of(workdir):
  return [record["step"] for record in trained(workdir)]


# ---- one process ----


def main(directory, workdir, *options):
  return in_process.cpt("train", f"--config={directory}/config.py", f"--workdir={workdir}", *options)


def base_loss(place, record, name) -> float:
  """Of the base on a source's held-out documents, by a plain log-softmax."""
  reader = pipeline.from_periods(record, record["num_steps"] - 1, tokenizer=tokenization.load(place / "base"))
  model = spec_lib.from_hf(spec_lib.load_hf_config(place / "base"))
  params = transformer.init(model, jax.random.key(0))
  total, count = 0.0, 0.0
  for batch in reader.heldout_rows(name, max_tokens=300, max_bytes=0).batches:
    hidden = factory.hidden(params, model, batch.tokens_BT, batch.positions_BT, batch.segments_BT, compute_dtype="float32")
    logits = np.asarray(transformer.logits(params, model, hidden), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets_BT[..., None], -1)[..., 0]
    total, count = total + (losses * batch.weights_BT).sum(), count + batch.weights_BT.sum()
  return total / count


def test_a_source_that_joins_is_compared_with_the_base(write_config, place, tmp_path):
  workdir, mixed = tmp_path / "run", {"general": dict(share=1.0, role="replay"), "watched": dict(share=0.0)}
  (place / "watched.jsonl").write_text((place / "small.jsonl").read_text())
  before = write_config("before", mixed, steps=12)
  assert main(before, workdir, "--config.debug.stop_after=8").returncode == 0
  after = write_config("after", {"added": dict(share=0.5), **mixed}, steps=16)
  # Nothing was read of the source that is only evaluated, so it may become another.
  other = [f"--config.data.sources.watched.{key}={place}/poetry{end}" for key, end in (("store", ""), ("text", ".jsonl"))]
  done = main(after, workdir, *other, "--config.debug.stop_after=10")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "period 2 begins at step 8: added joins; next rate" in done.stdout
  record = json.loads((workdir / "periods.json").read_text())
  assert [period["start_step"] for period in record["periods"]] == [0, 8]
  last = [r for r in journal.read(workdir / "metrics.jsonl") if r["kind"] == "eval"][-1]
  for name, source in last["sources"].items():
    assert source["loss"] - source["change"] == pytest.approx(base_loss(place, record, name), abs=1e-4), name
  assert last["sources"]["added"]["change"] < -0.05  # the base's loss is not that of the weights of step 8

  with pytest.raises(ConfigError, match=r"train\.length=9 steps: the run in .* is at step 10 already"):
    config = config_lib.load_file(str(after / "config.py"))
    config.train.length, config.data.sources.added.share = "9 steps", 0.1
    inputs_lib.open_inputs(config, workdir)


def test_a_run_that_a_source_stops_is_exported_and_complete(write_config, tmp_path):
  directory = write_config(
    "stops", {"general": dict(role="replay", share=0.5), "small": dict(share=0.5, at_end="stop")}, steps=99
  )
  dry = main(directory, tmp_path / "run", "--dry_run")
  assert dry.returncode == 0, dry.stderr
  done = main(directory, tmp_path / "run")
  assert done.returncode == 0, done.stdout + done.stderr
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  end = summary["step"]
  assert end < 99 and steps_of(tmp_path / "run") == [*range(1, end + 1)] and (tmp_path / "run" / "hf").exists()
  rows = {source["source"]: source["rows"] for source in summary["sources"]}
  assert rows == {"general": 6 * end, "small": 6 * end}
  for said in (dry, done):
    assert f"the run ends at step {end} of 99: small runs out" in said.stdout
  assert f"small runs out in step {end}: the run stops" in dry.stdout
  again = main(directory, tmp_path / "run")
  assert again.returncode == 0 and f"is complete at step {end}; nothing to do" in again.stdout


def test_ends_are_said_before_training_or_refused(write_config, place, tmp_path):
  mixed = {"general": dict(role="replay", share=0.25), "small": dict(share=0.25, at_end="renormalise"), "poetry": dict(share=0.5)}
  directory = write_config("ends", mixed, steps=60)
  dry = main(directory, tmp_path / "run", "--dry_run")
  assert dry.returncode == 0, dry.stderr
  step = Recount(place / "small", "small").plan.num_rows // 3  # 3 rows of 12 a step
  assert f"small runs out in step {step}: others share what is left" in dry.stdout
  refused = main(directory, tmp_path / "run", "--config.data.sources.small.at_end=error")
  assert refused.returncode == 78 and "Traceback" not in refused.stderr
  assert "data.sources.small.at_end='error': it runs out in step" in refused.stderr
  assert not (tmp_path / "run" / "ckpt").exists()
