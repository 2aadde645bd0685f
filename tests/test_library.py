"""`import cpt_jax` as a notebook does it: quick, lazy, and the same functions as the commands."""

import subprocess
import sys

import numpy as np
import pytest

import cpt_jax
from cpt_jax.config import ConfigError
from cpt_jax.results import tables


def test_import_is_quick_and_loads_nothing_heavy(root):
  code = (
    "import sys, time\nstart = time.process_time()\nimport cpt_jax\nsecs = time.process_time() - start\n"
    "heavy = {'jax', 'numpy', 'absl', 'ml_collections', 'rich'} & set(sys.modules)\n"
    "assert not heavy, heavy\nassert secs < 0.2, secs\nassert set(cpt_jax.__all__) <= set(dir(cpt_jax))\n"
    "cpt_jax.open_run\nassert 'jax' not in sys.modules, 'to read a run needs no jax'"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", cpt_jax.__all__)
def test_all_that_is_named_is_there_and_documented(name):
  found = getattr(cpt_jax, name)
  if callable(found):
    assert f"cpt_jax.{name}(" in found.__doc__, "a docstring with an example"
    assert found.__annotations__["return"], "typed"


def test_other_names_are_not_there():
  with pytest.raises(AttributeError, match="no attribute 'tain'"):
    cpt_jax.tain  # noqa: B018


def test_a_run_is_trained_read_exported_and_evaluated(tiny_plan, tmp_path, one_device):
  config = tiny_plan.copy_and_resolve_references()
  config.train.length, config.log.every = "4 steps", 2
  run = cpt_jax.train(config, tmp_path / "run")
  assert run.exit_code == 0 and run.summary["step"] == 4 and run.config.train.batch_rows == 4
  again = cpt_jax.open_run(tmp_path / "run")
  assert again.losses["step"][[0, -1]].tolist() == [0, 4] and again.losses["tokens"][0] == 0
  final = {source["source"]: source["result"]["loss"] for source in run.summary["sources"]}
  assert {name: again.losses[name][-1] for name in final} == final
  assert again.training["step"].tolist() == [2, 4] and np.isfinite(again.training["grad_norm"]).all()
  assert again.shares["general"] + again.shares["poetry"] == pytest.approx(1)
  assert again.drift["embedding"][-1] > 0 and "layer_1" in again.drift
  assert set(again.ledger["source"].tolist()) == {"general", "poetry"}
  exported = cpt_jax.export(tmp_path / "run", tmp_path / "out")
  assert exported.step == 4
  params, spec = cpt_jax.load_model(tmp_path / "out")
  of_run, _ = cpt_jax.load_model(tmp_path / "run")
  np.testing.assert_array_equal(params["embedding"], of_run["embedding"])
  files = cpt_jax.save_model(params, spec, tmp_path / "saved", source=tmp_path / "out")
  assert {file.name for file in files} >= {"config.json", "model.safetensors"}
  options = dict(max_tokens=500, heldout_frac=0.1, row_len=32)
  losses = cpt_jax.evaluate(tmp_path / "out", {"poetry": config.data.sources.poetry.store}, **options)
  assert losses["poetry"].loss == pytest.approx(final["poetry"], abs=0.2)  # the same text, cut otherwise
  with pytest.raises(ConfigError, match="not a run"):
    cpt_jax.open_run(tmp_path)


def test_a_table_prints_as_one():
  table = tables.Table(step=np.array([0, 30]), loss=np.array([3.5, 3.25]))
  assert str(table).splitlines() == ["step    loss", "   0     3.5", "  30    3.25"]


def test_one_path_is_prepared_as_a_list_of_one(fixtures, tmp_path):
  options = dict(tokenizer=fixtures / "tokenizer", progress=False)
  one = cpt_jax.prepare(fixtures / "corpus.jsonl", output=tmp_path / "one", **options)
  several = cpt_jax.prepare([str(fixtures / "corpus.jsonl")], output=str(tmp_path / "several"), **options)
  assert one.lines()[1:] == several.lines()[1:] and "200" in one.lines()[1]
