"""The config of a run and a design -> the configs of the short runs that tell its rate and replay share.

Invariant: a trial differs from the run in length, rates, shares, seed and what it keeps, and in nothing else; the same design
gives the same configs, so a probe that was stopped finds what it has done.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Duration, Share

NUM_EVALS = 4  # of a trial, after the base's: enough of a curve for the laws of whole curves


class Trial(NamedTuple):
  """A short run at one point of the plane that a plan searches."""

  rate: float  # schedule.lr_peak
  replay: float  # share of the tokens that the replay sources have, from 0 to 1
  steps: int
  seed: int

  @property
  def name(self) -> str:
    """Of its run directory."""
    return f"rate{self.rate:.3g}-replay{self.replay:.3g}-steps{self.steps}-seed{self.seed}"


def grid(rates: Sequence[float], replays: Sequence[float], *, steps: int, seeds: Sequence[int]) -> list[Trial]:
  """Every rate with every replay share and every seed, the first seed's whole grid before the next one's."""
  return [Trial(rate, replay, steps, seed) for seed in seeds for rate in rates for replay in replays]


def trial_config(config: Any, trial: Trial) -> Any:
  """The config of a trial of the run that `config` describes; its phases are the same parts of its length.

  Raises ConfigError: stages; a replay share above 0 in a run without replay sources, or below 1 without domain sources.
  """
  if config.train.stages:
    raise ConfigError(
      "train.stages: a probe looks for one rate of the whole run; leave the stages out of the config that is planned, and put "
      "them into the one that the plan writes"
    )
  c = at_point(config, rate=trial.rate, replay=trial.replay)
  with c.unlocked(), c.ignore_type():
    c.seed = config.seed + trial.seed
    for key in ("warmup", "cooldown", "anneal"):  # the same part of a trial as of the run
      if Duration(config.schedule[key]).unit != "%":
        c.schedule[key] = f"{100 * config_lib.steps_at(config, config.schedule[key]) / config_lib.num_steps(config):.6g}%"
    c.train.length = f"{trial.steps} steps"
    c.eval.every = f"{100 / NUM_EVALS:g}%"
    c.checkpoint.every = "100%"
    c.checkpoint.keep_last = 1
    c.checkpoint.keep_every = c.checkpoint.best_metric = ""
    c.checkpoint.export_hf = False
    c.log.every = max(1, trial.steps // 32)
    c.log.tensorboard = False
    c.guard.general_loss_rise = c.guard.spike_mads = 0.0  # what a trial forgets is what is to be learnt from it
    c.plan = config_lib.default().plan
  return c


def at_point(config: Any, *, rate: float, replay: float) -> Any:
  """The config with another rate and replay share.

  Rates keep their ratio to the peak, and the sources of a role the ratio of their shares at the run's end; shares stand still.
  Raises ConfigError: as `trial_config`.
  """
  c = config.copy_and_resolve_references()
  with c.unlocked():
    times = rate / config.schedule.lr_peak
    for key in ("lr_start", "lr_const", "lr_final"):
      c.schedule[key] = config.schedule[key] * times
    c.schedule.lr_peak = rate
    c.data.shares = ()
    for name, share in shares(config, replay).items():
      c.data.sources[name].share = Share(share)
  return c


def shares(config: Any, replay: float) -> dict[str, float]:
  """The share of each source where all replay sources together have `replay`."""
  last = last_shares(config)
  totals = {role: sum(last[name] for name in names) for role, names in by_role(config).items()}
  wanted = {"replay": replay, "domain": 1.0 - replay}
  for role, total in totals.items():
    if wanted[role] > 0 and total == 0:
      raise ConfigError(
        f"no source of role {role!r} has a share at the end of the run, and a trial asks for {wanted[role]:g}: give one a share, "
        "data.sources.NAME.share=0.1"
      )
  roles = {name: entry.role for name, entry in config.data.sources.items()}
  return {name: wanted[role] * (last[name] / totals[role]) if totals[role] else 0.0 for name, role in roles.items()}


def by_role(config: Any) -> dict[str, list[str]]:
  """Names of the sources of each role."""
  return {role: [name for name, entry in config.data.sources.items() if entry.role == role] for role in ("replay", "domain")}


def replay_share(config: Any) -> float:
  """What part of the shares at the end of the run the replay sources have."""
  last = last_shares(config)
  return sum(last[name] for name in by_role(config)["replay"]) / (sum(last.values()) or 1.0)


def last_shares(config: Any) -> dict[str, float]:
  """The share of each source at the end of the run, not normalised."""
  if config.data.shares:
    last = config.data.shares[-1][1]
    return {name: float(last[name]) if name in last else 0.0 for name in config.data.sources}
  return {name: Share(entry.share)[-1][1] for name, entry in config.data.sources.items()}
