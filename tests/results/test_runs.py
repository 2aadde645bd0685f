"""Run directories as arrays, and trials that are taken over, gone on with, or refused."""

import json
import shlex
import shutil
import types

import numpy as np
import pytest
from run_dirs import write_run

from cpt_jax import config as config_lib, exits, main
from cpt_jax.config import ConfigError
from cpt_jax.planning import execute, outcome, trials
from cpt_jax.planning.trials import Trial
from cpt_jax.results import runs
from cpt_jax.training import loop

TRIALS = [Trial(1e-3, 0.25, 8, 0), Trial(2e-3, 0.0, 8, 1), Trial(4e-3, 0.5, 16, 0)]


def test_a_run_directory_is_read_as_arrays(tiny_plan, tmp_path):
  config = trials.trial_config(tiny_plan, Trial(4e-3, 0.5, 16, 2))
  write_run(tmp_path / "a", config, final=(3.25, 2.5))
  run = runs.read_run(tmp_path / "a")
  assert run.eval_steps_E.tolist() == [0, 16] and run.losses["poetry"].tolist() == [4.0, 2.5]
  assert (run.base("general"), run.final("general"), run.replay, run.num_tokens) == (3.0, 3.25, 0.25, 400)
  assert run.is_complete and run.seed == 2 and run.rate == 4e-3 and run.rates_S.max() == pytest.approx(4e-3)
  assert len(run.rates_S) == 16 and run.rates_S[-1] < 1e-3 and run.roles == {"general": "replay", "poetry": "domain"}
  record = json.loads((tmp_path / "a" / "config.json").read_text())
  del record["train"]["stages"], record["plan"]  # as an older version wrote it
  (tmp_path / "a" / "config.json").write_text(json.dumps(record))
  again = runs.read_run(tmp_path / "a").config
  assert again.train.stages == () and list(again.data.sources) == ["general", "poetry"] and again.plan.losses == ()
  write_run(tmp_path / "b" / "c", config, final=(3.25, 2.5), complete=False)
  assert [(r.path.name, r.is_complete) for r in runs.read_runs(tmp_path)] == [("a", True), ("c", False)]
  for path in (tmp_path, tmp_path / "b"):
    with pytest.raises(ConfigError, match="not a run"):
      runs.read_run(path)
  (tmp_path / "a" / "metrics.jsonl").write_text("")
  with pytest.raises(ConfigError, match="no evaluation yet"):
    runs.read_run(tmp_path / "a")
  with pytest.raises(ConfigError, match="no run there"):
    runs.read_runs(tmp_path / "empty")


@pytest.fixture
def trained(monkeypatch):
  """loop.run_stack that writes what its runs leave, at once; lists what it was asked for."""
  trained = types.SimpleNamespace(asked=[], stop_at=None)

  def run_stack(made, workdirs, *, bar):
    trained.asked.append([workdir.name for workdir in workdirs])
    stopped = trained.stop_at is not None and len(trained.asked) > trained.stop_at
    diverged = ["nan" if config.schedule.lr_peak > 1 else "" for config in made]
    for config, workdir in zip(made, workdirs, strict=True):
      write_run(workdir, config, final=(3.1, 3.5), complete=config.schedule.lr_peak < 1 and not stopped)
      if len(made) == 1:
        (workdir / "ckpt" / "8").mkdir(parents=True, exist_ok=True)
    if all(diverged):
      raise FloatingPointError(*diverged)
    return exits.STOPPED if stopped else exits.DONE, diverged

  monkeypatch.setattr(loop, "run_stack", run_stack)
  return trained


def run_all(config, wanted, folder, **options):
  with execute.TrialsBar(wanted) as bar:
    return execute.run_trials(config, wanted, folder, bar=bar, **options)


def files(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_probe_that_was_stopped_goes_on_and_makes_nothing_twice(tiny_plan, trained, tmp_path, capsys):
  trained.stop_at = 1
  assert run_all(tiny_plan, TRIALS, tmp_path) == exits.STOPPED
  assert trained.asked == [[TRIALS[0].name], [TRIALS[1].name]]
  over = files(tmp_path / TRIALS[0].name)
  trained.asked.clear()
  trained.stop_at = None
  assert run_all(tiny_plan, TRIALS, tmp_path) == exits.DONE
  assert trained.asked == [[TRIALS[1].name], [TRIALS[2].name]] and files(tmp_path / TRIALS[0].name) == over
  assert not list(tmp_path.rglob("ckpt"))
  assert "3/3  " + TRIALS[2].name in capsys.readouterr().out
  found = execute.finished(tiny_plan, TRIALS, tmp_path)
  assert [m.trial for m in found] == TRIALS and all(m.run.final("poetry") == 3.5 for m in found)
  assert run_all(tiny_plan, TRIALS, tmp_path) == exits.DONE and len(trained.asked) == 2


def test_a_trial_that_diverged_is_recorded_and_not_tried_again(any_rate, tiny_plan, trained, tmp_path):
  wanted = [Trial(2.0, 0.25, 8, 0), *TRIALS]
  for _ in range(2):
    assert run_all(tiny_plan, wanted, tmp_path) == exits.DONE
  assert len(trained.asked) == 4
  found = execute.finished(tiny_plan, wanted, tmp_path)
  assert [bool(m.diverged) for m in found] == [True, False, False, False] and "nan" in found[0].diverged
  cells = outcome.cells_of(found)
  assert np.isnan([cell.losses["poetry"] for cell in cells]).tolist() == [True, False, False, False]
  # What it would have read: as the trial with the same share, which did not diverge.
  assert cells[0].replay == cells[1].replay == 0.25 and cells[0].tokens == cells[1].tokens == 400


def test_stacks_hold_trials_of_one_length_and_none_that_was_begun(any_rate, tiny_plan, trained, tmp_path, monkeypatch):
  wanted = [*TRIALS, Trial(8.0, 0.5, 8, 0), Trial(3e-3, 0.5, 8, 1), Trial(5e-3, 0.5, 8, 1)]
  write_run(tmp_path / wanted[5].name, trials.trial_config(tiny_plan, wanted[5]), final=(3, 3), complete=False)
  monkeypatch.setattr(execute.checkpoint, "saved_steps", lambda path: [4])
  assert run_all(tiny_plan, wanted, tmp_path, stack=2) == exits.DONE
  names = [trial.name for trial in wanted]
  assert sorted(trained.asked) == sorted([[names[0], names[1]], [names[3], names[4]], [names[5]], [names[2]]])
  assert [m.trial for m in execute.finished(tiny_plan, wanted, tmp_path) if m.diverged] == [wanted[3]]


def test_runs_made_by_hand_are_found_and_others_are_refused(tiny_plan, tmp_path):
  for trial in TRIALS:
    config = trials.trial_config(tiny_plan, trial)
    config.eval.every, config.log.every = "10%", 7  # what changes no update and no last evaluation
    write_run(tmp_path / trial.name, config, final=(3.1, 3.5))
  record = json.loads((tmp_path / TRIALS[0].name / "config.json").read_text())
  del record["plan"], record["data"]["sources"]["general"]["max_epochs"]  # a version that did not know these keys
  (tmp_path / TRIALS[0].name / "config.json").write_text(json.dumps(record))
  assert sorted(execute.found_trials(tiny_plan, tmp_path)) == sorted(TRIALS)
  other = trials.trial_config(tiny_plan, TRIALS[1])
  other.optimizer.b2, other.data.heldout_frac = 0.99, 0.2
  write_run(tmp_path / TRIALS[1].name, other, final=(3.1, 3.5))
  shutil.copytree(tmp_path / TRIALS[2].name, tmp_path / "copy")
  with pytest.raises(ConfigError) as error:
    execute.found_trials(tiny_plan, tmp_path)
  for part in ("optimizer.b2: 0.99 -> 0.95", "data.heldout_frac: 0.2 -> 0.1", TRIALS[1].name, f"the trial {TRIALS[2].name}"):
    assert part in str(error.value)
  with pytest.raises(ConfigError, match="another config"):
    run_all(tiny_plan, TRIALS, tmp_path)


def test_command_lines_make_the_same_trials(tiny_plan, tmp_path):
  folder = tmp_path / "a folder"
  folder.mkdir()
  write_run(folder / TRIALS[0].name, trials.trial_config(tiny_plan, TRIALS[0]), final=(3.1, 3.5))
  commands, array = execute.write_commands(tiny_plan, TRIALS, folder, slurm=True)
  lines = [shlex.split(line) for line in commands.read_text().splitlines()]
  assert len(lines) == 2 and f"--array=1-{len(lines)}\n" in array.read_text()
  for (*command, config, workdir), trial in zip(lines, TRIALS[1:], strict=True):
    assert command == ["python", "-m", main.__name__]
    loaded = config_lib.load_file(config.removeprefix("--config="))
    assert execute.config_json(loaded) == execute.config_json(trials.trial_config(tiny_plan, trial))
    assert workdir == f"--workdir={folder / trial.name}"


def measured(rate, loss, tmp_path, tiny_plan, *, diverged=""):
  trial = Trial(rate, 0.25, 8, 0)
  write_run(tmp_path / trial.name, trials.trial_config(tiny_plan, trial), final=(3.1, loss))
  return outcome.FinishedTrial(trial, runs.read_run(tmp_path / trial.name), diverged)


@pytest.mark.parametrize(
  "losses, highest",
  [
    ([3.8, 3.6, 3.5, 3.52, 3.6, 3.5], 3),  # up to the last before it leaves the lowest
    ([3.8, 3.6, 3.5, 3.4], 3),
    ([3.8, 3.6, "nan", 3.5], 1),
    ([3.8, 4.1], 0),  # worse than the base
    ([4.2, 3.5], None),
    ([3.9, 3.84, 3.7, 3.66], 3),  # low rates that have not arrived yet are no reason
  ],
)
def test_the_highest_stable_rate_is_below_the_first_that_is_not(losses, highest, tiny_plan, tmp_path):
  rates = [1e-3 * 2**k for k in range(len(losses))]
  found = [
    measured(rate, 3.0 if loss == "nan" else loss, tmp_path, tiny_plan, diverged="" if loss != "nan" else "nan")
    for rate, loss in zip(rates, losses, strict=True)
  ]
  assert outcome.highest_stable(found) == (None if highest is None else rates[highest])
  ladder = [m.trial for m in found]
  stop = next((i for i, m in enumerate(found) if not outcome.is_stable(m, found)), len(found) - 1)
  assert execute.is_swept(found[: stop + 1], ladder) and not execute.is_swept(found[:stop], ladder)


def test_a_sweep_ends_at_the_first_rate_that_is_not_stable(tiny_plan, trained, any_rate, tmp_path):
  ladder = [Trial(rate, 0.25, 8, 0) for rate in (1e-3, 1e-2, 2.0, 4.0, 8.0)]
  for stack, made in ((1, 3), (2, 4)):
    folder = tmp_path / str(stack)
    with execute.TrialsBar(ladder) as bar:
      found, code = execute.sweep(tiny_plan, ladder, folder, bar=bar, stack=stack)
    assert code == exits.DONE and len(found) == made and outcome.highest_stable(found) == 1e-2


def test_cells_hold_the_shares_and_tokens_that_were_read(tiny_plan, tmp_path):
  found = []
  for seed, read in ((0, (30, 970)), (1, (34, 966))):
    trial = Trial(1e-3, 0.01, 8, seed)
    write_run(tmp_path / trial.name, trials.trial_config(tiny_plan, trial), final=(3.1, 3.5 + seed), read=read)
    found.append(outcome.FinishedTrial(trial, runs.read_run(tmp_path / trial.name), ""))
  cells = outcome.cells_of(found)
  assert [cell.replay for cell in cells] == [0.032, 0.032] and [cell.tokens for cell in cells] == [1000, 1000]
  assert [cell.losses["poetry"] for cell in cells] == [3.5, 4.5] and cells[0].base == {"general": 3.0, "poetry": 4.0}
  assert outcome.trained_tokens(found, budget_tokens=1024 * 50, tokens_per_step=128) == 50_000
  with pytest.raises(ConfigError, match="every trial diverged"):
    outcome.trained_tokens([m._replace(diverged="nan") for m in found], budget_tokens=1, tokens_per_step=1)
