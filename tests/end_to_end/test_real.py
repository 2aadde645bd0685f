"""Real runs: the shipped base with and without replay, and a real 135M model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


def run(root, workdir, *options):
  command = [sys.executable, "-m", "cpt_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *options]
  done = subprocess.run(command, cwd=root, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  summary = json.loads((workdir / "summary.json").read_text())
  return {source["source"]: source["result"]["loss"] - source["base"]["loss"] for source in summary["sources"]}


def stores(directory):
  return [f"--config.data.sources.{name}.store={directory / name}" for name in ("general", "poetry")]


@pytest.mark.slow
def test_replay_forgets_less_and_both_learn(root, tmp_path):
  short = [*stores(tmp_path), "--config.train.length=60 steps", "--config.eval.tokens=8000"]
  with_replay = run(root, tmp_path / "replay", *short)
  without = run(root, tmp_path / "none", *short, "--config.data.sources.general.share=0.0")
  assert with_replay["poetry"] < -0.2 and without["poetry"] < -0.2
  assert without["general"] > with_replay["general"] + 0.05


@pytest.mark.slow
def test_the_shipped_base_is_a_language_model(root, tmp_path):
  options = [*stores(tmp_path), "--config.eval.tokens=8000"]
  run(root, tmp_path / "run", *options, "--config.train.length=1 steps")
  base = json.loads((tmp_path / "run" / "summary.json").read_text())["sources"]
  command = [sys.executable, "-m", "tools.bench.unigram_bits", "--config=configs/quickstart.py", *options]
  lines = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
  for source in base:
    unigram = float(next(line for line in lines if line.split()[:1] == [source["source"]]).split()[-1])
    assert source["base"]["bits_per_byte"] < 0.85 * unigram


@pytest.mark.materials
@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_smollm2_learns_poetry_and_comes_back_to_transformers(root, tmp_path):
  base = pathlib.Path(os.environ["CPT_MATERIALS"]) / "smollm2"
  options = [f"--config.start.hf={base}", *stores(tmp_path), "--config.train.length=20 steps", "--config.train.batch_rows=4"]
  options += ["--config.schedule.lr_peak=2e-4", "--config.schedule.lr_final=2e-5", "--config.eval.tokens=4000"]
  options += ["--config.eval.every=20 steps", "--config.checkpoint.every=20 steps"]
  change = run(root, tmp_path / "run", *options)
  assert change["poetry"] < -0.1 and change["general"] < 0.2
  transformers = pytest.importorskip("transformers")
  model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", output_loading_info=True)
  assert not any(info.values()), info
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "run" / "hf" / "tokenizer.json"))
  prompt = tokenizer("The capital of France is", return_tensors="pt")
  made = model.generate(prompt.input_ids, max_new_tokens=8, do_sample=False)
  assert "Paris" in tokenizer.decode(made[0, prompt.input_ids.shape[1] :])
