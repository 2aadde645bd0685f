"""Trials of a run -> their finished run directories, whatever of them is there already.

Invariant: a complete trial is taken as it is, one that was stopped goes on, one that diverged is not tried again, and a directory
that holds another run is an error.

A trial's directory is an ordinary run directory, but for its checkpoints, which are removed once it is complete. One that
diverged has a file diverged.json with what the run said.
"""

import json
import math
import pathlib
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from cpt_jax import config as config_lib, exits
from cpt_jax.config import ConfigError, Problems
from cpt_jax.journal import write_atomically
from cpt_jax.model import spec as spec_lib
from cpt_jax.planning import config_files
from cpt_jax.planning.outcome import FinishedTrial, is_stable
from cpt_jax.planning.trials import Trial, by_role, replay_share, trial_config
from cpt_jax.preview import memory
from cpt_jax.results import runs
from cpt_jax.training import checkpoint, console, inputs as inputs_lib, loop, metrics, start, step
from cpt_jax.training.stack import ONE_DEVICE

DIVERGED = "diverged.json"
# Bytes of a parameter while it is trained: itself, two moments, its gradient, its update, all float32.
_BYTES_PER_PARAMETER = 5 * 4
_MEMORY_FRAC = 0.7  # of a device's memory that a stack may take by this arithmetic; chosen by hand


def state_of(path: pathlib.Path, config: Any) -> str:
  """`missing`, `begun`, `complete` or `diverged`: what the directory holds of the trial that `config` describes.

  Raises ConfigError: it holds another run; a line for each key that differs.
  """
  if not (path / "config.json").is_file():
    return "missing"
  found = json.loads((path / "config.json").read_text(encoding="utf-8"))
  changed = differences(found, config_json(config))
  if changed:
    raise ConfigError("\n".join([f"{path} holds a run with another config; move it away or give another --output:", *changed]))
  if (path / DIVERGED).is_file():
    return "diverged"
  return "complete" if metrics.read_summary(path, config_lib.num_steps(config)) else "begun"


def config_json(config: Any) -> dict[str, Any]:
  """What config.json of a run with this config holds."""
  config = config_lib.resolve(config)
  with config.unlocked():
    config.data.tokenizer = start.tokenizer_path(config)
  return json.loads(config.to_json())


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
  """A line for each key that makes another run of it."""
  changed = config_lib.changes(found, wanted, allowed=("nothing",))
  return [f"  {key}: {json.dumps(a)} -> {json.dumps(b)}" for key, (a, b) in changed.items() if not _is_close(a, b)]


def _is_close(a: Any, b: Any) -> bool:
  """Equal, but for the last digits of rates and shares, which depend on the order of the arithmetic."""
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(_is_close, a, b))
  if isinstance(a, (int, float)) and isinstance(b, (int, float)):
    return math.isclose(a, b)
  return a == b


def found_trials(config: Any, folder: pathlib.Path) -> list[Trial]:
  """Every trial of this run that the folder has, by its config, also those that no design asked for.

  Raises ConfigError: a run there is not a trial of this run; names it and the keys.
  """
  problems, trials = Problems(), []
  for file in sorted(folder.glob("*/config.json")):
    recorded = config_lib.completed(json.loads(file.read_text(encoding="utf-8")))
    with problems.collect():
      trial = _trial_of(config, recorded, file.parent)
      state_of(file.parent, trial_config(config, trial))
      if file.parent.name != trial.name:
        raise ConfigError(f"{file.parent} holds the trial {trial.name}; rename it")
      trials.append(trial)
  problems.raise_if_any()
  return trials


def _trial_of(config: Any, recorded: Any, path: pathlib.Path) -> Trial:
  """What a run's config says of rate, share, length and seed."""
  names = by_role(config)
  missing = [name for of_role in names.values() for name in of_role if name not in recorded.data.sources]
  if missing:
    raise ConfigError(f"{path} holds a run without the source {', '.join(missing)}; move it away or give another --output")
  steps = config_lib.num_steps(recorded)
  return Trial(float(recorded.schedule.lr_peak), round(replay_share(recorded), 12), steps, int(recorded.seed) - config.seed)


def run_trials(config: Any, wanted: Sequence[Trial], folder: pathlib.Path, *, bar: "TrialsBar", stack: int = 1) -> int:
  """Makes the trials that are not there yet; returns the exit code of loop.run: done, or stopped by a signal.

  Up to `stack` trials of one length are trained at once, which begin again if they are stopped.
  Raises ConfigError: of a trial, or a directory that holds something else. OSError: the disk.
  """
  configs = {trial: trial_config(config, trial) for trial in wanted}
  states = {trial: state_of(folder / trial.name, configs[trial]) for trial in wanted}
  for trial in wanted:
    if states[trial] in ("complete", "diverged"):
      shutil.rmtree(folder / trial.name / "ckpt", ignore_errors=True)  # stopped between its end and this line
      bar.skip(trial)
  todo = [trial for trial in wanted if states[trial] in ("missing", "begun")]
  for together in _groups(todo, states, folder, stack=stack):
    with bar.running(together), console.muted():
      paths = [folder / trial.name for trial in together]
      try:
        code, diverged = loop.run_stack([configs[trial] for trial in together], paths, bar=bar)
      except FloatingPointError as error:  # all of them
        code, diverged = exits.DONE, error.args
      if code != exits.DONE:
        return code
      for path, message in zip(paths, diverged, strict=True):
        if message:
          write_atomically(path / DIVERGED, json.dumps({"message": message}, indent=1).encode())
        shutil.rmtree(path / "ckpt", ignore_errors=True)
    for trial, path in zip(together, paths, strict=True):
      bar.finished(trial, path)
  return exits.DONE


def how_many(config: Any) -> int:
  """Trials of this config that one device holds at once: as many as its memory has room for; 1 on a CPU, which gains little.

  By arithmetic: parameters, moments, gradients and updates in float32, and the activations that preview.memory counts, in
  _MEMORY_FRAC of the memory that the device says it has.
  """
  has = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
  if not has or "bytes_limit" not in has:
    return 1
  inputs = inputs_lib.open_inputs(config)
  itemsize = step.settings_from_config(inputs.config).compute_dtype.itemsize
  activations = memory.kept_bytes(inputs.config, inputs.spec, ONE_DEVICE, itemsize)
  one = spec_lib.num_parameters(inputs.spec) * _BYTES_PER_PARAMETER + activations
  return max(1, int(_MEMORY_FRAC * has["bytes_limit"] / one))


def _groups(todo: Sequence[Trial], states: dict[Trial, str], folder: pathlib.Path, *, stack: int) -> Iterator[list[Trial]]:
  """Trials that are trained at once: of one length, none of them with a checkpoint to go on from; in the given order."""
  waiting: dict[int, list[Trial]] = {}
  for trial in todo:
    if stack == 1 or (states[trial] == "begun" and checkpoint.saved_steps(folder / trial.name)):
      yield [trial]
      continue
    same = waiting.setdefault(trial.steps, [])
    same.append(trial)
    if len(same) == stack:
      yield waiting.pop(trial.steps)
  yield from waiting.values()


def finished(config: Any, wanted: Sequence[Trial], folder: pathlib.Path) -> list[FinishedTrial]:
  """Those of the trials that are over."""
  found = []
  for trial in wanted:
    path = folder / trial.name
    state = state_of(path, trial_config(config, trial))
    if state in ("complete", "diverged"):
      message = json.loads((path / DIVERGED).read_text(encoding="utf-8"))["message"] if state == "diverged" else ""
      found.append(FinishedTrial(trial, runs.read_run(path), message))
  return found


def sweep(
  config: Any, ladder: Sequence[Trial], folder: pathlib.Path, *, bar: "TrialsBar", stack: int = 1
) -> tuple[list[FinishedTrial], int]:
  """Goes up the ladder of rates until one is not stable: what was measured on the way, and the exit code of loop.run."""
  found: list[FinishedTrial] = []
  for at in range(0, len(ladder), stack):
    code = run_trials(config, ladder[at : at + stack], folder, bar=bar, stack=stack)
    found = finished(config, ladder[: at + stack], folder)
    if code != exits.DONE or is_swept(found, ladder):
      return found, code
  return found, exits.DONE


def is_swept(found: Sequence[FinishedTrial], ladder: Sequence[Trial]) -> bool:
  """Was the lowest unstable rate found, with all below it, or the whole ladder climbed."""
  over = {m.trial for m in found}
  unstable = [i for i, trial in enumerate(ladder) if any(m.trial == trial and not is_stable(m, found) for m in found)]
  return over >= set(ladder[: min(unstable, default=len(ladder))])


def write_commands(config: Any, wanted: Sequence[Trial], folder: pathlib.Path, *, slurm: bool) -> list[pathlib.Path]:
  """Command lines for the trials that are not over, one each, and their config files; returns the files to use.

  With `slurm` also a script for `sbatch`, an array with one task a line. They are run from the directory where the plan is.
  """
  lines = []
  for trial in wanted:
    made, path = trial_config(config, trial), folder / trial.name
    if state_of(path, made) in ("missing", "begun"):
      file = folder / "configs" / f"{trial.name}.py"
      config_files.write(made, file, about=f"The trial {trial.name} of a plan, made by cpt plan --commands.")
      lines.append(shlex.join(["python", "-m", "cpt_jax.main", f"--config={file}", f"--workdir={path}"]))
  written = [folder / "commands.txt"]
  write_atomically(written[0], "".join(f"{line}\n" for line in lines).encode())
  if slurm:
    written.append(folder / "array.sh")
    script = [
      "#!/bin/bash",
      "# One trial a task: sbatch --partition=... --gpus=1 --time=... " + shlex.quote(str(written[1])),
      f"#SBATCH --array=1-{max(len(lines), 1)}",
      "#SBATCH --job-name=plan",
      "#SBATCH --ntasks=1",
      'sed -n "${SLURM_ARRAY_TASK_ID}p" ' + shlex.quote(str(written[0])) + " | bash",
    ]
    write_atomically(written[1], ("\n".join(script) + "\n").encode())
  return written


class TrialsBar:
  """How far all trials are: one bar on a terminal, a line for each finished trial, with the time left.

  Time is counted in steps. It has the methods of console.TrainProgress, for the trial that is running.
  """

  def __init__(self, wanted: Sequence[Trial]):
    self._left = sum(trial.steps for trial in wanted)
    self._num, self._over = len(wanted), 0
    self._spent_secs, self._spent_steps = 0.0, 0
    self._bar = console.Bar(self._left)
    self._together: list[Trial] = []

  def skip(self, trial: Trial) -> None:
    """It was there already."""
    self._left -= trial.steps
    self._over += 1
    self._bar.advance(trial.steps)

  @contextmanager
  def running(self, together: list[Trial]) -> Iterator[None]:
    """These are trained in the block, at once."""
    self._together, self._shown, began = together, 0, time.monotonic()
    self._bar.describe(together[0].name + (f" and {len(together) - 1} more" if together[1:] else ""))
    yield
    steps = sum(trial.steps for trial in together)
    self._spent_secs += time.monotonic() - began
    self._spent_steps += steps
    self._left -= steps
    self.advance(together[0].steps)

  def finished(self, trial: Trial, path: pathlib.Path) -> None:
    """A line with what it came to."""
    self._over += 1
    run = runs.read_run(path)
    losses = "  ".join(f"{name} {run.final(name):.4f} ({run.final(name) - run.base(name):+.4f})" for name in run.losses)
    if (path / DIVERGED).is_file():
      losses = "diverged"
    left = self._spent_secs / max(self._spent_steps, 1) * self._left
    console.say(f"{self._over}/{self._num}  {trial.name}  {losses}  left {console.clock(left)}")

  def advance(self, step: int) -> None:
    """Of the running trials, so many steps are done."""
    self._bar.advance((step - self._shown) * len(self._together))
    self._shown = step

  def show(self, reading: Any) -> None:
    """A trial's own figures are in its files."""

  def evaluated(self, step: int, losses: dict[str, Any], base_losses: dict[str, Any]) -> None:
    """As are its evaluations."""

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Evaluations count as the steps that they follow."""
    yield

  def close(self) -> None:
    """Of a trial; the bar goes on."""

  def __enter__(self) -> "TrialsBar":
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.stop()
