"""A run's checkpoint -> a Hugging Face directory that transformers loads, with the base's tokenizer and generation files.

Invariant: the directory appears whole or not at all; the run is only read, and may go on training meanwhile.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

from cpt_jax.config import ConfigError


class Exported(NamedTuple):
  """What was written."""

  step: int  # of the checkpoint
  files: list[pathlib.Path]


def export(
  run: str | os.PathLike, output: str | os.PathLike, *, step: int | None = None, dtype: str | None = None,
  source: str | os.PathLike | None = None,
) -> Exported:  # fmt: skip
  """Writes a checkpoint of a run, the newest by default, as a Hugging Face directory.

  >>> cpt_jax.export("runs/quickstart", "exported", dtype="bfloat16").step  # doctest: +SKIP
  120

  Args:
    run: its --workdir.
    output: the directory to make; one that an export made earlier is replaced.
    step: of the checkpoint.
    dtype: float32, bfloat16 or float16; by default as the base stores its own.
    source: directory of the base or tokenizer, if it has moved since the run.

  Raises:
    ConfigError: no such run or step, or its base is not there any more.
    OSError: the disk.
  """
  run = pathlib.Path(run)
  found, hf_config = (os.fspath(source), None) if source else origin(run)
  if found and not pathlib.Path(found).exists():
    raise ConfigError(f"{found}: the run's base or tokenizer is not there any more; say where it is with --source")
  import jax

  from cpt_jax.devices import mesh as mesh_lib
  from cpt_jax.model import pretrained
  from cpt_jax.training import checkpoint

  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    params, spec, step = checkpoint.load_params(run, step=step)
    files = pretrained.save_params(params, spec, output, source_dir=found or None, hf_config=hf_config, dtype=dtype)
  return Exported(step, files)


def origin(run: pathlib.Path) -> tuple[str, dict[str, Any] | None]:
  """Where a run's tokenizer files and config.json come from, through the runs that it went on from: (directory, config.json).

  Raises ConfigError: a run in the chain has no config.json.
  """
  file = run / "config.json"
  if not file.is_file():
    raise ConfigError(f"{run}: not a run (no config.json); name the --workdir of a run")
  config = json.loads(file.read_text(encoding="utf-8"))
  start, tokenizer = config["start"], config["data"]["tokenizer"]
  if start["hf"]:
    return start["hf"], None
  if start["resume"] or start["weights"]:
    source, hf_config = origin(pathlib.Path(start["resume"] or start["weights"]))
    return tokenizer or source, hf_config
  from cpt_jax.model.spec import load_hf_config

  return tokenizer, load_hf_config(config["model"]["scratch"])
