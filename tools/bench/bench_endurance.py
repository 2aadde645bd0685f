"""The real loop for thousands of steps in one process: how its memory grows, and each program that is compiled, and when.

Invariant: nothing of the loop is replaced; only its progress bar is one that looks at the process.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from tools.bench import bench_samples, bench_step
from tools.bench.bench_samples import Section

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Watch:
  """Stands for console.TrainProgress; keeps the anonymous memory at every `every`-th step, and what was compiled before which.

  `compiled` are (step, program): the program was made when so many steps had been finished.
  """

  def __init__(self, *, every: int):
    self.step = 0
    self.memory: list[tuple[int, int]] = []
    self.compiled: list[tuple[int, str]] = []
    self._every = every

  def advance(self, step: int) -> None:
    """A step is finished."""
    self.step = step
    if step % self._every == 0:
      self.memory.append((step, bench_samples.status("RssAnon")[0]))

  def show(self, reading: Any) -> None:
    """Says nothing."""

  def evaluated(self, *measured: Any) -> None:
    """Says nothing."""

  def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Says nothing."""
    return contextlib.nullcontext()

  def close(self) -> None:
    """Keeps nothing open."""

  @contextlib.contextmanager
  def compilations(self) -> Iterator[None]:
    """While open, notes every program that is compiled, or read from the cache of compiled ones."""
    import jax

    def note(event: str, secs: float, **about: Any) -> None:
      if event == _COMPILED:
        self.compiled.append((self.step, about["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
      yield
    finally:
      jax.monitoring.unregister_event_duration_listener(note)


def watched(config: Any, workdir: pathlib.Path, *, every: int) -> Watch:
  """Runs training.loop as main does."""
  from cpt_jax.training import loop

  watch = Watch(every=every)
  with watch.compilations(), contextlib.redirect_stdout(io.StringIO()):
    code = loop.run(config, workdir, bar=watch)
  assert code == 0, f"the loop ended with {code}"
  return watch


def slope_per_step(memory: list[tuple[int, int]]) -> float:
  """Bytes a step: the median slope between all pairs of samples (Theil-Sen), which a save or an evaluation does not move."""
  from scipy import stats

  steps, sizes = zip(*memory, strict=True)
  return float(stats.theilslopes(sizes, steps).slope)


def measure_endurance(bench: Any) -> Section:
  """Memory and compilations of the real loop over 2,000 steps, and of a second start in the same process that ends the run."""
  num_steps = 40 if bench.quick else 2000
  sources = {
    name: dict(store=str(bench.directory / "store" / name), text=str(text), role="replay" if name == "general" else "domain")
    for name, text in bench.texts.items()
  }
  asked = {"base": str(bench.base), "workdir": str(bench.directory / "endurance"), "num_steps": num_steps, "sources": sources}
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
  command = bench_samples.command("bench_endurance", json.dumps(asked))
  starts = json.loads(bench_samples.call(command, env=environment).splitlines()[-1])
  steady = [(step, size) for step, size in starts[0]["memory"] if step > num_steps // 4]
  slope_bytes = slope_per_step(steady) * 1000
  table, begin = [], 0
  for i, start in enumerate(starts):
    programs = collections.Counter(program for _, program in start["compiled"])
    late = collections.Counter(program for step, program in start["compiled"] if step > begin)
    start["late"] = dict(late)
    expected = programs["jit(train_step)"] == programs["jit(eval_step)"] == 1 and (i > 0 or not late)
    size = statistics.median(size for _, size in start["memory"])
    row = [f"{start['memory'][-1][0] - begin:,}", f"{size / 1e6:,.0f}", "" if i else f"{slope_bytes / 1e6:+.2f}"]
    row += [programs["jit(train_step)"], programs["jit(eval_step)"], sum(programs.values()), sum(late.values())]
    begin = start["memory"][-1][0]
    table.append([*row, "yes" if expected and (i > 0 or slope_bytes < 1e6) else "NO"])
  return {"steps": num_steps, "slope_bytes_per_1000_steps": slope_bytes, "starts": starts}, table


def _main(asked: dict[str, Any]) -> None:
  """One start up to `num_steps`, and a second one, in the same process, to the end of the run a tenth further on."""
  from cpt_jax import config as config_lib

  num_steps = asked["num_steps"]
  starts = []
  for stop_after in (num_steps, 0):
    c = bench_step.settings(asked["base"], rows=1, row_len=64, num_steps=num_steps + num_steps // 10)
    c.data.heldout_frac = 0.02
    for name, source in asked["sources"].items():
      c.data.sources[name] = config_lib.source(share=0.5, **source)
    c.eval.tokens = 1000
    c.eval.every, c.checkpoint.every = f"{num_steps // 8} steps", f"{num_steps // 4} steps"
    c.debug.stop_after = stop_after
    watch = watched(c, pathlib.Path(asked["workdir"]), every=1 if num_steps < 100 else 10)
    starts.append({"memory": watch.memory, "compiled": watch.compiled})
  print(json.dumps(starts))


if __name__ == "__main__":
  _main(json.loads(sys.argv[1]))
