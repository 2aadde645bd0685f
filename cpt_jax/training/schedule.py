"""Names and numbers of a learning rate schedule -> a function from step to rate.

Invariant: a pure function of the step (updates already finished), so that a resumed run goes on exactly; computed on the host,
without jax, and given to each update as a number.

The numbers keep the names of their keys, lr_peak and the others, up to here; what comes out for a step is the rate: an argument
of training.step, a key of metrics.jsonl, a word of the progress line.

The rate of the update that follows `step` finished updates, for a run of N steps with a warm-up of W:

  warm-up, step < W      lr_start + (lr_peak - lr_start) * (step + 1) / W: no update is lost to a rate of 0, and the last one
                         of the warm-up, step W - 1, has lr_peak. W = 0 begins at lr_peak.
  a fall of D steps      f((step - first) / D): its first update still has the rate before the fall; its last one, D - 1,
                         is one step short of the end. So the run's last update (step N - 1) has nearly lr_final (above it by
                         1/D of the way for a straight fall), and lr_final = 0 wastes no update. From step N on: lr_final.

Which numbers each name uses, beside num_steps, warmup_steps, lr_start and lr_peak, which all use:

  constant   nothing more
  linear     lr_final: straight from the end of the warm-up to the end of the run
  cosine     lr_final: half a cosine over the same steps
  rewarm     lr_final: the same curve as cosine, under the name it has in continual pretraining: re-warm, then re-decay
             (Ibrahim et al. 2403.08763); lr_start is the base's last rate, or 0
  wsd        lr_final, anneal_steps, shape: lr_peak until the last anneal_steps, then down, linear or 1-sqrt (Haegele et al.
             2405.18392)
  infinite   lr_const, cooldown_steps, lr_final, anneal_steps: half a cosine from lr_peak to lr_const, constant, and an
             exponential fall over the last anneal_steps (2503.02844; its public code divides by more than anneal_steps
             and so does not arrive at lr_final; here it does)
"""

import dataclasses
import math
from typing import Any

import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems

NAMES = config_lib.KEYS["schedule.name"].choices


@dataclasses.dataclass(frozen=True)
class Fall:
  """A fall from `high` to `low` over `num_steps` steps from step `first` on; `shape` names its curve."""

  what: str
  first: int
  num_steps: int
  high: float
  low: float
  shape: str

  def __call__(self, step: np.ndarray) -> np.ndarray:
    """The rate at each `step` of an array of any shape: `high` before the fall, `low` after it."""
    x = np.clip((step - self.first) / max(self.num_steps, 1), 0.0, 1.0)
    if self.shape == "exponential":
      rate = self.high * np.exp(x * math.log(self.low / self.high))
    else:
      left = {"linear": 1.0 - x, "cosine": 0.5 * (1.0 + np.cos(np.pi * x)), "1-sqrt": 1.0 - np.sqrt(x)}[self.shape]
      rate = self.low + (self.high - self.low) * left
    # Both ends are exact, whatever rounding does to the curve; a fall of 0 steps is a jump.
    rate = np.where(step <= self.first, self.high, rate)
    return np.where(step >= self.first + self.num_steps, self.low, rate)


@dataclasses.dataclass(frozen=True)
class Staged:
  """One schedule after the other; call it as a Schedule."""

  parts: tuple[tuple[int, "Schedule"], ...]  # the step of the run at which each begins; its own steps count from there

  def __call__(self, step: Any) -> Any:
    """As a Schedule's."""
    steps = np.asarray(step)
    rate = self.parts[0][1](steps)
    for first, schedule in self.parts[1:]:
      rate = np.where(steps >= first, schedule(steps - first), rate)
    return np.asarray(rate, np.float32)[()]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A warm-up, then falls with constant rates between them; call it with a step or an array of steps."""

  warmup_steps: int
  lr_start: float
  lr_peak: float
  falls: tuple[Fall, ...]

  def __call__(self, step: Any) -> Any:
    """The rate, float32, of the update that follows `step` finished updates; of each where `step` is an array."""
    steps = np.asarray(step)
    rate = np.full(steps.shape, self.lr_peak)
    for fall in self.falls:
      rate = np.where(steps >= fall.first, fall(steps), rate)
    if self.warmup_steps:
      done = (steps + 1) / self.warmup_steps
      rate = np.where(steps < self.warmup_steps - 1, self.lr_start + (self.lr_peak - self.lr_start) * done, rate)
    return rate.astype(np.float32)[()]


def make(
  name: str,
  *,
  num_steps: int,
  warmup_steps: int,
  lr_peak: float,
  lr_start: float,
  lr_const: float,
  lr_final: float,
  cooldown_steps: int,
  anneal_steps: int,
  shape: str,
) -> Schedule:
  """The schedule called `name`; the module's docstring says which arguments each uses (the others are not looked at).
  Raises ConfigError: phases longer than the run, or rates that the curve cannot pass through."""
  if name not in NAMES:
    raise ConfigError(f"schedule.name={name!r}: choose one of {', '.join(NAMES)}.{config_lib.did_you_mean(name, list(NAMES))}")
  problems = Problems()
  used = {"warmup": warmup_steps}
  if name in ("wsd", "infinite"):
    used["anneal"] = anneal_steps
  if name == "infinite":
    used["cooldown"] = cooldown_steps
    _check_infinite(problems, lr_peak=lr_peak, lr_const=lr_const, lr_final=lr_final, anneal_steps=anneal_steps)
  if name != "constant" and sum(used.values()) > num_steps:
    keys = " + ".join(f"schedule.{key}" for key in used)
    problems.add(f"{keys} take {sum(used.values())} steps, the run has {num_steps}; shorten them")
  problems.raise_if_any()

  falls = []
  if name in ("linear", "cosine", "rewarm"):
    curve = "linear" if name == "linear" else "cosine"
    falls.append(Fall("decay begins", warmup_steps, num_steps - warmup_steps, lr_peak, lr_final, curve))
  if name == "infinite":
    falls.append(Fall("cool-down begins", warmup_steps, cooldown_steps, lr_peak, lr_const, "cosine"))
  if name in ("wsd", "infinite") and anneal_steps:  # without an anneal the constant rate holds to the end
    high, curve = (lr_const, "exponential") if name == "infinite" else (lr_peak, shape)
    falls.append(Fall("anneal begins", num_steps - anneal_steps, anneal_steps, high, lr_final, curve))
  return Schedule(warmup_steps, float(lr_start), float(lr_peak), tuple(falls))


def from_config(config: Any) -> Staged:
  """The schedule of a resolved config, stage by stage. Raises ConfigError: as `make`, with the stage."""
  problems, parts = Problems(), []
  for i, stage in enumerate(config_lib.stages(config)):
    own = Problems()
    with own.collect():
      parts.append((stage.first, _of_run(config_lib.of_stage(config, stage))))
    for line in own.lines:
      problems.add(f"train.stages[{i}]: {line}" if config.train.stages else line)
  problems.raise_if_any()
  return Staged(tuple(parts))


def _of_run(config: Any) -> Schedule:
  c = config.schedule
  rates = {key: c[key] for key in ("lr_peak", "lr_start", "lr_const", "lr_final")}
  steps = {f"{key}_steps": config_lib.steps_of(config, f"schedule.{key}") for key in ("warmup", "cooldown", "anneal")}
  return make(c.name, num_steps=config_lib.num_steps(config), **steps, **rates, shape=c.shape)


def table(schedule: Staged, *, num_steps: int) -> list[tuple[str, int, float]]:
  """Rows (what, step, rate) of the key steps in order, for people."""
  borders = [first for first, _ in schedule.parts] + [num_steps]
  several = len(schedule.parts) > 1
  rows = []
  for i, (first, part) in enumerate(schedule.parts):
    name = f"stage {i + 1}: " if several else ""
    rows += [(name + what, first + step, rate) for what, step, rate in _table(part, num_steps=borders[i + 1] - first)]
  return rows


def _table(schedule: Schedule, *, num_steps: int) -> list[tuple[str, int, float]]:
  rows = {0: "first update"}
  for percent in (25, 50, 75):
    rows.setdefault(num_steps * percent // 100, f"{percent}%")
  # Named steps replace the percentages, not the first update.
  if schedule.warmup_steps > 1:
    rows[schedule.warmup_steps - 1] = "end of warm-up"
  for fall in schedule.falls:
    rows[fall.first] = fall.what if fall.first else f"first update, {fall.what}"
    end = fall.first + fall.num_steps
    if end < num_steps:
      rows[end] = fall.what.replace("begins", "ends")
  rows[num_steps - 1] = "last update" if num_steps > 1 else "first and last update"
  return [(what, step, float(schedule(step))) for step, what in sorted(rows.items()) if step < num_steps]


def _check_infinite(problems: Problems, *, lr_peak: float, lr_const: float, lr_final: float, anneal_steps: int) -> None:
  if not 0 < lr_const <= lr_peak:
    problems.add(f"schedule.lr_const={lr_const:g}: must be above 0 and at most schedule.lr_peak={lr_peak:g}")
  elif anneal_steps and not 0 < lr_final <= lr_const:
    problems.add(
      f"schedule.lr_final={lr_final:g}: the exponential anneal of schedule.name='infinite' ends above 0 and at most at "
      f"schedule.lr_const={lr_const:g}; use e.g. {lr_const / 10:g}"
    )
