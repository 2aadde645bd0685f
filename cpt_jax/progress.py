"""Work that takes a while, in named parts -> bars on a terminal; elsewhere a line for each part and one now and then.

Invariant: goes to stderr alone, so what a command prints can be piped; the work does not depend on it.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress

EVERY_SECS = 20.0  # between two lines of one part


def columns(what: str, *middle: rich.progress.ProgressColumn) -> tuple[rich.progress.ProgressColumn, ...]:
  """Those of all bars: what is done, the bar, `middle`, the time that it took and that is left."""
  text, bar, left = rich.progress.TextColumn, rich.progress.BarColumn(bar_width=24), rich.progress.TimeRemainingColumn()
  return text(f"[bold]{what}"), bar, *middle, rich.progress.TimeElapsedColumn(), text("left"), left


class Progress:
  """`with Progress() as progress: advance = progress.part("read the domain", total); ...; advance(1)`."""

  def __init__(self):
    self._is_terminal = sys.stderr.isatty()
    console = rich.console.Console(stderr=True, highlight=False)
    found = columns("{task.description}", rich.progress.MofNCompleteColumn())
    hidden = not self._is_terminal
    self._bar = rich.progress.Progress(*found, console=console, transient=True, redirect_stdout=False, disable=hidden)

  def part(self, what: str, total: int | None = None, *, unit: int = 1) -> Callable[[int], None]:
    """Begins a part of the work; what is returned is called with how much more of `total` is done, shown in `unit`s."""
    task = self._bar.add_task(what, total=None if total is None else total // unit)
    done, said_secs = 0, time.monotonic()
    self._line(f"{what} ...")

    def advance(number: int = 1) -> None:
      nonlocal done, said_secs
      done += number
      self._bar.update(task, completed=done // unit)
      if total and time.monotonic() - said_secs > EVERY_SECS:
        said_secs = time.monotonic()
        self._line(f"{what}: {done / total:.0%}")

    return advance

  def _line(self, text: str) -> None:
    if not self._is_terminal:
      print(text, file=sys.stderr, flush=True)

  def __enter__(self) -> "Progress":
    self._bar.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.stop()
