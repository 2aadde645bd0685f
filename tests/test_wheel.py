"""The wheel: what is in it, and that it works in an empty environment without a clone."""

import os
import pathlib
import subprocess
import sys
import tomllib
import venv

import pytest


def test_all_folders_of_the_package_are_in_it(root):
  packages = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
  here = {".".join(file.parent.relative_to(root).parts) for file in (root / "cpt_jax").rglob("__init__.py")}
  shipped = {f"cpt_jax.shipped.{name}" for name in ("examples.base", "examples.corpora", "examples.plans", "configs")}
  shipped |= {
    f"cpt_jax.shipped.configs.{folder.name}"
    for folder in (root / "configs").iterdir()
    if folder.name != "__pycache__" and folder.is_dir()
  }
  assert packages == here | shipped


# What the tests set for themselves: the user has none of it, and the losses that are printed are the user's.
PLAIN = ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")


@pytest.mark.wheel
def test_it_works_in_an_empty_environment(root, tmp_path):
  def run(*command, cwd=tmp_path):
    environ = {key: value for key, value in os.environ.items() if key not in PLAIN}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout

  run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", root)
  files = sorted((tmp_path / "dist").iterdir())
  assert [file.suffix for file in files] == [".whl", ".gz"]
  run(sys.executable, "-m", "twine", "check", "--strict", *files)
  venv.create(tmp_path / "env", with_pip=True)
  programs = pathlib.Path(tmp_path / "env" / "bin")
  run(programs / "pip", "install", "--quiet", files[0])
  assert "quickstart" in run(programs / "cpt", "--help")
  assert run(programs / "python", "-c", "import cpt_jax; print(cpt_jax.__file__)").startswith(str(tmp_path / "env"))
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  printed = run(programs / "cpt", "quickstart", cwd=elsewhere)
  assert "eval 120/120  held-out nats/token (change)  general 3.7442 (+0.0608)  poetry 3.2458 (-0.5777)" in printed
  assert (elsewhere / "runs" / "quickstart" / "hf" / "model.safetensors").exists()
