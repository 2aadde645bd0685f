"""Commands and blocks of code -> samples of their time, and what is said of samples; what every bench shares.

Invariant: CPU time stands beside wall time, and ratios are of pairs that had the same turn.
"""

import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

Section = tuple[dict[str, Any], list[list[Any]]]  # what is written as JSON, and the rows of its table


def command(name: str, *arguments: Any) -> list[str]:
  """Runs a module of this folder in a process of its own; `call` starts it where it is found."""
  return [sys.executable, "-m", f"tools.bench.{name}", *map(str, arguments)]


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


def cores() -> list[int]:
  """Those that this process may use."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def take_cores(text: str) -> None:
  """Keeps this process to these cores, "0,1".

  ORDER: before jax and torch are imported, which count them once, when they start their threads.
  """
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [int(core) for core in text.split(",")])


def environment(on_cores: list[int]) -> dict[str, str]:
  """Variables of a side's process: as many threads as cores, threads that wait without working, nothing from the network."""
  number = str(len(on_cores))
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": number,
    "MKL_NUM_THREADS": number,
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
  }


def status(*names: str) -> list[int]:
  """Bytes of fields of /proc/self/status; 0 where the system has none."""
  path = pathlib.Path("/proc/self/status")
  fields = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}
  return [int(fields[name].split()[0]) << 10 if name in fields else 0 for name in names]
