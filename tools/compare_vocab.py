"""Runs with a grown vocabulary beside one without -> bits per byte: the shock, the curves, and when the loss is made up for.

Invariant: reads records alone; runs that are still going are compared as far as they are.

Exit codes: 0 done, 78 no such run, or runs that cannot be compared.
"""

import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax.config import ConfigError
from cpt_jax.results import recovery
from cpt_jax.training import console

_BASE = flags.DEFINE_string("base", "", "Directory of the run with the vocabulary as it was.")
_GROWN = flags.DEFINE_list("grown", [], "Directories of the runs with other vocabularies.")
_WITHIN = flags.DEFINE_float("within", 0.01, "Bits per byte above the unexpanded run that count as met too.", lower_bound=0.0)
_OUTPUT = flags.DEFINE_string("output", "", "The figure; vocabulary.png in the first grown run's directory by default.")
_FIGURE = flags.DEFINE_bool("figure", True, "Draw the figure (needs the extra [plots]).")

_NAMES = {"tokens": "tokens", "bytes": "bytes", "flops": "FLOPs"}
_MOST_ROWS = 13  # of a curve; of longer ones evaluations at even distances are shown


def main(argv: list[str]) -> int:
  """Prints the tables, draws the figure; returns the exit code."""
  del argv
  try:
    if not _BASE.value or not _GROWN.value:
      raise ConfigError("--base and --grown: name the --workdir of a run with the old vocabulary and of one or more with others")
    base = recovery.read_measured(_BASE.value)
    grown = [recovery.read_measured(path) for path in _GROWN.value]
    if len({run.path.resolve() for run in grown}) < len(grown):
      raise ConfigError(f"--grown={','.join(_GROWN.value)}: names a run twice")
    found = [one for run in grown for one in recovery.compare(base, run)]
    labels = _labels([base.path, *(run.path for run in grown)])
    _say(found, labels)
    for note in dict.fromkeys(note for run in (base, *grown) for note in run.notes):
      console.say(f"note: {note}")
    if _FIGURE.value:
      path = pathlib.Path(_OUTPUT.value or grown[0].path / "vocabulary.png")
      recovery.figure(found, labels, path)
      console.say(f"figure  {path}")
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  return 0


def _labels(paths: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
  """The last parts of the paths, as many as tell them apart."""
  full = [path.resolve().parts for path in paths]
  size = next(n for n in range(1, max(map(len, full)) + 1) if len({parts[-n:] for parts in full}) == len(paths))
  return {path: "/".join(parts[-size:]) for path, parts in zip(paths, full, strict=True)}


def _say(found: Sequence[recovery.Comparison], labels: dict[pathlib.Path, str]) -> None:
  console.table(
    "held-out bits per byte on the same text",
    ["source", "run", "before", "after surgery", "shock", "final without", "final with"]
    + [f"at equal {name}" for name in _NAMES.values()],
    [
      [one.source, labels[one.grown.path], f"{one.before:.4f}", f"{one.after:.4f}", f"{one.shock:+.4f}"]
      + [f"{final:.4f}" for final in one.finals]
      + [f"{one.at_end(axis):+.4f}" if axis in one.base_curves else "" for axis in _NAMES]
      for one in found
    ],
    left=2,
  )
  console.say("before: the unexpanded model; at equal ..: with less without, where the shorter of the two runs ends on that axis")
  if not all(one.is_by_targets for one in found):
    console.say("note: by all bytes of the documents where an older record counts no others: the longer first tokens gain by it")
  console.table(
    "recovery: from where on the run is at or below the unexpanded one at the same expense, and stays",
    ["source", "run", "", *_NAMES.values()],
    [
      [one.source, labels[one.grown.path], f"within {within:g}" if within else "met"]
      + [_met(one, axis, within) for axis in _NAMES]
      for one in found
      for within in dict.fromkeys((0.0, _WITHIN.value))
    ],
    left=3,
  )
  for one in found:
    _say_curve(one, labels)


def _met(one: recovery.Comparison, axis: str, within: float) -> str:
  if axis not in one.base_curves:
    return "not recorded"
  met = one.met(axis, within=within)
  if met.at is None:
    return f"not within {amount(met.end)}"
  return "from the start" if met.at == met.start else amount(met.at)


def _say_curve(one: recovery.Comparison, labels: dict[pathlib.Path, str]) -> None:
  num = len(one.grown_curves["tokens"][0])
  shown = np.unique(np.linspace(0, num - 1, min(num, _MOST_ROWS)).round().astype(int)).tolist()
  axes = [axis for axis in _NAMES if axis in one.base_curves]
  less = {axis: one.differences(axis) for axis in axes}
  console.table(
    f"{one.source}: {labels[one.grown.path]} less {labels[one.base.path]} at the same expense, bits per byte",
    [*(_NAMES[axis] for axis in axes), "bits per byte", *(f"at equal {_NAMES[axis]}" for axis in axes)],
    [
      [*(amount(one.grown_curves[axis][0][i]) for axis in axes), f"{one.grown_curves['tokens'][1][i]:.4f}"]
      + ["" if math.isnan(less[axis][i]) else f"{less[axis][i]:+.4f}" for axis in axes]
      for i in shown
    ],
    left=0,
  )


def amount(value: float) -> str:
  """A count as 12,345, 1.23M, or, from 1e15 on, 1.23e+15."""
  return console.count(value) if value < 1e15 else f"{value:.3g}"


if __name__ == "__main__":
  app.run(main)
