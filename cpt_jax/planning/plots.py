"""A recommendation -> two figures: the frontier of forgetting against learning, and how well held-out runs were predicted.

Invariant: draws what it is given and fits nothing.
"""

import os
from typing import Any

import numpy as np

from cpt_jax.planning import cells as cells_lib
from cpt_jax.planning.recommend import Recommendation
from cpt_jax.results import report

_BLUE, _RED = report.COLOURS[:2]


def frontier(plan: Recommendation, path: str | os.PathLike) -> None:
  """General loss rise against domain loss: frontier, recommended setting, limit, and the runs of the nearest budget."""
  figure, (ax,) = _figure(7.2, 5.2)
  rises, losses = [p.rise for p in plan.frontier], [p.domain_loss for p in plan.frontier]
  _dots(ax, *np.reshape(_measured(plan), (-1, 4)).T)
  ax.plot(rises, losses, color=_BLUE, linewidth=2, label=f"frontier at {_count(plan.tokens)} tokens, predicted", zorder=3)
  for point in plan.frontier[:: max(1, len(plan.frontier) // 6)]:
    text = f"{point.rate:.2g}, {point.replay:.0%}" if point.replay >= 0.1 else f"{point.rate:.2g}, {point.replay:.1%}"
    ax.annotate(text, (point.rise, point.domain_loss), xytext=(5, 6), textcoords="offset points", fontsize=7, color=_BLUE)
  ax.scatter([plan.best.rise], [plan.best.domain_loss], marker="*", s=260, color=_RED, edgecolors="black", zorder=5,
             label=f"recommended: rate {plan.rate:.3g}, replay {plan.replay:.1%}")  # fmt: skip
  if plan.general_loss_rise is not None:
    ax.axvline(
      plan.general_loss_rise, color=report.GREY, linestyle="--", linewidth=1.2, label=f"limit, {plan.general_loss_rise:g} nats"
    )
  # Collapsed runs would squeeze the rest into a corner: the axes end where the frontier does, with room for what is near it.
  span_x, span_y = _span(rises), _span(losses)
  ax.set_xlim(min([*rises, 0.0]) - 0.1 * span_x, max([*rises, plan.general_loss_rise or 0.0]) + 0.25 * span_x)
  ax.set_ylim(min(losses) - 0.12 * span_y, max(losses) + 0.35 * span_y)
  ax.set_xlabel("rise of the general loss over the base (nats/token)")
  ax.set_ylabel("domain loss (nats/token)")
  budgets = sorted({cell.tokens for cell in plan.cells})
  ax.set_title(
    f"Forgetting against learning\nDots: runs of {_count(_nearest(budgets, plan.tokens))} tokens, larger with more replay. "
    "On the line: rate, replay share",
    fontsize=10,
  )
  ax.legend(fontsize=7.5, loc="upper right")
  figure.savefig(path, dpi=140)


def fit_quality(plan: Recommendation, path: str | os.PathLike) -> None:
  """For each source: every run's loss as predicted without its cell, less the measured one, and the law's name and error."""
  sources = list(plan.choices)
  figure, axes = _figure(4.6 * len(sources), 4.4, columns=len(sources))
  for ax, source in zip(axes, sources, strict=True):
    choice = plan.choices[source]
    inputs = choice.fit.inputs
    _dots(ax, inputs["rate"], inputs["replay"], choice.loss_n, choice.held_out_n - choice.loss_n)
    ax.axhline(0, color="black", linewidth=0.8)
    if np.isfinite(choice.noise):
      ax.axhspan(-choice.noise, choice.noise, color=report.GREY, alpha=0.25, linewidth=0, label=f"seed noise, {choice.noise:.4f}")
    mae = next(score.mae for score in choice.scores if score.law == choice.law and score.scheme == "cell")
    ax.set_title(f"{source} ({choice.role}): {choice.law}\nmean error of held-out cells {mae:.4f} nats", fontsize=10)
    ax.set_xlabel("measured loss (nats/token)")
    ax.set_ylabel("predicted - measured (nats/token)")
    ax.legend(fontsize=7.5)
  figure.savefig(path, dpi=140)


def _measured(plan: Recommendation) -> list[tuple[float, float, float, float]]:
  """(rate, replay, rise, domain loss) of the runs of the budget nearest the plan's."""
  budget = _nearest(sorted({cell.tokens for cell in plan.cells}), plan.tokens)
  general = cells_lib.sources_of(plan.cells, role=cells_lib.REPLAY)
  domain = cells_lib.sources_of(plan.cells, role=cells_lib.DOMAIN)
  runs = [c for c in plan.cells if c.tokens == budget and all(np.isfinite(loss) for loss in c.losses.values())]
  rises = [max(cell.losses[s] - cell.base[s] for s in general) for cell in runs]
  learnt = [float(np.mean([cell.losses[s] for s in domain])) for cell in runs]
  return [(cell.rate, cell.replay, rise, loss) for cell, rise, loss in zip(runs, rises, learnt, strict=True)]


def _nearest(budgets: list[int], tokens: float) -> int:
  return min(budgets, key=lambda budget: abs(np.log(budget / tokens)))


def _span(values: list[float]) -> float:
  return max(max(values) - min(values), 0.01)


def _count(number: float) -> str:
  for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number:g}"


def _dots(ax: Any, rate_n: np.ndarray, replay_n: np.ndarray, x_n: np.ndarray, y_n: np.ndarray) -> None:
  """Runs, a colour for each rate, larger with more replay."""
  import matplotlib

  rates = np.unique(rate_n)
  for rate, shade in zip(rates, np.linspace(0.1, 0.9, len(rates)), strict=True):
    of_rate, colour = rate_n == rate, matplotlib.colormaps["viridis"](shade)
    ax.scatter(x_n[of_rate], y_n[of_rate], s=25 + 200 * replay_n[of_rate], color=colour, edgecolors="white", linewidths=0.7,
               label=f"rate {rate:.3g}")  # fmt: skip


def _figure(width: float, height: float, *, columns: int = 1) -> tuple[Any, Any]:
  figure, axes = report.panels(1, columns, size=(width, height))
  for ax in axes[0]:
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
  return figure, axes[0]
