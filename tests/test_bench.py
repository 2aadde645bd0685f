"""tools/bench.py works and writes what it promises; never a word about how long anything took."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

# Each section with the keys of its JSON, and the number of rows in its table.
SECTIONS = {
  "step": {
    "shape",
    "cores",
    "optimizer",
    "steps",
    "losses",
    "loss_difference",
    "skipped",
    "samples",
    "secs",
    "positions_per_sec",
    "ratios",
  },
  "overhead": {"block_steps", "sizes"},
  "loader": {"training_positions_per_sec", "shapes"},
  "prepare": {"text_bytes", "store", "workers"},
  "memory": {"models"},
  "startup": {"starts", "is_shipped_base"},
}
HEADER = {
  "section",
  "quick",
  "seed",
  "versions",
  "cpu",
  "platform",
  "commit",
  "load_before",
  "load_after",
  "is_noisy",
  "elapsed_secs",
}


@pytest.fixture
def bench(root, tmp_path):
  """Runs a section: its JSON and what was printed."""

  def run(section, *more):
    command = [
      sys.executable,
      root / "tools" / "bench.py",
      "--quick",
      "--force",
      f"--sections={section}",
      f"--output={tmp_path}",
      *more,
    ]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{section}.json").read_text())
    assert set(record) == HEADER | SECTIONS[section]
    assert record["section"] == section and record["quick"] and "jax" in record["versions"]
    return record, done.stdout

  return run


@pytest.fixture
def bench_step(root, monkeypatch):
  monkeypatch.syspath_prepend(root / "tools")
  import bench_step

  return bench_step


def stats_of(samples):
  return set(samples) == {"min", "median", "mad", "mean"} and samples["min"] <= samples["median"]


def test_loader(bench):
  record, printed = bench("loader")
  assert [(s["rows"], s["row_len"]) for s in record["shapes"]] == [(8, 2048), (16, 256)]
  for shape in record["shapes"]:
    assert stats_of(shape["rows_per_sec"])
    assert shape["positions_per_sec"] == pytest.approx(shape["rows_per_sec"]["median"] * shape["row_len"])
    assert shape["times_training"] == pytest.approx(shape["positions_per_sec"] / record["training_positions_per_sec"])
  assert "loader alone" in printed


def test_overhead(bench):
  record, printed = bench("overhead")
  (size,) = record["sizes"]
  pairs = list(zip(size["samples"]["bare_secs"], size["samples"]["loop_secs"], strict=True))
  assert size["overhead"]["median"] == pytest.approx(np.median([(loop - bare) / bare for bare, loop in pairs]))
  assert set(size["host_secs"]) == {"rows", "to_device", "dispatch"}
  assert "loop less bare step" in printed


def test_prepare(bench):
  record, _ = bench("prepare")
  assert record["text_bytes"] >= 200_000
  assert record["store"]["num_bytes"] == record["text_bytes"]
  assert {number: len(r["samples"]["wall_secs"]) for number, r in record["workers"].items()} == {"1": 1, "2": 1}


@pytest.mark.slow
def test_memory(bench):
  record, _ = bench("memory")
  (model,) = record["models"]
  assert model["num_layers"] == 1 and model["params_bytes"] > 100_000_000


@pytest.mark.slow
def test_startup(bench):
  record, _ = bench("startup")
  assert set(record["starts"]) == {
    "import cpt_jax.main",
    "import cpt_jax.train.loop",
    "quickstart, first start ever",
    "quickstart, nothing compiled",
    "quickstart, compiled before",
  }
  for what, start in record["starts"].items():
    assert len(start["samples"]["wall_secs"]) == 1
    assert not what.startswith("quickstart") or start["first_step_secs"]["min"] < start["wall_secs"]["min"]


@pytest.mark.slow
def test_step_without_peers(bench):
  record, printed = bench("step", "--nopeers")
  assert set(record["secs"]) == {"cpt_jax step", "cpt_jax loop"} and set(record["skipped"]) == {"HF Trainer", "HF model + AdamW"}
  assert record["loss_difference"]["cpt_jax loop"] < 1e-6
  assert len(record["samples"]["cpt_jax step"][0]["wall_secs"]) == record["steps"]["timed"]
  assert "skipped: needs --nopeers" in printed


@pytest.mark.parity
def test_step_beside_hugging_face(bench):
  record, _ = bench("step")
  assert max(record["loss_difference"].values()) < 1e-5
  assert set(record["ratios"]) == {"cpt_jax loop / HF Trainer", "cpt_jax step / HF model + AdamW"}


def test_a_busy_machine_is_refused(root, tmp_path):
  busy = "import sys; sys.path.insert(0, 'tools'); import bench; bench.load = lambda: 9.0; bench.app.run(bench.main)"
  command = [sys.executable, "-c", busy, f"--output={tmp_path / 'out'}"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
  assert done.returncode == 3 and "noisy: load average 9.00" in done.stderr
  assert not (tmp_path / "out").exists()


def test_unknown_section_is_refused(root):
  command = [sys.executable, "tools/bench.py", "--sections=stpe"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
  assert done.returncode == 78 and "stpe" in done.stderr and "step,overhead" in done.stderr


def test_clock_leaves_out_the_warm_up(bench_step):
  clock = bench_step.Clock()
  clock._ticks = [(0.0, 0.0), (5.0, 9.0), (6.0, 10.0), (8.0, 13.0)]
  assert clock.seconds(skip=1) == {"wall_secs": [1.0, 2.0], "cpu_secs": [1.0, 3.0]}


def test_batches_for_both_sides_predict_the_same_positions(bench_step):
  tokens = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32)
  batch = bench_step.batch_of(tokens)
  is_counted = batch.weights_BT > 0
  # Hugging Face's loss: logits of positions [0, T-1) against labels [1, T).
  assert is_counted.sum() == tokens[:, 1:].size
  np.testing.assert_array_equal(batch.targets_BT[is_counted], tokens[:, 1:].ravel())
  np.testing.assert_array_equal(batch.positions_BT[0], np.arange(4))
