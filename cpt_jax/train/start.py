"""Run directory and config -> what the run starts from, and its parameters.

Invariant: one order of precedence, stated in `choose_start`; a restore is strict. Called by train.loop, train.dry_run.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import optax

from cpt_jax.config import ConfigError, Problems
from cpt_jax.model import pretrained, transformer
from cpt_jax.model.spec import ModelSpec, from_hf, load_hf_config
from cpt_jax.train import state as state_lib
from cpt_jax.train.checkpoint import Checkpoints, saved_steps
from cpt_jax.train.state import TrainState


class Start(NamedTuple):
  """Where a run's state comes from."""

  kind: str  # run, resume, hf, weights or scratch
  path: str  # the run or Hugging Face directory, or the architecture file
  step: int  # updates finished in the state that is loaded; 0 where only parameters are

  def describe(self, *, optimizer: str = "keep") -> str:
    """One line for people."""
    return {
      "run": f"this run's own checkpoint at step {self.step}: parameters, optimizer state and data position",
      "resume": f"{self.path} at step {self.step}: parameters"
      + (", optimizer state and step" if optimizer == "keep" else "; optimizer state and step reset"),
      "hf": f"{self.path} (Hugging Face): parameters; optimizer state fresh",
      "weights": f"{self.path}: parameters; optimizer state fresh",
      "scratch": f"random parameters for {self.path}; optimizer state fresh",
    }[self.kind]


def choose_start(config: Any, workdir: pathlib.Path) -> Start:
  """The first that applies:

  1. the run's own newest checkpoint in `workdir`
  2. `start.resume`: another run's whole state
  3. `start.hf`: a Hugging Face directory
  4. `start.weights`: another run's parameters
  5. scratch: random parameters for the architecture `model.scratch`
  """
  steps = saved_steps(workdir)
  if steps:
    return Start("run", str(workdir), steps[-1])
  return choose_base(config)


def choose_base(config: Any) -> Start:
  """What the run started from at first: `choose_start` without the run's own checkpoints. Drift is measured from here."""
  start = config.start
  if start.resume:
    step = _newest_step(start.resume, "start.resume")
    return Start("resume", start.resume, step if start.optimizer == "keep" else 0)
  if start.hf:
    return Start("hf", start.hf, 0)
  if start.weights:
    _newest_step(start.weights, "start.weights")
    return Start("weights", start.weights, 0)
  return Start("scratch", config.model.scratch, 0)


def load_spec(base: Start) -> tuple[ModelSpec, dict]:
  """The model's shape, and the Hugging Face config.json that says it."""
  if base.kind in ("resume", "weights"):
    checkpoints = Checkpoints(base.path)
    hf_config = checkpoints.meta(checkpoints.steps()[-1])["hf_config"]
    checkpoints.close()
  else:
    hf_config = load_hf_config(base.path)
  return from_hf(hf_config), hf_config


def tokenizer_path(config: Any, problems: Problems) -> str:
  """`data.tokenizer`, or the tokenizer of what the run starts from."""
  if config.data.tokenizer:
    return config.data.tokenizer
  if config.start.hf:
    return config.start.hf
  other = config.start.resume or config.start.weights
  if other:
    saved = pathlib.Path(other) / "config.json"
    if saved.exists():
      return json.loads(saved.read_text())["data"]["tokenizer"]
  problems.add("data.tokenizer is empty: with model.scratch, name the tokenizer's directory")
  return ""


def base_params(base: Start, spec: ModelSpec, *, seed: int) -> Any:
  """The parameters that the run starts from at first, in float32, sharded over the mesh that is set."""
  abstract = transformer.abstract_params(spec)
  if base.kind == "scratch":
    return transformer.init(spec, jax.random.key(seed))
  if base.kind == "hf":
    return pretrained.load_params(base.path, spec, abstract)
  checkpoints = Checkpoints(base.path)
  params = checkpoints.restore_params(checkpoints.steps()[-1], abstract)
  checkpoints.close()
  return params


def initial_state(
  start: Start,
  params: Any,
  spec: ModelSpec,
  optimizer: optax.GradientTransformation,
  checkpoints: Checkpoints,
  *,
  keep_optimizer: bool,
) -> TrainState:
  """The state before the first update of this process; `params` are those of the base."""
  if start.kind == "run":
    return checkpoints.restore(start.step, state_lib.abstract(spec, optimizer))
  if start.kind == "resume" and keep_optimizer:
    other = Checkpoints(start.path)
    state = other.restore(start.step, state_lib.abstract(spec, optimizer))
    other.close()
    return state
  return state_lib.create(params, optimizer)


def files_dir(config: Any, base: Start) -> str:
  """The directory whose tokenizer and generation files an export carries along."""
  return base.path if base.kind == "hf" else config.data.tokenizer


def _newest_step(run_dir: str, key: str) -> int:
  steps = saved_steps(run_dir)
  if not steps:
    raise ConfigError(f"{key}={run_dir}: no checkpoint there; name the --workdir of a run that has saved one")
  return steps[-1]
