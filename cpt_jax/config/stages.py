"""train.stages -> the stretches of training that they name, each as a run of its own.

Invariant: the stages of a resolved config cover its steps without a gap.
"""

import numbers
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cpt_jax.config import keys
from cpt_jax.config.durations import Duration, num_steps, steps_at
from cpt_jax.config.errors import Problems, did_you_mean

NEW_ROWS = ":new"  # behind a path pattern in a stage: of the leaves that it matches, the rows of new pieces
STAGES = {"new_rows": (f"embedding{NEW_ROWS}", f"head{NEW_ROWS}"), "embeddings": ("embedding", "head"), "all": (".*",)}


class Stage(NamedTuple):
  """One of train.stages, or the whole run where there are none."""

  trains: Any  # a name of STAGES, or path patterns
  first: int  # its first step
  end: int  # the first step behind it
  schedule: dict[str, Any]  # keys of `schedule` that are its own

  def describe(self) -> str:
    """What it trains, for people."""
    return self.trains if isinstance(self.trains, str) else ", ".join(self.trains)


def stages(config: Any) -> list[Stage]:
  """The stages of a resolved config, at least one."""
  found, end, run_steps = [], 0.0, num_steps(config)
  for what, length, lr_peak, *more in config.train.stages:
    first, end = end, float(run_steps) if length == "rest" else end + steps_at(config, length)
    # Rounded as borders, not as lengths: three thirds are a whole.
    found.append(Stage(what, round(first), round(end), {"lr_peak": lr_peak, **(dict(more[0]) if more else {})}))
  return found or [Stage("all", 0, run_steps, {})]


def of_stage(config: Any, stage: Stage) -> Any:
  """The config of a run that would be that stage: its length and its schedule."""
  c = config.copy_and_resolve_references()
  with c.unlocked(), c.ignore_type():
    c.train.length, c.train.stages = Duration.of_steps(stage.end - stage.first), ()
    times = stage.schedule.get("lr_peak", c.schedule.lr_peak) / c.schedule.lr_peak
    for key in ("lr_start", "lr_const", "lr_final"):
      c.schedule[key] *= times
    c.schedule.update(stage.schedule)
  return c


def parsed(key: str, entry: Any, problems: Problems, *, is_last: bool, bare: str) -> tuple:
  """One of train.stages with its durations parsed; what is wrong with its form goes to `problems`."""
  is_stage = isinstance(entry, (list, tuple)) and len(entry) in (3, 4) and isinstance(entry[2], numbers.Real)
  if not (is_stage and isinstance(entry[-1], (dict, ConfigDict) if len(entry) == 4 else numbers.Real)):
    problems.add(
      f"{key}: {entry!r} is no stage; write (what is trained, how long, lr_peak), e.g. ('new_rows', '20%', 1e-3), and as a "
      "fourth entry other keys of the schedule, {'name': 'constant'}"
    )
    return ()
  what, length, lr_peak, *more = entry
  if isinstance(what, str) and what not in STAGES:
    problems.add(
      f"{key}: {what!r}: choose one of {', '.join(STAGES)}, or give path patterns, ({what!r},).{did_you_mean(what, STAGES)}"
    )
  elif not (isinstance(what, (str, list, tuple)) and what and all(isinstance(pattern, str) for pattern in what)):
    problems.add(
      f"{key}: {what!r} names nothing to train; give one of {', '.join(STAGES)}, or path patterns, ('embedding:new', 'head')"
    )
  rate = keys.KEYS["schedule.lr_peak"]
  if not rate.allows(lr_peak):
    problems.add(f"{key}: lr_peak={lr_peak}: must be {rate.range()} ({rate.reason})")
  own = dict(more[0]) if more else {}
  for name, value in own.items():
    if name == "lr_peak":
      problems.add(f"{key}: lr_peak stands twice; it is the third entry")
    elif (known := keys.of(f"schedule.{name}")) is None:
      names = [known.split(".")[1] for known in keys.KEYS if known.startswith("schedule.")]
      problems.add(f"{key}: schedule has no key {name}.{did_you_mean(name, names)}")
    elif not known.has_type(value):
      problems.add(f"{key}: {name}={value!r}: expected {type(known.default).__name__}, found {type(value).__name__}")
    elif known.duration:
      own[name] = _duration(f"{key}: {name}", value, problems, bare=bare)
  if not (is_last and length == "rest"):
    length = _duration(key, length, problems, bare=bare, hint="; the last stage may be as long as the 'rest'")
  return (what, length, lr_peak, own) if more else (what, length, lr_peak)


def _duration(key: str, text: Any, problems: Problems, *, bare: str, hint: str = "") -> Any:
  try:
    return Duration(text, bare=bare)
  except ValueError as error:
    problems.add(f"{key}: {error}{hint}")
    return text
