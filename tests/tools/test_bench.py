"""tools/bench/bench.py works and writes what it promises; never a word about how long anything took."""

import json
import os
import subprocess

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tools.bench import bench as bench_lib, bench_data, bench_data_sides, bench_endurance, bench_memory, bench_samples, bench_step

# Each section with the keys of its JSON.
SECTIONS = {
  "step": "shape cores optimizer steps losses loss_difference skipped samples secs positions_per_sec ratios",
  "loss": "cores timed rounds shapes",
  "overhead": "block_steps sizes",
  "loader": "training_positions_per_sec shapes",
  "mixture": "row_len fixed packed skipped",
  "seek": "sides skipped",
  "prepare": "text_bytes store workers tokenized speed_ratio large_bytes large skipped",
  "memory": "models",
  "endurance": "steps slope_bytes_per_1000_steps starts",
  "startup": "starts is_shipped_base",
}
SECTIONS["step_5m"] = SECTIONS["step"]
HEADER = "section quick seed versions cpu platform commit load_before load_after is_noisy elapsed_secs"


@pytest.fixture
def bench(root, tmp_path):
  """Runs a section: its JSON and what was printed."""

  def run(section, *more):
    command = bench_samples.command("bench", "--quick", "--force", f"--sections={section}", f"--output={tmp_path}", *more)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{section}.json").read_text())
    assert set(record) == set(HEADER.split()) | set(SECTIONS[section].split())
    assert record["section"] == section and record["quick"] and "jax" in record["versions"]
    return record, done.stdout

  return run


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


@pytest.mark.slow
@pytest.mark.parametrize("section", sorted(SECTIONS.keys() - {"loader"}))
def test_every_section_writes_what_it_promises(bench, section):
  record, _ = bench(section, "--nopeers")
  if section.startswith("step"):
    assert set(record["secs"]) == {"cpt_jax step", "cpt_jax loop"} and record["loss_difference"]["cpt_jax loop"] < 1e-6
  elif section == "loss":
    assert 0 < max(record["shapes"][0]["errors"].values()) < 1e-6
  elif section == "prepare":
    assert record["store"]["num_bytes"] == record["text_bytes"] and not record["speed_ratio"]
  elif section == "endurance":  # what is compiled after the first step
    first, second = record["starts"]
    assert not first["late"] and set(second["late"]) <= {"jit(eval_step)", "jit(_norms)", "jit(_rows)"}


@pytest.mark.parity
@pytest.mark.parametrize("section", ["mixture", "seek", "prepare"])
def test_peers_are_measured_or_skipped_by_name(bench, section):
  record, printed = bench(section)
  if section == "prepare":
    sides = set(record["tokenized"])
    wanted = {"cpt_jax", "datatrove"}
  else:
    entries = record["fixed"] if section == "mixture" else record["sides"]
    sides = {entry["side"] for entry in entries}
    wanted = sides | {side for side in record["skipped"] if side.startswith(("HF", "mosaic"))}
    assert any(side.startswith("HF") for side in wanted) and any(side.startswith("mosaic") for side in wanted)
  assert wanted == sides | set(record["skipped"]) and not sides & set(record["skipped"])
  assert all("Error" in why for why in record["skipped"].values()) and ("skipped" in printed) == bool(record["skipped"])


def test_rows_are_extrapolated_on_a_line_through_those_measured():
  turns = {
    0: [{"wall_secs": [1.0], "cpu_secs": [0.5]}],
    100: [{"wall_secs": [4.0], "cpu_secs": [0.5]}, {"wall_secs": [2.0], "cpu_secs": [0.5]}],
  }
  measured, extrapolated = bench_data._at(turns, 100), bench_data._at(turns, 1000)
  assert measured["first"] == {"wall_secs": 3.0, "cpu_secs": 0.5} and measured["measured_at"] == 100
  assert extrapolated["first"] == {"wall_secs": pytest.approx(21.0), "cpu_secs": 0.5} and extrapolated["measured_at"] == 100


def test_noise_is_not_extrapolated():
  turns = {row: [{"wall_secs": [secs], "cpu_secs": [secs]}] for row, secs in ((0, 1.0), (100, 1.9))}
  assert bench_data._at(turns, 10**9)["first"] == {"wall_secs": 1.9, "cpu_secs": 1.9}


def test_sides_that_read_other_shares_are_refused():
  bench_data._check_shares({"a": [[{"sources": 2, "first_rows": [100, 200]}]]}, num_rows=300)
  with pytest.raises(RuntimeError, match="a read 300 rows of source 0 of 2, not 100"):
    bench_data._check_shares({"a": [[{"sources": 2, "first_rows": [300, 0]}]]}, num_rows=300)


@pytest.mark.parametrize("pair", [("cpt_jax", "cpt_jax, read ahead"), ("grain mix", "grain mix, read ahead")])
def test_fixed_rows_are_read_in_order_and_in_their_shares(tmp_path, pair):
  bench_data_sides.make_rows(tmp_path, 3, num_rows=48)
  batches = [[next(reader) for _ in range(6)] for reader in (bench_data_sides.READERS[side](tmp_path, 3) for side in pair)]
  np.testing.assert_array_equal(*batches)
  ids = np.concatenate(batches[0])[:, :2]
  assert [int((ids[:, 0] == m).sum()) for m in range(3)] == [8, 16, 24]  # 1/6, 1/3 and 1/2
  for m in range(3):
    np.testing.assert_array_equal(ids[ids[:, 0] == m, 1], np.arange((ids[:, 0] == m).sum()))


def test_turns_are_balanced():
  assert "".join(bench_samples.in_turns(list("abc"), rounds=3)) == "abccbaabc"


@pytest.mark.slow
def test_memory_of_import_and_export_does_not_grow_with_the_model():
  small, large = bench_memory.import_export_memory((1, 9))
  assert large["params_bytes"] > 4 * small["params_bytes"]
  for way in ("import", "export"):
    assert large[way]["excess_bytes"] <= large["allowed_bytes"]
    # Twice what the largest stacked tensor grows by; 100 MB for the allocator and what is read ahead. The model grows by 370 MB.
    grown = large[way]["excess_bytes"] - small[way]["excess_bytes"]
    assert grown <= 2 * (large["largest_bytes"] - small["largest_bytes"]) + 100_000_000, way


def test_a_save_does_not_bend_the_slope():
  memory = [(step, 10**9 + 300 * step + (5 * 10**7 if step % 97 < 3 else 0)) for step in range(500, 2000, 10)]
  assert bench_endurance.slope_per_step(memory) == pytest.approx(300, rel=0.05)


@pytest.mark.parity
def test_step_beside_hugging_face(bench):
  record, _ = bench("step")
  assert max(record["loss_difference"].values()) < 1e-5
  assert set(record["ratios"]) == {"cpt_jax loop / HF Trainer", "cpt_jax step / HF model + AdamW"}


def test_a_busy_machine_and_an_unknown_section_are_refused(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bench_lib, "load", lambda: 9.0)
  with flagsaver.flagsaver():
    assert bench_lib.main(flags.FLAGS(["bench", f"--output={tmp_path / 'out'}"])) == 3
    assert "noisy: load average 9.00" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert bench_lib.main(flags.FLAGS(["bench", "--sections=stpe"])) == 78
  said = capsys.readouterr().err
  assert "stpe" in said and "step,step_5m,loss" in said


def test_clock_leaves_out_the_warm_up():
  clock = bench_step.Clock()
  clock._ticks = [(0.0, 0.0), (5.0, 9.0), (6.0, 10.0), (8.0, 13.0)]
  assert clock.seconds(skip=1) == {"wall_secs": [1.0, 2.0], "cpu_secs": [1.0, 3.0]}


def test_batches_for_both_sides_predict_the_same_positions():
  tokens = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32)
  batch = bench_step.batch_of(tokens)
  is_counted = batch.weights_BT > 0
  # Hugging Face's loss: logits of positions [0, T-1) against labels [1, T).
  assert is_counted.sum() == tokens[:, 1:].size
  np.testing.assert_array_equal(batch.targets_BT[is_counted], tokens[:, 1:].ravel())
  np.testing.assert_array_equal(batch.positions_BT[0], np.arange(4))
