"""A run's checkpoint -> a Hugging Face directory that transformers loads, with the base's tokenizer and generation files.

Invariant: the directory appears whole or not at all; the run is only read, on the CPU, and may go on training meanwhile.

Exit codes: 0 done, 74 disk or file error, 78 wrong settings (no such run, step or base).
"""

import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, and the devices may be training

from cpt_jax.config import ConfigError

_RUN = flags.DEFINE_string("run", "", "The --workdir of a run.")
_OUTPUT = flags.DEFINE_string("output", "", "Directory to make; one that an export made earlier is replaced.")
_STEP = flags.DEFINE_integer("step", -1, "Step of the checkpoint; -1 = the newest.")
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16", "float16"], "Stored as; empty = as the base (else float32).")
_SOURCE = flags.DEFINE_string("source", "", "Directory of the base or tokenizer, if it has moved since the run.")


def origin(run_dir: pathlib.Path) -> tuple[str, dict[str, Any] | None]:
  """Where a run's tokenizer files and config.json come from, through the runs that it went on from: (directory, config.json).

  Raises:
    ConfigError: a run in the chain has no config.json.
  """
  file = run_dir / "config.json"
  if not file.is_file():
    raise ConfigError(f"{run_dir}: not a run (no config.json); name the --workdir of a run")
  config = json.loads(file.read_text(encoding="utf-8"))
  start, tokenizer = config["start"], config["data"]["tokenizer"]
  if start["hf"]:
    return start["hf"], None
  if start["resume"] or start["weights"]:
    source, hf_config = origin(pathlib.Path(start["resume"] or start["weights"]))
    return tokenizer or source, hf_config
  from cpt_jax.model.spec import load_hf_config

  return tokenizer, load_hf_config(config["model"]["scratch"])


def export() -> list[str]:
  """Does what the flags ask for; returns the lines to print."""
  missing = [f"--{flag.name}" for flag in (_RUN, _OUTPUT) if not flag.value]
  if missing:
    raise ConfigError(f"{' and '.join(missing)} missing, e.g. --run runs/zh --output exported/zh")
  run_dir = pathlib.Path(_RUN.value)
  source, hf_config = (_SOURCE.value, None) if _SOURCE.value else origin(run_dir)
  if source and not pathlib.Path(source).exists():
    raise ConfigError(f"{source}: the run's base or tokenizer is not there any more; say where it is with --source")
  import jax

  from cpt_jax.devices import mesh as mesh_lib
  from cpt_jax.model import pretrained
  from cpt_jax.training import checkpoint

  step = None if _STEP.value < 0 else _STEP.value
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    params, spec, step = checkpoint.load_params(run_dir, step=step)
    files = pretrained.save_params(
      params, spec, _OUTPUT.value, source_dir=source or None, hf_config=hf_config, dtype=_DTYPE.value or None
    )
  total_bytes = sum(file.stat().st_size for file in files)
  lines = [f"  {file.name}  {file.stat().st_size:,} bytes" for file in files]
  return [*lines, f"{run_dir} at step {step} -> {_OUTPUT.value}  ({len(files)} files, {total_bytes / 1e6:,.1f} MB)"]


def main(argv: list[str]) -> int:
  """Exit code, after printing what was written or what is wrong."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the libraries' own diaries come with --verbosity=0
  if len(argv) > 1:
    print(f"what is {' '.join(argv[1:])}? options look like --run=DIR", file=sys.stderr)
    return 78
  try:
    print("\n".join(export()))
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 78
  except OSError as error:
    print(error, file=sys.stderr)
    return 74
  return 0


if __name__ == "__main__":
  app.run(main)
