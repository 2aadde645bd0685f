"""Run directory and config -> what the run starts from, and its parameters.

Invariant: one order of precedence, stated in `choose_start`; a restore is strict.
"""

import dataclasses
import json
import pathlib
import secrets
import shutil
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import optax

from cpt_jax import config as config_lib, hub
from cpt_jax.config import ConfigError, Problems
from cpt_jax.model import pretrained, transformer
from cpt_jax.model.spec import ModelSpec, from_hf, load_hf_config
from cpt_jax.stream import pipeline
from cpt_jax.training import guard, optimizer, perplexity, state
from cpt_jax.training.checkpoint import read_meta, reader, saved_steps
from cpt_jax.training.perplexity import SourceLoss
from cpt_jax.training.state import TrainState


class Start(NamedTuple):
  """Where a run's state comes from."""

  kind: str  # run, resume, hf, weights or scratch
  path: str  # the run or Hugging Face directory, or the architecture file
  step: int = 0  # updates finished in the state that is loaded; 0 where only parameters are
  checkpoint: int = -1  # step of the checkpoint that is read, of this run or another

  def describe(self, *, optimizer: str | None = None, moments: str | None = None) -> str:
    """One line for people; `optimizer` and `moments` as in config.start, where it is to be said what becomes of moments."""
    fresh = f"moments of {moments} for what it had" if moments else "optimizer state fresh"
    return {
      "run": f"this run's own checkpoint at step {self.step}: parameters, optimizer state and data position",
      "resume": f"{self.path} at step {self.step}: parameters"
      + {"keep": ", optimizer state and step", "reset": "; optimizer state and step reset", None: ""}[optimizer],
      "hf": f"{self.path} (Hugging Face): parameters; {fresh}",
      "weights": f"{self.path}: parameters; optimizer state fresh",
      "scratch": f"random parameters for {self.path}; optimizer state fresh",
    }[self.kind]


def choose_start(config: Any, workdir: pathlib.Path | None, base: Start) -> Start:
  """The first that applies; 2 to 5 are `base`, by `choose_base`:

  1. the run's own newest checkpoint in `workdir`
  2. `start.resume`: another run's whole state
  3. `start.hf`: a Hugging Face directory
  4. `start.weights`: another run's parameters
  5. scratch: random parameters for the architecture `model.scratch`

  Raises ConfigError: the run would be over before its first step.
  """
  steps = _valid_steps(workdir) if workdir else []
  if steps and steps[-1] > config_lib.num_steps(config):
    raise ConfigError(
      f"train.length={config.train.length}: the run in {workdir} is at step {steps[-1]} already; set at least '{steps[-1]} steps'"
    )
  if steps:
    return Start("run", str(workdir), steps[-1], steps[-1])
  if base.step >= config_lib.num_steps(config):
    raise ConfigError(
      f"train.length={config.train.length}: start.resume={base.path} is at step {base.step} already; make it longer"
    )
  return base


def _valid_steps(workdir: pathlib.Path) -> list[int]:
  """Steps that the run has saved and that no decision of a guard has given up, rising."""
  found = guard.decisions(workdir)
  earliest = min((decision["to_step"] for decision in found), default=None)

  def is_void(step: int) -> bool:
    return guard.is_void(step, num_decisions=read_meta(workdir, step)["guard"]["decisions"], found=found)

  return [step for step in saved_steps(workdir) if earliest is None or step <= earliest or not is_void(step)]


def remove_void(workdir: pathlib.Path) -> None:
  """Removes the checkpoints that a guard has given up. Interrupted, it leaves none that is half there."""
  void = workdir / "void"
  valid = _valid_steps(workdir)
  for step in saved_steps(workdir):
    if step not in valid:
      void.mkdir(exist_ok=True)
      # ORDER: moved away whole before it is deleted piece by piece.
      (workdir / "ckpt" / str(step)).rename(void / f"{step}-{secrets.token_hex(4)}")
  shutil.rmtree(void, ignore_errors=True)


def choose_base(config: Any) -> Start:
  """What the run started from at first: `choose_start` without the run's own checkpoints. Drift is measured from here."""
  start = config.start
  if start.resume:
    newest = _newest_step(start.resume, "start.resume")
    return Start("resume", start.resume, newest if start.optimizer == "keep" else 0, newest)
  if start.hf:
    if not pathlib.Path(start.hf).is_dir():
      raise ConfigError(
        f"start.hf={start.hf}: no such directory; name one with config.json, *.safetensors and the tokenizer's files"
        f"{hub.how_to_get(start.hf)}"
      )
    return Start("hf", start.hf)
  if start.weights:
    return Start("weights", start.weights, 0, _newest_step(start.weights, "start.weights"))
  return Start("scratch", config.model.scratch)


def data_past(begin: Start) -> dict | None:
  """What a run that goes on from `begin` has read, as `stream.pipeline.Loader` takes it; None where it has read nothing."""
  if begin.kind not in ("run", "resume"):
    return None
  past = read_meta(begin.path, begin.checkpoint)["loader"]
  pipeline.check_formats(past)
  if begin.kind == "resume" and begin.step == 0:  # steps are counted anew, rows go on
    merged: dict = {}
    for period in past["periods"]:
      merged |= period["sources"]
    past = {**past, "periods": [{**past["periods"][-1], "start_step": 0, "read": past["read"], "sources": merged}]}
  return past


def load_spec(base: Start) -> tuple[ModelSpec, dict]:
  """The model's shape, and the Hugging Face config.json that says it."""
  if base.kind in ("resume", "weights"):
    hf_config = read_meta(base.path, base.checkpoint)["hf_config"]
  else:
    hf_config = load_hf_config(base.path)
  return from_hf(hf_config), hf_config


def check_row_len(config: Any, spec: ModelSpec, problems: Problems) -> None:
  """Adds a line where rows are longer than the model's positions."""
  if config.data.row_len > spec.max_positions:
    problems.add(f"data.row_len={config.data.row_len}: the model was made for {spec.max_positions} positions; use at most that")


def check_moments(config: Any, spec: ModelSpec, problems: Problems) -> None:
  """Adds a line where `start.moments` are not of what this model was before its vocabulary grew."""
  path = config.start.moments
  if not path:
    return
  if not config.start.hf:
    problems.add(f"start.moments={path}: only with start.hf; start.resume takes the moments of its run by itself")
    return
  with problems.collect():
    other = from_hf(read_meta(path, _newest_step(path, "start.moments"))["hf_config"])
    sizes = {key: getattr(spec, key) for key in ("vocab_size", "true_vocab_size", "base_vocab_size")}
    now, then = (dataclasses.asdict(each) for each in (spec, dataclasses.replace(other, **sizes)))
    different = [f"{key} {then[key]} there, {now[key]} in {config.start.hf}" for key in now if now[key] != then[key]]
    if different:
      problems.add(f"start.moments={path}: of another model: {', '.join(different)}")
    elif other.num_ids not in (spec.num_ids, spec.base_vocab_size):
      problems.add(
        f"start.moments={path}: it has {other.num_ids} ids, the vocabulary of {config.start.hf} grew from "
        f"{spec.base_vocab_size or spec.num_ids}; name the run whose export was grown"
      )


def tokenizer_path(config: Any) -> str:
  """`data.tokenizer`, or the tokenizer of what the run starts from."""
  if config.data.tokenizer:
    return config.data.tokenizer
  if config.start.hf:
    return config.start.hf
  other = config.start.resume or config.start.weights
  if other:
    return json.loads((pathlib.Path(other) / "config.json").read_text(encoding="utf-8"))["data"]["tokenizer"]
  raise ConfigError("data.tokenizer is empty: with model.scratch, name the tokenizer's directory")


def base_params(base: Start, spec: ModelSpec, *, seed: int) -> Any:
  """The parameters that the run starts from at first, in float32, sharded over the mesh that is set.

  None if they were another run's, whose checkpoint is not kept any more: possible only when this run is past its start.
  """
  abstract = transformer.abstract_params(spec)
  if base.kind == "scratch":
    return transformer.init(spec, jax.random.key(seed))
  if base.kind == "hf":
    return pretrained.load_params(base.path, spec, abstract)
  if base.checkpoint not in saved_steps(base.path):
    return None
  checkpoints = reader(base.path)
  params = checkpoints.restore_params(base.checkpoint, abstract)
  checkpoints.close()
  return params


def kept_losses(meta: Mapping[str, Any], heldout: Mapping[str, Any], *, replaced: Collection[str]) -> dict[str, SourceLoss]:
  """The base's losses that a checkpoint keeps, but for sources that were `replaced`: those were other documents."""
  kept = meta.get("base_losses", {}).items()
  return {name: perplexity.recorded(values, heldout.get(name)) for name, values in kept if name not in replaced}


def initial_state(
  start: Start, params: Any, spec: ModelSpec, tx: optax.GradientTransformation, *, keep_optimizer: bool, moments: str
) -> TrainState:
  """The state before the first update of this process; `params` are those of the base, `moments` as in start.moments."""
  if start.kind == "run" or (start.kind == "resume" and keep_optimizer):
    kept = reader(start.path)
    restored = kept.restore(start.checkpoint, state.abstract(spec, tx))
    kept.close()
    return restored
  if start.kind == "hf" and moments:
    before = reader(moments)
    opt_state = before.restore_moments(_newest_step(moments, "start.moments"), state.abstract(spec, tx).opt_state)
    before.close()
    # Padding rows were counted with the others, and may be rows of pieces now.
    opt_state = optimizer.without_rows(opt_state, first=spec.base_vocab_size or spec.num_ids)
    return state.create(params, tx, opt_state=opt_state)
  return state.create(params, tx)


def _newest_step(run_dir: str, key: str) -> int:
  steps = saved_steps(run_dir)
  if not steps:
    raise ConfigError(f"{key}={run_dir}: no checkpoint there; name the --workdir of a run that has saved one")
  return steps[-1]
