"""A design, finished trials and a recommendation -> tables for people.

Invariant: shows, computes nothing but means.
"""

from collections.abc import Sequence

import numpy as np

from cpt_jax.planning import choose
from cpt_jax.planning.design import FARTHEST, Design
from cpt_jax.planning.outcome import FinishedTrial, domain_loss, general_rise, highest_stable, is_stable
from cpt_jax.planning.recommend import Point, Recommendation
from cpt_jax.training.console import count, say, table


def design(planned: Design, *, num_over: int) -> None:
  """What will be made, what it costs, and of what run."""
  groups = {}
  for trial in planned.trials():
    of_sweep = trial in planned.sweep()
    groups.setdefault((not of_sweep, trial.steps), []).append(trial)
  rows = []
  for (is_grid, steps), trials in sorted(groups.items()):
    rates, replays, seeds = (sorted({getattr(trial, key) for trial in trials}) for key in ("rate", "replay", "seed"))
    words = _list(rates, "{:.3g}") if planned.rates or not is_grid else f"{len(rates)}, up to the highest stable"
    what = ("grid" if steps == planned.steps else f"{steps // planned.steps}x as long") if is_grid else "rate sweep, at most"
    rows.append([what, words, _list(replays, "{:g}"), _list(seeds, "{:g}"), len(trials), f"{steps:,}"])
    rows[-1] += [f"{steps * planned.tokens_per_step:,}", f"{sum(t.steps for t in trials) * planned.tokens_per_step:,}"]
  share = planned.num_tokens / planned.budget_tokens
  table(
    "the probe", ["part", "rates", "replay shares", "seeds", "trials", "steps each", "tokens each", "tokens"],
    [*rows, ["all", "", "", "", len(planned.trials()), "", "", f"{planned.num_tokens:,}"]], left=4,
  )  # fmt: skip
  shared = "; those of the sweep count in the grid, too" if planned.ladder else ""
  say(f"there    {num_over} of {len(planned.trials())} trials are finished{shared}")
  say(f"cost     {planned.num_tokens:,} tokens at most, {share:.2%} of the run's {planned.budget_tokens:,}")
  times = planned.budget_tokens / planned.longest_tokens
  far = "" if times <= FARTHEST else f": too far for the laws, which say nothing from {FARTHEST} times on; give longer trials"
  say(f"reach    the run is {times:.3g} times as long as the longest trial{far}")


def sweep(found: Sequence[FinishedTrial]) -> None:
  """Rate against learning and forgetting at one replay share, and where the loss is no longer stable."""
  rows = [
    [f"{m.trial.rate:.3g}", *_losses(m), "stable" if is_stable(m, found) else m.diverged or "not stable"]
    for m in sorted(found, key=lambda m: m.trial.rate)
  ]
  table(
    f"rate sweep at replay share {found[0].trial.replay:g}: final losses, nats per token (change against the base)",
    ["rate", *found[0].run.roles, ""],
    rows,
  )
  highest = highest_stable(found)
  if highest is not None:
    say(f"highest stable rate {highest:.3g}" + ("" if highest < found[-1].trial.rate else ", the ladder's highest"))


def cells(found: Sequence[FinishedTrial]) -> None:
  """Change of the general and the domain loss in every cell, means over its seeds."""
  for steps in sorted({m.trial.steps for m in found}):
    of_length = [m for m in found if m.trial.steps == steps]
    rates, replays = (sorted({getattr(m.trial, key) for m in of_length}) for key in ("rate", "replay"))
    for title, figure in (("rise of the general loss over the base", general_rise), ("domain loss", domain_loss)):
      rows = []
      for rate in rates:
        by_cell = [[figure(m) for m in of_length if (m.trial.rate, m.trial.replay) == (rate, replay)] for replay in replays]
        rows.append([f"{rate:.3g}", *(_mean(values) for values in by_cell)])
      # A line of its own: a title would be folded to the width of so narrow a table.
      say(f"{title}, trials of {steps:,} steps, means over seeds: rate by replay share")
      table("", ["rate", *(f"{x:g}" for x in replays)], rows)


def laws(plan: Recommendation) -> None:
  """Mean absolute errors on held-out trials, of every law and of simple guesses; the last figure, laws.choose's own, decides."""
  for source, choice in plan.choices.items():
    names = list(dict.fromkeys(score.law for score in choice.scores))
    schemes = list(dict.fromkeys(score.scheme for score in choice.scores))
    errors = {(score.law, score.scheme): score.mae for score in choice.scores}
    noise = f"{choice.noise:.4f}" if np.isfinite(choice.noise) else "not known: one seed"
    table(
      f"{source} ({choice.role}): mean error on trials held out by ..., nats; seed noise {noise}",
      ["law", *schemes, "all, scaled", ""],
      [
        [name, *(f"{errors[name, scheme]:.4f}" for scheme in schemes), f"{choice.mean_error(name):.4f}"]
        + ["chosen" if name == choice.law else "simple guess" if name in choose.BASELINES else ""]
        for name in names
      ],
    )
    for name, why in choice.skipped.items():
      say(f"{name}: not fitted; {why}")


def recommendation(plan: Recommendation) -> None:
  """The setting, what it will come to, and what others would."""
  say(f"objective    {plan.objective}")
  say(f"recommended  rate {plan.rate:.4g}, replay share {plan.replay:.4g}")
  table(
    f"predicted for {count(plan.tokens)} tokens: nats per token, with {plan.level:.0%} intervals",
    ["source", "role", "law", "base", "predicted", "from", "to", "change", "doublings beyond"],
    [
      [name, plan.choices[name].role, p.law, f"{p.loss - p.change:.4f}", f"{p.loss:.4f}", f"{p.low:.4f}", f"{p.high:.4f}"]
      + [f"{p.change:+.4f}", f"{p.doublings:.1f}"]
      for name, p in plan.losses.items()
    ],
    left=3,
  )
  _points("the next best choices", [plan.best, *plan.alternatives], plan)
  step = max(1, len(plan.frontier) // 8)
  _points("the frontier: nothing forgets less and learns more", plan.frontier[::step], plan)
  for note in plan.notes:
    say(f"note: {note}")


def _points(title: str, points: Sequence[Point], plan: Recommendation) -> None:
  limit = plan.general_loss_rise is not None
  table(
    title,
    ["", "rate", "replay", "general rise", "domain loss", "domain against recommended", *(["limit"] if limit else [])],
    [
      [p.what, f"{p.rate:.3g}", f"{p.replay:.3g}", f"{p.rise:+.4f}", f"{p.domain_loss:.4f}"]
      + [f"{p.domain_loss - plan.best.domain_loss:+.4f}"]
      + ([("kept" if p.is_allowed else "broken")] if limit else [])
      for p in points
    ],
  )


def _losses(finished: FinishedTrial) -> list[str]:
  if finished.diverged:
    return ["diverged"] * len(finished.run.roles)
  run = finished.run
  return [f"{run.final(name):.4f} ({run.final(name) - run.base(name):+.4f})" for name in run.roles]


def _mean(values: Sequence[float]) -> str:
  if not values:
    return ""
  return f"{np.mean(values):.4f}" if np.isfinite(values).all() else "diverged"


def _list(values: Sequence[float], form: str) -> str:
  return " ".join(form.format(value) for value in values)
