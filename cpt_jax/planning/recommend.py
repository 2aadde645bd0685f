"""Finished runs and a budget -> the rate and replay share to train with, what they will cost, and what the next best would.

Invariant: only settings inside the measured rates and replay shares are recommended; same cells and seed, same answer.

  cells = [Cell(rate=..., replay=..., tokens=..., seed=..., losses=..., base=..., roles=...), ...]
  plan = plan_from_cells(cells, tokens=10e9, general_loss_rise=0.05)
  plan.rate, plan.replay, plan.losses["law"].loss, plan.frontier, plan.alternatives, plan.notes; json.dumps(plan.as_json())

The rise is that of the worst general source (role "replay") over the base; the learning is the mean over the domain sources.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.planning import choose
from cpt_jax.planning.cells import Cell
from cpt_jax.planning.choose import Choice
from cpt_jax.planning.predictor import Point, Predicted, Predictor, fit_sources

_ROUNDS = 4  # grids, each finer than the one before


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
          "seed_noise": choice.noise if math.isfinite(choice.noise) else None, "beats_baselines": choice.beats_baselines,
          "held_out": [score._asdict() for score in choice.scores], "skipped": choice.skipped,
          "range": {axis: choice.range(axis) for axis in choose.AXES}, "widening_per_doubling": choice.growth,
        }
        for source, choice in self.choices.items()
      },
    }  # fmt: skip


def recommend(
  predictor: Predictor, *, general_loss_rise: float | None = None, weights: Mapping[str, float] | None = None
) -> Recommendation:
  """The best setting: most domain learning within a general loss rise in nats, or the least weighted sum of losses.

  Raises ConfigError: not exactly one objective; weights that name no source; no measured setting that keeps the limit.
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
    objective=objective, tokens=predictor.tokens, level=predictor.level, confidence=predictor.confidence,
    general_loss_rise=general_loss_rise, weights=dict(weights or {}), best=best, alternatives=alternatives,
    frontier=_frontier(predictor, rate_n[usable_n], replay_n[usable_n], rise_n[usable_n], domain_n[usable_n], general_loss_rise),
    notes=_notes(predictor, best, general_loss_rise), choices=predictor.choices, cells=predictor.cells,
  )  # fmt: skip


def plan_from_cells(
  cells: Sequence[Cell], *, tokens: float, general_loss_rise: float | None = None, weights: Mapping[str, float] | None = None,
  confidence: float | None = None, level: float = 0.9, laws: Mapping[str, Sequence[Any]] | None = None, seed: int = 0,
) -> Recommendation:  # fmt: skip
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
    ("half the rate", best.rate / 2, best.replay), ("double the rate", best.rate * 2, best.replay),
    ("half the replay", best.rate, best.replay / 2), ("double the replay", best.rate, min(2 * best.replay, 1.0)),
  ]  # fmt: skip
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
    free = _minimum(predictor, lambda *at: np.nan_to_num(predictor.domain_loss(*at), nan=np.inf, posinf=np.inf))
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


def _point_json(point: Point) -> dict[str, Any]:
  return point._asdict() | {"losses": {source: predicted._asdict() for source, predicted in point.losses.items()}}
