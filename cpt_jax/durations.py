"""Durations as people write them -> whole steps.

Invariant: a duration is a string with exactly one unit ("200", "200 steps", "5%", "2.5e9 tokens", "300M tokens").
Called by config, train.schedule, train.loop and data.mixture.
"""

import dataclasses
import math
import re

_PATTERN = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([kKMBT]?)\s*(steps?|tokens?|%)?\s*")
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclasses.dataclass(frozen=True)
class Duration:
  """A length of training: `amount` of `unit` ("steps", "tokens" or "%" of the run)."""

  amount: float
  unit: str

  def steps(self, *, tokens_per_step: int, run_steps: int | None = None) -> float:
    """The length in steps, not rounded. `run_steps` is needed by "%" alone.

    Raises:
      ValueError: a "%" without `run_steps`: the run's own length cannot be a share of itself.
    """
    if self.unit == "steps":
      return self.amount
    if self.unit == "tokens":
      return self.amount / tokens_per_step
    if run_steps is None:
      raise ValueError(f"'{self}' is a share of the run; give steps or tokens")
    return self.amount / 100 * run_steps

  def __str__(self) -> str:
    amount = f"{self.amount:g}"
    return f"{amount}%" if self.unit == "%" else f"{amount} {self.unit}"


def parse(text: str | int | float) -> Duration:
  """Reads "200", "200 steps", "5%", "1.5B tokens", "2e9 tokens"; a bare number counts steps.

  Raises:
    ValueError: anything else, with the forms that are understood.
  """
  match = _PATTERN.fullmatch(str(text))
  if match is None:
    raise ValueError(f"{text!r} is no duration; write '200 steps', '5%' or '1.5B tokens'")
  number, scale, unit = match.groups()
  amount = float(number.replace("_", "")) * _SCALE[scale]
  if not math.isfinite(amount):
    raise ValueError(f"{text!r} is not finite")
  if unit == "%":
    if scale or amount > 100:
      raise ValueError(f"{text!r}: a share of the run lies between 0% and 100%")
    return Duration(amount, "%")
  return Duration(amount, "tokens" if unit and unit.startswith("token") else "steps")


def whole_steps(text: str | int | float, *, tokens_per_step: int, run_steps: int | None = None) -> int:
  """Steps of a duration, rounded up: a run given a number of tokens sees at least that many.

  >>> whole_steps("5%", tokens_per_step=4096, run_steps=120)
  6
  """
  # The 1e-9 keeps 10% of 70 (7.000000000000001) at 7.
  return math.ceil(parse(text).steps(tokens_per_step=tokens_per_step, run_steps=run_steps) - 1e-9)


def parse_tokens(text: str) -> float:
  """Reads a number of tokens above 0, whose unit may be left out: "2B", "2e9", "300M tokens".

  Raises:
    ValueError: anything else, with the form that is understood.
  """
  found = parse(text)
  if found.unit == "%" or found.amount <= 0 or "step" in text:
    raise ValueError(f"{text!r}: give tokens above 0, e.g. '2B tokens'")
  return found.amount
