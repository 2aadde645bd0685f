"""A source's share as people write it -> knots of (when, share, curve), checked.

Invariant: a Share's times are parsed durations; every share lies between 0 and 1.
"""

import ast
import math
import numbers
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags

from cpt_jax.config.durations import Duration
from cpt_jax.config.errors import Problems

CURVES = ("linear", "log", "hold")


class Share(tuple):
  """A source's share of the tokens: knots ((when, share, curve), ...).

  `when` is a duration, `curve` the way from the knot before to this one: "linear", which may be left out; "log", straight in
  the logarithm; "hold", the share before up to this time, then a jump. A type of its own so that the command line takes
  both forms: `--config.data.sources.zh.share=0.3` and `--config.data.sources.zh.share='[(0, 0.05), ("20%", 0.3)]'`.
  """

  def __new__(cls, value: Any, *, bare: str = "") -> "Share":
    """From a number, knots, or the text of either; `bare` as of Duration.
    Raises ValueError: what is none of them, or a knot's time that is no duration."""
    if isinstance(value, str):
      try:
        value = ast.literal_eval(value)
      except (ValueError, SyntaxError):
        raise ValueError(_no_share(value)) from None
    if isinstance(value, numbers.Real):
      value = [(0, value)]
    try:
      knots = [(when, float(share), *(curve or ["linear"])) for when, share, *curve in value]
    except (TypeError, ValueError):
      raise ValueError(_no_share(value)) from None
    return super().__new__(cls, ((Duration(when, bare=bare), *rest) for when, *rest in knots))


def _no_share(value: Any) -> str:
  return f"{value!r} is no share; write 0.3 or [(0, 0.05), ('20%', 0.3)], a knot's third entry is one of {', '.join(CURVES)}"


class _ShareParser(flags.ArgumentParser):
  """What absl calls for a share on the command line, and for its default."""

  def parse(self, argument: Any) -> Share:
    """A Share from either form, or from one."""
    return Share(argument)


config_flags.register_flag_parser_for_type(Share, _ShareParser())


def check_number(key: str, share: Any, problems: Problems) -> bool:
  """Adds a line where it is no share of the tokens."""
  if not (isinstance(share, (int, float)) and math.isfinite(share) and share >= 0):
    problems.add(f"{key}={share!r}: shares are numbers from 0 to 1, finite and not negative")
  elif share > 1:
    meant = f"write {share / 100:g}" if share <= 100 else "write a number from 0 to 1"
    problems.add(f"{key}={share:g}: shares are parts of 1, not of 100; {meant}")
  else:
    return True
  return False


def check_knots(key: str, knots: Sequence[tuple], steps: Sequence[float] | None, problems: Problems) -> None:
  """Checks shares, curves, and that the times rise; `steps` are the times in steps, None where they cannot be told."""
  for i, (when, share, *curve) in enumerate(knots):
    if not check_number(key, share, problems):
      continue
    if len(curve) != 1 or curve[0] not in CURVES:
      problems.add(f"{key}: the knot at {when!r} has {tuple(curve)} behind its share; write one of {', '.join(CURVES)}")
    elif curve[0] == "log" and (i == 0 or not min(share, knots[i - 1][1]) > 0):
      problems.add(f"{key}: the log curve to the knot at {when!r} runs between two shares above 0, e.g. from 0.001")
  if steps and (list(steps) != sorted(steps) or any(steps.count(step) > 2 for step in steps)):
    problems.add(f"{key}={tuple(knots)}: the knots' times must rise (twice the same time is a jump)")
