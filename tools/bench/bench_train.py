"""A model and texts -> seconds of a training step beside its peers', what the loop adds to it, and how fast rows are read.

Invariant: the sides train alike, or their times are refused; blocks and processes take turns.
"""

import functools
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

from cpt_jax.training import console
from tools.bench import bench_samples, bench_step
from tools.bench.bench_samples import Section

PEERS = ("torch", "transformers", "accelerate")


def measure_step(bench: Any) -> Section:
  """Seconds of a training step on equal terms: cpt_jax's bare step and loop, Hugging Face's bare model and Trainer."""
  return _measure_step(bench, bench.base, rows=16)


def measure_step_5m(bench: Any) -> Section:
  """The same for a model of 5.0M parameters, wider and with fewer rows, where products weigh more."""
  heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=32)
  return _measure_step(bench, bench.model("5m", hidden_size=256, intermediate_size=1024, **heads), rows=8)


def _measure_step(bench: Any, base: pathlib.Path, *, rows: int) -> Section:
  rows, row_len = (2, 64) if bench.quick else (rows, 256)
  num_checked, num_warm, num_timed, rounds = (10, 2, 3, 1) if bench.quick else (10, 3, 20, 2)
  _write_tokens(bench, base, num_steps=max(num_checked, num_warm + num_timed), rows=rows, row_len=row_len)
  missing = [name for name in PEERS if importlib.util.find_spec(name) is None] if bench.peers else ["--nopeers"]
  sides = list(bench_step.PAIRS)[::-1] + ([] if missing else list(bench_step.PAIRS.values()))
  run = functools.partial(_run_side, bench, base)
  checked = {side: run(side, num_steps=num_checked, skip=0)["losses"] for side in sides}
  differences = _loss_differences(checked)
  if differences and max(differences.values()) > 1e-4:
    raise RuntimeError(f"the sides do not train alike, so their times mean nothing: largest relative differences {differences}")
  samples: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
  for side in bench_samples.in_turns(sides, rounds=rounds):
    samples[side].append(run(side, num_steps=num_warm + num_timed, skip=num_warm))
  clocks = ("wall_secs", "cpu_secs")
  stats = {
    side: {clock: bench_samples.stats([t for turn in turns for t in turn[clock]]) for clock in clocks}
    for side, turns in samples.items()
  }
  ratios = {
    f"{ours} / {theirs}": {clock: _paired_ratios(samples[ours], samples[theirs], clock) for clock in clocks}
    for ours, theirs in bench_step.PAIRS.items()
    if not missing
  }
  result = {
    "shape": {"rows": rows, "row_len": row_len, "architecture": json.loads((base / "config.json").read_text())},
    "cores": bench.cores,
    "optimizer": bench_step.OPTIMIZER,
    "steps": {"checked": num_checked, "warm_up": num_warm, "timed": num_timed, "rounds": rounds},
    "losses": checked,
    "loss_difference": differences,
    "skipped": {side: f"needs {', '.join(missing)}" for side in bench_step.PAIRS.values()} if missing else {},
    "samples": samples,
    "secs": stats,
    "positions_per_sec": {side: rows * row_len / s["wall_secs"]["mean"] for side, s in stats.items()},
    "ratios": ratios,
  }
  table = []
  for side in sides:
    wall, cpu = stats[side]["wall_secs"], stats[side]["cpu_secs"]
    ratio = next((bench_samples.ratio_cells(r) for name, r in ratios.items() if name.startswith(f"{side} /")), ["", ""])
    cells = [side, f"{result['positions_per_sec'][side]:,.0f}", *_ms(wall), f"{cpu['mean'] * 1e3:.1f}"]
    table.append([*cells, *ratio, f"{differences[side]:.1e}"])
  table += [[side, f"skipped: {why}", *[""] * 7] for side, why in result["skipped"].items()]
  return result, table


def measure_overhead(bench: Any) -> Section:
  """The loop's time less the bare jitted step's, in blocks that take turns within one process."""
  shapes = ((64, 0.0),) if bench.quick else ((256, 0.05), (64, 0.0))  # row length, and the step's seconds; 0 = of one row
  block, pairs = (10, 3) if bench.quick else (20, 8)
  result: dict[str, Any] = {"block_steps": block, "sizes": []}
  table = []
  for row_len, target_secs in shapes:
    inputs, training = _sized(bench, target_secs, row_len=row_len)
    rows, batches = inputs.config.train.batch_rows, inputs.loader.batches(0)
    device_batches = [training.to_device(next(batches)) for _ in range(block)]
    run_dir = bench.directory / f"overhead_{rows}_{row_len}"
    num_steps, names = pairs * block + block, inputs.loader.names
    hooks = bench_step.Hooks(inputs, run_dir)
    loop = bench_step.Loop(training, batches, run_dir, names=names, num_steps=num_steps, hooks=hooks)
    loop.run(block)  # warm
    loop.host_secs = dict.fromkeys(loop.host_secs, 0.0)
    bare, whole = [], []
    busy: dict[bool, list[float]] = {False: [], True: []}  # CPU time of the thread that runs the loop: load does not stretch it
    for pair in range(pairs):
      for measure_loop in (False, True) if pair % 2 == 0 else (True, False):
        begin, busy_begin = time.perf_counter(), time.thread_time()
        if measure_loop:
          loop.run(block)
        else:
          _dispatch(training, device_batches)
        (whole if measure_loop else bare).append((time.perf_counter() - begin) / block)
        busy[measure_loop].append((time.thread_time() - busy_begin) / block)
    loop.close()
    overheads = [(w - b) / b for w, b in zip(whole, bare, strict=True)]
    size = {
      "rows": rows,
      "row_len": row_len,
      "target_secs": target_secs,
      "bare_secs": bench_samples.stats(bare),
      "loop_secs": bench_samples.stats(whole),
      "overhead": bench_samples.stats(overheads),
      "overhead_thread_secs": bench_samples.stats([w - b for w, b in zip(busy[True], busy[False], strict=True)]),
      "overhead_secs": bench_samples.stats([w - b for w, b in zip(whole, bare, strict=True)]),
      "host_secs": {name: secs / (pairs * block) for name, secs in loop.host_secs.items()},
      "samples": {"bare_secs": bare, "loop_secs": whole},
    }
    result["sizes"].append(size)
    held = size["overhead"]["median"] <= 0.02 and size["overhead_secs"]["median"] <= 1e-3
    bar = "" if not target_secs else "yes" if held else "NO"
    table.append(
      [f"{rows} x {row_len}", f"{size['bare_secs']['median'] * 1e3:.2f}", f"{size['loop_secs']['median'] * 1e3:.2f}"]
      + [f"{size[key]['median'] * 1e3:+.2f}" for key in ("overhead_secs", "overhead_thread_secs")]
      + [f"{size['overhead']['median']:+.2%}", f"{size['overhead']['mad']:.2%}"]
      + [f"{secs * 1e3:.2f}" for secs in size["host_secs"].values()]
      + [bar]
    )
  return result, table


def measure_loader(bench: Any) -> Section:
  """Rows a second of Loader.batches alone, against what the step trains on."""
  repeats, window_secs = (2, 0.05) if bench.quick else (5, 2.0)
  result: dict[str, Any] = {"training_positions_per_sec": bench.training_rate, "shapes": []}
  table = []
  for rows, row_len in ((8, 2048), (16, 256)):
    loader = bench.inputs(rows=rows, row_len=row_len, num_steps=1_000_000).loader
    batches = loader.batches(0)
    next(batches)
    rates, single = [], []
    for repeat in range(repeats):
      begin, num_rows = time.perf_counter(), 0
      while (elapsed_secs := time.perf_counter() - begin) < window_secs:
        num_rows += len(next(batches).source_B)
      rates.append(num_rows / elapsed_secs)
      begin = time.perf_counter()
      for index in range(repeat * 100, repeat * 100 + 100):
        loader.row(index)
      single.append((time.perf_counter() - begin) / 100)
    positions_per_sec = statistics.median(rates) * row_len
    shape = {
      "rows": rows,
      "row_len": row_len,
      "rows_per_sec": bench_samples.stats(rates),
      "positions_per_sec": positions_per_sec,
      "times_training": positions_per_sec / bench.training_rate,
      "row_secs": bench_samples.stats(single),
      "samples": {"rows_per_sec": rates, "row_secs": single},
    }
    result["shapes"].append(shape)
    speed = shape["rows_per_sec"]
    cells = [f"{rows} x {row_len}", f"{speed['median']:,.0f}", f"{speed['mad']:,.0f}", console.count(positions_per_sec)]
    cells += [f"{bench.training_rate:,.0f}", f"{shape['times_training']:,.0f}", f"{shape['row_secs']['median'] * 1e6:.0f}"]
    table.append([*cells, "yes" if shape["times_training"] >= 20 else "NO"])
  return result, table


def _run_side(bench: Any, base: pathlib.Path, side: str, *, num_steps: int, skip: int) -> dict[str, Any]:
  cores = ",".join(map(str, bench.cores))
  command = bench_samples.command("bench_step", side, base, num_steps, skip, cores)
  return json.loads(bench_samples.call(command, env=bench_samples.environment(bench.cores)).splitlines()[-1])


def _write_tokens(bench: Any, base: pathlib.Path, *, num_steps: int, rows: int, row_len: int) -> None:
  """Real text, as tokens [S, B, T] beside the model; constant tokens would flatter caches and branches."""
  import numpy as np

  stores = [source.store for source in bench.inputs(rows=rows, row_len=row_len, num_steps=num_steps).loader.sources]
  needed = num_steps * rows * row_len
  parts, have = [], 0
  for document in (store.document(i) for store in stores[::-1] for i in range(store.num_documents)):
    parts.append(np.asarray(document, np.int32))
    have += len(document)
    if have >= needed:
      break
  assert have >= needed, f"the corpora have {have} tokens, {needed} are needed"
  np.save(base / "tokens.npy", np.concatenate(parts)[:needed].reshape(num_steps, rows, row_len))


def _loss_differences(losses: dict[str, list[float]]) -> dict[str, float]:
  """Largest relative difference of each side's losses to the first side's; a loop's records are means of steps."""
  names = list(losses)
  expected = losses["cpt_jax step"]
  differences = {}
  for name in names:
    found, wanted = losses[name], expected
    if name == "cpt_jax loop":
      every = bench_step.LOG_EVERY
      wanted = [statistics.fmean(expected[i : i + every]) for i in range(0, len(expected) - every + 1, every)]
    assert len(found) == len(wanted), f"{name} gave {len(found)} losses, not {len(wanted)}"
    differences[name] = max((abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)), default=0.0)
  return differences


def _paired_ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> list[float]:
  """Of the totals, which hold what a trainer does only now and then, for each pair of processes that had the same turn."""
  return [sum(a[key]) / sum(b[key]) for a, b in zip(ours, theirs, strict=True)]


def _ms(stats: dict[str, float]) -> list[str]:
  return [f"{stats[key] * 1e3:.1f}" for key in ("median", "min", "mad")]


def _dispatch(training: bench_step.Training, device_batches: list[Any]) -> None:
  """A step for each batch, one behind the other as the device takes them, and the wait for the last one."""
  import jax

  for batch in device_batches:
    measured = training.step(batch)
  jax.block_until_ready((measured, training.state))


def bare(training: bench_step.Training, batches: Iterator[Any], *, num_steps: int) -> float:
  """Seconds a step, after one that compiles and one that warms."""
  device_batches = [training.to_device(next(batches)) for _ in range(num_steps)]
  _dispatch(training, device_batches[:1] * 2)
  begin = time.perf_counter()
  _dispatch(training, device_batches)
  return (time.perf_counter() - begin) / num_steps


def _sized(bench: Any, target_secs: float, *, row_len: int) -> tuple[Any, bench_step.Training]:
  """Inputs and training of so many rows that a step takes about `target_secs` (0: one row)."""
  rows = 1
  for _ in range(3):
    inputs = bench.inputs(rows=rows, row_len=row_len, num_steps=100_000)
    training = bench_step.of_base(inputs.config, bench.base, num_sources=2)
    step_secs = bare(training, inputs.loader.batches(0), num_steps=10)
    wanted = max(1, round(rows * target_secs / step_secs))
    if target_secs == 0 or wanted == rows:
      break
    rows = wanted
  return inputs, training
