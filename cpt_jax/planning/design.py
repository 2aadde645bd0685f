"""A run's config, its budget and the part of it that a probe may take -> which trials are made.

Invariant: all trials together cost no more than was asked for, or the error says how much it would take. No device, no files.

A probe has two parts. The sweep goes up a ladder of rates, each twice the one before, at one replay share, until the loss is no
longer stable. The grid has the highest stable rate and the three below it, each with every replay share and every seed; and
beside it a few longer trials, so that laws in tokens have something to hold on to. A trial of the sweep is one of the grid, too.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Duration
from cpt_jax.planning import choose
from cpt_jax.planning.trials import Trial, by_role, grid, replay_share

REPLAYS = (0.0, 0.01, 0.05, 0.25, 0.5)  # the range of Ibrahim et al. 2403.08763, table 2
NUM_RATES = 4  # of the grid
LADDER = tuple(2.0**k for k in range(-2, 6))  # of the sweep, times the config's own rate
HIGHEST = config_lib.KEYS["schedule.lr_peak"].at_most or math.inf  # rate of a run
LONGER = (2, 4)  # times the steps of the others
NUM_LONGER = {2: 4, 4: 2}  # cells at so many times the steps; one where it is more
MIN_STEPS = 16  # of a trial whose length follows from the budget: a warm-up of 5% is then one step, an anneal of 25% four
FARTHEST = int(2 ** choose.FARTHEST["tokens"])  # times the longest trial: of a longer run the laws say nothing


class Design(NamedTuple):
  """What a probe will do; in tokens, positions are counted, as in train.length."""

  rates: tuple[float, ...]  # of the grid; () = the sweep finds them
  ladder: tuple[float, ...]  # of the sweep, rising; () = no sweep
  replays: tuple[float, ...]
  own_replay: float  # the share of the sweep, and of the longest trial
  seeds: tuple[int, ...]
  steps: int  # of a trial
  longer: tuple[int, ...]  # times these steps
  tokens_per_step: int
  budget_tokens: int  # of the run

  def trials(self) -> list[Trial]:
    """All of them, as many as there can be: the sweep to the top of its ladder, and the grid below it."""
    return list(dict.fromkeys(self.sweep() + self.grid(max(self.ladder, default=0.0))))

  @property
  def num_tokens(self) -> int:
    """Of all trials together, at most."""
    return sum(trial.steps for trial in self.trials()) * self.tokens_per_step

  @property
  def longest_tokens(self) -> int:
    """Of one trial."""
    return self.steps * max((1, *self.longer)) * self.tokens_per_step

  def sweep(self) -> list[Trial]:
    """Stage one, lowest rate first."""
    return [Trial(rate, self.own_replay, self.steps, self.seeds[0]) for rate in self.ladder]

  def grid(self, highest: float) -> list[Trial]:
    """Stage two, up to the highest stable rate (not looked at where the rates are given)."""
    rates = self.rates or tuple(sorted(highest / 2**k for k in range(NUM_RATES)))
    made = grid(rates, self.replays, steps=self.steps, seeds=self.seeds)
    for times in self.longer:
      made += self._long(rates, times)
    return made

  def _long(self, rates: Sequence[float], times: int) -> list[Trial]:
    """A few cells of the grid's inner rates, at `times` the steps, with its own replay share and with the least.

    The least, since forgetting without replay grows with the tokens when that with replay has levelled off.
    """
    shares = dict.fromkeys((self.own_replay, min(self.replays), *_inner(self.replays)))
    cells = [(rate, replay) for rate in reversed(_inner(rates)) for replay in list(shares)[:2]]
    return [Trial(rate, replay, self.steps * times, self.seeds[0]) for rate, replay in cells[: NUM_LONGER.get(times, 1)]]


def make(
  config: Any, *, budget: str = "", probe_budget: str = "", rates: Sequence[float] = (), replays: Sequence[float] = (),
  seeds: int = 2, trial_tokens: str = "", longer: Sequence[float] = LONGER,
) -> Design:  # fmt: skip
  """The design; `budget` (default: train.length), `probe_budget` (also a share of the budget) and `trial_tokens` are durations.

  The tokens of a trial follow from `probe_budget`, or are given and the probe costs what it costs.
  Raises ConfigError: no replay or no domain source, values out of range, a probe too small for its trials or for the run's
  length.
  """
  per_step = config_lib.tokens_per_step(config)
  budget_tokens = _tokens("budget", budget or f"{config_lib.num_steps(config)} steps", per_step)
  _check(config, rates, replays, seeds, longer)
  own = replay_share(config)
  own = own if not replays else min(replays, key=lambda x: abs(x - own))
  design = Design(
    rates=tuple(sorted(rates)),
    ladder=() if rates else tuple(rate for times in LADDER if (rate := config.schedule.lr_peak * times) <= HIGHEST),
    replays=tuple(sorted(replays or {own, *(x for x in REPLAYS if x != min(REPLAYS, key=lambda y: abs(y - own)))})),
    own_replay=own, seeds=tuple(range(seeds)), steps=1, longer=tuple(int(times) for times in longer), tokens_per_step=per_step,
    budget_tokens=math.ceil(budget_tokens),
  )  # fmt: skip
  if trial_tokens:
    steps = math.ceil(_tokens("trial_tokens", trial_tokens, per_step) / per_step)
    if steps < 4:
      raise ConfigError(f"--trial_tokens={trial_tokens}: {steps} steps of {per_step:,} tokens; a trial has 4 or more")
    return design._replace(steps=steps)
  probe_tokens = _tokens("probe_budget", probe_budget or "2%", per_step, of=budget_tokens)
  return _within(design, probe_tokens, asked=probe_budget or "2%")


def _within(design: Design, probe_tokens: float, *, asked: str) -> Design:
  """The longest trials that the tokens are enough for, and one more of many times their length where the run is far longer."""
  for times in (0, *(2**k for k in range(3, 13))):
    tried = design._replace(longer=(*design.longer, times)) if times else design
    tried = tried._replace(steps=int(probe_tokens // tried.num_tokens))
    if tried.steps < MIN_STEPS:
      break
    if tried.longest_tokens * FARTHEST >= tried.budget_tokens:
      return tried
  needed = min(_needed(design, times) for times in (0, *(2**k for k in range(3, 13))))
  raise ConfigError(
    f"--probe_budget={asked} of {design.budget_tokens:,} tokens is {probe_tokens:,.0f}: too little for {len(design.trials())} "
    f"trials of {MIN_STEPS} steps of {design.tokens_per_step:,} tokens, one of them 1/{FARTHEST} as long as the run. It takes "
    f"{needed:,} tokens ({needed / design.budget_tokens:.2%}); or probe less (--replays=0,0.05,0.25 --seeds=1), with fewer rows "
    "in a step (--config.train.batch_rows), or with a smaller model of the same kind"
  )


def _needed(design: Design, times: int) -> int:
  """Tokens with which the design, and one trial of `times` the length of the others (0 = none), can be made."""
  tried = design._replace(longer=(*design.longer, times)) if times else design
  steps = max(MIN_STEPS, math.ceil(tried.budget_tokens / FARTHEST / tried.longest_tokens))
  return tried._replace(steps=steps).num_tokens


def _inner(values: Sequence[float]) -> list[float]:
  """Without the lowest and the highest, where anything is left then."""
  return sorted(values)[1:-1] or sorted(values)


def _check(config: Any, rates: Sequence[float], replays: Sequence[float], seeds: int, longer: Sequence[float]) -> None:
  problems = config_lib.Problems()
  for role, names in by_role(config).items():
    if not names:
      problems.add(
        f"data.sources: none has role {role!r}, and a plan weighs forgetting (replay) against learning (domain); add one, "
        f"data.sources.NAME = config.source(store=..., role={role!r})"
      )
  if config.start.resume and config.start.optimizer == "keep":
    problems.add("start.resume with start.optimizer='keep': trials begin at step 0; probe with start.optimizer='reset'")
  if any(not 0 < rate <= HIGHEST for rate in rates):
    problems.add(f"--rates={','.join(map(str, rates))}: rates are above 0 and at most {HIGHEST:g}, e.g. 3e-4,6e-4,1.2e-3,2.4e-3")
  if any(not 0 <= replay <= 1 for replay in replays):
    problems.add(f"--replays={','.join(map(str, replays))}: shares lie between 0 and 1, e.g. 0,0.01,0.05,0.25,0.5")
  if any(times < 2 or times != int(times) for times in longer):
    problems.add(f"--longer={','.join(map(str, longer))}: whole numbers from 2 up, e.g. 2,4")
  if seeds < 1:
    problems.add(f"--seeds={seeds}: 1 or more; with 2 there is a measure of noise")
  problems.raise_if_any()


def _tokens(flag: str, text: str, per_step: int, *, of: float | None = None) -> float:
  """Tokens of a duration; a bare number counts tokens."""
  try:
    found = Duration(text, bare="tokens")
    amount = found.steps(tokens_per_step=1, run_steps=None if of is None else math.ceil(of))
    amount *= per_step if found.unit == "steps" else 1
  except ValueError as error:
    raise ConfigError(f"--{flag}: {error}") from None
  if not (math.isfinite(amount) and amount > 0):
    raise ConfigError(f"--{flag}={text}: must be above 0, e.g. 10e9 or '10B tokens'")
  return amount
