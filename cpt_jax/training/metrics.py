"""What a run measured -> lines of metrics.jsonl and ledger.jsonl, and TensorBoard when asked.

Invariant: an entry's `step` is the number of updates finished when it was true; after a resume the files hold no line from
a future that was thrown away.
"""

import json
import math
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cpt_jax import config as config_lib, journal
from cpt_jax.config import ConfigError
from cpt_jax.devices import chips
from cpt_jax.journal import write_atomically
from cpt_jax.model.loss import Sums
from cpt_jax.model.spec import ModelSpec, flops_per_token
from cpt_jax.training import optimizer
from cpt_jax.training.perplexity import SourceLoss
from cpt_jax.training.step import StepMetrics


def training_flops(config: Any, spec: ModelSpec, step: int) -> float:
  """Floating point operations of a run's first `step` steps, padding counted, as the causal ones of `flops_per_token`."""
  total = 0.0
  for i, stage in enumerate(config_lib.stages(config)):
    causal, _ = stage_flops(config, spec, i)
    total += causal * config_lib.tokens_per_step(config) * (min(step, stage.end) - min(step, stage.first))
  return total


def stage_flops(config: Any, spec: ModelSpec, stage: int) -> tuple[float, float]:
  """`flops_per_token` of one of train.stages: causal, palm."""
  leaves = optimizer.leaves_from_config(config, spec, stage=stage)
  rest = [re.escape(path) for path, leaf in leaves.items() if leaf.trains is optimizer.Trains.NOTHING]
  return flops_per_token(spec, config.data.row_len, frozen=rest)


def peak_flops(device_kind: str) -> float | None:
  """Peak of one chip in FLOP/s, or None where it is not known (a CPU)."""
  chip = chips.of_device(device_kind)
  return None if chip is None else chip.peak_flops


class Writer:
  """The metric files of one run; without a `run_dir` it writes nothing (the processes beside the first)."""

  def __init__(self, run_dir: pathlib.Path | None, *, start_step: int, evaluates_first: bool, tensorboard: bool):
    self._files, self._events = {}, None
    self._last_read: dict[str, dict] = {}
    if run_dir is None:
      return
    for name in ("metrics.jsonl", "ledger.jsonl"):
      drop_after(run_dir / name, start_step, evaluates_first=evaluates_first)
      # Line buffered: a run that is killed has its last full entry on disk.
      self._files[name] = open(run_dir / name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by close)
    if ledger := journal.read(run_dir / "ledger.jsonl"):
      self._last_read = {entry["source"]: entry for entry in ledger[-1]["sources"]}
    self._events = _event_writer(run_dir, start_step) if tensorboard else None

  def train(self, reading: "Reading") -> None:
    """The mean over the steps since the entry before."""
    speed = {"tokens_per_sec": round(reading.tokens_per_sec, 1), "mfu": reading.mfu}
    self._write(reading.step, "train", {**(reading.values or {}), **speed})

  def eval(
    self, step: int, losses: dict[str, SourceLoss], base_losses: dict[str, SourceLoss], moved: dict[str, Any], *, flops: float
  ) -> None:
    """One evaluation; `change` is the difference to the base in nats per token, `drift` as training.drift gives it.

    `flops` are those of all training before it, as `training_flops` counts them.
    """
    sources = {name: {**now._asdict(), "change": now.loss - base_losses[name].loss} for name, now in losses.items()}
    self._write(step, "eval", {"sources": sources, "drift": moved, "flops": flops})

  def ledger(self, step: int, sources: list[dict]) -> None:
    """One entry of ledger.jsonl: what was read of each source before `step`, and in the `window` since the entry before."""
    entries = []
    for entry in sources:
      before = self._last_read.get(entry["source"])
      window = {key: entry[key] - (before[key] if before else 0) for key in ("rows", "tokens", "documents", "epochs")}
      bytes_before = before.get("bytes") if before else 0  # older entries count none
      window["bytes"] = None if None in (entry["bytes"], bytes_before) else entry["bytes"] - bytes_before
      entries.append({**entry, "window": window})
    self._last_read = {entry["source"]: entry for entry in sources}
    self._append("ledger.jsonl", {"step": step, "sources": entries})

  def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    self._append("metrics.jsonl", {"step": step, "kind": kind, **values})
    if self._events is not None:
      for key, value in _flatten(f"{kind}/", values):
        self._events.add_scalar(key, value, step)

  def _append(self, name: str, entry: dict[str, Any]) -> None:
    if name in self._files:
      self._files[name].write(json.dumps(entry) + "\n")

  def close(self) -> None:
    """Flushes and closes."""
    for file in self._files.values():
      file.close()
    if self._events is not None:
      self._events.close()


def drop_after(path: pathlib.Path, step: int, *, evaluates_first: bool) -> None:
  """Removes what lies after `step`: a resumed run does those steps again, and may evaluate at `step` again."""
  stay = ("train",) if evaluates_first else ("train", "eval", None)  # the ledger's entries have no kind
  kept = [r for r in journal.read(path) if r["step"] < step or (r["step"] == step and r.get("kind") in stay)]
  if path.exists():
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept).encode())


class Reading(NamedTuple):
  """What the newest step that has finished brought to light."""

  step: int  # updates finished
  values: dict[str, Any] | None  # means over the steps since the last entry; None between entries
  tokens_per_sec: float
  mfu: dict[str, float] | None  # causal and palm conventions; None where the chip's peak is not known
  not_finite: dict[str, float] | None = None  # loss sum and gradient norm of a step whose update was skipped


class Meter:
  """Takes in each step's metrics while the next step runs; adds up sums, divides once per entry.

  A step whose update was skipped, as its numbers are not finite, is counted and left out of the means. With the `state` of a
  checkpoint an entry that was begun before a restart is what it would have been without one; only its speed is not.

  The clock stands still in evaluations and saves, and starts after the first step, which may hold a compilation.
  """

  def __init__(
    self,
    names: tuple[str, ...],
    *,
    log_every: int,
    flops_per_token: tuple[float, float],
    peak_flops: float | None,
    state: dict | None = None,
  ):
    self._names, self._log_every, self._flops_per_token, self._peak_flops = names, log_every, flops_per_token, peak_flops
    begun = state or {"sums": {}, "grad_norm": math.nan, "skipped": 0}
    rows = [begun["sums"].get(name, (0.0, 0.0, 0)) for name in names]
    # Wider than on the device: the steps of one entry may hold more tokens than int32 counts.
    columns: list[Any] = [np.array([row[i] for row in rows], dtype) for i, dtype in enumerate((np.float64, np.float64, np.int64))]
    self._sums: Any = Sums(*columns)
    self._grad_norm, self._skipped = float(begun["grad_norm"]), begun["skipped"]
    self._is_warm, self._elapsed_secs, self._timed_positions = False, 0.0, 0
    self._start_secs: float | None = None

  def enters_stage(self, flops_per_token: tuple[float, float]) -> None:
    """From here on a token takes so many operations: causal, palm; the next step may hold a compilation."""
    self.pause()
    self._is_warm, self._flops_per_token = False, flops_per_token

  def dispatched(self, *, num_positions: int) -> None:
    """A step with this many positions is on its way."""
    if self._is_warm:
      self._timed_positions += num_positions
      if self._start_secs is None:
        self._start_secs = time.monotonic()

  def read(self, step: int, host: StepMetrics) -> Reading:
    """Takes in what the step has measured that finished `step` updates, as soon as it is on the host."""
    if not self._is_warm:
      self._is_warm, self._start_secs = True, time.monotonic()
    not_finite = None
    if np.isfinite(host.grad_norm) and np.isfinite(host.sums.loss_M).all():  # as training.step decides
      self._sums = jax.tree.map(np.add, self._sums, host.sums)
      self._grad_norm = float(host.grad_norm)
    else:
      self._skipped += 1
      not_finite = {"loss": float(host.sums.loss), "grad_norm": float(host.grad_norm)}
    if step % self._log_every:
      return Reading(step, None, 0.0, None, not_finite)
    values = summarize(self._sums, self._names) | {"rate": float(host.rate), "grad_norm": self._grad_norm}
    values["skipped"] = self._skipped
    self.pause()
    tokens_per_sec = self._timed_positions / self._elapsed_secs if self._elapsed_secs else 0.0
    self._sums = jax.tree.map(np.zeros_like, self._sums)
    self._grad_norm, self._skipped, self._elapsed_secs, self._timed_positions = math.nan, 0, 0.0, 0
    self._start_secs = time.monotonic()
    mfu = None
    if self._peak_flops is not None:
      causal, palm = (flops * tokens_per_sec / self._peak_flops for flops in self._flops_per_token)
      mfu = {"causal": causal, "palm": palm}
    return Reading(step, values, tokens_per_sec, mfu, not_finite)

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps of the entry that has begun, JSON-able."""
    sums = {name: [x.tolist()[m] for x in self._sums] for m, name in enumerate(self._names)}
    return {"sums": sums, "grad_norm": self._grad_norm, "skipped": self._skipped}

  def pause(self) -> None:
    """Stops the clock until the next step is dispatched."""
    if self._start_secs is not None:
      self._elapsed_secs += time.monotonic() - self._start_secs
      self._start_secs = None


def summary(
  step: int,
  base_losses: dict[str, SourceLoss],
  losses: dict[str, SourceLoss],
  ledger: list[dict],
  checkpoint: str,
  exported: str,
  guard: list[str],
  predicted: Sequence[Sequence[Any]],
) -> dict[str, Any]:
  """What the run came to: summary.json, and the table at the end. `predicted`: `plan.losses`, what a plan had said of it."""
  said = {name: {"predicted": {"loss": loss, "low": low, "high": high}} for name, loss, low, high in predicted}
  sources = [
    {**row, "base": base_losses[name]._asdict(), "result": losses[name]._asdict(), **said.get(name, {})}
    for row in ledger
    if (name := row["source"]) in losses  # sources that the run has given up are not evaluated
  ]
  return {"step": step, "sources": sources, "checkpoint": checkpoint, "exported": exported, "guard": guard}


def keep(path: pathlib.Path, entry: dict[str, Any]) -> None:
  """Writes periods.json, which rows the run reads (`Loader.periods`), or summary.json; a run with one for its end is complete."""
  write_atomically(path, json.dumps(entry, indent=1).encode())


def read_summary(run_dir: pathlib.Path, num_steps: int) -> dict[str, Any] | None:
  """The summary of a run that reached `num_steps`, else None."""
  path = run_dir / "summary.json"
  if not path.exists():
    return None
  result = json.loads(path.read_text(encoding="utf-8"))
  return result if result["step"] == num_steps else None


def from_config(config: Any, names: tuple[str, ...], spec: ModelSpec, mesh: Any, *, state: dict | None = None) -> Meter:
  """The meter of a run on this mesh; `state` as `Meter` takes it."""
  peak = peak_flops(mesh.devices.flat[0].device_kind)
  return Meter(
    names,
    log_every=config.log.every,
    flops_per_token=stage_flops(config, spec, 0),
    peak_flops=None if peak is None else peak * mesh.devices.size,
    state=state,
  )


def summarize(sums: Sums, names: tuple[str, ...]) -> dict[str, Any]:
  """Means of sums, as floats: the loss over all tokens, and that of each source that took part; no source weighs more."""
  by_source = zip(names, sums.loss_M, sums.tokens_M, strict=True)
  losses = {name: float(loss) / int(count) for name, loss, count in by_source if count > 0}
  tokens = int(sums.tokens)
  return {"loss": float(sums.loss) / tokens if tokens else math.nan, "source_loss": losses, "tokens": tokens}


def _flatten(prefix: str, values: dict[str, Any]) -> list[tuple[str, float]]:
  flat = []
  for key, value in values.items():
    if isinstance(value, dict):
      flat += _flatten(f"{prefix}{key}/", value)
    elif isinstance(value, list):
      flat += _flatten(f"{prefix}{key}/", {f"{i:03d}": v for i, v in enumerate(value)})
    elif isinstance(value, (int, float)):
      flat.append((prefix + key, float(value)))
  return flat


def _event_writer(run_dir: pathlib.Path, start_step: int) -> Any:
  try:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports] (an extra)
  except ImportError:
    raise ConfigError("log.tensorboard=True needs pip install 'cpt_jax[tensorboard]'; or set log.tensorboard=False") from None
  # TensorBoard hides what an earlier process wrote from this step on.
  return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)
