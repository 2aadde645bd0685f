"""The export tool: a run's checkpoint to a Hugging Face directory, and what it says when there is none."""

import json

import factory
import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import pretrained, transformer
from cpt_jax.results import export
from cpt_jax.training import state


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_spec):
  """(run directory, parameters at step 3, at step 7): a run that started from a bfloat16 base."""
  directory = tmp_path_factory.mktemp("export")
  base, run_dir = directory / "base", directory / "run"
  base.mkdir()
  hf_config = pretrained.to_hf(tiny_spec) | {"torch_dtype": "bfloat16", "eos_token_id": 5}
  (base / "config.json").write_text(json.dumps(hf_config))
  (base / "tokenizer.json").write_text("{}")
  saved = []
  with jax.set_mesh(mesh_lib.make_mesh(data=2, fsdp=2, context=1, tensor=1, devices=jax.devices()[:4])):
    abstract = transformer.abstract_params(tiny_spec)
    rng = np.random.default_rng(0)
    checkpoints = factory.checkpoints(run_dir, keep_last=5)
    for step in (3, 7):
      values = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
      params = jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, abstract)
      if step == 3:
        pretrained.save_params(params, tiny_spec, directory / "weights", source_dir=base, dtype="bfloat16")
        (directory / "weights" / "model.safetensors").rename(base / "model.safetensors")
      checkpoints.save(state.create(params, optax.sgd(0.1)), step, meta={"hf_config": hf_config}, losses=None)
      saved.append(values)
    checkpoints.close()
  config = {"start": {"hf": str(base), "resume": "", "weights": ""}, "data": {"tokenizer": ""}, "model": {"scratch": ""}}
  (run_dir / "config.json").write_text(json.dumps(config))
  return run_dir, *saved


def test_the_newest_step_is_exported_in_the_dtype_of_the_base(run, cpt, tmp_path):
  run_dir, _, newest = run
  done = cpt("export", "--run", run_dir, "--output", tmp_path / "out")
  assert done.returncode == 0, done.stderr
  assert f"{run_dir} at step 7 -> {tmp_path / 'out'}" in done.stdout.splitlines()[-1]
  assert {line.split()[0] for line in done.stdout.splitlines()[:-1]} == {path.name for path in (tmp_path / "out").iterdir()}
  embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
  assert embedding.dtype.name == "bfloat16"
  np.testing.assert_array_equal(embedding, newest["embedding"].astype(embedding.dtype))
  assert (tmp_path / "out" / "tokenizer.json").exists()
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5


def test_another_step_and_dtype(run, cpt, tmp_path):
  run_dir, older, _ = run
  arguments = ["--run", run_dir, "--output", tmp_path / "out", "--step=3", "--dtype=float32"]
  for _ in range(2):  # the second replaces the first
    done = cpt("export", *arguments)
    assert done.returncode == 0 and not done.stderr, done
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], older["embedding"])
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_mistakes_are_named(run, cpt, tmp_path):
  run_dir, _, _ = run
  out = tmp_path / "out"
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "config.json").write_text((run_dir / "config.json").read_text())
  full = tmp_path / "full"
  full.mkdir()
  (full / "thesis.txt").write_text("mine")
  cases = [
    ((), "required: --run, --output"),
    (("--run", tmp_path / "absent", "--output", out), "not a run (no config.json)"),
    (("--run", tmp_path / "new", "--output", out), "has no checkpoint yet"),
    (("--run", run_dir, "--output", out, "--step=4"), "no checkpoint of step 4; it has 3, 7"),
    (("--run", run_dir, "--output", full), "not empty, and no export wrote thesis.txt"),
    (("--run", run_dir, "--output", out, "--source", tmp_path / "gone"), "gone: the run's base or tokenizer is not there"),
    (("--run", run_dir, "--output", out, "extra"), "there is no extra"),
  ]
  for arguments, message in cases:
    done = cpt("export", *arguments)
    assert done.returncode == 78 and message in done.stderr, (arguments, done)
  assert not out.exists()


def test_the_origin_is_found_through_the_runs_before(tmp_path, tiny_spec):
  def make(name, *, tokenizer="", scratch="", **start):
    (tmp_path / name).mkdir()
    start = {"hf": "", "resume": "", "weights": ""} | start
    config = {"start": start, "data": {"tokenizer": tokenizer}, "model": {"scratch": scratch}}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path / name

  architecture = tmp_path / "architecture.json"
  architecture.write_text(json.dumps(pretrained.to_hf(tiny_spec)))
  scratch = make("scratch", tokenizer="tokenizers/own", scratch=str(architecture))
  longest = make("longest", weights=str(make("longer", resume=str(scratch))))
  continued = make("continued", hf="models/base", tokenizer="ignored")
  assert export.origin(scratch) == export.origin(longest) == ("tokenizers/own", pretrained.to_hf(tiny_spec))
  assert export.origin(continued) == ("models/base", None)
