"""A run's config and a budget -> short trials, fitted laws, and the run's config with rate, replay share and predicted losses.

Invariant: the same command, given again, goes on where it stopped; finished trials are not made again, by whoever they were made.

Exit codes: 0 done, 74 disk or file error, 75 stopped by a signal (give the same command again), 78 wrong settings.
"""

import importlib.util
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.devices import environment

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config of the planned run; --config.key=value changes a key.")
_OUTPUT = flags.DEFINE_string("output", "", "Directory of the plan: trials, plan.json, frontier.png, fit.png, config.py.")
_BUDGET = flags.DEFINE_string("budget", "", "Tokens of the run, e.g. 10e9; default: the config's train.length.")
_PROBE_BUDGET = flags.DEFINE_string("probe_budget", "", "What all trials together may cost: 2% (of the budget) or tokens.")
_RISE = flags.DEFINE_float("general_loss_rise", None, "Most that the general loss may rise over the base, nats per token.")
_WEIGHTS = flags.DEFINE_list("weights", [], "Instead: least weighted sum of losses, e.g. general=0.5,legal=0.5.")
_CONFIDENCE = flags.DEFINE_float("confidence", None, "With which the limit holds, .5 to 1; default: the prediction keeps it.")
_RATES = flags.DEFINE_list("rates", [], "Rates of the grid, instead of those that the sweep finds.")
_REPLAYS = flags.DEFINE_list("replays", [], "Replay shares of the grid.")
_SEEDS = flags.DEFINE_integer("seeds", 2, "Runs of each cell.")
_LONGER = flags.DEFINE_list("longer", ["2", "4"], "A few trials of so many times the length of the others; empty = none.")
_TRIAL_TOKENS = flags.DEFINE_string("trial_tokens", "", "Length of a trial, instead of --probe_budget, e.g. 65536 or '32 steps'.")
_STACK = flags.DEFINE_integer("stack", 0, "Trials trained at once on one device; 0 = as its memory has room for, 1 on a CPU.")
_COMMANDS = flags.DEFINE_bool("commands", False, "Write the trials as command lines, and end.")
_SLURM = flags.DEFINE_bool("slurm", False, "With --commands: also as an array for Slurm.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the design, and end.")

EXIT_DISK, EXIT_CONFIG = 74, 78


def plan() -> int:
  """Designs, runs, fits, recommends and writes, as the flags say; returns the exit code."""
  from cpt_jax.planning import design

  if importlib.util.find_spec("matplotlib") is None:  # said before the trials, not after them
    raise ConfigError("a plan ends with figures: pip install 'cpt_jax[plots]'")
  config, output = config_lib.resolve(_CONFIG.value), pathlib.Path(_OUTPUT.value)
  trials_dir, objective = output / "trials", _objective(config)

  # ---- 1. design ----
  designed = design.make(
    config,
    budget=_BUDGET.value,
    probe_budget=_PROBE_BUDGET.value,
    rates=_numbers("rates", _RATES.value),
    replays=_numbers("replays", _REPLAYS.value),
    seeds=_SEEDS.value,
    trial_tokens=_TRIAL_TOKENS.value,
    longer=_numbers("longer", [times for times in _LONGER.value if times]),
  )
  from cpt_jax.planning import execute, outcome, plots, recommend, tables
  from cpt_jax.training import console

  there = execute.found_trials(config, trials_dir)
  tables.design(designed, num_over=len(execute.measured(config, [t for t in designed.trials() if t in there], trials_dir)))
  if _DRY_RUN.value:
    console.say("dry run: nothing was trained. Without --dry_run this command goes on.")
    return 0
  trials_dir.mkdir(parents=True, exist_ok=True)

  # ---- 2. sweep of the rate, then the grid ----
  highest = 0.0
  if designed.ladder:
    sweep, code = _sweep(config, designed, trials_dir)
    if code is not None:
      return code
    tables.sweep(sweep)
    highest = outcome.highest_stable(sweep)
    if highest is None:
      raise ConfigError(f"the lowest rate of the sweep, {designed.ladder[0]:g}, is not stable; lower schedule.lr_peak")
  wanted = designed.grid(highest)
  if _COMMANDS.value and not _all_over(config, wanted, trials_dir):
    return _say_commands(execute.write_commands(config, wanted, trials_dir, slurm=_SLURM.value))
  code = _run(config, wanted, trials_dir)
  if code:
    return code

  # ---- 3. fit: every trial that is there, also those that this design does not have ----
  wanted += [trial for trial in execute.found_trials(config, trials_dir) if trial not in wanted]
  found = execute.measured(config, wanted, trials_dir)
  tables.cells(found)
  tokens = outcome.trained_tokens(found, budget_tokens=designed.budget_tokens, tokens_per_step=designed.tokens_per_step)
  cells = outcome.cells_of(found)
  made = recommend.plan_from_cells(cells, tokens=tokens, confidence=_CONFIDENCE.value, seed=config.seed, **objective)
  tables.laws(made)

  # ---- 4. recommend and write ----
  tables.recommendation(made)
  planned = outcome.planned_config(
    config, made, budget_tokens=designed.budget_tokens if _BUDGET.value else None, made_by=str(output)
  )
  outcome.write_plan(output / "plan.json", made, designed, cells)
  outcome.write_config(planned, output / "config.py", made)
  plots.frontier(made, output / "frontier.png")
  plots.fit_quality(made, output / "fit.png")
  for name in ("plan.json", "frontier.png", "fit.png", "config.py"):
    console.say(f"wrote    {output / name}")
  console.say(f"next     python -m cpt_jax.main --config={output / 'config.py'} --workdir=runs/NAME")
  return 0


def _sweep(config, designed, trials_dir: pathlib.Path):
  """The sweep's finished trials, and an exit code where the plan ends here."""
  from cpt_jax.planning import execute

  ladder = designed.sweep()
  if _COMMANDS.value:
    found = execute.measured(config, ladder, trials_dir)
    if not execute.is_swept(found, ladder):
      return found, _say_commands(execute.write_commands(config, ladder, trials_dir, slurm=_SLURM.value))
    return found, None
  with execute.Progress(ladder) as bar:
    found, code = execute.sweep(config, ladder, trials_dir, bar=bar, stack=_stack(config, ladder[0]))
  return found, code or None


def _run(config, wanted, trials_dir: pathlib.Path) -> int:
  from cpt_jax.planning import execute

  with execute.Progress(wanted) as bar:
    return execute.run_trials(config, wanted, trials_dir, bar=bar, stack=_stack(config, wanted[0]))


def _stack(config, trial) -> int:
  from cpt_jax.planning import stacked, trials

  return _STACK.value or stacked.how_many(trials.trial_config(config, trial))


def _all_over(config, wanted, trials_dir: pathlib.Path) -> bool:
  from cpt_jax.planning import execute

  return len(execute.measured(config, wanted, trials_dir)) == len(wanted)


def _say_commands(files: list[pathlib.Path]) -> int:
  from cpt_jax.training import console

  for file in files:
    console.say(f"wrote    {file}")
  console.say("when they are done, give the same command again")
  return 0


def _objective(config) -> dict:
  """What laws.recommend takes."""
  if _WEIGHTS.value and _RISE.value is not None:
    raise ConfigError("--weights and --general_loss_rise are two objectives: give one of them")
  if not _WEIGHTS.value:
    return {"general_loss_rise": 0.05 if _RISE.value is None else _RISE.value}
  weights = {}
  for part in _WEIGHTS.value:
    name, _, weight = part.partition("=")
    if name not in config.data.sources:
      raise ConfigError(f"--weights: there is no source {name}.{config_lib.did_you_mean(name, list(config.data.sources))}")
    weights[name] = _numbers("weights", [weight])[0]
  return {"weights": weights}


def _numbers(flag: str, texts: list[str]) -> list[float]:
  try:
    return [float(text) for text in texts]
  except ValueError:
    raise ConfigError(f"--{flag}={','.join(texts)}: numbers with commas between them, e.g. 0,0.01,0.05") from None


def main(argv: list[str]) -> int:
  """Exit code, after planning or saying what is wrong."""
  if len(argv) > 1 or not flags.FLAGS["config"].present or not _OUTPUT.value:
    unknown = f"what is {' '.join(argv[1:])}? " if len(argv) > 1 else ""
    print(f"{unknown}name a config and an output: python tools/plan.py --config=FILE --output plan/", file=sys.stderr)
    return EXIT_CONFIG
  try:
    return plan()
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  except OSError as error:
    print(f"{error}. What was saved is good; mend the disk or the path and give the same command.", file=sys.stderr)
    return EXIT_DISK


def _read_flags(argv: list[str]) -> list[str]:
  """absl's flags, with every unknown config key reported at once and with what was meant."""
  try:
    config_lib.check_overrides(argv)
    rest = flags.FLAGS(argv)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    return rest
  except (flags.Error, ConfigError) as error:
    print(error, file=sys.stderr)
    sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
  # Trials are the same program: compiled once, read from here by all that follow.
  environment.prepare(os.environ)
  app.run(main, flags_parser=_read_flags)
