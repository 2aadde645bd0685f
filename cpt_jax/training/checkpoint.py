"""Train state and data position <-> checkpoints in a run's directory (orbax v1; no other module calls orbax).

Invariant: a checkpoint is whole or absent; a restore is strict (missing, extra and reshaped leaves are an error that names
them); the data position is one integer with a fingerprint, so any number of hosts goes on from it.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import secrets
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from cpt_jax import config as config_lib, trees
from cpt_jax.config import ConfigError
from cpt_jax.devices import hosts
from cpt_jax.journal import write_atomically
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec, from_hf
from cpt_jax.training import guard, optimizer
from cpt_jax.training.perplexity import SourceLoss
from cpt_jax.training.state import TrainState

FORMAT = 2  # 1 had no `guard` and no `meter` in its record
_STATE, _META = "state", "meta"


class Checkpoints:
  """The checkpoints of one run: of this process's own run, where it says what is kept, or of any run, to read (`reader`)."""

  def __init__(self, run_dir: str | pathlib.Path, *, keep_last: int, keep_every_steps: int, best_metric: str):
    policies = ocp.training.preservation_policies
    self._needed = _Needed()
    keep: list[Any] = [policies.LatestN(keep_last), self._needed]
    if keep_every_steps:
      keep.append(policies.EveryNSteps(keep_every_steps))
    if best_metric:
      keep.append(policies.BestN(get_metric_fn=lambda metrics: metrics[best_metric], reverse=True, n=1))
    kept: Any = policies.AnyPreservationPolicy(keep) if keep_last else policies.PreserveAll()
    self.directory = pathlib.Path(run_dir).absolute() / "ckpt"
    self._best_metric = best_metric
    self._saving: Any = None  # the answer to the newest save, until it was waited for
    self._checkpointer = ocp.training.Checkpointer(
      str(self.directory),
      preservation_policy=kept,
      # What a kill left half-written is removed by the run itself alone: a reader might see it at work.
      cleanup_tmp_directories=keep_last > 0,
    )

  def steps(self) -> list[int]:
    """Steps with a whole checkpoint, rising."""
    return sorted(c.step for c in self._checkpointer.checkpoints)

  def save(self, state: TrainState, step: int, *, meta: dict, losses: dict[str, SourceLoss]) -> None:
    """Starts writing in the background; what the devices hold may be changed as soon as this returns.

    `losses`: held-out losses of this very state, for `best_metric`; empty where it was not evaluated.

    What went wrong in the background is raised by the next call.
    """
    metrics: Any = None
    if self._best_metric and losses:
      metrics = {f"eval/{name}/loss": loss.loss for name, loss in losses.items()}
    self._finish()
    self._saving = self._checkpointer.save_checkpointables_async(
      step,
      # One text: orbax takes a dictionary for a tree of arrays and stumbles over truth values; it wants one number in it.
      {_STATE: trees.paths(state), _META: {"format": FORMAT, "json": json.dumps(meta)}},
      force=True,
      metrics=metrics,
    )

  def need(self, steps: Collection[int]) -> None:
    """These steps, and of those named before no other, are kept whatever the rules say."""
    self._needed.steps = frozenset(steps)

  def meta(self, step: int) -> dict:
    """What was saved beside the arrays."""
    return read_meta(self.directory.parent, step)

  def restore(self, step: int, abstract_state: TrainState) -> TrainState:
    """The state of a step, sharded as `abstract_state` says.
    Raises ConfigError: the checkpoint is of another model or optimizer; lists missing, extra and reshaped leaves."""
    wanted = trees.paths(abstract_state)
    self._check(step, wanted)
    flat = self._checkpointer.load_checkpointables(step, {_STATE: wanted})[_STATE]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [flat[path] for path in wanted])

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    """The parameters alone, sharded as `abstract_params` says; strict as `restore`."""
    wanted = {f"params.{path}": leaf for path, leaf in trees.paths(abstract_params).items()}
    self._check(step, wanted, only="params.")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      flat = ocp.load(str(self.directory / str(step)), wanted, checkpointable_name=_STATE)
    return jax.tree.unflatten(jax.tree.structure(abstract_params), [flat[path] for path in wanted])

  def restore_moments(self, step: int, abstract_opt_state: Any) -> Any:
    """Moments and counts alone, for a model whose tables may have more or fewer rows.

    Rows that were not there, and leaves that had no moments, have zeros. Raises ConfigError: another leaf has another shape.
    """
    wanted = {f"opt_state.{path}": leaf for path, leaf in trees.paths(abstract_opt_state).items()}
    saved = trees.paths(self._checkpointer.checkpointables_metadata(step).metadata[_STATE])
    # In the dtype that they were kept in: mu_dtype may be another now.
    both = {
      path: jax.ShapeDtypeStruct(leaf.shape, saved[path].dtype, sharding=leaf.sharding)
      for path, leaf in wanted.items()
      if path in saved
    }
    tables = tuple(f".{name}" for name in optimizer.VOCAB_DIM)
    wrong = [path for path, leaf in both.items() if saved[path].shape != leaf.shape and not path.endswith(tables)]
    if wrong:
      raise ConfigError(
        f"start.moments={self.directory.parent}: its moments are of another model: "
        + ", ".join(f"{path}: found {list(saved[path].shape)}, expected {list(both[path].shape)}" for path in wrong)
      )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.array.loading.enable_padding_and_truncation = True
    with context:
      flat = ocp.load(str(self.directory / str(step)), both, checkpointable_name=_STATE)

    def moment(path: str, leaf: Any) -> jax.Array:
      zeros = functools.partial(jnp.zeros, leaf.shape, leaf.dtype)
      return flat[path].astype(leaf.dtype) if path in flat else jax.jit(zeros, out_shardings=leaf.sharding)()

    return jax.tree.unflatten(jax.tree.structure(abstract_opt_state), [moment(path, leaf) for path, leaf in wanted.items()])

  def wait(self) -> None:
    """Until everything is on disk."""
    self._finish()
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits and frees the background threads."""
    try:
      self._finish()
    finally:
      self._checkpointer.close()

  def _finish(self) -> None:
    """Waits for the save under way and frees the thread and the three files that orbax keeps until somebody asks for its end."""
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def _check(self, step: int, wanted: dict[str, Any], *, only: str = "") -> None:
    saved = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
    found = {path: leaf for path, leaf in trees.paths(saved).items() if path.startswith(only)}
    difference = trees.diff(found, wanted)
    if difference:
      raise ConfigError(
        "\n".join(
          [f"the checkpoint {self.directory / str(step)} is of another model or optimizer:"] + _difference_lines(difference)
        )
      )


class _Needed(ocp.training.preservation_policies.PreservationPolicy):
  """Keeps the steps that were named last."""

  steps: frozenset[int] = frozenset()

  def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
    """As orbax asks it."""
    return [found.step in self.steps for found in checkpoints]


def _difference_lines(difference: trees.Diff) -> list[str]:
  lines = [f"  missing: {path}" for path in difference.missing] + [f"  extra: {path}" for path in difference.extra]
  if any(".mu." in line for line in difference.reshaped):
    lines.append("  (moments of another dtype: give optimizer.mu_dtype as it was then, or start.optimizer=reset)")
  if any(re.match(r"  extra: opt_state\.\d", line) for line in lines):
    lines.append("  (of a version whose optimizer state had another form; start.weights goes on with its parameters)")
  return lines + [f"  reshaped: {line}" for line in difference.reshaped]


def load_params(run_dir: str | pathlib.Path, *, step: int | None = None) -> tuple[Any, ModelSpec, int]:
  """Parameters of a run on this process's devices, with the model's shape: `(params, spec, step)`. The newest step by default.

  Needs a mesh to be set. Raises ConfigError: no such run, no checkpoint, no such step.
  """
  run_dir = pathlib.Path(run_dir)
  if not (run_dir / "config.json").exists():
    raise ConfigError(f"{run_dir}: not a run (no config.json); name the --workdir of a run")
  steps = saved_steps(run_dir)
  if not steps:
    raise ConfigError(f"{run_dir} has no checkpoint yet; let the run reach checkpoint.every, or its end")
  if step is not None and step not in steps:
    raise ConfigError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
  step = steps[-1] if step is None else step
  checkpoints = reader(run_dir)
  spec = from_hf(checkpoints.meta(step)["hf_config"])
  params = checkpoints.restore_params(step, transformer.abstract_params(spec))
  checkpoints.close()
  return params, spec, step


def read_meta(run_dir: str | pathlib.Path, step: int) -> dict:
  """What any run saved beside the arrays; read by this process alone, which waits for no other."""
  alone = jax.process_index()
  context = ocp.Context()
  context.multiprocessing.primary_host, context.multiprocessing.active_processes = alone, {alone}
  context.multiprocessing.barrier_sync_key_prefix = f"meta{alone}"
  directory = pathlib.Path(run_dir).absolute() / "ckpt" / str(step)
  with context:
    meta = ocp.load_checkpointables(str(directory), {_META: None})[_META]
  if meta["format"] > FORMAT:
    raise ConfigError(f"{directory} has format {meta['format']}, this version reads up to {FORMAT}; update cpt_jax")
  found = json.loads(meta["json"])
  return found if meta["format"] > 1 else {**found, "guard": guard.NO_STATE, "meter": None}


def saved_steps(run_dir: str | pathlib.Path) -> list[int]:
  """Steps with a whole checkpoint in any run's directory, rising; only looks, and waits for no other process."""
  directory = pathlib.Path(run_dir).absolute() / "ckpt"
  return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory)) if directory.is_dir() else []


def reader(run_dir: str | pathlib.Path) -> Checkpoints:
  """The checkpoints of any run, of which none is removed."""
  return Checkpoints(run_dir, keep_last=0, keep_every_steps=0, best_metric="")


def from_config(config: Any, run_dir: pathlib.Path) -> Checkpoints:
  """The checkpoints of a run."""
  return Checkpoints(
    run_dir,
    keep_last=config.checkpoint.keep_last,
    keep_every_steps=config_lib.steps_of(config, "checkpoint.keep_every"),
    best_metric=config.checkpoint.best_metric,
  )


@contextmanager
def claim(run_dir: pathlib.Path, config: Any) -> Iterator[None]:
  """Makes the run directory this run's own, with config.json and versions.json in it; of several processes the first does.
  Raises ConfigError: another process trains there, or it holds a run with another config."""
  if not hosts.is_main():
    yield
    return
  run_dir.mkdir(parents=True, exist_ok=True)
  with open(run_dir / ".lock", "a", encoding="utf-8") as lock:
    try:
      # The kernel drops the lock with the process, so a killed run leaves none behind.
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"--workdir={run_dir}: another process is training there; wait for it or give another --workdir"
      ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, start {secrets.token_hex(8)}\n")
    lock.flush()
    values = json.loads(config.to_json())
    # A start that failed before its first checkpoint has no past: its config may be mended.
    if (run_dir / "config.json").exists() and saved_steps(run_dir):
      check_same_run(json.loads((run_dir / "config.json").read_text(encoding="utf-8")), values)
    for name, value in (("config.json", values), ("versions.json", versions())):
      write_atomically(run_dir / name, json.dumps(value, indent=1).encode())
    yield


def versions() -> dict[str, str]:
  """What a result depends on beside the config; `cpt_jax` is a digest of this package's own sources."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"python": platform.python_version(), "machine": platform.machine(), **found, "cpt_jax": _sources_digest()}


def _sources_digest() -> str:
  package = pathlib.Path(__file__).parent.parent
  digest = hashlib.blake2b(digest_size=16)
  for file in sorted(package.rglob("*.py")):
    digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
  return digest.hexdigest()


def identity(config: Any, run_dir: pathlib.Path) -> dict[str, str]:
  """What must be the same on every process of a run: each key of the config, the versions, and the claimed directory itself."""
  lock = run_dir / ".lock"
  missing = f"not there; {run_dir} must be on a disk that all share"
  claimed = lock.read_text(encoding="utf-8").strip() if lock.exists() else missing
  keys = {f"config key {key}": value for key, value in _flat_json(json.loads(config.to_json())).items()}
  code = {f"version of {name}": value for name, value in versions().items()}
  return {**keys, **code, "--workdir is claimed by": claimed}


def check_same_run(saved: dict, config: dict) -> None:
  """Refuses to continue a run under a config that would have changed its past.

  What lies ahead may change: stream.order keeps the past as it was, or refuses.
  Raises ConfigError: a line for each key that differs and matters.
  """
  changed = config_lib.changes(saved, config, allowed=("nothing", "ahead"))
  if changed:
    lines = [f"  {key}: {json.dumps(before)} -> {json.dumps(now)}" for key, (before, now) in changed.items()]
    raise ConfigError(
      "\n".join(
        ["this --workdir holds a run with another config:", *lines]
        + ["give another --workdir, or take these changes back; start.resume=RUN goes on from a run under a new config"]
      )
    )


def _flat_json(tree: dict, prefix: str = "") -> dict[str, str]:
  flat = {}
  for key, value in tree.items():
    flat |= _flat_json(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
  return flat
