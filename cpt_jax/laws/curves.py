"""Logged steps, rates and losses of a run -> a Curve: its rate at every step, and the areas that the laws read from it.

Invariant: the loss at step t is that after t updates, and the rate at t that of the update which follows (as in
train.schedule); so a change of the rate at t shows in no loss before t + 1. Called by laws.annealing, laws.cpt_law,
tools.fit_laws.
"""

import csv
import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.signal

from cpt_jax.config import ConfigError

COLUMNS = ("step", "lr", "loss")
_PIECES_PER_OCTAVE = 4  # of the distance from a fall to a loss; see Curve.falls
_NO_FALL = 1e-10  # of the peak: what rounding leaves of a constant rate
_MAX_STEPS = 100_000_000  # a run of more would not fit as one float a step


class Falls(NamedTuple):
  """Pairs of a logged loss and a fall of the rate before it (a rise is a negative fall); see Curve.falls."""

  row_F: np.ndarray  # of the loss
  size_F: np.ndarray
  rate_F: np.ndarray  # after the fall
  since_F: np.ndarray  # sum of the rates from the first update with the new rate up to the loss


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
  """Losses of one run on one validation set, the rate of each of its updates, and what its base went through."""

  name: str
  rates_S: np.ndarray
  step_n: np.ndarray  # updates finished at each loss, rising
  loss_n: np.ndarray
  warmup_steps: int = 0  # updates before this one count in the sum of rates, but their rise is no (negative) fall
  base_area: float = 0.0  # sum of the rates of the base's own training; 0 where it is unknown
  base_annealing: float = 0.0  # and its annealing area
  replay_frac: float = 0.0  # share of old data in the tokens of this run

  @functools.cached_property
  def area_n(self) -> np.ndarray:
    """S1, the sum of the rates up to each loss, without the base's."""
    return forward_area(self.rates_S)[self.step_n]

  @functools.cached_property
  def falls(self) -> Falls:
    """Every pair of a loss and an earlier fall after the warm-up, with falls at like distances taken together.

    What a fall does grows with the rates summed since, fast at first and ever more slowly. So the steps before a loss are
    cut where their distance to it grows by a constant ratio, and the falls of a piece count as one, at their mean rate and
    place. A lone jump stays exact; a slow decay over a million steps costs some 100 pairs for each loss, and the error is
    below 1e-5 nats (tests).
    """
    sizes_S = fall_sizes(self.rates_S, warmup_steps=self.warmup_steps)
    area_S = forward_area(self.rates_S)
    octaves = np.arange(_PIECES_PER_OCTAVE * (1 + np.log2(max(len(self.rates_S), 2))))
    edges_E = np.unique(np.ceil(2 ** (octaves / _PIECES_PER_OCTAVE)).astype(np.int64))
    # A piece holds the updates k with edge <= t - k < next edge.
    place_nE = np.clip(self.step_n[:, None] - edges_E[None, :] + 1, 0, len(self.rates_S))
    parts = []
    for sign in (1.0, -1.0):  # falls and rises would cancel in their means
      size_S = np.maximum(sign * sizes_S, 0.0)
      of_pieces = lambda values_S: -np.diff(forward_area(values_S)[place_nE], axis=1)  # noqa: E731
      size_nF = of_pieces(size_S)
      row_F, piece_F = np.nonzero(size_nF > _NO_FALL * self.rates_S.max())
      size_F = size_nF[row_F, piece_F]
      mean = lambda values_S: of_pieces(size_S * values_S)[row_F, piece_F] / size_F  # noqa: B023, E731
      since_F = self.area_n[row_F] - mean(area_S[:-1])
      parts.append(Falls(row_F, sign * size_F, mean(self.rates_S), np.maximum(since_F, 0.0)))
    return Falls(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))

  def annealing(self, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """S2 at each loss, and its derivative in `decay`."""
    area_n, slope_n = annealing_area(self.rates_S, decay=decay, warmup_steps=self.warmup_steps)
    return area_n[self.step_n], slope_n[self.step_n]


def forward_area(rates_S: np.ndarray) -> np.ndarray:
  """S1 after 0, 1, ... S updates: the sum of their rates (2408.11029, eq. 1)."""
  return np.concatenate([[0.0], np.cumsum(rates_S)])


def fall_sizes(rates_S: np.ndarray, *, warmup_steps: int = 0) -> np.ndarray:
  """How far the rate of each update lies below the one before; 0 up to the first update after the warm-up."""
  sizes_S = np.concatenate([np.zeros(1), rates_S[:-1] - rates_S[1:]])[: len(rates_S)]
  sizes_S[: warmup_steps + 1] = 0
  return sizes_S


def annealing_area(rates_S: np.ndarray, *, decay: float, warmup_steps: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """S2 after 0, 1, ... S updates, and its derivative in `decay`: the sum of m_i = decay m_{i-1} + (rate_{i-1} - rate_i).

  2408.11029, eq. 1. Its known flaw is kept, as it is the law's own: S2 goes on growing at a rate of 0.
  """
  sizes_S = fall_sizes(rates_S, warmup_steps=warmup_steps)
  momentum_S = scipy.signal.lfilter([1.0], [1.0, -decay], sizes_S)
  slope_S = scipy.signal.lfilter([0.0, 1.0], [1.0, -decay], momentum_S)
  return forward_area(momentum_S), forward_area(slope_S)


def from_log(
  step_n: np.ndarray, *, lr_n: np.ndarray, loss_n: np.ndarray, name: str, warmup_steps: int | None = None
) -> Curve:
  """The Curve of logged rows; what happened between them is filled in by these rules.

  - Between two rows the rate goes in a straight line. A change that stands alone, with an unchanged rate on both its sides
    (or the end of the rows), is a jump: the old rate holds until the later row's step.
  - Before the first row it rises in a straight line from 0, over `warmup_steps` steps if they are given, then holds.
  - Rows at whose start the rate still rises belong to the warm-up (or those before `warmup_steps`): their rates are counted,
    their losses are left out, since no law here describes them.

  Raises:
    ConfigError: rows that are no curve, all problems at once.
  """
  step_n, lr_n, loss_n = np.asarray(step_n), np.asarray(lr_n, np.float64), np.asarray(loss_n, np.float64)
  problems = []
  if len(step_n) < 2:
    problems.append(f"{name}: {len(step_n)} row(s); a curve has at least 2")
  elif (np.diff(step_n) <= 0).any():
    at = int(np.argmax(np.diff(step_n) <= 0)) + 1
    problems.append(f"{name}: step {step_n[at]} comes after step {step_n[at - 1]}; sort the rows, one for each step")
  if len(step_n) and not 0 <= step_n.min() <= step_n.max() <= _MAX_STEPS:
    problems.append(f"{name}: steps from {step_n.min()} to {step_n.max()}; they lie between 0 and {_MAX_STEPS:,}")
  if not (np.isfinite(lr_n).all() and (lr_n >= 0).all() and lr_n.max(initial=0) > 0):
    problems.append(f"{name}: rates must be finite, not below 0, and somewhere above 0")
  if not (np.isfinite(loss_n).all() and (loss_n > 0).all()):
    problems.append(f"{name}: losses must be finite and above 0")
  if problems:
    raise ConfigError("\n".join(problems))
  step_n = step_n.astype(np.int64)
  rising_n = np.diff(lr_n) > 0
  peak = int(np.argmin(np.append(rising_n, False)))
  rise_steps = int(step_n[peak]) if warmup_steps is None else warmup_steps
  first_steps = int(step_n[0]) if warmup_steps is None else min(warmup_steps, int(step_n[0]))
  is_kept_n = step_n >= rise_steps
  if is_kept_n.sum() < 2:
    raise ConfigError(f"{name}: the warm-up ends at step {rise_steps}, with {is_kept_n.sum()} row(s) after it; a curve needs 2")
  rates_S = np.interp(np.arange(step_n[-1]), *_knots(step_n, lr_n, first_steps))
  return Curve(name, rates_S, step_n[is_kept_n], loss_n[is_kept_n], warmup_steps=rise_steps)


def _knots(step_n: np.ndarray, lr_n: np.ndarray, rise_steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Steps and rates between which the rate is straight."""
  change_n = np.diff(lr_n) != 0
  flat_n = np.concatenate([[True], ~change_n, [True]])
  is_jump_n = change_n & flat_n[:-2] & flat_n[2:]
  # The old rate holds up to the update before the later row.
  jumps_J = np.flatnonzero(is_jump_n)
  steps = np.concatenate([[0, rise_steps], step_n, step_n[jumps_J + 1] - 1])
  rates = np.concatenate([[0.0 if rise_steps else lr_n[0], lr_n[0]], lr_n, lr_n[jumps_J]])
  order = np.argsort(steps, kind="stable")
  return steps[order], rates[order]


def read_csv(path: str | pathlib.Path, *, warmup_steps: int | None = None) -> Curve:
  """The Curve of a file with columns step, lr and loss, others being ignored; named by the file.

  Raises:
    ConfigError: what is wrong with the file, with its lines, all problems at once.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f"{path}: no such file")
  try:
    with path.open(encoding="utf-8-sig", newline="") as lines:
      rows = list(csv.reader(lines))
  except (UnicodeDecodeError, csv.Error) as error:
    raise ConfigError(f"{path}: no CSV file ({error})") from error
  header = [name.strip().lower() for name in rows[0]] if rows else []
  if not header:
    raise ConfigError(f"{path}: empty; expected a first line {','.join(COLUMNS)}")
  missing = [column for column in COLUMNS if column not in header]
  if missing:
    raise ConfigError(f"{path}: no column {' and no '.join(missing)}; found {', '.join(header)}; expected {', '.join(COLUMNS)}")
  places = [header.index(column) for column in COLUMNS]
  problems, table = [], []
  for number, row in enumerate(rows[1:], start=2):
    if not any(cell.strip() for cell in row):
      continue
    values = [_number(row[place]) if place < len(row) else None for place in places]
    wrong = [f"{column}={row[place].strip() if place < len(row) else ''!r}" for column, place, value in zip(COLUMNS, places, values, strict=True) if value is None]
    if wrong:
      problems.append(f"{path}, line {number}: {', '.join(wrong)} is no finite number")
    elif values[0] != int(values[0]):
      problems.append(f"{path}, line {number}: step={values[0]}; steps are whole numbers")
    else:
      table.append(values)
  if not problems and not table:
    problems.append(f"{path}: no rows under the header")
  if problems:
    raise ConfigError("\n".join(problems))
  step_n, lr_n, loss_n = np.array(table).T
  return from_log(step_n.astype(np.int64), lr_n=lr_n, loss_n=loss_n, name=str(path), warmup_steps=warmup_steps)


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def losses(curves: Sequence[Curve]) -> np.ndarray:
  """Losses of all curves, one after the other: the observations that a law of curves is fitted to."""
  return np.concatenate([curve.loss_n for curve in curves])


def weights(curves: Sequence[Curve]) -> np.ndarray:
  """A weight for each loss: every curve counts the same, and within it every factor of the steps.

  A law of curves is made of powers: on the axis on which it is straight, logs of one loss every 100 steps crowd at the end,
  and they are wrong together. Counted alike they would decide the fit, and a curve by how often it was logged.
  """
  parts = []
  for curve in curves:
    part_n = np.gradient(np.log(np.maximum(curve.step_n, 1)))
    parts.append(part_n / part_n.sum())
  return np.concatenate(parts)


def stretches(curves: Sequence[Curve], *, num: int) -> np.ndarray:
  """A group for each loss: every curve in `num` stretches, within which losses are wrong together; for bootstrap."""
  groups, first = [], 0
  for curve in curves:
    n = len(curve.loss_n)
    groups.append(first + np.arange(n) * min(num, n) // n)
    first += num
  return np.concatenate(groups)
