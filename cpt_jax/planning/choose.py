"""Finished runs and several laws -> the law that predicts held-out runs best, and its predictions with honest intervals.

Invariant: laws are compared by errors on runs they did not see, never by parameters; all seeds of a cell are held out together.

Held out, each in turn:

  cell         a tenth of the cells (the rest of the grid is there)
  rate         every measured rate but the lowest and the highest
  replay       every measured replay share but the lowest and the highest
  budget       the largest number of tokens, predicted from the smaller ones
  rate edge, replay edge   the lowest and the highest: what it costs to leave the measured range

The winner has the lowest scaled error (Score.scaled), averaged over the first four as far as the grid has them. The edges do not
count, since no recommendation leaves the grid; they say how fast predictions get worse beyond it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.laws import change, dcpt, domain, fit as fit_lib, replay
from cpt_jax.laws.separable import TOLERANCE
from cpt_jax.planning import cells as cells_lib
from cpt_jax.planning.cells import Cell

INSIDE = ("cell", "rate", "replay", "budget")
_NUM_FOLDS = 10
AXES = ("rate", "replay", "tokens")
# Replay shares are compared as ln(share + this), so that none is at a finite distance from 1%. Chosen by hand.
REPLAY0 = 0.01
# How many doublings beyond the measured range a prediction is given; chosen by hand. A rate past the highest may collapse the
# model, which no law of smooth curves foresees; longer runs are what a plan is for, and their intervals widen as measured.
FARTHEST = {"rate": 1.0, "replay": 1.0, "tokens": 6.0}
# From a mean absolute error to the half-width that holds 90% of normal errors: 1.645 / sqrt(2 / pi).
_WIDTH_PER_MAE = 2.06
_HUBER = 1.345  # times the scale of the residuals: Huber's estimate then has 95% of the efficiency of least squares
_MAD = 1.4826  # from a median absolute residual to a standard deviation


class Score(NamedTuple):
  """Errors of a law on the runs held out by a scheme, in nats."""

  law: str
  scheme: str
  scaled: float  # mean of |error| / sqrt(SMALL^2 + change^2): relative to the change from the base, where that is not small
  mae: float
  rmse: float
  worst: float
  num_runs: int


class Prediction(NamedTuple):
  """Losses with the interval of a new run, and how far outside the measured range each stands."""

  loss_n: np.ndarray
  low_n: np.ndarray
  high_n: np.ndarray
  doublings_n: np.ndarray  # beyond the measured range, all axes together; 0 = inside
  refused_n: np.ndarray  # too far, or like a run that diverged: the numbers are nan


class Fold(NamedTuple):
  """Runs that are held out together."""

  scheme: str
  held_n: np.ndarray  # bool
  axis: str = ""  # of an edge
  doublings: float = 0.0  # from the edge to the next measured value


def candidates(role: str, inputs: dict[str, np.ndarray]) -> list[Any]:
  """The laws for sources of a role, their units those of the median run."""
  units = {"rate0": float(np.median(inputs["rate"])), "tokens0": float(np.median(inputs["tokens"]))}
  shares = [name for name in inputs if name.startswith("share:")]
  shared = [
    replay.Surface(**units), dcpt.DCpt(role=role, **units), dcpt.DCptRate(role=role, **units),
    dcpt.Mixing(names=tuple(shares[:-1]) if len(shares) > 2 else ("replay",), **units),
  ]  # fmt: skip
  if role == cells_lib.REPLAY:
    return [
      law(**units) for law in (replay.Additive, replay.Multiplicative, replay.Metric, replay.Power, replay.Balance)
    ] + shared
  return [law(**units) for law in (domain.LogGain, domain.Shift, domain.PowerGain)] + shared


def folds(cells: Sequence[Cell], *, seed: int = 0) -> list[Fold]:
  """What is held out in turn; a scheme that the grid is too small for is left out.

  So is what no fit could predict: runs that alone have another rate, share or length than all the others.
  """
  number_n = cells_lib.cell_numbers(cells)
  order = np.random.default_rng(seed).permutation(int(number_n.max()) + 1)
  groups = [group for group in np.array_split(order, _NUM_FOLDS) if group.size]
  result = [Fold("cell", np.isin(number_n, group)) for group in groups] if len(groups) > 1 else []
  for axis in AXES:
    value_n = np.array([getattr(cell, axis) for cell in cells], np.float64)
    values = np.unique(value_n)
    position = _position(axis, values)
    if axis == "tokens":
      if len(values) > 1:
        result.append(Fold("budget", value_n == values[-1], axis, float(position[-1] - position[-2])))
      continue
    result += [Fold(axis, value_n == value) for value in values[1:-1]]
    if len(values) > 2:
      for edge, step in ((0, position[1] - position[0]), (-1, position[-1] - position[-2])):
        result.append(Fold(f"{axis} edge", value_n == values[edge], axis, float(step)))
  return [fold for fold in result if _is_predictable(cells, fold.held_n)]


def _is_predictable(cells: Sequence[Cell], held_n: np.ndarray) -> bool:
  for axis in AXES:
    value_n = np.array([getattr(cell, axis) for cell in cells])
    kept = np.unique(value_n[~held_n])
    if len(kept) < 2 and not np.isin(value_n[held_n], kept).all():
      return False
  return True


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
  """The law that won for one source, with everything that its predictions need."""

  source: str
  role: str
  fit: fit_lib.Fit  # of the winner, to all runs, by change (laws.change)
  loss_n: np.ndarray  # measured
  scores: tuple[Score, ...]  # of all laws and baselines, the winner's first
  skipped: dict[str, str]  # law -> why it could not be fitted
  noise: float  # pooled standard deviation of replicates, nats; nan without any
  noise_freedom: int
  held_out_n: np.ndarray  # the winner's prediction of each run by the fit that did not see its cell; nan where none could be
  fold_n: np.ndarray  # which of fold_fits that was
  fold_fits: tuple[fit_lib.Fit, ...]
  growth: dict[str, float]  # axis -> half-width, on the scale of laws.change, added by each doubling beyond the range
  diverged: tuple[Cell, ...]

  @property
  def law(self) -> str:
    """The winner's name."""
    return self.fit.law.name

  @property
  def beats_baselines(self) -> bool:
    """Whether the winner's error is under that of every baseline."""
    return self.mean_error(self.law) < min(self.mean_error(name) for name in BASELINES)

  def mean_error(self, law: str) -> float:
    """The figure that decides: the scaled error, averaged over the schemes inside the range."""
    return _mean_error([score for score in self.scores if score.law == law])

  def range(self, axis: str) -> tuple[float, float]:
    """Lowest and highest measured value."""
    return float(self.fit.inputs[axis].min()), float(self.fit.inputs[axis].max())

  def expect(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The losses of `predict` alone, which is much quicker; nan where refused."""
    _, _, refused_n = self._beyond(inputs)
    return np.where(refused_n, np.nan, change.to_loss(np.log(self.fit.predict(inputs)), inputs["base"]))

  def predict(self, inputs: dict[str, np.ndarray], *, level: float = 0.9) -> Prediction:
    """Losses at other settings, with the interval for a new run.

    The interval is CV+ (Barber et al. 1905.02928, sec. 1.2) on the scale of laws.change: each held-out run's error about the
    prediction of the fit that did not see it, so it holds noise, the parameters' freedom and the law's own error. Beyond the
    measured range it widens by `growth` for each doubling; beyond FARTHEST, along an axis that was never varied, or where rate
    and replay are at least as harsh as in a run that diverged, the prediction is refused.
    """
    u_n = np.log(self.fit.predict(inputs))
    was_held = np.isfinite(self.held_out_n)
    base_i = self.fit.inputs["base"]
    error_i = np.abs(change.to_u(self.held_out_n, base_i) - change.to_u(self.loss_n, base_i))[was_held]
    by_run_in = np.log(np.stack([fitted.predict(inputs) for fitted in self.fold_fits]))[self.fold_n[was_held]]
    rank = min(1.0, level * (1 + 1 / len(error_i)))
    low_n = np.quantile(by_run_in - error_i[:, None], 1 - rank, axis=0)
    high_n = np.quantile(by_run_in + error_i[:, None], rank, axis=0)
    doublings_n, wider_n, refused_n = self._beyond(inputs)
    bounds = (u_n, np.minimum(low_n, u_n) - wider_n, np.maximum(high_n, u_n) + wider_n)
    loss_n, low_n, high_n = (np.where(refused_n, np.nan, change.to_loss(u_n, inputs["base"])) for u_n in bounds)
    return Prediction(loss_n, low_n, high_n, doublings_n, refused_n)

  def _beyond(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Doublings outside the measured range, what they add to the half-width, and what is refused."""
    rate_n = inputs["rate"]
    doublings_n, wider_n, refused_n = np.zeros_like(rate_n), np.zeros_like(rate_n), np.zeros(len(rate_n), bool)
    for axis in AXES:
      low, high = _position(axis, np.array(self.range(axis)))
      at_n = _position(axis, inputs[axis])
      beyond_n = np.maximum(np.maximum(low - at_n, at_n - high), 0.0)
      beyond_n = np.where(beyond_n < 1e-9, 0.0, beyond_n)
      refused_n |= beyond_n > (FARTHEST[axis] + 1e-9 if high > low else 0.0)
      doublings_n += beyond_n
      wider_n += self.growth[axis] * beyond_n
    for cell in self.diverged:
      refused_n |= (rate_n >= cell.rate * (1 - 1e-9)) & (inputs["replay"] <= cell.replay + 1e-9)
    return doublings_n, wider_n, refused_n


BASELINES = ("base_loss", "mean", "nearest_cell")


def choose(
  cells: Sequence[Cell], source: str, *, laws: Sequence[Any] | None = None, num_starts: int = 8, seed: int = 0
) -> Choice:
  """The law for `source` with the lowest error on held-out runs; runs whose loss is not finite are left out and remembered.

  Raises ConfigError: too few cells, or no law can be fitted to them.
  """
  diverged = tuple(cell for cell in cells if not math.isfinite(cell.losses[source]))
  cells = [cell for cell in cells if math.isfinite(cell.losses[source])]
  if len({(cell.rate, cell.replay, cell.tokens) for cell in cells}) < 4:
    raise ConfigError(
      f"{source}: {len(cells)} finished runs in fewer than 4 cells; a law of rate and replay needs a grid, e.g. 4 x 5"
    )
  inputs, loss_n = cells_lib.inputs_of(cells, source), cells_lib.losses_of(cells, source)
  role = cells[0].roles[source]
  number_n = cells_lib.cell_numbers(cells)
  noise, freedom = cells_lib.seed_noise(loss_n, number_n)
  held = folds(cells, seed=seed)
  exp_u_n = np.exp(change.to_u(loss_n, inputs["base"]))

  tried, skipped = {}, {}
  for law in candidates(role, inputs) if laws is None else laws:
    try:
      fitted = _fit_all(change.ByChange(law), inputs, exp_u_n, num_starts=num_starts, seed=seed)
      fold_fits = [_fit_others(fitted, fold, seed=seed) for fold in held]
    except ConfigError as error:
      skipped[law.name] = str(error)
      continue
    predicted = [law.predict(fit.theta_P, _rows(inputs, fold.held_n)) for fit, fold in zip(fold_fits, held, strict=True)]
    tried[law.name] = fitted, fold_fits, predicted, _scores(law.name, held, predicted, loss_n, inputs["base"])
  if not tried:
    raise ConfigError(f"{source}: no law could be fitted:\n" + "\n".join(f"  {why}" for why in skipped.values()))

  names = sorted(tried, key=lambda name: _mean_error(tried[name][3]))
  fitted, fold_fits, predicted, _ = tried[names[0]]
  held_out_n, fold_n = np.full_like(loss_n, np.nan), np.zeros(len(loss_n), int)
  of_cells = [i for i, fold in enumerate(held) if fold.scheme == "cell"]
  for number, i in enumerate(of_cells):
    held_out_n[held[i].held_n], fold_n[held[i].held_n] = predicted[i], number
  scores = [score for name in names for score in tried[name][3]]
  for name in BASELINES:
    guesses = [_baseline(name, inputs, loss_n, fold.held_n) for fold in held]
    scores += _scores(name, held, guesses, loss_n, inputs["base"])
  return Choice(
    source, role, fitted, loss_n, tuple(scores), skipped, noise, freedom,
    held_out_n, fold_n, tuple(fold_fits[i] for i in of_cells),
    _growth(held, predicted, loss_n, inputs["base"]), diverged,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Started(fit_lib.Around):
  """A law that begins at given parameters, and at one place of its own."""

  theta_P: tuple[float, ...]

  def starts(self, inputs: Any, loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.array([self.theta_P]), self.law.starts(inputs, loss_n, num=num - 1, rng=rng)])


def _fit_all(law: Any, inputs: dict[str, np.ndarray], loss_n: np.ndarray, *, num_starts: int, seed: int) -> fit_lib.Fit:
  """Least squares, then Huber's loss at the scale of its residuals: few runs that a law cannot follow do not bend it."""
  rough = fit_lib.fit(law, inputs, loss_n, num_starts=num_starts, seed=seed, delta=1.0, tolerance=TOLERANCE)
  scale = _MAD * float(np.median(np.abs(np.log(rough.predict(inputs) / loss_n))))
  started = _Started(law, tuple(rough.theta_P))
  delta = max(fit_lib.DELTA, _HUBER * scale)
  fitted = fit_lib.fit(started, inputs, loss_n, num_starts=2, seed=seed, delta=delta, tolerance=TOLERANCE)
  return dataclasses.replace(fitted, law=law)


def _fit_others(fitted: fit_lib.Fit, fold: Fold, *, seed: int) -> fit_lib.Fit:
  """The fit to the runs that are not held out, begun at the fit to all of them, which only saves time, and at one other place."""
  law = _Started(fitted.law, tuple(fitted.theta_P))
  kept_n = ~fold.held_n
  kept, loss_n = _rows(fitted.inputs, kept_n), fitted.loss_n[kept_n]
  again = fit_lib.fit(law, kept, loss_n, num_starts=2, seed=seed, delta=fitted.delta, tolerance=TOLERANCE)
  return dataclasses.replace(again, law=fitted.law)


def _rows(inputs: dict[str, np.ndarray], keep_n: np.ndarray) -> dict[str, np.ndarray]:
  return {name: column[keep_n] for name, column in inputs.items()}


def _baseline(name: str, inputs: dict[str, np.ndarray], loss_n: np.ndarray, held_n: np.ndarray) -> np.ndarray:
  if name == "base_loss":
    return inputs["base"][held_n]
  if name == "mean":
    return np.full(int(held_n.sum()), loss_n[~held_n].mean())
  # The nearest cell in doublings, each axis relative to the range of the grid; the mean of its seeds.
  place_nX = np.stack([_position(axis, inputs[axis]) for axis in AXES], axis=1)
  place_nX = place_nX / np.maximum(np.ptp(place_nX, axis=0), 1e-9)
  distance_hk = np.linalg.norm(place_nX[held_n][:, None] - place_nX[~held_n][None], axis=2)
  is_near_hk = distance_hk <= distance_hk.min(axis=1, keepdims=True) + 1e-9
  return (is_near_hk @ loss_n[~held_n]) / is_near_hk.sum(axis=1)


def _mean_error(scores: Sequence[Score]) -> float:
  return float(np.mean([score.scaled for score in scores if score.scheme in INSIDE]))


def _scores(
  law: str, held: Sequence[Fold], predicted: Sequence[np.ndarray], loss_n: np.ndarray, base_n: np.ndarray
) -> list[Score]:
  result = []
  scale_n = np.sqrt(change.SMALL**2 + (loss_n - base_n) ** 2)
  for scheme in dict.fromkeys(fold.scheme for fold in held):
    of_scheme = [(fold.held_n, guess) for fold, guess in zip(held, predicted, strict=True) if fold.scheme == scheme]
    size_n = np.abs(np.concatenate([guess - loss_n[held_n] for held_n, guess in of_scheme]))
    scaled = float(np.mean(size_n / np.concatenate([scale_n[held_n] for held_n, _ in of_scheme])))
    rmse = float(np.sqrt(np.mean(size_n**2)))
    result.append(Score(law, scheme, scaled, float(size_n.mean()), rmse, float(size_n.max()), len(size_n)))
  return result


def _growth(held: Sequence[Fold], predicted: Sequence[np.ndarray], loss_n: np.ndarray, base_n: np.ndarray) -> dict[str, float]:
  """Half-width added per doubling: what the held-out edges of an axis were missed by; without edges, as much as any fold was."""
  errors = []
  for fold, guess_n in zip(held, predicted, strict=True):
    base, measured = base_n[fold.held_n], loss_n[fold.held_n]
    errors.append(float(np.mean(np.abs(change.to_u(guess_n, base) - change.to_u(measured, base)))))
  growth = {}
  for axis in AXES:
    rates = [error / fold.doublings for fold, error in zip(held, errors, strict=True) if fold.axis == axis]
    growth[axis] = _WIDTH_PER_MAE * max(rates, default=max(errors))
  return growth


def _position(axis: str, value_n: np.ndarray) -> np.ndarray:
  """Where values stand, in doublings."""
  return np.log2(value_n + REPLAY0) if axis == "replay" else np.log2(value_n)
