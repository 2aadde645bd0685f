"""Predicted against measured: from a run's records, and through the tool as people call it."""

import json
import re

import pytest
from run_dirs import write_run

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.results import report, runs

PREDICTED = (("general", 3.1, 3.0, 3.2), ("poetry", 3.5, 3.4, 3.6))
PLAN = {
  "recommended": {
    "rate": 1e-3,
    "replay": 0.25,
    "losses": {name: {"loss": loss, "low": low, "high": high} for name, loss, low, high in PREDICTED},
  },
  "frontier": [{"rise": 0.05, "domain_loss": 3.6}, {"rise": 0.1, "domain_loss": 3.5}],
  "tokens": 400,
  "general_loss_rise": 0.1,
}


@pytest.fixture
def config(root):
  config = config_lib.load_file(str(root / "examples" / "plans" / "poetry.py"))
  config.plan.losses = PREDICTED
  return config


@pytest.fixture
def run_dir(config, tmp_path, monkeypatch, root):
  monkeypatch.chdir(root)
  write_run(tmp_path / "run", config, final=(3.15, 3.7))
  return tmp_path / "run"


def test_rows_are_what_the_config_recorded_beside_what_the_run_measured(run_dir):
  run = runs.read_run(run_dir)
  general, poetry = report.rows(run, report.recorded(run))
  assert (general.source, general.role, general.base, general.measured) == ("general", "replay", 3.0, 3.15)
  assert general.error == pytest.approx(0.05) and general.is_inside
  assert poetry.error == pytest.approx(0.2) and not poetry.is_inside


def test_a_run_that_left_its_plan_is_told(run_dir, config, tmp_path):
  (tmp_path / "plan").mkdir()
  (tmp_path / "plan" / "plan.json").write_text(json.dumps(PLAN))
  plan = report.read_plan(tmp_path / "plan")
  run = runs.read_run(run_dir)
  assert report.differences(run, plan) == []
  other = plan._replace(rate=2e-3, replay=0.1, tokens=800)
  lines = report.differences(run, other)
  assert [line.split(":")[0] for line in lines] == ["schedule.lr_peak", "replay share", "tokens"]
  assert "0.001 in the run, 0.002 in the plan" in lines[0]


def test_a_run_without_a_prediction_is_refused(run_dir, tmp_path):
  with pytest.raises(ConfigError, match=r"no prediction for its sources general, poetry.*cpt plan"):
    report.rows(runs.read_run(run_dir), {"law": (1.0, 0.9, 1.1)})
  with pytest.raises(ConfigError, match=r"no plan\.json there"):
    report.read_plan(tmp_path)


def test_a_source_has_the_same_colour_in_every_figure():
  two = report.colours(["poetry", "general"])
  assert two == report.colours(["general", "poetry"])  # whatever the order of the config
  assert len(set(two.values())) == 2
  alone = {name: report.colours([name])[name] for name in ("general", "poetry", "law", "zh")}
  assert alone["general"] == two["general"] == report.colours(["general", "poetry", "zh"])["general"]
  assert len(set(report.colours(f"source {i}" for i in range(6)).values())) == 6  # as many as there are colours


def test_a_wide_interval_does_not_flatten_the_curves(run_dir, tmp_path, monkeypatch):
  import matplotlib.figure

  run = runs.read_run(run_dir)
  seen = []
  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: seen.append(self.axes[0]))
  for wide in (0.1, 11.0):
    table = report.rows(run, {"general": (3.1, 3.0, 3.2), "poetry": (3.5, 3.5 - wide, 3.5 + wide)})
    report.figure(run, table, None, tmp_path / "report.png")
  usual, cut = seen
  moved = max(abs(run.losses[name] - run.base(name)).max() for name in run.losses)
  for ax in seen:
    low, high = ax.get_ylim()
    assert high - low < 5 * moved  # the curves fill a good part of the panel
  assert not any("from" in text for text in usual.get_legend_handles_labels()[1])
  assert "poetry, predicted; from -11.5 to +10.5" in cut.get_legend_handles_labels()[1]


def test_the_command_prints_the_table_and_draws_the_figure(run_dir, tmp_path, cpt):
  (tmp_path / "plan").mkdir()
  (tmp_path / "plan" / "plan.json").write_text(json.dumps(PLAN))
  done = cpt("report", f"--run={run_dir}", f"--plan={tmp_path / 'plan'}")
  assert done.returncode == 0, done.stderr
  assert "3.0000 to 3.2000" in done.stdout and "+0.2000" in done.stdout
  assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
  wrong = cpt("report", f"--run={tmp_path}")
  assert wrong.returncode == 78 and "not a run (no config.json)" in wrong.stderr


def test_a_run_without_a_plan_gets_its_losses_over_tokens(tiny_plan, tmp_path, cpt, monkeypatch):
  import matplotlib.figure

  drawn = []
  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
  write_run(tmp_path / "run", tiny_plan, final=(3.25, 3.5), base=(3.0, 4.0), read=(100, 300))
  done = cpt("report", f"--run={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  assert re.search(r"general +replay +100 +3.0000 +3.2500 +\+0.2500 +forgetting", done.stdout), done.stdout
  assert re.search(r"poetry +domain +300 +4.0000 +3.5000 +-0.5000 +learning", done.stdout), done.stdout
  [ax] = drawn
  lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines() if "(" in line.get_label()}
  assert lines["poetry (domain)"][-1] == [400, -0.5] and lines["general (replay)"][-1] == [400, 0.25]
  assert ax.get_xlabel() == "tokens trained on"
