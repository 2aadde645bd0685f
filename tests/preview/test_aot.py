"""Recipes compiled for chips that are not there, against the records in tests/golden: the stage `pytest -m aot`.

A record is what cpt compile --output writes, so the command that a failure names is the one that renews it.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

CASES = {  # name -> (config, topology, exit code)
  "tpu": ("configs/recipes/llama3_8b_v5e_16.py", "v5e:4x4", 0),
  "gpu": ("configs/recipes/llama3_1b_1xh100.py", "h100:1x1", 0),
  "too_large": ("configs/recipes/llama3_8b_v5e_16.py", "v5e:2x2", 1),
}
# Of another compiler than that of the record, so much may differ; of the same one nothing may.
TOLERANCES = {"bytes": 0.05, "secs": 0.05, "flops": 0.02}


def compile_again(root, name, path):
  config, topology, code = CASES[name]
  command = [sys.executable, "-m", "cpt_jax.cli", "compile", f"--config={config}", f"--topology={topology}", f"--output={path}"]
  environ = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
  done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)
  assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
  return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def leaves(value, path=""):
  """(path, value) of everything in a record that is no container."""
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from leaves(inner, f"{path}.{key}")
  elif isinstance(value, list):
    for n, inner in enumerate(value):
      yield from leaves(inner, f"{path}[{n}]")
  else:
    yield path, value


def differences(found, golden):
  """Lines for what is not as in the golden record."""
  found, golden = ({k: v for k, v in record.items() if k != "compile_secs"} for record in (found, golden))
  is_same_compiler = found["versions"] == golden["versions"]
  if not is_same_compiler:  # compared by figures alone: another compiler may order and join transfers as it likes
    keys = ("memory", "flops_per_chip", "hbm_bytes_per_chip", "roofline")
    found, golden = ({key: record[key] for key in keys if key in record} for record in (found, golden))
  found, golden = dict(leaves(found)), dict(leaves(golden))
  wrong = [
    f"{path}: only in the {where}"
    for a, b, where in ((found, golden, "new"), (golden, found, "old"))
    for path in a
    if path not in b
  ]
  for path in found.keys() & golden.keys():
    new, old = found[path], golden[path]
    tolerance = max([t for name, t in TOLERANCES.items() if name in path], default=0.05)
    if is_same_compiler:
      tolerance = 1e-9 if isinstance(old, float) else 0.0  # sums of floats, whole bytes
    is_number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if is_number and isinstance(new, (int, float)) and abs(new - old) <= tolerance * abs(old):
      continue
    if new != old and (is_same_compiler or not isinstance(old, str)):
      wrong.append(f"{path}: {old!r} became {new!r}")
  return sorted(wrong)


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_compiles_to_what_it_did_before(root, tmp_path, name):
  said, found = compile_again(root, name, tmp_path / "record.json")
  config, topology, _ = CASES[name]
  file = f"tests/golden/aot_{name}.json"
  wrong = differences(found, json.loads((root / file).read_text(encoding="utf-8")))
  assert not wrong, (
    "\n".join(wrong[:40]) + f"\nIf that is meant: cpt compile --config={config} --topology={topology} --output={file}"
  )
  assert ("verdict       fits: " in said) == found["memory"]["fits"]
  if found["memory"]["fits"]:
    quoted = re.search(r"verdict .*?\n\n", (root / config).read_text(encoding="utf-8"), re.S).group()
    assert " ".join(quoted.split()) in " ".join(said.split()), "the recipe's docstring quotes another verdict"
