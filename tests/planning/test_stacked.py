"""Trials trained at once are the trials trained one by one."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cpt_jax import config as config_lib, exits, journal, trees
from cpt_jax.config import ConfigError
from cpt_jax.planning import execute, trials
from cpt_jax.planning.trials import Trial
from cpt_jax.results import runs
from cpt_jax.stream import pipeline
from cpt_jax.training import checkpoint, loop, recorder, schedule, stack

# Rates, shares and seeds that differ; the third one diverges at its first update, which the others must not feel.
TRIALS = [Trial(1e-3, 0.25, 4, 0), Trial(4e-3, 0.0, 4, 1), Trial(1e30, 0.5, 4, 0), Trial(2e-2, 0.6, 4, 2)]


@pytest.fixture(scope="module", autouse=True)
def any_rate():
  """A rate that no config may have makes a trial diverge for certain."""
  key = dataclasses.replace(config_lib.KEYS["schedule.lr_peak"], at_most=None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(config_lib.KEYS, key.name, key)
    yield


@pytest.fixture
def config(tiny_plan):
  c = tiny_plan.copy_and_resolve_references()
  c.optimizer.clip_norm = 0.0
  return c


def test_a_stack_equals_its_trials_made_one_by_one(config, one_device, any_rate, tmp_path, monkeypatch):
  batches, last = [], {}
  to_device, by_layer = stack.Stack.to_device, recorder.drift.by_layer

  def see(stack, mesh, given, *, num_rows):
    batches.append(given)
    return to_device(stack, mesh, given, num_rows=num_rows)

  def keep(params, base):
    last[len(last)] = jax.device_get(trees.paths(params))
    return by_layer(params, base)

  with execute.TrialsBar(TRIALS) as bar, monkeypatch.context() as patch:
    patch.setattr(stack.Stack, "to_device", see)
    patch.setattr(recorder.drift, "by_layer", keep)
    assert execute.run_trials(config, TRIALS, tmp_path / "stack", bar=bar, stack=4) == exits.DONE
  together = execute.finished(config, TRIALS, tmp_path / "stack")
  assert [bool(m.diverged) for m in together] == [False, False, True, False] and "not finite" in together[2].diverged
  assert not (tmp_path / "stack" / TRIALS[2].name / "summary.json").exists()

  final = [last[len(last) - 3 + i] for i in range(3)]  # of those that reached the end
  for r, params in ((0, final[0]), (1, final[1]), (3, final[2])):
    made, path, twin = trials.trial_config(config, TRIALS[r]), tmp_path / f"alone{r}", tmp_path / "stack" / TRIALS[r].name
    assert loop.run(made, path) == exits.DONE
    alone, ours = runs.read_run(path), runs.read_run(twin)
    np.testing.assert_array_equal(ours.eval_steps_E, alone.eval_steps_E)
    for name, loss_E in alone.losses.items():
      np.testing.assert_allclose(ours.losses[name], loss_E, rtol=2e-6)
    wanted = trees.paths(checkpoint.load_params(path)[0])
    assert wanted.keys() == params.keys()
    for leaf, value in wanted.items():
      # Adam divides small gradients by their own size, rounding and all: what counts is the size of an update.
      np.testing.assert_allclose(params[leaf], value, atol=2e-3 * TRIALS[r].rate, rtol=1e-6, err_msg=leaf)
    # The same records, down to the rows: each trial's own stream.
    for file in ("config.json", "periods.json", "ledger.jsonl"):
      assert (twin / file).read_text() == (path / file).read_text(), file
    loader = pipeline.from_periods(json.loads((path / "periods.json").read_text()), 0)
    for now, given in enumerate(batches):
      for b in range(loader.batch_rows):
        for mine, row in zip(given[r], loader.row(now * loader.batch_rows + b), strict=True):
          np.testing.assert_array_equal(mine[b], row[0])
    lines = [[x for x in journal.read(d / "metrics.jsonl") if x["kind"] == "train"] for d in (twin, path)]
    for mine, single in zip(*lines, strict=True):
      assert mine["step"] == single["step"] and mine["tokens"] == single["tokens"] and mine["rate"] == single["rate"]
      assert mine["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert [x["rate"] for x in lines[0]] == [float(x) for x in schedule.from_config(config_lib.resolve(made))(np.arange(4))]
    summaries = [json.loads((d / "summary.json").read_text()) for d in (twin, path)]
    assert [s["step"] for s in summaries] == [4, 4] and summaries[0]["checkpoint"] == ""


def test_random_parameters_are_each_trials_own(config, one_device, tmp_path):
  base = config.start.hf
  config.start.hf, config.model.scratch, config.data.tokenizer = "", f"{base}/config.json", base
  wanted = [Trial(1e-3, 0.25, 8, 0), Trial(1e-3, 0.25, 8, 1)]
  with execute.TrialsBar(wanted) as bar:
    assert execute.run_trials(config, wanted, tmp_path, bar=bar, stack=2) == exits.DONE
  ours = [m.run for m in execute.finished(config, wanted, tmp_path)]
  assert ours[0].base("poetry") != ours[1].base("poetry")
  assert loop.run(trials.trial_config(config, wanted[1]), tmp_path / "alone") == exits.DONE
  alone = runs.read_run(tmp_path / "alone")
  np.testing.assert_allclose(ours[1].losses["poetry"], alone.losses["poetry"], rtol=2e-6)


def test_what_cannot_be_stacked_is_said(config, one_device, tmp_path):
  config.data.sources.poetry.at_end = "stop"
  wanted = [Trial(1e-3, 0.25, 3000, 0), Trial(1e-3, 0.25, 3000, 1)]
  with execute.TrialsBar(wanted) as bar, pytest.raises(ConfigError, match="runs out before its end"):
    execute.run_trials(config, wanted, tmp_path, bar=bar, stack=2)


def test_a_cpu_trains_one_trial_at_a_time_by_itself(config):
  assert execute.how_many(config) == 1


def test_as_many_trials_as_the_memory_holds(config, monkeypatch):
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 20_000_000}

  monkeypatch.setattr(execute.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(execute.jax, "devices", lambda: [Device()])
  many = execute.how_many(config)
  assert 5 < many < 20_000_000 * execute._MEMORY_FRAC / (40_000 * 20)
  config.train.batch_rows *= 2
  assert execute.how_many(config) < many
