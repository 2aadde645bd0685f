"""Finished runs and a budget -> the rate and replay share to train with, what they will cost, and what the next best would.

Invariant: only settings inside the measured rates and replay shares are recommended; same cells and seed, same answer.

  cells = [Cell(rate=..., replay=..., tokens=..., seed=..., losses=..., base=..., roles=...), ...]
  plan = plan_from_cells(cells, tokens=10e9, general_loss_rise=0.05)
  plan.rate, plan.replay, plan.losses["law"].loss, plan.frontier, plan.alternatives, plan.notes; json.dumps(plan.as_json())

The rise is that of the worst general source (role "replay") over the base; the learning is the mean over the domain sources.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.laws.change import SMALL
from cpt_jax.planning import cells as cells_lib
from cpt_jax.planning import choose
from cpt_jax.planning.cells import Cell
from cpt_jax.planning.choose import REPLAY0, Choice

_NUM_GRID = 41  # rates and shares of the first grid; then twice as many, each time in a fifth of the range
_ROUNDS = 4
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
class Recommendation:
  """Everything that a table, a figure, a JSON file and the run's config need."""

  objective: str
  tokens: float
  level: float
  confidence: float | None
  general_loss_rise: float | None
  weights: dict[str, float]
  best: Point
  alternatives: tuple[Point, ...]
  frontier: tuple[Point, ...]  # least rise first: no other setting has both a lower rise and a lower domain loss
  notes: tuple[str, ...]  # why this setting, and what to doubt
  choices: dict[str, Choice]
  cells: tuple[Cell, ...]

  @property
  def rate(self) -> float:
    """The recommended peak learning rate."""
    return self.best.rate

  @property
  def replay(self) -> float:
    """The recommended replay share."""
    return self.best.replay

  @property
  def losses(self) -> dict[str, Predicted]:
    """Predicted final losses of every source."""
    return self.best.losses

  def as_json(self) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts."""
    return {
      "objective": self.objective,
      "tokens": self.tokens,
      "interval_level": self.level,
      "confidence": self.confidence,
      "general_loss_rise": self.general_loss_rise,
      "weights": self.weights,
      "recommended": _point_json(self.best),
      "alternatives": [_point_json(point) for point in self.alternatives],
      "frontier": [_point_json(point) for point in self.frontier],
      "notes": list(self.notes),
      "laws": {
        source: {
          "law": choice.law,
          "parameters": dict(zip(choice.fit.law.parameters, (float(x) for x in choice.fit.theta_P), strict=True)),
          "seed_noise": _finite(choice.noise),
          "beats_baselines": choice.beats_baselines,
          "held_out": [score._asdict() for score in choice.scores],
          "skipped": choice.skipped,
          "range": {axis: choice.range(axis) for axis in choose.AXES},
          "widening_per_doubling": choice.growth,
        }
        for source, choice in self.choices.items()
      },
    }


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
  cells: Sequence[Cell],
  *,
  tokens: float,
  laws: Mapping[str, Sequence[Any]] | None = None,
  level: float = 0.9,
  confidence: float | None = None,
  seed: int = 0,
) -> Predictor:
  """Chooses and fits a law for every source.

  Args:
    cells: finished runs of one base.
    tokens: of the run that is planned.
    laws: source -> laws to choose from; None = `choose.candidates` of its role.
    level: of the intervals.
    confidence: with which the general loss shall keep its limit, .5..1; None = the prediction itself keeps it.
    seed: of folds and starts.

  Raises:
    ConfigError: cells that do not fit together or are too few, or a budget too far beyond the measured ones.
  """
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


def recommend(
  predictor: Predictor, *, general_loss_rise: float | None = None, weights: Mapping[str, float] | None = None
) -> Recommendation:
  """The best setting: most domain learning within a general loss rise in nats, or the least weighted sum of losses.

  Raises:
    ConfigError: not exactly one objective; weights that name no source; no measured setting that keeps the limit.
  """
  if (general_loss_rise is None) == (weights is None):
    raise ConfigError("give either general_loss_rise (nats over the base) or weights (source -> weight), not both or none")
  if weights is not None:
    _check_weights(weights, list(predictor.choices))

  def cost(rate_n: np.ndarray, replay_n: np.ndarray) -> np.ndarray:
    """To be made small; inf where refused or over the limit."""
    if weights is not None:
      losses = {s: choice.expect(predictor.inputs(s, rate_n, replay_n)) for s, choice in predictor.choices.items()}
      cost_n = np.sum([weight * losses[source] for source, weight in weights.items()], axis=0)
      return np.where(np.isfinite(np.sum(list(losses.values()), axis=0)), cost_n, np.inf)
    rise_n, cost_n = predictor.rise(rate_n, replay_n), predictor.domain_loss(rate_n, replay_n)
    return np.where((rise_n <= general_loss_rise) & np.isfinite(cost_n), cost_n, np.inf)

  rate_n, replay_n = predictor.grid()
  found = _minimum(predictor, cost)
  rise_n, domain_n = predictor.rise(rate_n, replay_n), predictor.domain_loss(rate_n, replay_n)
  usable_n = np.isfinite(rise_n) & np.isfinite(domain_n)
  if found is None:
    if not usable_n.any():
      raise ConfigError("every setting of the grid is at least as harsh as one that diverged; measure lower rates")
    i = int(np.nanargmin(np.where(usable_n, rise_n, np.nan)))
    bound = "" if predictor.confidence is None else f" at confidence {predictor.confidence:g}"
    raise ConfigError(
      f"general_loss_rise={general_loss_rise:g}: no measured rate and replay share keeps the general loss so low{bound} "
      f"in a run of {predictor.tokens:g} tokens. The least rise is {rise_n[i]:.4f} nats, at rate {rate_n[i]:.3g} "
      f"and replay {replay_n[i]:.3g}; allow {math.ceil(rise_n[i] * 100) / 100:.2f} or more, "
      "or measure lower rates and more replay"
    )
  best = predictor.point("recommended", *found, limit=general_loss_rise)
  assert best is not None
  alternatives = _alternatives(predictor, best, general_loss_rise)
  objective = (
    f"lowest domain loss with the general loss at most {general_loss_rise:g} nats over the base"
    + ("" if predictor.confidence is None else f" at confidence {predictor.confidence:g}")
    if weights is None
    else "lowest " + " + ".join(f"{weight:g} x {source}" for source, weight in weights.items())
  )
  return Recommendation(
    objective=objective,
    tokens=predictor.tokens,
    level=predictor.level,
    confidence=predictor.confidence,
    general_loss_rise=general_loss_rise,
    weights=dict(weights or {}),
    best=best,
    alternatives=alternatives,
    frontier=_frontier(predictor, rate_n[usable_n], replay_n[usable_n], rise_n[usable_n], domain_n[usable_n], general_loss_rise),
    notes=_notes(predictor, best, general_loss_rise),
    choices=predictor.choices,
    cells=predictor.cells,
  )


def plan_from_cells(
  cells: Sequence[Cell],
  *,
  tokens: float,
  general_loss_rise: float | None = None,
  weights: Mapping[str, float] | None = None,
  confidence: float | None = None,
  level: float = 0.9,
  laws: Mapping[str, Sequence[Any]] | None = None,
  seed: int = 0,
) -> Recommendation:
  """`fit_sources`, then `recommend`; their arguments and errors."""
  predictor = fit_sources(cells, tokens=tokens, laws=laws, level=level, confidence=confidence, seed=seed)
  return recommend(predictor, general_loss_rise=general_loss_rise, weights=weights)


def _check_weights(weights: Mapping[str, float], sources: list[str]) -> None:
  unknown = [source for source in weights if source not in sources]
  if unknown or not any(weight > 0 for weight in weights.values()) or any(weight < 0 for weight in weights.values()):
    raise ConfigError(
      f"weights={dict(weights)}: must name sources of the runs ({', '.join(sources)}), "
      "with numbers of at least 0 and one above it"
    )


def _minimum(predictor: Predictor, cost: Any) -> tuple[float, float] | None:
  """The best of the grid, then of ever finer grids around it; None where no setting has a finite cost."""
  rate_n, replay_n = predictor.grid()
  best, zoom = None, 1.0
  for _ in range(_ROUNDS):
    cost_n = cost(rate_n, replay_n)
    i = int(np.argmin(cost_n))
    if not np.isfinite(cost_n[i]):
      return None
    best, zoom = (float(rate_n[i]), float(replay_n[i])), zoom * 5
    rate_n, replay_n = predictor.grid(around=best, zoom=zoom)
    # The setting itself stays a candidate, so that no round loses what the one before found.
    rate_n, replay_n = np.append(rate_n, best[0]), np.append(replay_n, best[1])
  return best


def _frontier(
  predictor: Predictor, rate_n: np.ndarray, replay_n: np.ndarray, rise_n: np.ndarray, domain_n: np.ndarray, limit: float | None
) -> tuple[Point, ...]:
  order = np.lexsort((domain_n, rise_n))
  lowest = np.minimum.accumulate(domain_n[order])
  is_better = np.concatenate([[True], domain_n[order][1:] < lowest[:-1] - 1e-9])
  kept = order[is_better]
  thinned = kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), 40)).round().astype(int))]
  points = [predictor.point("frontier", float(rate_n[i]), float(replay_n[i]), limit=limit) for i in thinned]
  return tuple(point for point in points if point is not None)


def _alternatives(predictor: Predictor, best: Point, limit: float | None) -> tuple[Point, ...]:
  """One step away in each direction, and the best cell that was measured; those beyond what may be predicted are left out."""
  wanted = [
    ("half the rate", best.rate / 2, best.replay),
    ("double the rate", best.rate * 2, best.replay),
    ("half the replay", best.rate, best.replay / 2),
    ("double the replay", best.rate, min(2 * best.replay, 1.0)),
  ]
  low, high = predictor.range("replay")
  if best.replay == 0:
    wanted[2:] = [("1% replay", best.rate, 0.01)]
  wanted.append(("least replay that was measured", best.rate, low))
  wanted.append(("most replay that was measured", best.rate, high))
  points: list[Point] = []
  for what, rate, replay in wanted:
    if replay < predictor.least_replay - 1e-9:
      continue
    point = predictor.point(what, rate, replay, limit=limit)
    known = [best, *points]
    if point is not None and not any(math.isclose(p.rate, rate) and math.isclose(p.replay, replay) for p in known):
      points.append(point)
  measured = [
    predictor.point("a measured cell", rate, replay, limit=limit)
    for rate, replay in sorted({(cell.rate, cell.replay) for cell in predictor.cells})
    if replay >= predictor.least_replay - 1e-9
  ]
  allowed = [point for point in measured if point is not None and point.is_allowed]
  if limit is not None and allowed:
    points.append(min(allowed, key=lambda point: point.domain_loss)._replace(what="best measured cell"))
  return tuple(points)


def _notes(predictor: Predictor, best: Point, limit: float | None) -> tuple[str, ...]:
  notes = []
  if limit is not None:
    free = _minimum(predictor, lambda rate_n, replay_n: _finite_or_inf(predictor.domain_loss(rate_n, replay_n)))
    assert free is not None
    gain = best.domain_loss - float(predictor.domain_loss(np.array([free[0]]), np.array([free[1]]))[0])
    if gain > 1e-4:
      notes.append(
        f"The limit of {limit:g} nats decides: without it rate {free[0]:.3g} and replay {free[1]:.3g} would bring "
        f"the domain loss {gain:.4f} nats lower."
      )
    else:
      notes.append(
        f"The limit of {limit:g} nats does not bind: the domain loss is lowest here, at a general rise of {best.rise:.4f}."
      )
  for axis, value, more in (("rate", best.rate, ("lower", "higher")), ("replay", best.replay, ("less", "more"))):
    low, high = predictor.range(axis)
    for edge, word in ((low, more[0]), (high, more[1])):
      if high > low and math.isclose(value, edge, rel_tol=1e-6, abs_tol=1e-9) and not (axis == "replay" and edge in (0.0, 1.0)):
        notes.append(f"The {axis} is at the edge of the measured range ({edge:g}): the best may lie beyond; measure {word}.")
  least = min(cell.replay for cell in predictor.cells)
  if least < predictor.least_replay:
    notes.append(
      f"Replay below {predictor.least_replay:.3g} is not considered: either the longest runs had no less, or the laws miss what "
      "those with less came to. Forgetting without replay goes on growing with the tokens; measure it in the longest runs."
    )
  missed = [cell for cell in predictor.cells if math.isfinite(max(cell.losses.values())) and predictor.is_missed(cell)]
  for cell in missed:
    losses = ", ".join(f"{source} {loss:.4f}" for source, loss in cell.losses.items())
    notes.append(
      f"The laws miss a measured run, {cell.run or 'unnamed'} (rate {cell.rate:g}, replay {cell.replay:.3g}, {cell.tokens:g} "
      f"tokens: {losses}); do not trust settings near it."
    )
  low, high = predictor.range("tokens")
  if not low <= predictor.tokens <= high:
    notes.append(
      f"{predictor.tokens:g} tokens lie outside the finished runs ({low:g} to {high:g}): all losses are extrapolated, and their "
      "intervals widened by the error of predicting the largest finished budget from the smaller ones, for each doubling."
    )
  if predictor.dropped:
    rates = ", ".join(f"{rate:g}" for rate in predictor.dropped)
    notes.append(f"Runs at rate {rates} were left out: the domain loss rises from the rate below on, so they serve nothing.")
  for source, choice in predictor.choices.items():
    if not choice.beats_baselines:
      notes.append(
        f"{source}: no law predicts held-out runs better than the simple guesses beside it; trust measured cells, not this fit."
      )
    if not choice.noise_freedom:
      notes.append(f"{source}: no cell has two seeds, so nothing says how much of the differences is chance.")
    if choice.diverged:
      at = ", ".join(sorted({f"rate {cell.rate:g} with replay {cell.replay:g}" for cell in choice.diverged}))
      notes.append(f"{source}: runs diverged at {at}; settings as harsh or harsher are not considered.")
  return tuple(notes)


def _finite_or_inf(value_n: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(value_n), value_n, np.inf)


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _point_json(point: Point) -> dict[str, Any]:
  return point._asdict() | {"losses": {source: predicted._asdict() for source, predicted in point.losses.items()}}
