"""Records of runs with one vocabulary and another -> their bits per byte compared: the shock of surgery and the way back.

Invariant: only evaluations of the same documents are compared; a curve is a line between evaluations and says nothing beyond its
last one.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpt_jax import journal
from cpt_jax.config import ConfigError
from cpt_jax.results.report import COLOURS, GREY, label, panels

AXES = {"tokens": "tokens trained on", "bytes": "bytes of text trained on", "flops": "FLOPs of training"}


class Evaluated(NamedTuple):
  """What a run measured of one source, always on the same documents."""

  nats_E: np.ndarray  # summed over all targets; nan where it was not measured
  documents: int
  bytes: int  # of their text
  target_bytes: int | None  # those that targets spell; None in records of versions that divided by all bytes


class EvaluatedRun(NamedTuple):
  """The evaluations of one run, and what it had spent at each."""

  path: pathlib.Path
  steps_E: np.ndarray  # updates finished
  spent: dict[str, np.ndarray]  # of AXES, over all sources; nan where the records do not say
  sources: dict[str, Evaluated]
  notes: tuple[str, ...]  # what is not exact


class Met(NamedTuple):
  """From where on one curve is at or below another, and stays."""

  at: float | None  # None = not within what was compared
  start: float  # what was compared: where both curves are known
  end: float


class Comparison(NamedTuple):
  """One source in two runs; bits per byte."""

  source: str
  base: EvaluatedRun  # the unexpanded run
  grown: EvaluatedRun
  base_curves: dict[str, tuple[np.ndarray, np.ndarray]]  # axis -> spent, bits per byte; axes that both runs have on record
  grown_curves: dict[str, tuple[np.ndarray, np.ndarray]]
  is_by_targets: bool  # else both by all bytes of the documents, for an older run lacks the other count

  @property
  def before(self) -> float:
    """Of the unexpanded model, before training."""
    return float(self.base_curves["tokens"][1][0])

  @property
  def after(self) -> float:
    """Of the grown model, before training."""
    return float(self.grown_curves["tokens"][1][0])

  @property
  def shock(self) -> float:
    """What surgery alone costs."""
    return self.after - self.before

  @property
  def finals(self) -> tuple[float, float]:
    """Of both runs at their own ends, the unexpanded one's first."""
    return float(self.base_curves["tokens"][1][-1]), float(self.grown_curves["tokens"][1][-1])

  def met(self, axis: str, *, within: float = 0.0) -> Met:
    """From what expense on the grown run is no worse than `within` above the unexpanded one at the same expense."""
    return met_from(*self.base_curves[axis], *self.grown_curves[axis], within=within)

  def differences(self, axis: str) -> np.ndarray:
    """The grown run's bits less the unexpanded run's at the same expense, at each evaluation of the grown run; nan beyond."""
    (x, y), (x_base, y_base) = self.grown_curves[axis], self.base_curves[axis]
    return y - np.interp(x, x_base, y_base, left=np.nan, right=np.nan)

  def at_end(self, axis: str) -> float:
    """The same where the shorter of the two curves ends."""
    return float(_difference(*self.base_curves[axis], *self.grown_curves[axis])[1][-1])


def met_from(x_base: np.ndarray, y_base: np.ndarray, x: np.ndarray, y: np.ndarray, *, within: float = 0.0) -> Met:
  """The least x from which on the curve `y` stays at or below `y_base` + `within`, to the end of the shorter one.

  Both x rise; between their points the curves are straight. [4, 2, 0] at [0, 1, 2] meets the constant 1 at 1.5.
  """
  at, above = _difference(x_base, y_base, x, y)
  above = above - within
  start, end = float(at[0]), float(at[-1])
  over = np.flatnonzero(above > 0)
  if not len(over):
    return Met(start, start, end)
  last = int(over[-1])
  if last == len(at) - 1:
    return Met(None, start, end)
  share = above[last] / (above[last] - above[last + 1])
  return Met(float(at[last] + share * (at[last + 1] - at[last])), start, end)


def _difference(x_base: np.ndarray, y_base: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where either curve has a point, within what both know, and `y` less `y_base` there: straight between."""
  low, high = max(x_base[0], x[0]), min(x_base[-1], x[-1])
  assert low <= high, "curves that have no expense in common"
  at = np.unique(np.concatenate([x_base, x]))
  at = at[(at >= low) & (at <= high)]
  return at, np.interp(at, x, y) - np.interp(at, x_base, y_base)


def read_evaluated(path: str | pathlib.Path) -> EvaluatedRun:
  """Reads the evaluations of a run, as far as it is.

  Raises ConfigError: no run there, one without an evaluation before its first step, or one whose held-out documents changed.
  """
  path = pathlib.Path(path)
  if not (path / "config.json").is_file():
    raise ConfigError(f"{path}: not a run (no config.json); name the --workdir of a run")
  ledger = {entry["step"]: entry["sources"] for entry in journal.read(path / "ledger.jsonl")}
  evals = {r["step"]: r for r in journal.read(path / "metrics.jsonl") if r["kind"] == "eval" and r["step"] in ledger}
  entries = [evals[step] for step in sorted(evals)]
  if not entries or entries[0]["step"]:
    raise ConfigError(f"{path}: no evaluation before the first step; let the run reach its first step")
  sources = {name: _evaluated(path, name, entries) for name in entries[0]["sources"]}
  spent: dict[str, list[float]] = {axis: [] for axis in AXES}
  estimated: set[str] = set()
  for entry in entries:
    sources_read = ledger[entry["step"]]
    spent["tokens"].append(sum(read["tokens"] for read in sources_read))
    spent["bytes"].append(sum(_bytes_read(read, entries[0]["sources"], estimated) for read in sources_read))
    spent["flops"].append(entry.get("flops", math.nan))
  notes = [f"{path}: bytes of {', '.join(sorted(estimated))} are tokens times the held-out bytes per token"] if estimated else []
  if np.isnan(spent["flops"]).any():
    notes.append(f"{path}: an older version did not record FLOPs")
  arrays = {axis: np.array(values, np.float64) for axis, values in spent.items()}
  return EvaluatedRun(path, np.array([entry["step"] for entry in entries]), arrays, sources, tuple(notes))


def _evaluated(path: pathlib.Path, name: str, entries: list[dict]) -> Evaluated:
  found = [entry["sources"].get(name) for entry in entries]
  what = {(one["documents"], one["bytes"], one.get("target_bytes")) for one in found if one}
  same = {(documents, num_bytes) for documents, num_bytes, _ in what}
  if len(same) > 1:
    raise ConfigError(f"{path}: source {name} was evaluated on other documents in a later part of the run, by its metrics.jsonl")
  ((documents, num_bytes),) = same
  counts = {count for *_, count in what if count is not None}
  nats = [one["loss"] * one["tokens"] if one else math.nan for one in found]
  return Evaluated(np.array(nats), documents, num_bytes, counts.pop() if counts else None)


def _bytes_read(entry: dict, evaluated: dict, estimated: set[str]) -> float:
  """Of a source, by an entry of the ledger; where that does not say, by the held-out documents', named in `estimated`."""
  if entry.get("bytes") is not None:
    return entry["bytes"]
  if not entry["tokens"]:
    return 0.0
  held = evaluated.get(entry["source"])
  if held is None:
    return math.nan
  estimated.add(entry["source"])
  return entry["tokens"] * held["bytes"] / held["tokens"]


def compare_runs(base: str | pathlib.Path, grown: Sequence[str | pathlib.Path]) -> list[Comparison]:
  """Every source of the run directories `grown` beside the run with the old vocabulary.

  Raises ConfigError: no such run, or runs that cannot be compared.
  """
  if not base or not grown:
    raise ConfigError("--base and --grown: name the --workdir of a run with the old vocabulary and of one or more with others")
  with_old, runs = read_evaluated(base), [read_evaluated(path) for path in grown]
  if len({run.path.resolve() for run in runs}) < len(runs):
    raise ConfigError(f"--grown={','.join(map(str, grown))}: names a run twice")
  return [one for run in runs for one in compare(with_old, run)]


def compare(base: EvaluatedRun, grown: EvaluatedRun) -> list[Comparison]:
  """The sources that both runs evaluated.

  Raises ConfigError: it is one run, they have no source in common, or evaluated other documents: all of these, a line each.
  """
  if base.path.resolve() == grown.path.resolve():
    raise ConfigError(f"{base.path}: is compared with itself; name another run as --grown")
  names = [name for name in base.sources if name in grown.sources]
  if not names:
    ours, theirs = (", ".join(run.sources) for run in (base, grown))
    raise ConfigError(f"{base.path} evaluated {ours}, {grown.path} {theirs}: no source in common, by name")
  wrong = [
    f"source {name}: {base.path} evaluated {ours.documents:,} documents of {ours.bytes:,} bytes, "
    f"{grown.path} {theirs.documents:,} of {theirs.bytes:,}"
    for name in names
    if (ours := base.sources[name])[1:3] != (theirs := grown.sources[name])[1:3]
  ]
  if wrong:
    raise ConfigError(
      "\n".join(wrong) + "\nBits per byte compare on the same text only: make the stores from the same files, keep "
      "data.heldout_frac, and set eval.bytes (documents are chosen by their bytes), or eval.tokens above the held-out tokens"
    )
  axes = [axis for axis in AXES if not any(np.isnan(run.spent[axis]).any() for run in (base, grown))]
  return [_comparison(name, base, grown, axes) for name in names]


def _comparison(name: str, base: EvaluatedRun, grown: EvaluatedRun, axes: Sequence[str]) -> Comparison:
  by_targets = all(run.sources[name].target_bytes is not None for run in (base, grown))

  def curves(run: EvaluatedRun) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    of_run = run.sources[name]
    divisor = of_run.target_bytes if by_targets else of_run.bytes
    assert divisor, f"{run.path}: {name} has no bytes to predict"
    bits_E = of_run.nats_E / math.log(2) / divisor
    known_E = ~np.isnan(bits_E)
    return {axis: (run.spent[axis][known_E], bits_E[known_E]) for axis in axes}

  return Comparison(name, base, grown, curves(base), curves(grown), by_targets)


def labels(comparisons: Sequence[Comparison]) -> dict[pathlib.Path, str]:
  """The last parts of the runs' paths, as many as tell them apart."""
  paths = list(dict.fromkeys(run.path for one in comparisons for run in (one.base, one.grown)))
  full = [path.resolve().parts for path in paths]
  size = next(n for n in range(1, max(map(len, full)) + 1) if len({parts[-n:] for parts in full}) == len(paths))
  return {path: "/".join(parts[-size:]) for path, parts in zip(paths, full, strict=True)}


def figure(comparisons: Sequence[Comparison], labels: dict[pathlib.Path, str], path: str | pathlib.Path) -> None:
  """Bits per byte over bytes and over FLOPs, a row for each source.

  Raises ConfigError: matplotlib is not installed.
  """
  sources = list(dict.fromkeys(one.source for one in comparisons))
  axes = [axis for axis in ("bytes", "flops") if all(axis in one.base_curves for one in comparisons)] or ["tokens"]
  made, grid = panels(len(sources), len(axes), size=(6.0 * len(axes), 4.0 * len(sources)))
  for row, source in zip(grid, sources, strict=True):
    of_source = [one for one in comparisons if one.source == source]
    for ax, axis in zip(row, axes, strict=True):
      base = of_source[0]
      ax.plot(*base.base_curves[axis], marker="o", markersize=4, color="black", label=labels[base.base.path])
      for one, colour in zip(of_source, COLOURS * len(of_source), strict=False):
        ax.plot(*one.grown_curves[axis], marker="o", markersize=4, color=colour, label=labels[one.grown.path])
        met = one.met(axis)
        if met.at is not None and met.at > met.start:
          ax.axvline(met.at, color=colour, linestyle=":", linewidth=1.2)
      ax.axhline(base.before, color=GREY, linewidth=0.8)
      label(ax, AXES[axis], f"{source}, bits per byte")
  made.savefig(path, dpi=140)
