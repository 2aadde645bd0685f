"""Logged steps, rates and losses of a run -> a Curve: its rate at every step, and the areas that the laws read from it.

Invariant: the loss at step t is that after t updates, and the rate at t that of the update which follows (as in
training.schedule); so a change of the rate at t shows in no loss before t + 1.
"""

import csv
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import scipy.signal

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.laws import fit as fit_lib
from cpt_jax.laws.fit import Fit, Law, Prior
from cpt_jax.results.runs import Run

COLUMNS = ("step", "lr", "loss")
_PIECES_PER_OCTAVE = 2  # of the distance from a fall to a loss; see Curve.falls
_ROUNDING = 1e-12
_NO_FALL = 1e-10  # of the peak: what rounding leaves of a constant rate
NUM_STRETCHES = 8  # of a curve, whose losses are wrong together: what a curve is worth in independent observations
_MAX_STEPS = 100_000_000  # a run of more would not fit as one float a step


class Falls(NamedTuple):
  """Pairs of a logged loss and a fall of the rate before it (a rise is a negative fall); see Curve.falls."""

  row_F: np.ndarray  # of the loss
  size_F: np.ndarray
  rate_F: np.ndarray  # after the fall
  since_F: np.ndarray  # sum of the rates from the first update with the new rate up to the loss


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
  """Losses of one run on one validation set, and the rate of each of its updates."""

  name: str
  rates_S: np.ndarray
  step_n: np.ndarray  # updates finished at each loss, rising
  loss_n: np.ndarray
  warmup_steps: int = 0  # updates before this one count in the sum of rates, but their rise is no (negative) fall
  replay_frac: float = 0.0  # share of old data in the tokens of this run

  @functools.cached_property
  def area_n(self) -> np.ndarray:
    """S1, the sum of the rates up to each loss, without the base's."""
    return forward_area(self.rates_S)[self.step_n]

  @functools.cached_property
  def falls(self) -> Falls:
    """Every pair of a loss and an earlier fall after the warm-up, with falls at like distances taken together.

    What a fall does grows with the rates summed since, fast at first and ever more slowly. So the steps before a loss are
    cut where their distance to it grows by a constant ratio, and the falls of a piece count as two of half the size, one
    standard deviation to each side of their mean place and rate (Gauss's two-point rule). A lone jump stays exact; a slow
    decay over a million steps costs some 100 pairs for each loss, and the error is below 1e-5 nats (tests;
    1e-4 where the rate falls to 0, as the rate stands there to a negative power).
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
      (rate_F, rate_sd_F), (place_F, place_sd_F) = (_moments(values_S, mean) for values_S in (self.rates_S, area_S[:-1]))
      for side in (-1.0, 1.0):  # the later half of a fall has the lower rates, that of a rise the higher ones
        since_F = np.maximum(self.area_n[row_F] - place_F - side * place_sd_F, 0.0)
        parts.append(Falls(row_F, sign * size_F / 2, rate_F - sign * side * rate_sd_F, since_F))
    return Falls(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))

  def annealing(self, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """S2 at each loss, and its derivative in `decay`; those of the last `decay` are kept, since a fit asks twice."""
    if decay not in self._annealing:
      self._annealing.clear()
      area_n, slope_n = annealing_area(self.rates_S, decay=decay, warmup_steps=self.warmup_steps)
      self._annealing[decay] = area_n[self.step_n], slope_n[self.step_n]
    return self._annealing[decay]

  @functools.cached_property
  def _annealing(self) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    return {}


def _moments(values_S: np.ndarray, mean: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Means and standard deviations of pieces; the latter are 0 where they are no more than rounding."""
  mean_F = mean(values_S)
  variance_F = mean(values_S**2) - mean_F**2
  return mean_F, np.sqrt(np.where(variance_F > _ROUNDING * values_S.max() ** 2, variance_F, 0.0))


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
  momentum_S = np.asarray(scipy.signal.lfilter([1.0], [1.0, -decay], sizes_S))
  slope_S = np.asarray(scipy.signal.lfilter([0.0, 1.0], [1.0, -decay], momentum_S))
  return forward_area(momentum_S), forward_area(slope_S)


def from_log(step_n: np.ndarray, *, lr_n: np.ndarray, loss_n: np.ndarray, name: str, warmup_steps: int | None = None) -> Curve:
  """The Curve of logged rows; what happened between them is filled in by these rules.

  - Between two rows the rate goes in a straight line. A change that stands alone, with an unchanged rate on both its sides
    (or the end of the rows), is a jump: the old rate holds until the later row's step.
  - Before the first row it rises in a straight line from 0, over `warmup_steps` steps if they are given, then holds.
  - Rows at whose start the rate still rises belong to the warm-up (or those before `warmup_steps`): their rates are counted,
    their losses are left out, since no law here describes them.
  Raises ConfigError: rows that are no curve, all problems at once.
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

  Raises ConfigError: what is wrong with the file, with its lines, all problems at once.
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
  places = {column: header.index(column) for column in COLUMNS}
  problems, table = [], []
  for number, row in enumerate(rows[1:], start=2):
    if not any(cell.strip() for cell in row):
      continue
    cells = {column: row[place].strip() if place < len(row) else "" for column, place in places.items()}
    values = {column: value for column, cell in cells.items() if (value := _number(cell)) is not None}
    wrong = [f"{column}={cells[column]!r}" for column in COLUMNS if column not in values]
    if wrong:
      problems.append(f"{path}, line {number}: {', '.join(wrong)}: expected a finite number")
    elif values["step"] != int(values["step"]):
      problems.append(f"{path}, line {number}: step={cells['step']!r}: expected a whole number")
    else:
      table.append([values[column] for column in COLUMNS])
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


def from_run(run: Run, *, source: str) -> Curve:
  """The Curve of one source's held-out losses in a run of this project; the losses before and in the warm-up are left out.

  Raises ConfigError: the run does not measure the source, or has fewer than two losses of it after the warm-up.
  """
  if source not in run.losses:
    raise ConfigError(f"{run.path}: measures no source {source!r}; it has {', '.join(run.losses)}")
  warmup_steps = config_lib.steps_of(run.config, "schedule.warmup")
  loss_n = run.losses[source]
  is_kept_n = np.isfinite(loss_n) & (run.eval_steps_E >= max(warmup_steps, 1))
  if is_kept_n.sum() < 2:
    raise ConfigError(f"{run.path}: {is_kept_n.sum()} loss(es) of {source} after the warm-up; a curve needs 2 (see eval.every)")
  return Curve(
    str(run.path), run.rates_S, run.eval_steps_E[is_kept_n], loss_n[is_kept_n], warmup_steps=warmup_steps,
    replay_frac=run.replay if run.num_tokens else 0.0,
  )  # fmt: skip


class CurveLaw(Law, Protocol):
  """A law of whole curves: its inputs are a sequence of Curve."""

  @property
  def priors(self) -> Mapping[str, Prior]:
    """For what a few curves cannot fix."""
    ...


def fit(law: CurveLaw, curves: Sequence[Curve], *, num_starts: int = 48, seed: int = 0) -> Fit:
  """`law` fitted to the curves, each counting the same. Raises ConfigError: no curve, or see laws.fit.fit."""
  if not curves:
    raise ConfigError(f"{law.name}: no curve to fit")
  return fit_lib.fit(
    law, curves, losses(curves), weights_n=weights(curves), priors=law.priors, num_independent=NUM_STRETCHES * len(curves),
    num_starts=num_starts, seed=seed,
  )  # fmt: skip


def bootstrap(fitted: Fit, *, num: int = 100, seed: int = 0) -> Fit:
  """With the parameters of resampled stretches of its curves."""
  return fit_lib.bootstrap(fitted, num=num, groups_n=stretches(fitted.inputs), seed=seed)


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


def stretches(curves: Sequence[Curve]) -> np.ndarray:
  """A group for each loss: every curve in NUM_STRETCHES stretches."""
  sizes = [len(curve.loss_n) for curve in curves]
  return np.concatenate([NUM_STRETCHES * i + np.arange(n) * min(NUM_STRETCHES, n) // n for i, n in enumerate(sizes)])
