"""Compares runs with one vocabulary and another: flags to one call of `cpt_jax.results.recovery`."""

import argparse
import pathlib

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "vocab compare",
    description="""Puts runs with a grown vocabulary beside one without, in held-out bits per byte of the same text: what the
    new pieces cost at first, and after how many tokens, bytes and FLOPs that was made up for. Reads records alone; runs that
    are still going are compared as far as they are.""",
    example="""cpt vocab compare --base=runs/plain --grown=runs/grown

    Prints the tables and draws runs/grown/vocabulary.png.""",
  )
  p.flag("--base=DIR", "Directory of the run with the vocabulary as it was.")
  p.flag("--grown=DIR,...", "Directories of the runs with other vocabularies.", [])
  p.flag("--within=BITS", "Bits per byte above the unexpanded run that count as met too; 0.01 by default.", 0.01)
  p.flag("--output=FILE", "The figure; vocabulary.png in the first grown run's directory by default.")
  p.switch("figure", default=True, help="Draw the figure.")
  return p


def run(args: argparse.Namespace) -> int:
  """Compares, prints and draws."""
  from cpt_jax.results import recovery, recovery_tables
  from cpt_jax.training import console

  found = recovery.compare_runs(args.base, args.grown)
  recovery_tables.show(found, within=args.within)
  if args.figure:
    path = pathlib.Path(args.output or pathlib.Path(args.grown[0]) / "vocabulary.png")
    recovery.figure(found, recovery.labels(found), path)
    console.say(f"figure  {path}")
  return exits.DONE
