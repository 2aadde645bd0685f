"""tools/bench/bench.py works and writes what it promises; never a word about how long anything took."""

import json
import os
import subprocess

import pytest
from absl import flags
from absl.testing import flagsaver

from tools.bench import bench as bench_lib, bench_memory, bench_samples

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


@pytest.mark.slow
def test_memory_of_import_and_export_does_not_grow_with_the_model():
  small, large = bench_memory.import_export_memory((1, 9))
  assert large["params_bytes"] > 4 * small["params_bytes"]
  for way in ("import", "export"):
    assert large[way]["excess_bytes"] <= large["allowed_bytes"]
    # Twice what the largest stacked tensor grows by; 100 MB for the allocator and what is read ahead. The model grows by 370 MB.
    grown = large[way]["excess_bytes"] - small[way]["excess_bytes"]
    assert grown <= 2 * (large["largest_bytes"] - small["largest_bytes"]) + 100_000_000, way


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
