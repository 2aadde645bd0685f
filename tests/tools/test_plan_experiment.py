"""What was measured for docs/results/experiments.md, and the tool that reads and makes such files; no law is fitted here."""

import json

import pytest
from run_dirs import write_run

from cpt_jax import config as config_lib
from cpt_jax.planning import trials
from tools.experiments import plan_experiment


@pytest.mark.parametrize(
  ("name", "general", "domain", "num_controls"), [("poetry", 0.0724, -0.4053, 4), ("legal", 0.4289, -1.2292, 0)]
)
def test_the_documented_grid_is_that_of_the_file(root, name, general, domain, num_controls):
  data = plan_experiment.MeasuredRuns(root / "tools" / "experiments" / "measured" / "plans" / f"{name}.jsonl")
  assert (data.rates, data.replays) == ([3e-4, 6e-4, 1.2e-3, 2.4e-3], [0.0, 0.01, 0.05, 0.1, 0.25, 0.5])
  assert (len(data.grid), len(data.off_grid), len(data.control)) == (48, 6, num_controls)
  assert plan_experiment._mean_change(data, "general", (6e-4, 0.0)) == pytest.approx(general, abs=5e-5)
  assert plan_experiment._mean_change(data, name, (6e-4, 0.0)) == pytest.approx(domain, abs=5e-5)
  grid = {plan_experiment._place(r) for r in data.grid}
  assert not grid & {plan_experiment._place(r) for r in data.off_grid}  # what is held out was not fitted
  row = plan_experiment.Outcome(data, "general", "", "", [r["losses"]["general"][-1] + 0.1 for r in data.off_grid], data.off_grid)
  assert row["mae"] == pytest.approx(0.1) and row["bias"] == pytest.approx(0.1) and not row["is_met"]


def test_run_directories_become_such_a_file(root, tmp_path, monkeypatch):
  monkeypatch.chdir(root)
  config = config_lib.load_file("examples/plans/poetry.py")
  for seed in (0, 1):
    made = trials.trial_config(config, trials.Trial(6e-4, 0.25, 8, seed))
    write_run(tmp_path / "runs" / str(seed), made, final=(3.1, 3.6), complete=seed == 0)
  assert plan_experiment.main(["--collect", str(tmp_path / "runs"), "--output", str(tmp_path / "out" / "measured.jsonl")]) == 0
  [record] = map(json.loads, (tmp_path / "out" / "measured.jsonl").read_text().splitlines())  # the other one is not complete
  assert (record["rate"], record["replay"], record["seed"], record["tokens"]) == (6e-4, 0.25, 0, 8 * 8 * 256)
  assert record["losses"] == {"general": [3.0, 3.1], "poetry": [4.0, 3.6]} and len(record["rates"]) == 8
  assert plan_experiment.main(["--output", str(tmp_path)]) == 78
