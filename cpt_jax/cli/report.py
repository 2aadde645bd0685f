"""`cpt report`: what a run learnt and forgot, beside what a plan had predicted where there is one."""

import pathlib
from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "report",
    description="""Says for each source of a run how its held-out loss has changed from the base's, and draws it over the tokens
    trained on. Where a plan predicted the run's losses, measured and predicted stand beside each other.

    A run that is still going is reported as far as it is.""",
    example="""cpt report --run=runs/quickstart

    Prints the table, and writes runs/quickstart/report.png.""",
  )
  p.flag("--run=DIR", "The --workdir of the run.", required=True)
  p.flag("--plan=DIR", "Its plan; without it, the prediction that the run's config records.")
  p.flag("--output=FILE", "The figure; report.png in the run's directory by default.")
  p.switch("figure", default=True, help="Draw the figure.")
  return p


def run(args: Namespace) -> int:
  """Reports."""
  from cpt_jax.results import learning, report, runs, tables

  read = runs.read_run(args.run)
  plan = report.read_plan(args.plan) if args.plan else None
  predicted = plan.losses if plan else report.recorded(read)
  path = pathlib.Path(args.output or read.path / "report.png")
  table = report.rows(read, predicted) if predicted else []
  learning.say(read, table, plan)
  if args.figure:
    if table:
      report.figure(read, table, plan, path)
    else:
      learning.figure(tables.open_run(args.run), path)
    print(f"figure        {path}")
  return exits.DONE
