"""A run's config and a budget -> short trials, fitted laws, and the run's config with rate, replay share and predicted losses.

Invariant: the same call, made again, goes on where it stopped; finished trials are not made again, by whoever they were made.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpt_jax import config as config_lib, exits
from cpt_jax.config import ConfigError, Problems
from cpt_jax.planning import design, execute, outcome, plots, recommend, tables, trials
from cpt_jax.planning.design import Design
from cpt_jax.planning.outcome import FinishedTrial
from cpt_jax.planning.recommend import Recommendation
from cpt_jax.planning.trials import Trial
from cpt_jax.preview.dry_run import mesh_sizes
from cpt_jax.store import documents
from cpt_jax.stream import sources
from cpt_jax.training import console, inputs as inputs_lib
from cpt_jax.training.stack import ONE_DEVICE

GENERAL_LOSS_RISE = 0.05  # nats, where no objective is given; that of 2407.17467


class Plan(NamedTuple):
  """What `plan` came to."""

  output: pathlib.Path
  design: Design
  recommendation: Recommendation | None  # None: a dry run, trials that are to be run elsewhere, or stopped by a signal
  exit_code: int  # of cpt_jax.exits

  @property
  def config(self) -> pathlib.Path:
    """The config file of the recommended run."""
    return self.output / "config.py"


class _Settings(NamedTuple):
  """How trials are made."""

  config: Any
  trials_dir: pathlib.Path
  stack: int
  commands: bool
  slurm: bool


class _UnfinishedError(Exception):
  """The plan ends here, for now, with this exit code."""

  def __init__(self, exit_code: int):
    super().__init__(exit_code)
    self.exit_code = exit_code


def plan(
  config: Any, *, output: str | os.PathLike, budget: str = "", probe_budget: str = "", general_loss_rise: float | None = None,
  weights: Mapping[str, float] | Sequence[str] = (), confidence: float | None = None, rates: Sequence[float | str] = (),
  replays: Sequence[float | str] = (), seeds: int = 2, longer: Sequence[float | str] = design.LONGER, trial_tokens: str = "",
  stack: int = 0, commands: bool = False, slurm: bool = False, dry_run: bool = False,
) -> Plan:  # fmt: skip
  """Designs, runs, fits, recommends and writes, saying what it does; the plan's files are below `output`.

  >>> cpt_jax.plan(config, budget="2B tokens", probe_budget="15%", general_loss_rise=0.05, output="plan")  # doctest: +SKIP

  Args:
    config: of the planned run, or the path of its file.
    output: directory of the plan: trials, plan.json, frontier.png, fit.png, config.py.
    budget: tokens of the run, e.g. "10e9"; "" = the config's train.length.
    probe_budget: what all trials together may cost, a share of the budget or tokens; "" = 2%.
    general_loss_rise: most that the general loss may rise over the base, nats a token; None = 0.05.
    weights: instead: least weighted sum of losses, source -> weight, or texts "general=0.5".
    confidence: with which the limit holds, .5 to 1; None = the prediction keeps it.
    rates: of the grid, instead of those that the sweep finds.
    replays: replay shares of the grid.
    seeds: runs of each cell.
    longer: a few trials of so many times the length of the others; () = none.
    trial_tokens: length of a trial, instead of `probe_budget`, e.g. "65536" or "32 steps".
    stack: trials trained at once on one device; 0 = as its memory has room for, 1 on a CPU.
    commands: write the trials as command lines, and end.
    slurm: with `commands`: also as an array for Slurm.
    dry_run: show the design, check what the trials need, and end.

  Raises:
    ConfigError: what is wrong with the settings, the texts or the trials that are there.
  """
  if not output:
    raise ConfigError("--output is empty: name the directory of the plan, e.g. --output=plan")
  config = _read(config)
  output = pathlib.Path(output)
  objective = _objective(config, weights, general_loss_rise)

  designed = design.make(
    config, budget=budget, probe_budget=probe_budget, rates=_numbers("rates", rates), replays=_numbers("replays", replays),
    seeds=seeds, trial_tokens=trial_tokens, longer=_numbers("longer", longer),
  )  # fmt: skip
  how = _Settings(config, output / "trials", stack, commands, slurm)
  there = execute.found_trials(config, how.trials_dir)
  num_over = len(execute.finished(config, [t for t in designed.trials() if t in there], how.trials_dir))
  tables.design(designed, num_over=num_over)
  if dry_run:
    if num_over < len(designed.trials()):
      check_inputs(trials.trial_config(config, designed.trials()[0]), stack=stack)
    console.say("dry run: nothing was trained. Without --dry_run this command goes on.")
    return Plan(output, designed, None, exits.DONE)
  how.trials_dir.mkdir(parents=True, exist_ok=True)
  try:
    found = _make_trials(designed, how)
  except _UnfinishedError as end:
    return Plan(output, designed, None, end.exit_code)
  made = _recommend(designed, found, config, output, confidence=confidence, objective=objective, has_budget=bool(budget))
  return Plan(output, designed, made, exits.DONE)


def _read(config: Any) -> Any:
  """The config itself, or that of a file, resolved."""
  if isinstance(config, (str, os.PathLike)):
    config = config_lib.load(os.fspath(config))
  return config_lib.resolve(config)


def _make_trials(designed: Design, how: _Settings) -> list[FinishedTrial]:
  """The trials of the sweep and the grid, and every other that is there, finished.

  Raises ConfigError: no rate is stable, or what a run refuses. _UnfinishedError: trials are still to be made.
  """
  highest = 0.0
  if designed.ladder:
    swept = _sweep(designed, how)
    tables.sweep(swept)
    highest = outcome.highest_stable(swept)
    if highest is None:
      raise ConfigError(f"the lowest rate of the sweep, {designed.ladder[0]:g}, is not stable; lower schedule.lr_peak")
  wanted = designed.grid(highest)
  if how.commands and len(execute.finished(how.config, wanted, how.trials_dir)) < len(wanted):
    _say_commands(wanted, how)
  with execute.TrialsBar(wanted) as bar:
    code = execute.run_trials(how.config, wanted, how.trials_dir, bar=bar, stack=_stack(how, wanted[0]))
  if code:
    raise _UnfinishedError(code)
  wanted += [trial for trial in execute.found_trials(how.config, how.trials_dir) if trial not in wanted]
  return execute.finished(how.config, wanted, how.trials_dir)


def _sweep(designed: Design, how: _Settings) -> list[FinishedTrial]:
  """The sweep's trials, finished."""
  ladder = designed.sweep()
  if how.commands:
    found = execute.finished(how.config, ladder, how.trials_dir)
    if not execute.is_swept(found, ladder):
      _say_commands(ladder, how)
    return found
  with execute.TrialsBar(ladder) as bar:
    found, code = execute.sweep(how.config, ladder, how.trials_dir, bar=bar, stack=_stack(how, ladder[0]))
  if code:
    raise _UnfinishedError(code)
  return found


def _stack(how: _Settings, trial: Trial) -> int:
  return how.stack or execute.how_many(trials.trial_config(how.config, trial))


def _say_commands(wanted: Sequence[Trial], how: _Settings) -> None:
  for file in execute.write_commands(how.config, wanted, how.trials_dir, slurm=how.slurm):
    console.say(f"wrote    {file}")
  console.say("when they are done, give the same command again")
  raise _UnfinishedError(exits.DONE)


def _recommend(
  designed: Design, found: list[FinishedTrial], config: Any, output: pathlib.Path, *, confidence: float | None,
  objective: dict[str, Any], has_budget: bool,
) -> Recommendation:  # fmt: skip
  """Fits laws to every trial that is there, also to those that this design does not have, recommends, and writes."""
  tables.cells(found)
  tokens = outcome.trained_tokens(found, budget_tokens=designed.budget_tokens, tokens_per_step=designed.tokens_per_step)
  cells = outcome.cells_of(found)
  made = recommend.plan_from_cells(cells, tokens=tokens, confidence=confidence, seed=config.seed, **objective)
  tables.laws(made)

  tables.recommendation(made)
  planned = outcome.planned_config(
    config, made, budget_tokens=designed.budget_tokens if has_budget else None, made_by=str(output)
  )
  outcome.write_plan(output / "plan.json", made, designed, cells)
  outcome.write_config(planned, output / "config.py", made)
  plots.frontier(made, output / "frontier.png")
  plots.fit_quality(made, output / "fit.png")
  for name in ("plan.json", "frontier.png", "fit.png", "config.py"):
    console.say(f"wrote    {output / name}")
  console.say(f"next     cpt train --config={output / 'config.py'} --workdir=runs/NAME")
  return made


def check_inputs(config: Any, *, stack: int) -> None:
  """Raises ConfigError with all that a trial of `config` would refuse before its first step; writes and prepares nothing."""
  resolved = inputs_lib.resolve(config)
  sizes = ONE_DEVICE if stack > 1 else mesh_sizes(resolved.config)[0]
  inputs_lib.check_mesh(sizes, resolved.spec, resolved.config)
  config, problems = resolved.config.copy_and_resolve_references(), Problems()
  with config.unlocked():
    for name, entry in inputs_lib.unprepared(config).items():  # the first trial makes them of their texts
      with problems.collect():
        documents.find_files([entry.text], flag=f"data.sources.{name}.text")
      del config.data.sources[name]
  opened = sources.from_config(config, problems)
  sources.check_vocabulary(opened, resolved.spec.num_ids, problems)
  problems.raise_if_any()


def _objective(config: Any, weights: Mapping[str, float] | Sequence[str], rise: float | None) -> dict[str, Any]:
  """What `recommend.recommend` takes."""
  if weights and rise is not None:
    raise ConfigError("--weights and --general_loss_rise are two objectives: give one of them")
  if not weights:
    return {"general_loss_rise": GENERAL_LOSS_RISE if rise is None else rise}
  pairs = weights.items() if isinstance(weights, Mapping) else [part.partition("=")[::2] for part in weights]
  found = {}
  for name, weight in pairs:
    if name not in config.data.sources:
      raise ConfigError(f"--weights: there is no source {name}.{config_lib.did_you_mean(name, list(config.data.sources))}")
    (found[name],) = _numbers("weights", [weight])
  return {"weights": found}


def _numbers(flag: str, values: Sequence[float | str]) -> list[float]:
  try:
    return [float(value) for value in values]
  except ValueError:
    text = ",".join(map(str, values))
    raise ConfigError(f"--{flag}={text}: numbers with commas between them, e.g. 0,0.01,0.05") from None
