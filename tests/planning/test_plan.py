"""cpt plan as its user runs it, from a config to the config of the recommended run."""

import json
import math
import os
import subprocess
import sys

import pytest
from run_dirs import write_run

import cpt_jax
from cpt_jax import config as config_lib
from cpt_jax.cli import app
from cpt_jax.planning import config_files, design, trials
from cpt_jax.store import prepare

SMALL = ["--rates=1e-3,4e-3", "--replays=0.05,0.25", "--seeds=1", "--longer=2", "--trial_tokens=1024"]


@pytest.fixture
def file(tiny_plan, tmp_path):
  """The config's."""
  config_files.write(tiny_plan, tmp_path / "run.py", about="A run to be planned.")
  return tmp_path / "run.py"


@pytest.fixture
def plan(file, tmp_path, capsys, monkeypatch, one_device):
  """Runs the command in this process, in the directory of its config: (exit code, printed, complained)."""
  monkeypatch.chdir(tmp_path)

  def run(*options):
    code = app.main(["plan", "--config=run.py", "--output=plan", *options])
    said = capsys.readouterr()
    return code, said.out, said.err

  return run


def losses(trial):
  """Forgetting grows with the rate and falls with replay, learning grows with rate and length."""
  t = trial.steps / 8
  forgotten = 0.1 * (trial.rate / 2e-3) * t**0.3 * math.log(1.5 / (trial.replay + 0.02))
  learnt = 0.5 * math.log1p(2 * trial.rate / 1e-3 * t) * (1 - trial.replay) ** 0.3
  noise = 0.01 * math.sin(1e5 * trial.rate + 50 * trial.replay + trial.steps)
  return 3.0 + forgotten + noise, 4.0 - learnt - noise


def files(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_finished_trials_become_a_plan_and_a_config(plan, tiny_plan, tmp_path):
  made = design.make(tiny_plan, rates=[1e-3, 4e-3], replays=[0.05, 0.25], seeds=1, longer=[2], trial_tokens="1024")
  by_hand = trials.Trial(2e-3, 0.25, 32, 0)  # of no design, and taken all the same
  for trial in [*made.trials(), by_hand]:
    share = round(128 * trial.steps * trial.replay)
    made_config = trials.trial_config(tiny_plan, trial)
    write_run(
      tmp_path / "plan" / "trials" / trial.name, made_config, final=losses(trial), read=(share, 128 * trial.steps - share)
    )
  before = files(tmp_path / "plan" / "trials")
  code, printed, complained = plan(*SMALL, "--budget=16384", "--general_loss_rise=0.3")
  assert code == 0, complained
  assert files(tmp_path / "plan" / "trials") == before
  said = json.loads((tmp_path / "plan" / "plan.json").read_text())
  best = said["recommended"]
  assert len(said["cells"]) == len(made.trials()) + 1 and said["tokens"] == 16384
  assert best["is_allowed"] and best["rise"] <= 0.3
  assert {x["law"] for x in said["laws"]["general"]["held_out"]} > {"replay_multiplicative", "nearest_cell", "mean"}
  for name in ("frontier.png", "fit.png"):
    assert (tmp_path / "plan" / name).read_bytes()[:4] == b"\x89PNG"

  config = config_lib.resolve(config_lib.load_file(str(tmp_path / "plan" / "config.py")))
  assert config_lib.num_steps(config) * config_lib.tokens_per_step(config) == 16384
  assert config.schedule.lr_peak == pytest.approx(best["rate"], rel=1e-4)
  assert config.data.sources.general.share[0][1] == pytest.approx(best["replay"], rel=1e-4)
  assert [name for name, *_ in config.plan.losses] == ["general", "poetry"]
  for name, loss, low, high in config.plan.losses:
    assert low < loss < high and loss == pytest.approx(best["losses"][name]["loss"], abs=1e-4)
  free = ("schedule.", "data.sources.", "plan.", "train.length")
  same = [k for k in config_lib.leaf_keys(tiny_plan) if not k.startswith(free)]
  assert [config_lib.get(config, k) for k in same] == [config_lib.get(config_lib.resolve(tiny_plan), k) for k in same]
  for part in ("rate by replay share", "chosen", "simple guess", "seed noise not known", "frontier", "double the rate", "next  "):
    assert part in printed, part


def test_the_design_is_shown_and_nothing_is_made(plan, tmp_path):
  before = files(tmp_path)
  code, printed, complained = plan("--budget=10B tokens", "--probe_budget=5%", "--dry_run")
  assert code == 0, complained
  for part in ("rate sweep", "grid", "2x as long", "% of the run's 10,000,000,000", "times as long as the longest trial"):
    assert part in printed, part
  assert files(tmp_path) == before


def test_a_dry_run_refuses_what_the_trials_would(plan, tiny_plan, root, tmp_path):
  dry = [*SMALL, "--dry_run"]
  stores = ["--config.data.sources.poetry.text=", "--config.data.sources.poetry.store=nowhere"]
  assert plan(*dry, *stores)[::2] == (78, plan(*SMALL, *stores)[2]) and "no such token store" in plan(*dry, *stores)[2]
  other = [f"--config.data.tokenizer={root / 'examples' / 'base'}"]  # not that of the stores, once they are made
  assert plan(*dry)[0] == 0  # they are made of their texts
  corpus = tiny_plan.data.sources.general.text
  prepare.prepare([corpus], tokenizer=tiny_plan.start.hf, output="made", progress=False)
  made = [f"--config.data.sources.{name}.{key}" for name in ("general", "poetry") for key in ("store=made", "text=")]
  assert plan(*dry, *made)[0] == 0
  code, _, complained = plan(*dry, *made, *other)
  assert code == 78 and "made with tokenizer" in complained
  code, _, complained = plan(*dry, "--config.data.sources.general.text=gone.jsonl", "--config.data.sources.general.store=new")
  assert code == 78 and "gone.jsonl" in complained
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  "options, parts",
  [
    (["--budget=1e6"], ["--probe_budget=2%", "It takes", "--replays"]),
    (["--config.schedule.lr_paek=1"], ["Did you mean schedule.lr_peak"]),
    ([*SMALL, "--weights=general=1,verse=1"], ["there is no source verse"]),
    ([*SMALL, "--weights=general=1", "--general_loss_rise=0.1"], ["two objectives"]),
    ([*SMALL, "--replays=0;0.1"], ["--replays=0;0.1"]),
    ([*SMALL, "--config.data.sources.general.role=domain"], ["none has role 'replay'"]),
    (["--output="], ["--output is empty"]),
    (["--config=run.yaml"], ["run.yaml: no such file"]),
  ],
)
def test_wrong_input_is_named_with_the_fix(plan, options, parts):
  code, _, complained = plan(*options)
  assert code == 78
  for part in parts:
    assert part in complained, complained


def test_an_output_with_another_plan_is_refused(plan, tiny_plan, tmp_path):
  other = tiny_plan.copy_and_resolve_references()
  other.train.batch_rows = 8
  trial = trials.Trial(1e-3, 0.05, 8, 0)
  write_run(tmp_path / "plan" / "trials" / trial.name, trials.trial_config(other, trial), final=(3.0, 3.0))
  code, _, complained = plan(*SMALL)
  assert code == 78 and "train.batch_rows: 8 -> 4" in complained


def test_command_lines_are_written_for_the_sweep_first(plan, tmp_path):
  code, printed, complained = plan("--commands", "--slurm", "--trial_tokens=1024")
  assert code == 0 and "give the same command again" in printed, complained
  lines = (tmp_path / "plan" / "trials" / "commands.txt").read_text().splitlines()
  assert len(lines) == len(design.LADDER) and all("replay0.25-steps8-seed0" in line for line in lines)
  assert (tmp_path / "plan" / "trials" / "array.sh").exists()


def test_a_plan_from_a_notebook(tiny_plan, tmp_path, one_device):
  options = {"rates": [1e-3, 4e-3], "replays": [0.05, 0.25], "seeds": 1, "longer": (), "trial_tokens": "1024"}
  made = cpt_jax.plan(tiny_plan, output=tmp_path / "plan", weights={"poetry": 1}, dry_run=True, **options)
  assert (made.exit_code, made.recommendation, made.config) == (0, None, tmp_path / "plan" / "config.py")
  assert [(t.rate, t.replay) for t in made.design.trials()] == [(1e-3, 0.05), (1e-3, 0.25), (4e-3, 0.05), (4e-3, 0.25)]


@pytest.mark.slow
def test_from_nothing_to_a_run_that_shows_prediction_and_result(file, root, tmp_path):
  def cpt(*command):
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", "from cpt_jax.cli import app; app.entry()", *command]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  options = [*SMALL, "--rates=2e-3,8e-3", "--replays=0.05,0.5", "--seeds=2", "--stack=4", "--general_loss_rise=5"]
  command = ["plan", f"--config={file}", "--output=plan", *options, "--budget=32 steps"]
  first = cpt(*command)
  before = files(tmp_path / "plan" / "trials")
  again = cpt(*command)
  assert files(tmp_path / "plan" / "trials") == before
  assert again.split("objective")[1] == first.split("objective")[1]
  trained = [cpt("train", "--config=plan/config.py", "--workdir=run", *more) for more in (["--dry_run"], [])]
  assert "what the plan had predicted" in trained[1]
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  said = json.loads((tmp_path / "plan" / "plan.json").read_text())["recommended"]["losses"]
  assert {row["source"]: row["predicted"]["loss"] for row in summary["sources"]} == pytest.approx(
    {name: predicted["loss"] for name, predicted in said.items()}, abs=1e-4
  )
