"""Mistakes that a person can mend -> one message with a line for each.

Invariant: a line names the key (or file), what was found and what to write instead.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from cpt_jax import exits


class ConfigError(ValueError):
  """One or more mistakes that a person can mend; the message is a line for each, with key, value and fix."""

  exit_code = exits.CONFIG  # of a program that ends with it

  def __init__(self, text: str):
    super().__init__(text)
    self.lines = [text]  # one for each mistake


class Problems:
  """Collects what is wrong, so that a user mends everything in one go."""

  def __init__(self):
    self.lines: list[str] = []

  def add(self, text: str) -> None:
    """Notes a line, once."""
    if text not in self.lines:
      self.lines.append(text)

  @contextlib.contextmanager
  def collect(self) -> Iterator[None]:
    """Notes a ConfigError of the block, so that what comes after it is checked too."""
    try:
      yield
    except ConfigError as error:
      for line in error.lines:
        self.add(line)

  def raise_if_any(self) -> None:
    """Raises ConfigError with every collected line."""
    if self.lines:
      count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
      error = ConfigError("\n".join([f"{count} in the configuration:"] + [f"  {line}" for line in self.lines]))
      error.lines = self.lines
      raise error


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """' Did you mean x?' or ''."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {close[0]}?" if close else ""
