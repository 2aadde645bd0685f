"""Finished runs -> the fitted laws of all sources at one budget: settings -> losses, rise and domain loss.

Invariant: a setting too far from the measured ones, or like one that diverged, has no prediction.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.laws.change import SMALL
from cpt_jax.planning import cells as cells_lib, choose
from cpt_jax.planning.cells import Cell
from cpt_jax.planning.choose import REPLAY0, Choice

_NUM_GRID = 41  # rates and shares of the first grid; then twice as many, each time in a fifth of the range
# A law misses a run when it is wrong by more than this part of the run's change from the base, and by more than so many times its
# mean error on held-out runs. Chosen by hand.
_MISSED, _TIMES_USUAL = 0.3, 5


class Predicted(NamedTuple):
  """The final loss of a source, in nats/token."""

  loss: float
  low: float
  high: float
  change: float  # from the base's loss
  law: str
  doublings: float  # beyond the measured range


class Point(NamedTuple):
  """A setting with what it is predicted to cost and to bring."""

  what: str
  rate: float
  replay: float
  rise: float  # of the worst general source over the base, nats; the upper bound where a confidence is asked
  domain_loss: float  # mean over the domain sources, nats
  losses: dict[str, Predicted]
  is_allowed: bool  # the rise is within the limit, if there is one


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """The fitted choices of all sources at one budget: settings -> losses, rise and domain loss."""

  choices: dict[str, Choice]
  cells: tuple[Cell, ...]
  tokens: float
  level: float
  confidence: float | None
  dropped: tuple[float, ...] = ()  # rates that were measured, but are too high to be of use

  def sources(self, role: str) -> list[str]:
    """Names of the sources of a role."""
    return cells_lib.sources_of(self.cells, role=role)

  def inputs(self, source: str, rate_n: np.ndarray, replay_n: np.ndarray) -> dict[str, np.ndarray]:
    """What the laws of a source read."""
    base = self.cells[0].base[source]
    return {
      "rate": rate_n, "replay": replay_n, "tokens": np.full_like(rate_n, self.tokens), "base": np.full_like(rate_n, base)
    }  # fmt: skip

  def predict(self, rate_n: np.ndarray, replay_n: np.ndarray) -> dict[str, choose.Prediction]:
    """Losses of every source."""
    return {s: choice.predict(self.inputs(s, rate_n, replay_n), level=self.level) for s, choice in self.choices.items()}

  def rise(self, rate_n: np.ndarray, replay_n: np.ndarray) -> np.ndarray:
    """Of the worst general source; its upper bound where a confidence is asked. nan: refused."""
    rises = []
    for source in self.sources(cells_lib.REPLAY):
      inputs = self.inputs(source, rate_n, replay_n)
      if self.confidence is None:
        predicted_n = self.choices[source].expect(inputs)
      else:
        predicted_n = self.choices[source].predict(inputs, level=2 * self.confidence - 1).high_n
      rises.append(predicted_n - inputs["base"])
    return np.max(rises, axis=0)

  def domain_loss(self, rate_n: np.ndarray, replay_n: np.ndarray) -> np.ndarray:
    """Mean over the domain sources. nan: refused."""
    sources = self.sources(cells_lib.DOMAIN)
    return np.mean([self.choices[s].expect(self.inputs(s, rate_n, replay_n)) for s in sources], axis=0)

  def point(self, what: str, rate: float, replay: float, *, limit: float | None) -> Point | None:
    """One setting; None where a source's prediction is refused."""
    rate_n, replay_n = np.array([rate]), np.array([replay])
    losses = {}
    for source, predicted in self.predict(rate_n, replay_n).items():
      if predicted.refused_n[0]:
        return None
      loss, low, high = (float(a[0]) for a in (predicted.loss_n, predicted.low_n, predicted.high_n))
      change = loss - self.cells[0].base[source]
      losses[source] = Predicted(loss, low, high, change, self.choices[source].law, float(predicted.doublings_n[0]))
    rise = float(self.rise(rate_n, replay_n)[0])
    allowed = limit is None or rise <= limit + 1e-12
    return Point(what, rate, replay, rise, float(self.domain_loss(rate_n, replay_n)[0]), losses, allowed)

  def range(self, axis: str) -> tuple[float, float]:
    """What all sources were measured at; of replay no less than in the longest runs, see `least_replay`."""
    ranges = [choice.range(axis) for choice in self.choices.values()]
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return (max(low, self.least_replay), high) if axis == "replay" else (low, high)

  @functools.cached_property
  def least_replay(self) -> float:
    """The least share of the runs whose length comes nearest to the budget from below, of those that the laws reproduce.

    Forgetting levels off with replay and goes on growing without it, so what short runs say of little replay does not hold for
    long ones: a plan from longer runs with 5% and 25% alone missed a run without replay by 0.27 nats (experiments.md, 1).
    """
    lengths = {cell.tokens for cell in self.cells if math.isfinite(max(cell.losses.values()))}
    # A quarter more: runs of one length differ by their padding.
    longest = max((tokens for tokens in lengths if tokens <= 1.25 * self.tokens), default=min(lengths))
    followed = [cell.replay for cell in self.cells if cell.tokens == longest and not self.is_missed(cell)]
    return min(followed, default=max(cell.replay for cell in self.cells))

  def is_missed(self, cell: Cell) -> bool:
    """Did a run come to another loss than its source's law says, by far more than that law is wrong on held-out runs."""
    for source, choice in self.choices.items():
      loss, change = cell.losses[source], cell.losses[source] - cell.base[source]
      error = float(choice.expect(cells_lib.inputs_of([cell], source))[0]) - loss
      usual = np.mean([score.mae for score in choice.scores if score.law == choice.law and score.scheme in choose.INSIDE])
      if not abs(error) <= max(_MISSED * math.hypot(SMALL, change), _TIMES_USUAL * usual):
        return True
    return False

  def grid(self, *, around: tuple[float, float] | None = None, zoom: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(n,) rates and replay shares, even in their logarithms: all measured ones, or 1/zoom of the range around a setting."""
    axes = []
    for axis, shift, center in (("rate", 0.0, around and around[0]), ("replay", REPLAY0, around and around[1])):
      low, high = (math.log(value + shift) for value in self.range(axis))
      if center is not None:
        reach = (high - low) / (2 * zoom)
        middle = math.log(center + shift)
        low, high = max(low, middle - reach), min(high, middle + reach)
      points = np.round(np.exp(np.linspace(low, high, _NUM_GRID if high > low else 1)) - shift, 12)  # 0, not 3e-18
      axes.append(np.clip(points, *self.range(axis)))
    rate_n, replay_n = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    return rate_n, replay_n


def fit_sources(
  cells: Sequence[Cell], *, tokens: float, laws: Mapping[str, Sequence[Any]] | None = None, level: float = 0.9,
  confidence: float | None = None, seed: int = 0,
) -> Predictor:  # fmt: skip
  """Chooses and fits a law for every source, for a run of `tokens` from finished runs of one base.

  `laws`: source -> laws to choose from; None = `choose.candidates` of its role. `level`: of the intervals. `confidence`: with
  which the general loss shall keep its limit, .5..1; None = the prediction itself keeps it. `seed`: of folds and starts. Raises
  ConfigError: cells that do not fit together or are too few, or a budget too far beyond the measured ones."""
  cells = cells_lib.checked(cells)
  if confidence is not None and not 0.5 < confidence < 1:
    raise ConfigError(f"confidence={confidence:g}: must be above 0.5 and below 1, e.g. 0.9")
  _check_budget(cells, tokens)
  cells, dropped = _useful(cells)
  choices = {
    source: choose.choose(cells, source, laws=None if laws is None else laws[source], seed=seed) for source in cells[0].roles
  }
  return Predictor(choices, tuple(cells), float(tokens), level, confidence, dropped)


def _useful(cells: list[Cell]) -> tuple[list[Cell], tuple[float, ...]]:
  """The cells without rates past the next one above that of the lowest domain loss, and these rates.

  Beyond it both losses rise, so nothing is recommended there, and runs that fall apart would bend every law. Rates are compared
  by their best runs of the most frequent budget.
  """
  domain = cells_lib.sources_of(cells, role=cells_lib.DOMAIN)
  budgets = [cell.tokens for cell in cells]
  at_budget = [cell for cell in cells if cell.tokens == max(set(budgets), key=lambda tokens: (budgets.count(tokens), -tokens))]
  lowest: dict[float, float] = {}
  for cell in at_budget:
    loss = float(np.mean([cell.losses[source] for source in domain]))
    if math.isfinite(loss):
      lowest[cell.rate] = min(loss, lowest.get(cell.rate, math.inf))
  best = min(lowest, key=lambda rate: (lowest[rate], rate))
  above = [rate for rate in lowest if rate > best]
  highest = min(above, default=best)
  kept = [cell for cell in cells if cell.rate <= highest or not all(math.isfinite(loss) for loss in cell.losses.values())]
  return kept, tuple(sorted({cell.rate for cell in cells} - {cell.rate for cell in kept}))


def _check_budget(cells: Sequence[Cell], tokens: float) -> None:
  finished = [cell.tokens for cell in cells if all(math.isfinite(loss) for loss in cell.losses.values())]
  if not finished:
    raise ConfigError(f"all {len(cells)} runs diverged; run the grid again at lower rates")
  low, high = min(finished), max(finished)
  farthest = 2 ** choose.FARTHEST["tokens"]
  if low == high and tokens != low:
    raise ConfigError(
      f"all finished runs have {low:g} tokens, so nothing says what {tokens:g} would do; "
      "run some cells at 2 and 4 times the tokens too"
    )
  if not low / farthest <= tokens <= high * farthest:
    raise ConfigError(
      f"a run of {tokens:g} tokens is more than {farthest:g} times beyond the finished ones ({low:g} to {high:g}); "
      f"run some cells at {tokens / farthest:g} tokens or more"
    )
