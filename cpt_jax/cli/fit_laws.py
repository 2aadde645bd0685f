"""Fits laws to loss curves: flags to one call of `cpt_jax.laws`."""

import argparse

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  from cpt_jax.laws.fit_curves import LAWS

  p = manual.Parser(
    "fit-laws",
    description="""Fits laws of learning-rate schedules and of continual pretraining to whole loss curves, and says how well
    each predicts curves that it has not seen: those of --score, or without any each fitted curve from the others. Curves are
    CSV files with the columns step, lr, loss, or runs of this package, of which --source names the held-out losses.
    Parameters come with 90% intervals.""",
    example="""cpt fit-laws --law=all --runs=plan/trials --source=general --plot=laws.png

    Compares all laws on the trials of a plan, each predicted from the others.""",
  )
  p.repeated("--fit=FILE", "CSV files, runs or folders of runs to fit: one or more; repeatable.", nargs="+")
  p.repeated("--score=FILE", "Such to predict; without any, each fitted curve is predicted from the others.", nargs="+")
  p.flag("--runs=DIR", "A folder of runs to fit, beside those of --fit.")
  p.flag("--source=NAME", "Whose held-out losses are taken from runs, e.g. general.")
  p.flag("--law=NAME", f"{', '.join(LAWS)}; or all, to compare those that fit the curves' kind.", "multi_power")
  p.flag("--json=FILE", "File to write the figures into.")
  p.flag("--plot=FILE", "PNG of all curves with the laws' predictions.")
  p.flag("--warmup_steps=N", "Of the CSV files; -1, the default = until the first row, or while the rate rises.", -1)
  p.flag("--resamples=N", "Resampled data sets for the intervals of parameters, 100 by default; 0 = no intervals.", 100)
  p.flag("--starts=N", "Points from which each fit is searched; 48 by default.", 48)
  p.flag("--seed", "Of starts and resamples.", 0)
  return p


def run(args: argparse.Namespace) -> int:
  """Fits, scores and prints."""
  from cpt_jax.laws import tables
  from cpt_jax.laws.fit_curves import fit_curves

  found = fit_curves(
    args.fit, score=args.score, runs=args.runs, source=args.source, law=args.law, warmup_steps=args.warmup_steps,
    resamples=args.resamples, starts=args.starts, seed=args.seed, json_file=args.json, plot=args.plot,
  )  # fmt: skip
  tables.show(found)
  return exits.DONE
