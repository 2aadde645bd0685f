"""What was measured for docs/results/experiments.md, section 2, and the tools that make and read it; nothing is trained."""

import json

import numpy as np
import pytest

from tools.experiments import vocab_results, vocab_where


def of_committed(root):
  return sorted((root / "tools" / "experiments" / "measured" / "vocabulary").glob("*.jsonl"))


def test_the_documented_tables_are_those_of_the_committed_files(root):
  text = set((root / "docs" / "results" / "experiments.md").read_text(encoding="utf-8").splitlines())
  files = of_committed(root)
  assert [path.stem for path in files] == ["tech", "zh"]
  lines = [line for path in files for line in vocab_results.report(vocab_results.Experiment(path)) if line]
  assert len(lines) > 80 and not [line for line in lines if line not in text]


def test_the_committed_runs_are_whole(root):
  """Every band with three seeds or six, on the same documents and steps as the base as it is."""
  for path in of_committed(root):
    data = vocab_results.Experiment(path)
    for arm in ("none", *vocab_results.bands_of(data)):
      runs = data.runs(arm)
      assert sorted(runs) == list(range(3 if data.name == "zh" else 6)), arm
      assert all(r["steps"] == data.steps and len(r["eval_steps"]) == data.steps // 6 + 1 for r in runs.values())
      assert len({json.dumps(r["growth"]) for r in runs.values()}) == 1  # one base for all seeds
      assert all(r["nats"]["domain"][0] == runs[0]["nats"]["domain"][0] for r in runs.values())


def test_parts_of_a_shock_add_up_to_what_the_runs_measured(root):
  """Two ways to the same number: the evaluation of a run before its first step, and the scores of vocab_where.py."""
  for path in of_committed(root):
    data = vocab_results.Experiment(path)
    assert len(data.where) >= 2 * len(vocab_results.bands_of(data))
    for (arm, source), record in data.where.items():
      assert record["total"] == pytest.approx(sum(record[part] for part in ("softmax", "context", "changed")), abs=3e-5)
      shock = data.effects([(arm, "none")], source=source, at=0)[arm, "none"].mean
      assert record["total"] == pytest.approx(shock, abs=0.02), (path, arm, source)


def test_parts_of_a_difference():
  """Of four bytes that targets spell: kept tokens lose 2 nats, 0.5 of them to new ids; the changed one gains 3."""
  lengths_W = np.array([1, 1, 1, 2])
  before = vocab_where.Scored(np.array([0, 1, 0, 0, 2]), np.array([0.0, 1.0, 4.0, 2.0, 1.0]), np.array([0.0, 1.0, 4.0, 2.0, 1.0]))
  after = vocab_where.Scored(np.array([0, 1, 3, 2]), np.array([0.0, 2.0, 3.0, 2.0]), np.array([0.0, 1.7, 9.0, 1.8]))
  found = vocab_where.where([before], [after], lengths_W=lengths_W)
  bits = {name: nats / np.log(2) / 4 for name, nats in dict(total=-1.0, softmax=0.5, context=1.5, changed=-3.0).items()}
  assert found == pytest.approx(bits | {"kept": 3}, abs=1e-5)
