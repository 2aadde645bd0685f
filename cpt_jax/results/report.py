"""A run and the plan that it followed -> what was predicted beside what was measured: rows, and a figure.

Invariant: a prediction is read from where the plan recorded it, never made anew.
"""

import json
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.results.runs import Run

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"


class Row(NamedTuple):
  """One source; losses in nats/token."""

  source: str
  role: str
  base: float
  predicted: float
  low: float
  high: float
  measured: float

  @property
  def error(self) -> float:
    """Measured less predicted."""
    return self.measured - self.predicted

  @property
  def is_inside(self) -> bool:
    """Does the interval hold the measured loss."""
    return self.low <= self.measured <= self.high


class Prediction(NamedTuple):
  """What a plan recorded."""

  path: pathlib.Path
  rate: float
  replay: float
  tokens: float
  losses: dict[str, tuple[float, float, float]]  # source -> loss, low, high
  frontier: list[tuple[float, float]]  # general loss rise and domain loss, nats
  limit: float | None  # of the rise


def read_plan(folder: str | pathlib.Path) -> Prediction:
  """Reads the plan.json that cpt plan wrote. Raises ConfigError: it is not there."""
  path = pathlib.Path(folder) / "plan.json"
  if not path.is_file():
    raise ConfigError(f"--plan={folder}: no plan.json there; name the --output of cpt plan")
  made = json.loads(path.read_text(encoding="utf-8"))
  best = made["recommended"]
  losses = {name: (p["loss"], p["low"], p["high"]) for name, p in best["losses"].items()}
  frontier = [(point["rise"], point["domain_loss"]) for point in made["frontier"]]
  return Prediction(path, best["rate"], best["replay"], made["tokens"], losses, frontier, made["general_loss_rise"])


def recorded(run: Run) -> dict[str, tuple[float, float, float]]:
  """What the plan wrote into the run's config: source -> loss, low, high."""
  return {name: (loss, low, high) for name, loss, low, high in run.config.plan.losses}


def rows(run: Run, predicted: dict[str, tuple[float, float, float]]) -> list[Row]:
  """A row for each source that was predicted and measured. Raises ConfigError: none was."""
  both = [name for name in run.losses if name in predicted]
  if not both:
    raise ConfigError(
      f"{run.path}: no prediction for its sources {', '.join(run.losses)}; the config of a plan records one (cpt plan), "
      "and --plan=DIR names a plan"
    )
  return [Row(name, run.roles[name], run.base(name), *predicted[name], run.final(name)) for name in both]


def differences(run: Run, plan: Prediction) -> list[str]:
  """Where the run did not do what the plan predicted for, in words."""
  lines = []
  asked = {
    "schedule.lr_peak": (run.rate, plan.rate),
    "replay share": (run.replay, plan.replay),
    "tokens": (run.num_tokens, plan.tokens),
  }
  for what, (was, planned) in asked.items():
    # A share is as exact as the rows of a run allow, and the last step of a run is a whole one.
    if abs(was - planned) > 0.02 * abs(planned) + (0.005 if what == "replay share" else 0.0):
      lines.append(f"{what}: {was:g} in the run, {planned:g} in the plan")
  return lines


def figure(run: Run, table: list[Row], plan: Prediction | None, path: str | pathlib.Path) -> None:
  """Losses over the run with what was predicted for its end; with a plan also where it came out beside the frontier."""
  columns = 1 if plan is None else 2
  made, axes = panels(1, columns, size=(6.4 * columns, 4.6))
  ax = axes[0][0]
  steps_E = run.eval_steps_E
  colour_of = colours(run.losses)
  low, high = visible_range(run, table)
  for row in table:
    colour = colour_of[row.source]
    ax.plot(steps_E, run.losses[row.source] - row.base, marker="o", color=colour, label=f"{row.source} ({row.role}), measured")
    predicted, least, most = row.predicted - row.base, row.low - row.base, row.high - row.base
    is_cut = least < low or most > high
    ax.errorbar(
      [len(run.rates_S) * 1.03], [predicted], yerr=[[predicted - least], [most - predicted]], marker="D", capsize=5, color=colour,
      alpha=0.6, label=f"{row.source}, predicted" + (f"; from {least:+.3g} to {most:+.3g}" if is_cut else ""),
    )  # fmt: skip
  ax.set_ylim(low, high)
  ax.axhline(0, color=GREY, linewidth=0.8)
  label(ax, "step", "held-out loss less the base's, nats/token", "learning and forgetting, and what was predicted for the end")
  if plan is not None:
    _frontier(axes[0][1], table, plan)
  made.savefig(path, dpi=140)


def colours(names: Iterable[str]) -> dict[str, str]:
  """Name -> colour, which follows from the name: a source looks the same in every figure. Two of one colour are moved apart."""
  found: dict[str, str] = {}
  for name in sorted(names):
    at = zlib.crc32(name.encode())
    ordered = [COLOURS[(at + i) % len(COLOURS)] for i in range(len(COLOURS))]
    found[name] = next((colour for colour in ordered if colour not in found.values()), ordered[0])
  return found


def visible_range(run: Run, table: list[Row]) -> tuple[float, float]:
  """What the panel of losses shows, nats less the base's: all curves and predictions, and half as much again for intervals.

  An interval that is far wider than everything measured would press the curves flat; it is cut, and the legend says its ends.
  """
  shown = [0.0]
  for row in table:
    shown += [*(run.losses[row.source] - row.base), row.predicted - row.base]
  least, most = min(shown), max(shown)
  span = (most - least) or 1.0
  low = max(least - span / 2, min([least, *(row.low - row.base for row in table)]))
  high = min(most + span / 2, max([most, *(row.high - row.base for row in table)]))
  return low - 0.05 * span, high + 0.05 * span


def _frontier(ax: Any, table: list[Row], plan: Prediction) -> None:
  def place(value: str) -> tuple[float, float]:
    rise = max(getattr(row, value) - row.base for row in table if row.role == "replay")
    return rise, float(np.mean([getattr(row, value) for row in table if row.role == "domain"]))

  ax.plot(*zip(*plan.frontier, strict=True), color=COLOURS[0], label="frontier, predicted")
  ax.plot(*place("predicted"), marker="*", markersize=15, linestyle="", color=COLOURS[1], label="the plan's choice, predicted")
  ax.plot(*place("measured"), marker="X", markersize=11, linestyle="", color="black", label="this run, measured")
  if plan.limit is not None:
    ax.axvline(plan.limit, color=GREY, linestyle="--", label=f"limit, {plan.limit:g} nats")
  label(ax, "general loss less the base's, nats/token", "domain loss, nats/token", "where the run came out")


def panels(rows: int = 1, columns: int = 1, *, size: tuple[float, float], layout: Any = "constrained") -> tuple[Any, Any]:
  """A figure of so many inches and its axes [rows, columns], of no global state: a caller's own figures are left alone."""
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  made = Figure(figsize=size, layout=layout)
  backend_agg.FigureCanvasAgg(made)
  return made, made.subplots(rows, columns, squeeze=False)


def label(ax: Any, x: str, y: str, title: str = "", *, titlesize: float | None = None) -> None:
  """Names the axes and the panel, and shows the legend."""
  ax.set_xlabel(x)
  ax.set_ylabel(y)
  ax.set_title(title, fontsize=titlesize)
  ax.legend(fontsize=8)
