"""Durations as people write them ("200 steps", "5%", "2.5e9 tokens", "300M tokens") -> steps.

Invariant: a duration has exactly one unit, and is parsed once: in `resolve`, or here where nobody resolved the config.
"""

import math
import re
from typing import Any

import yaml

_PATTERN = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([kKMBT]?)\s*(steps?|tokens?|%)?\s*")
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


class Duration(str):
  """A length of training: `amount` of `unit` ("steps", "tokens" or "%" of the run), written as it was given.

  `bare` is the unit of a number alone, where a name says it (--budget is in tokens). Without it only 0 needs none.
  Raises ValueError: what is no duration, with the forms that are understood.
  """

  amount: float
  unit: str

  def __new__(cls, text: Any, *, bare: str = "") -> "Duration":
    """Of a duration it is the same one."""
    if isinstance(text, Duration):
      return text
    match = _PATTERN.fullmatch(str(text))
    if match is None or isinstance(text, bool):
      raise ValueError(f"{text!r} is no duration; write '200 steps', '5%' or '1.5B tokens'")
    number, scale, unit = match.groups()
    amount = float(number.replace("_", "")) * _SCALE[scale]
    if not math.isfinite(amount):
      raise ValueError(f"{text!r} is not finite")
    if unit == "%" and (scale or amount > 100):
      raise ValueError(f"{text!r}: a share of the run lies between 0% and 100%")
    if not unit and not bare and amount:
      number = str(text).strip()
      raise ValueError(f"{text!r}: steps or tokens? Write '{number} steps' or '{number} tokens'")
    return cls._of(str(text), amount, "%" if unit == "%" else "tokens" if (unit or bare).startswith("token") else "steps")

  @classmethod
  def of_steps(cls, num_steps: int) -> "Duration":
    """So many steps."""
    return cls._of(f"{num_steps} steps", num_steps, "steps")

  @classmethod
  def _of(cls, text: str, amount: float, unit: str) -> "Duration":
    found = super().__new__(cls, text)
    found.amount, found.unit = amount, unit
    return found

  def steps(self, *, tokens_per_step: int, run_steps: int | None = None) -> float:
    """The length in steps, not rounded. `run_steps` is needed by "%" alone.
    Raises ValueError: a "%" without `run_steps`: the run's own length cannot be a share of itself."""
    if self.unit == "steps":
      return self.amount
    if self.unit == "tokens":
      return self.amount / tokens_per_step
    if run_steps is None:
      raise ValueError(f"'{self}' is a share of the run; give steps or tokens")
    return self.amount / 100 * run_steps

  def whole_steps(self, *, tokens_per_step: int, run_steps: int | None = None) -> int:
    """Steps, rounded up: a run given a number of tokens sees at least that many.

    >>> Duration("5%").whole_steps(tokens_per_step=4096, run_steps=120)
    6
    """
    # The 1e-9 keeps 10% of 70 (7.000000000000001) at 7.
    return math.ceil(self.steps(tokens_per_step=tokens_per_step, run_steps=run_steps) - 1e-9)


# A config that is printed shows a duration as it was written.
yaml.add_representer(Duration, lambda dumper, duration: dumper.represent_str(str.__str__(duration)))


def parse_tokens(text: str) -> float:
  """Reads a number of tokens above 0, whose unit may be left out: "2B", "2e9", "300M tokens".
  Raises ValueError: anything else, with the form that is understood."""
  found = Duration(text, bare="tokens")
  if found.unit != "tokens" or found.amount <= 0:
    raise ValueError(f"{text!r}: give tokens above 0, e.g. '2B tokens'")
  return found.amount


def get(config: Any, key: str) -> Any:
  """The value of a dotted key."""
  for part in key.split("."):
    config = config[part]
  return config


def tokens_per_step(config: Any) -> int:
  """Positions that a step trains on, padding counted."""
  return config.train.batch_rows * config.data.row_len


def num_steps(config: Any) -> int:
  """Length of the run in steps."""
  return Duration(config.train.length).whole_steps(tokens_per_step=tokens_per_step(config))


def steps_of(config: Any, key: str) -> int:
  """Steps of the duration at a dotted key; 0 where it is empty."""
  value = get(config, key)
  return Duration(value).whole_steps(tokens_per_step=tokens_per_step(config), run_steps=num_steps(config)) if value else 0


def steps_at(config: Any, when: str | int) -> float:
  """A time of the run in steps, not rounded."""
  return Duration(when).steps(tokens_per_step=tokens_per_step(config), run_steps=num_steps(config))
