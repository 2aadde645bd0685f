"""Commands -> seconds of an import, and of the quickstart to its first finished step and to its end, compiled before or not.

Invariant: every start is a process of its own; its first step is seen in the run's own record.
"""

import collections
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from tools.bench import bench_samples
from tools.bench.bench_samples import ROOT, Section


def measure_startup(bench: Any) -> Section:
  """Seconds of the import, and of the quickstart from its command to its first finished step and to the end after it."""
  repeats = 1 if bench.quick else 5
  secs: dict[str, dict[str, list[float]]] = collections.defaultdict(
    lambda: {"wall_secs": [], "cpu_secs": [], "first_step_secs": []}
  )
  for _ in range(repeats):
    for what in ("cpt_jax.main", "cpt_jax.training.loop"):
      with bench_samples.timed(secs[f"import {what}"]):
        bench_samples.call([sys.executable, "-c", f"import {what}"], env={**os.environ})
  # The weights' values do not matter here: where the shipped ones are missing, random ones start as fast.
  base = ROOT / "examples/base" if not bench.quick and (ROOT / "examples/base/config.json").exists() else bench.base
  cache, stores = bench.directory / "start_cache", bench.directory / "start_stores"
  kinds = ["first start ever", "nothing compiled", "compiled before"]
  for turn, kind in enumerate(kinds if bench.quick else [*kinds, *kinds[:0:-1]]):
    # The evaluation of the base is work of the run; with few tokens the start alone is left.
    for tokens in (20_000, 1_000):
      if tokens == 1_000 and kind == kinds[0]:
        continue
      if kind != "compiled before":
        shutil.rmtree(cache, ignore_errors=True)
      of_kind, workdir = secs[f"quickstart, {kind}, {tokens:,} tokens evaluated"], bench.directory / f"start_{turn}_{tokens}"
      with bench_samples.timed(of_kind):
        of_kind["first_step_secs"].append(_start(bench, workdir, base=base, stores=stores, cache=cache, eval_tokens=tokens))
  starts, table = {}, []
  for what, samples in secs.items():
    stats = {clock: bench_samples.stats(s) for clock, s in samples.items() if s}
    starts[what] = {**stats, "samples": samples}
    first = f"{stats['first_step_secs']['median']:.2f}" if "first_step_secs" in stats else ""
    wall, cpu = stats["wall_secs"], stats["cpu_secs"]
    cells = [f"{wall['median']:.2f}", f"{wall['min']:.2f}", f"{wall['mad']:.2f}", f"{cpu['median']:.2f}"]
    ratios = ["", ""]
    if "compiled before" in what:
      before = starts[what.replace("compiled before", "nothing compiled")]
      ratios = [f"{stats[clock]['median'] / before[clock]['median']:.2f}" for clock in ("first_step_secs", "cpu_secs")]
    table.append([what, first, *cells, len(samples["wall_secs"]), *ratios])
  return {"starts": starts, "is_shipped_base": base == ROOT / "examples/base"}, table


def _start(
  bench: Any, workdir: pathlib.Path, *, base: pathlib.Path, stores: pathlib.Path, cache: pathlib.Path, eval_tokens: int
) -> float:
  """Runs a quickstart of one step; seconds from the command to the record of that step."""
  command = [sys.executable, "-m", "cpt_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
  command += [f"--config.start.hf={base}", "--config.debug.stop_after=1", "--config.log.every=1"]
  command += [f"--config.eval.tokens={eval_tokens // 20 if bench.quick else eval_tokens}"]
  for name, text in bench.texts.items():
    command += [f"--config.data.sources.{name}.store={stores / name}", f"--config.data.sources.{name}.text={text}"]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
  begin, first_secs = time.perf_counter(), None
  with tempfile.TemporaryFile("w+") as output:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
      if first_secs is None and _has_train_record(workdir / "metrics.jsonl"):
        first_secs = time.perf_counter() - begin
      time.sleep(0.02)
    output.seek(0)
    if process.returncode or first_secs is None:
      raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()[-4000:]}")
  return first_secs


def _has_train_record(path: pathlib.Path) -> bool:
  return path.exists() and '"kind": "train"' in path.read_text(encoding="utf-8")
