"""What a notebook asks for that has no room of its own: train, evaluate, load and save a model.

Invariant: the commands call these functions, so that a notebook and a terminal do the same.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from cpt_jax import config as config_lib, exits, shipped
from cpt_jax.config import Problems
from cpt_jax.devices import hosts, mesh as mesh_lib
from cpt_jax.diagnosis import measure, verdict
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.progress import Progress
from cpt_jax.results import tables
from cpt_jax.training import checkpoint, loop


def train(
  config: Any,
  workdir: str | os.PathLike,
  *,
  coordinator: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
  wait_secs: int = 300,
) -> tables.OpenRun:
  """Trains what a config says, or goes on with it from the newest checkpoint in `workdir`.

  >>> run = cpt_jax.train("configs/quickstart.py", "runs/quickstart")  # doctest: +SKIP
  >>> run.losses["poetry"][-1]  # doctest: +SKIP
  3.2458

  Args:
    config: of `cpt_jax.config.default()` with changes, or the path of a config file.
    workdir: where the run keeps everything.
    coordinator: HOST:PORT of process 0, where a run of several processes is not started by Slurm, Open MPI or on a TPU pod.
    num_processes: of this run, with `coordinator`.
    process_id: which of them this is, with `coordinator`.
    wait_secs: how long to wait for the others.

  Returns:
    The run. Its `exit_code` says how it ended: 0 done, 75 stopped by a signal and saved, 88 stopped by a guard.

  Raises:
    ConfigError: what is wrong with the config, a line each.
    FloatingPointError: loss or gradient were not finite for guard.nonfinite_steps.
    OSError: the disk.
  """
  config = config_lib.load(config) if isinstance(config, str) else shipped.complete(config.copy_and_resolve_references())
  workdir = pathlib.Path(workdir)
  try:
    hosts.connect(coordinator=coordinator, num_processes=num_processes, process_id=process_id, wait_secs=wait_secs)
    code = loop.run(config, workdir)
    hosts.disconnect()
  except BaseException as error:
    # One process alone goes on with its error; of several, each ends here with the words and the code of the first.
    hosts.end_all(*(exits.explain(error) or hosts.explain(error)))
    raise
  return tables.OpenRun(workdir, exit_code=code)


def evaluate(
  model: str | os.PathLike,
  sources: Mapping[str, str | os.PathLike],
  *,
  max_tokens: int = 50_000,
  heldout_frac: float = config_lib.KEYS["data.heldout_frac"].default,
  row_len: int = 0,
) -> dict[str, verdict.Loss]:
  """The loss of a model on the held-out documents of token stores, by source, with its standard error.

  >>> cpt_jax.evaluate("runs/quickstart/hf", {"poetry": "store/quickstart/poetry"})["poetry"].loss  # doctest: +SKIP
  3.24

  Args:
    model: a Hugging Face directory; a run writes one at its end, into its `hf`.
    sources: name -> directory of a store that was made with the model's tokenizer.
    max_tokens: of each source, at most.
    heldout_frac: share of documents that the run held out; training has seen the rest.
    row_len: positions of a row; 0 = 2048, or the model's context.

  Raises:
    ConfigError: what is wrong with model and stores, a line each.
  """
  problems = Problems()
  base = measure.open_base(shipped.find(os.fspath(model)), problems)
  opened = {name: measure.open_store(name, os.fspath(path), base, problems) for name, path in sources.items()}
  problems.raise_if_any()
  assert base is not None
  options: dict[str, Any] = dict(max_tokens=max_tokens, heldout_frac=heldout_frac, row_len=measure.row_len(base, row_len))
  held = {name: measure.hold_out(name, i, store, base, **options) for i, (name, store) in enumerate(opened.items()) if store}
  with Progress() as progress:
    return measure.evaluate(base, held, config=config_lib.default(), progress=progress)


def load_model(path: str | os.PathLike) -> tuple[Any, spec_lib.ModelSpec]:
  """The parameters and the shape of a model: of a Hugging Face directory, or the newest checkpoint of a run.

  >>> params, spec = cpt_jax.load_model("examples/base")  # doctest: +SKIP

  Raises:
    ConfigError: it is neither, or its tensors are not those of its config.json.
  """
  path = pathlib.Path(shipped.find(os.fspath(path)))
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    if (path / "ckpt").is_dir():
      params, spec, _ = checkpoint.load_params(path)
      return params, spec
    spec = spec_lib.from_hf(spec_lib.load_hf_config(path))
    return pretrained.load_params(path, spec, transformer.abstract_params(spec)), spec


def save_model(
  params: Any,
  spec: spec_lib.ModelSpec,
  output: str | os.PathLike,
  *,
  source: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> list[pathlib.Path]:
  """Writes parameters as a Hugging Face directory that transformers loads; returns its files.

  >>> cpt_jax.save_model(params, spec, "mine", source="examples/base")  # doctest: +SKIP

  Args:
    params: of `load_model`, whatever has become of them.
    spec: their shape.
    output: the directory to make.
    source: the Hugging Face directory whose tokenizer and other files are carried along.
    dtype: float32, bfloat16 or float16; by default as `source` stores its own.

  Raises:
    ConfigError: `output` holds something else, or a number is not finite.
    OSError: the disk.
  """
  return pretrained.save_params(params, spec, output, source_dir=source and shipped.find(os.fspath(source)), dtype=dtype)
