"""A run -> what it learnt and forgot: each source's held-out loss over the tokens trained on, less the base's.

Invariant: needs no plan and no prediction.
"""

import pathlib

import numpy as np

from cpt_jax.results import report, runs, tables
from cpt_jax.training import console


def rows(run: tables.OpenRun) -> list[list[str]]:
  """A row for each source: name, role, tokens trained on, the loss of base and run, their change."""
  read = dict(zip(run.ledger["source"].tolist(), run.ledger["tokens"].tolist(), strict=True))  # the last entry of each
  found = []
  for name in sources(run):
    loss_E = run.losses[name][~np.isnan(run.losses[name])]
    change = loss_E[-1] - loss_E[0]
    role = run.config.data.sources[name].role
    tokens = f"{read.get(name, 0):,.0f}"
    found.append([name, role, tokens, f"{loss_E[0]:.4f}", f"{loss_E[-1]:.4f}", f"{change:+.4f}", console.meaning(change, role)])
  return found


def sources(run: tables.OpenRun) -> list[str]:
  """Names of those that were evaluated."""
  return [name for name in run.losses if name not in ("step", "tokens")]


def figure(run: tables.OpenRun, path: str | pathlib.Path) -> None:
  """Draws both: replay sources below zero have forgotten nothing, domain sources below zero have been learnt."""
  made, ((ax,),) = report.panels(size=(7.2, 4.6))
  colours = report.colours(sources(run))
  for name in sources(run):
    role = run.config.data.sources[name].role
    loss_E = run.losses[name]
    line = "--" if role == "replay" else "-"
    ax.plot(run.losses["tokens"], loss_E - loss_E[0], line, marker="o", color=colours[name], label=f"{name} ({role})")
  ax.axhline(0, color=report.GREY, linewidth=0.8)
  title = f"{run.path}: below 0 learnt, above 0 forgotten"
  report.label(ax, "tokens trained on", "held-out loss less the base's, nats/token", title, titlesize=10)
  made.savefig(path, dpi=140)


def say(run: runs.Run, predicted: list[report.Row], plan: report.Prediction | None) -> None:
  """Prints the table: with `predicted` rows what was predicted and measured, without any what was learnt."""
  at = f"at step {run.eval_steps_E[-1]} of {len(run.rates_S)}: what follows is not its end yet"
  console.say(f"run           {run.path}, {'complete' if run.is_complete else at}")
  if not predicted:
    console.table(
      "held-out loss, nats per token", ["source", "role", "tokens", "base", "result", "change", ""],
      rows(tables.open_run(run.path)), left=2,
    )  # fmt: skip
    return
  for line in report.differences(run, plan) if plan else []:
    console.say(f"note: {line}; the prediction is not for this run")
  console.table(
    "held-out loss, nats per token: predicted before the run, measured in it",
    ["source", "role", "base", "predicted", "interval", "measured", "error", "change", "predicted change", "inside"],
    [
      [row.source, row.role, f"{row.base:.4f}", f"{row.predicted:.4f}", f"{row.low:.4f} to {row.high:.4f}", f"{row.measured:.4f}"]
      + [f"{row.error:+.4f}", f"{row.measured - row.base:+.4f}", f"{row.predicted - row.base:+.4f}"]
      + ["yes" if row.is_inside else "no"]
      for row in predicted
    ],
    left=2,
  )
