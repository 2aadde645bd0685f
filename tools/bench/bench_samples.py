"""Commands and blocks of code -> samples of their time, and what is said of samples.

Invariant: CPU time stands beside wall time, and ratios are of pairs that had the same turn.
"""

import contextlib
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def call(command: list[str], *, env: dict[str, str]) -> str:
  """What the command printed; if it fails, its own words are the error."""
  done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
  return done.stdout


@contextlib.contextmanager
def timed(samples: dict[str, list[float]]) -> Iterator[None]:
  """Adds the wall time of the block, and the CPU time of the processes that ended in it."""
  wall, before = time.perf_counter(), os.times()
  yield
  after = os.times()
  samples["wall_secs"].append(time.perf_counter() - wall)
  samples["cpu_secs"].append(after.children_user + after.children_system - before.children_user - before.children_system)


def stats(samples: list[float]) -> dict[str, float]:
  """Minimum, median, median distance from the median, and mean."""
  median = statistics.median(samples)
  mad = statistics.median(abs(s - median) for s in samples)
  return {"min": min(samples), "median": median, "mad": mad, "mean": statistics.fmean(samples)}


def ratio_cells(ratios: dict[str, list[float]]) -> list[str]:
  """Median and range of the ratios of wall and of CPU time."""
  return [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (ratios["wall_secs"], ratios["cpu_secs"])]


def in_turns(sides: list[Any], *, rounds: int) -> Iterator[Any]:
  """A B C, C B A, and so on: what drifts slowly hits all alike."""
  for turn in range(rounds):
    yield from sides if turn % 2 == 0 else sides[::-1]
