"""Fits laws to loss curves: flags to one call of `cpt_jax.laws`."""

import argparse

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  from cpt_jax.laws.fit_curves import LAWS

  p = manual.Parser(
    "fit-laws",
    description="""
    Fits laws of learning-rate schedules and of continual pretraining to whole loss curves, and says how well each predicts
    curves that it has not seen: those of --score, or without any each fitted curve from the others. Curves are CSV files with the
    columns step, lr, loss, or runs of this package, of which --source names the held-out losses. Parameters come with 90%
    intervals.
    """,
    example="""
    cpt fit-laws --law=all --runs=plan/trials --source=general --plot=laws.png

    Compares all laws on the trials of a plan, each predicted from the others.
    """,
  )
  for name, what in (
    ("fit", "CSV files, runs or folders of runs to fit: one or more; repeatable."),
    ("score", "Such to predict; without any, each fitted curve is predicted from the others."),
  ):
    p.add_argument(f"--{name}", nargs="+", action="extend", default=[], metavar="FILE", help=what)
  p.add_argument("--runs", default="", metavar="DIR", help="A folder of runs to fit, beside those of --fit.")
  p.add_argument("--source", default="", metavar="NAME", help="Whose held-out losses are taken from runs, e.g. general.")
  p.add_argument(
    "--law", default="multi_power", metavar="NAME", help=f"{', '.join(LAWS)}; or all, to compare those that fit the curves' kind."
  )
  p.add_argument("--json", default="", metavar="FILE", help="File to write the figures into.")
  p.add_argument(
    "--plot", default="", metavar="FILE", help="PNG of all curves with the laws' predictions (needs the extra [plots])."
  )
  p.add_argument(
    "--warmup_steps", type=int, default=-1, metavar="N",
    help="Of the CSV files; -1, the default = until the first row, or while the rate rises.",
  )  # fmt: skip
  p.add_argument(
    "--resamples", type=int, default=100, metavar="N",
    help="Resampled data sets for the intervals of parameters, 100 by default; 0 = no intervals.",
  )  # fmt: skip
  p.add_argument("--starts", type=int, default=48, metavar="N", help="Points from which each fit is searched; 48 by default.")
  p.add_argument("--seed", type=int, default=0, help="Of starts and resamples.")
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
