"""Plans a run by short trials: flags to one call of `cpt_jax.plan`."""

import argparse

from cpt_jax import config as config_lib, exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "plan",
    description="""Finds the rate and the replay share of a run by trials that cost a few hundredths of it. A sweep of the rate
    finds the highest stable one; a grid of rates, replay shares and seeds below it says what is learnt and what is forgotten.
    Laws are fitted to it and chosen by their errors on trials that they did not see. The run's config is then written with the
    setting that learns most within --general_loss_rise, and with its predicted losses.

    The same command, given again, goes on where it stopped. --commands writes the trials as command lines for other machines.""",
    example="""cpt plan --config=configs/domain.py --output=plan --budget='2B tokens' --general_loss_rise=0.05 --dry_run
    cpt plan --config=configs/domain.py --output=plan --budget='2B tokens' --general_loss_rise=0.05

    Shows what the trials would be and cost; then makes them, and ends with plan/config.py, which cpt train takes.""",
    exit_codes=(exits.STOPPED,),
    overrides=True,
  )
  p.flag("--config=FILE", "The config of the planned run; --config.KEY=VALUE changes a key.", required=True)
  p.flag("--output=DIR", "Directory of the plan: trials, plan.json, frontier.png, fit.png, config.py.", required=True)
  p.flag("--budget=TOKENS", "Tokens of the run, e.g. 10e9; by default the config's train.length.")
  cost = "What all trials together may cost: tokens, or a share of the budget with a percent sign; by default 2 in 100."
  p.flag("--probe_budget=TOKENS", cost)
  rise = "Most that the general loss may rise over the base, nats a token; 0.05 by default."
  p.flag("--general_loss_rise=NATS", rise, None, type=float)
  p.flag("--weights=NAME=X,...", "Instead: least weighted sum of losses, e.g. general=0.5,legal=0.5.", [])
  p.flag("--confidence=P", "With which the limit holds, .5 to 1; by default the prediction keeps it.", None, type=float)
  p.flag("--rates=X,...", "Rates of the grid, instead of those that the sweep finds.", [])
  p.flag("--replays=X,...", "Replay shares of the grid.", [])
  longer = "A few trials of so many times the length of the others, 2,4 by default; empty = none."
  p.flag("--longer=X,...", longer, ["2", "4"])
  p.flag("--seeds=N", "Runs of each cell; 2 by default.", 2)
  p.flag("--trial_tokens=TOKENS", "Length of a trial, instead of --probe_budget, e.g. 65536 or '32 steps'.")
  p.flag("--stack=N", "Trials trained at once on one device; 0, the default: as its memory has room for, 1 on a CPU.", 0, low=0)
  p.switch("commands", default=False, help="Write the trials as command lines, and end.")
  p.switch("slurm", default=False, help="With --commands: also as an array for Slurm.")
  p.switch("dry_run", default=False, help="Show the design, check what the trials need, and end.")
  return p


def run(args: argparse.Namespace) -> int:
  """Plans."""
  from cpt_jax.planning.planner import plan

  flags = {name: value for name, value in vars(args).items() if name not in ("help", "rest", "config", "overrides")}
  return plan(config_lib.load(args.config, args.overrides), **flags).exit_code
