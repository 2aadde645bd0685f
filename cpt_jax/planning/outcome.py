"""Trials that are over -> the highest stable rate, the cells that laws are fitted to, and the config of the recommended run.

Invariant: what is fitted is what was measured: losses as the runs have them on record, and the shares and tokens that were really
read.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.journal import write_atomically
from cpt_jax.planning import config_files
from cpt_jax.planning.cells import Cell
from cpt_jax.planning.recommend import Recommendation
from cpt_jax.planning.trials import Trial, at_point
from cpt_jax.results.runs import Run

# A rate is stable while its domain loss is at most this much above the lowest of the rates below it, in nats; chosen by hand:
# some times what two seeds of short runs differ by, and little beside what a rate costs that is really too high.
STABLE_NATS = 0.05


class FinishedTrial(NamedTuple):
  """A trial that is over."""

  trial: Trial
  run: Run
  diverged: str  # how; "" = it did not


def domain_loss(finished: FinishedTrial) -> float:
  """Mean final loss of the domain sources, infinite where the trial diverged."""
  if finished.diverged:
    return float("inf")
  return float(np.mean([finished.run.final(name) for name, role in finished.run.roles.items() if role == "domain"]))


def general_rise(finished: FinishedTrial) -> float:
  """Of the replay source that was forgotten most, over the base; infinite where the trial diverged."""
  if finished.diverged:
    return float("inf")
  run = finished.run
  return max(run.final(name) - run.base(name) for name, role in run.roles.items() if role == "replay")


def base_domain_loss(run: Run) -> float:
  """Mean loss of the domain sources before the first update."""
  return float(np.mean([run.base(name) for name, role in run.roles.items() if role == "domain"]))


def is_stable(finished: FinishedTrial, sweep: Sequence[FinishedTrial]) -> bool:
  """Did it learn, and end with a domain loss at most STABLE_NATS above the lowest of the rates below it."""
  loss = domain_loss(finished)
  better = [domain_loss(other) for other in sweep if other.trial.rate < finished.trial.rate]
  return loss < base_domain_loss(finished.run) and loss <= min(better, default=loss) + STABLE_NATS


def highest_stable(sweep: Sequence[FinishedTrial]) -> float | None:
  """The highest rate of a sweep below the first one that is not stable; None where the lowest is not."""
  highest = None
  for finished in sorted(sweep, key=lambda m: m.trial.rate):
    if not is_stable(finished, sweep):
      break
    highest = finished.trial.rate
  return highest


def cells_of(found: Sequence[FinishedTrial]) -> list[Cell]:
  """Trials as the laws take them.

  Replay shares and tokens are what was really read, as means over all trials with the same share and steps: a share of 1% of 256
  rows is 3 rows. Seeds differ in it by a few tokens, and are one cell all the same.
  """
  replays, tokens = {}, {}
  for finished in found:
    if not finished.diverged:
      replays.setdefault((finished.trial.replay, finished.trial.steps), []).append(finished.run.replay)
      tokens.setdefault(finished.trial.steps, []).append(finished.run.num_tokens)
  per_step = np.mean([count / steps for steps, counts in tokens.items() for count in counts]) if tokens else 1.0
  cells = []
  for trial, run, diverged in found:
    real = replays.get((trial.replay, trial.steps), [trial.replay])
    read = tokens.get(trial.steps, [per_step * trial.steps])
    losses = {name: float("nan") if diverged else run.final(name) for name in run.losses}
    base = {name: run.base(name) for name in run.losses}
    cells.append(
      Cell(
        trial.rate, round(float(np.mean(real)), 9), round(float(np.mean(read))), trial.seed, losses, base, run.roles, trial.name
      )
    )
  return cells


def trained_tokens(found: Sequence[FinishedTrial], *, budget_tokens: int, tokens_per_step: int) -> float:
  """Targets that a run of `budget_tokens` positions trains on: those that the trials' padding and first tokens left."""
  whole = [m for m in found if not m.diverged]
  if not whole:
    raise ConfigError("every trial diverged; lower schedule.lr_peak")
  return budget_tokens * sum(m.run.num_tokens for m in whole) / (tokens_per_step * sum(m.trial.steps for m in whole))


def planned_config(config: Any, plan: Recommendation, *, budget_tokens: int | None, made_by: str) -> Any:
  """The config of the recommended run, with what is predicted of it; `budget_tokens` None leaves its length as it was."""
  c = at_point(config, rate=float(f"{plan.rate:.5g}"), replay=float(f"{plan.replay:.5g}"))
  with c.unlocked(), c.ignore_type():
    if budget_tokens is not None:
      c.train.length = f"{budget_tokens} tokens"
    c.plan.losses = tuple((name, *(round(x, 5) for x in (said.loss, said.low, said.high))) for name, said in plan.losses.items())
    c.plan.made_by = made_by
  return c


def write_config(config: Any, path: pathlib.Path, plan: Recommendation) -> None:
  """OUTPUT/config.py."""
  said = "; ".join(f"{name} {p.loss:.4f} ({p.low:.4f} to {p.high:.4f})" for name, p in plan.losses.items())
  about = (
    f"The run that cpt plan recommends: {plan.objective}.\n\n"
    f"Predicted final losses in nats per token: {said}.\nRun: cpt train --config={path}"
  )
  config_files.write(config, path, about=about)


def write_plan(path: pathlib.Path, plan: Recommendation, design: Any, cells: Sequence[Cell]) -> None:
  """OUTPUT/plan.json: the recommendation, the design, and every cell that it was fitted to."""
  values = {**plan.as_json(), "design": design._asdict(), "cells": [cell._asdict() for cell in cells]}
  write_atomically(path, json.dumps(values, indent=1).encode())
