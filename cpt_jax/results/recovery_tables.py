"""Runs with a grown vocabulary beside one without -> tables of bits per byte: the shock, the recovery, the curves.

Invariant: shows, computes nothing.
"""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from cpt_jax.results import recovery
from cpt_jax.results.recovery import Comparison
from cpt_jax.training import console

_NAMES = {"tokens": "tokens", "bytes": "bytes", "flops": "FLOPs"}
_MOST_ROWS = 13  # of a curve; of longer ones evaluations at even distances are shown


def show(found: Sequence[Comparison], *, within: float) -> None:
  """What surgery cost, when it was made up for, and the curves; `within`: bits above the old run that count as met too."""
  labels = recovery.labels(found)
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
      [one.source, labels[one.grown.path], f"within {limit:g}" if limit else "met"] + [_met(one, axis, limit) for axis in _NAMES]
      for one in found
      for limit in dict.fromkeys((0.0, within))
    ],
    left=3,
  )
  for one in found:
    _curve(one, labels)
  for note in dict.fromkeys(note for one in found for run in (one.base, one.grown) for note in run.notes):
    console.say(f"note: {note}")


def _met(one: Comparison, axis: str, within: float) -> str:
  if axis not in one.base_curves:
    return "not recorded"
  met = one.met(axis, within=within)
  if met.at is None:
    return f"not within {_amount(met.end)}"
  return "from the start" if met.at == met.start else _amount(met.at)


def _curve(one: Comparison, labels: dict[pathlib.Path, str]) -> None:
  num = len(one.grown_curves["tokens"][0])
  shown = np.unique(np.linspace(0, num - 1, min(num, _MOST_ROWS)).round().astype(int)).tolist()
  axes = [axis for axis in _NAMES if axis in one.base_curves]
  less = {axis: one.differences(axis) for axis in axes}
  console.table(
    f"{one.source}: {labels[one.grown.path]} less {labels[one.base.path]} at the same expense, bits per byte",
    [*(_NAMES[axis] for axis in axes), "bits per byte", *(f"at equal {_NAMES[axis]}" for axis in axes)],
    [
      [*(_amount(float(one.grown_curves[axis][0][i])) for axis in axes), f"{one.grown_curves['tokens'][1][i]:.4f}"]
      + ["" if math.isnan(less[axis][i]) else f"{less[axis][i]:+.4f}" for axis in axes]
      for i in shown
    ],
    left=0,
  )


def _amount(value: float) -> str:
  """A count as 12,345, 1.23M, or, from 1e15 on, 1.23e+15."""
  return console.count(value) if value < 1e15 else f"{value:.3g}"
