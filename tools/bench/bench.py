"""This machine -> how fast cpt_jax trains, reads, prepares, converts and starts on it: tables, and JSON with every sample.

Invariant: nothing is compared across processes that did not take turns in this very run, and nothing here is a test.

Exit codes: 0 done, 3 the machine is too busy to measure (--force goes on), 78 wrong settings.
"""

import collections
import contextlib
import functools
import gzip
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(_ROOT))  # a clone that is not installed

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what the peers and the processes of their own are held to as well

import bench_data
import bench_endurance
import bench_loss
import bench_memory
import bench_samples
import bench_step

from cpt_jax.config import ConfigError
from cpt_jax.training import console

NOISY, EXIT_CONFIG = 3, 78
MAX_LOAD = 1.5  # a busier machine measures its neighbours
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "orbax-checkpoint", "tokenizers", "safetensors")
_PEERS = ("torch", "transformers", "accelerate")
_DATA_PEERS = ("datasets", "mosaicml-streaming", "datatrove")

_SECTIONS = flags.DEFINE_list("sections", [], "Of those that the docs name; all by default.")
_OUTPUT = flags.DEFINE_string("output", "runs/bench", "Directory for a SECTION.json of each section.")
_FORCE = flags.DEFINE_bool("force", False, "Measure on a busy machine too; the result says that it is noisy.")
_QUICK = flags.DEFINE_bool("quick", False, "A tiny model and few samples: shows that it works; its figures mean nothing.")
_PEERS_FLAG = flags.DEFINE_bool("peers", True, "Measure Hugging Face beside cpt_jax, where it is installed.")
_CORES = flags.DEFINE_list("cores", [], "Cores for the step section, e.g. 0 or 0,1; all by default.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random weights.")


class Bench:
  """What the sections share: a scratch directory, a model with random weights in it, texts, and what was measured so far."""

  def __init__(self, directory: pathlib.Path, *, quick: bool, peers: bool, cores: list[int], seed: int):
    self.directory, self.quick, self.peers, self.cores, self.seed = directory, quick, peers, cores, seed
    self.results: dict[str, dict[str, Any]] = {}

  @functools.cached_property
  def base(self) -> pathlib.Path:
    """The shipped base's architecture and tokenizer with random float32 weights, as a Hugging Face directory."""
    return self.model("base")

  def model(self, name: str, **changes: int) -> pathlib.Path:
    """As `base`, with these keys of its config.json changed."""
    import jax

    from cpt_jax.model import pretrained, transformer
    from cpt_jax.model import spec as spec_lib

    hf_config = json.loads((_ROOT / "examples/base/config.json").read_text()) | changes
    if self.quick:
      hf_config |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
      hf_config |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    shape = spec_lib.from_hf(hf_config)
    params = transformer.init(shape, jax.random.key(self.seed))
    with contextlib.redirect_stdout(io.StringIO()):
      pretrained.save_params(
        params, shape, self.directory / name, source_dir=_ROOT / "examples/base", hf_config=hf_config, dtype="float32"
      )
    return self.directory / name

  @functools.cached_property
  def texts(self) -> dict[str, pathlib.Path]:
    """The corpora of the quickstart by its names of them; their first documents where quick."""
    found = {"general": _ROOT / "examples/corpora/english.jsonl.gz", "poetry": _ROOT / "examples/corpora/poetry_ci.jsonl.gz"}
    if not self.quick:
      return found
    short = {name: self.directory / f"{name}.jsonl" for name in found}
    for name, path in found.items():
      with gzip.open(path, "rt", encoding="utf-8") as lines:
        short[name].write_text("".join(line for _, line in zip(range(300), lines, strict=False)), encoding="utf-8")
    return short

  def inputs(self, *, rows: int, row_len: int, num_steps: int) -> Any:
    """What training.loop opens for this shape: the loader of the quickstart's two sources among it."""
    from cpt_jax import config as config_lib
    from cpt_jax.training import loop

    c = bench_step.settings(self.base, rows=rows, row_len=row_len, num_steps=num_steps)
    c.data.heldout_frac = 0.02
    for name, role, share in (("general", "replay", 0.25), ("poetry", "domain", 0.75)):
      store = str(self.directory / "store" / name)
      c.data.sources[name] = config_lib.source(store=store, text=str(self.texts[name]), role=role, share=share)
    with contextlib.redirect_stdout(io.StringIO()):
      return loop.open_inputs(c)

  @functools.cached_property
  def training_rate(self) -> float:
    """Positions a second of the bare step, from the step section where it was run."""
    if "step" in self.results:
      return self.results["step"]["positions_per_sec"]["cpt_jax step"]
    rows, row_len = (2, 64) if self.quick else (16, 256)
    inputs = self.inputs(rows=rows, row_len=row_len, num_steps=100)
    step_secs = _bare(bench_step.Training(inputs.config, self.base, num_sources=2), inputs.loader.batches(0), num_steps=5)
    return rows * row_len / step_secs


def measure_step(bench: Bench) -> tuple[dict[str, Any], list[list[Any]]]:
  """Seconds of a training step on equal terms: cpt_jax's bare step and loop, Hugging Face's bare model and Trainer."""
  return _measure_step(bench, bench.base, rows=16)


def measure_step_5m(bench: Bench) -> tuple[dict[str, Any], list[list[Any]]]:
  """The same for a model of 5.0M parameters, wider and with fewer rows, where products weigh more."""
  heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=32)
  return _measure_step(bench, bench.model("5m", hidden_size=256, intermediate_size=1024, **heads), rows=8)


def _measure_step(bench: Bench, base: pathlib.Path, *, rows: int) -> tuple[dict[str, Any], list[list[Any]]]:
  rows, row_len = (2, 64) if bench.quick else (rows, 256)
  num_checked, num_warm, num_timed, rounds = (10, 2, 3, 1) if bench.quick else (10, 3, 20, 2)
  _write_tokens(bench, base, num_steps=max(num_checked, num_warm + num_timed), rows=rows, row_len=row_len)
  missing = [name for name in _PEERS if importlib.util.find_spec(name) is None] if bench.peers else ["--nopeers"]
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


def measure_overhead(bench: Bench) -> tuple[dict[str, Any], list[list[Any]]]:
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


def measure_loader(bench: Bench) -> tuple[dict[str, Any], list[list[Any]]]:
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


def measure_memory(bench: Bench) -> tuple[dict[str, Any], list[list[Any]]]:
  """Peak host memory of import and export beside the parameters, for a model and one four times as deep."""
  models = bench_memory.import_export_memory((1,)) if bench.quick else bench_memory.import_export_memory()
  table = []
  for m in models:
    held = max(m[way]["excess_bytes"] for way in ("import", "export")) <= m["allowed_bytes"]
    mb = [m["params_bytes"], m["largest_bytes"], m["allowed_bytes"], m["import"]["excess_bytes"], m["export"]["excess_bytes"]]
    speed = [f"{m['params_bytes'] / 1e6 / m[way]['secs']:,.0f}" for way in ("import", "export")]
    table.append([m["num_layers"], *(f"{x / 1e6:,.0f}" for x in mb), *speed, "yes" if held else "NO"])
  return {"models": models}, table


def measure_startup(bench: Bench) -> tuple[dict[str, Any], list[list[Any]]]:
  """Seconds of the import, and of the quickstart from its command to its first finished step and to the end after it."""
  repeats = 1 if bench.quick else 5
  environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
  secs: dict[str, dict[str, list[float]]] = collections.defaultdict(
    lambda: {"wall_secs": [], "cpu_secs": [], "first_step_secs": []}
  )
  for _ in range(repeats):
    for what in ("cpt_jax.main", "cpt_jax.training.loop"):
      with bench_samples.timed(secs[f"import {what}"]):
        bench_samples.call([sys.executable, "-c", f"import {what}"], env=environment)
  # The weights' values do not matter here: where the shipped ones are missing, random ones start as fast.
  base = _ROOT / "examples/base" if not bench.quick and (_ROOT / "examples/base/config.json").exists() else bench.base
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
  return {"starts": starts, "is_shipped_base": base == _ROOT / "examples/base"}, table


_STEP_TITLE = "float32; ratios are times of cpt_jax over times of its peer, so below 1 is faster"
_STEP_COLUMNS = ["side", "positions/s", "wall ms", "min", "MAD", "CPU ms", "wall ratio", "CPU ratio", "loss differs by"]
_MEASURE: dict[str, tuple[Callable[[Bench], tuple[dict[str, Any], list[list[Any]]]], str, list[str]]] = {
  "step": (measure_step, f"training step, {_STEP_TITLE}", _STEP_COLUMNS),
  "step_5m": (measure_step_5m, f"training step of 5.0M parameters, {_STEP_TITLE}", _STEP_COLUMNS),
  "loss": (
    bench_loss.measure_loss,
    "cross-entropy with its gradients, float32; ratios are cpt_jax over optax on whole logits, so below 1 is better; the "
    "bars: 1/4 of the memory at 128k, 1.1 of the CPU time, an error of 1e-6",
    ["vocabulary", "side", "peak MB", "wall ms", "CPU ms", "MAD", "error", "memory ratio", "wall ratio", "CPU ratio", "held"],
  ),
  "overhead": (
    measure_overhead,
    "loop less bare step, ms a step; the bar is 2% and 1 ms at 50 ms",
    [
      "rows x positions",
      "bare",
      "loop",
      "overhead",
      "its CPU time",
      "of the step",
      "MAD",
      "rows",
      "to device",
      "dispatch",
      "held",
    ],
  ),
  "loader": (
    measure_loader,
    "loader alone; the bar is 20 times what the step trains on",
    ["rows x positions", "rows/s", "MAD", "positions/s", "step positions/s", "times", "us/row, one thread", "held"],
  ),
  "mixture": (
    bench_data.measure_mixture,
    "mixing and packing, rows of 2048 but where it says so; ratios are speeds of cpt_jax over its peer's, so above 1 is faster; "
    "the bars, held to CPU time: 1, and 5M positions/s packed",
    ["sources", "side", "rows/s", "MAD", "positions/s", "rows/CPU s", "positions/CPU s", "wall ratio", "CPU ratio", "held"],
  ),
  "seek": (
    bench_data.measure_seek,
    "time to the first batch at a row, in a fresh process and CPU time of it; then of later seeks; ~ is extrapolated; the bars, "
    "held to CPU time: 50 ms at any row, 5 s and 200 MB to open 64 sources and a million steps",
    ["side", "open s", "open CPU s", "open MB", "row 0", "row 10^6", "row 10^9", "held"],
  ),
  "prepare": (
    bench_data.measure_prepare,
    "preparation; ratios are speeds of cpt_jax over datatrove's, so above 1 is faster",
    ["what", "MB of text", "s", "MAD", "CPU s", "MB/CPU s", "wall ratio", "CPU ratio", "peak MB"],
  ),
  "memory": (
    measure_memory,
    "peak host memory beside the parameters, MB; allowed is twice the largest stacked tensor and 300 MB",
    ["layers", "parameters", "largest stacked", "allowed", "import", "export", "import MB/s", "export MB/s", "held"],
  ),
  "endurance": (
    bench_endurance.measure_endurance,
    "the real loop, and a second start in the same process that ends and exports the run; the bars: 1 MB per 1,000 steps, one "
    "compilation of the step and of the evaluation a start, and none after the first step",
    ["steps", "memory, MB", "MB per 1,000 steps", "train steps", "eval steps", "all programs", "after the first step", "held"],
  ),
  "startup": (
    measure_startup,
    "start, seconds to the first finished step and to the end, which evaluates and saves once more; ratios to the same with "
    "nothing compiled; the bar is half",
    ["what", "first step", "end", "min", "MAD", "CPU", "samples", "ratio, first step", "ratio, CPU"],
  ),
}


def environment() -> dict[str, Any]:
  """What the figures depend on beside the code."""
  versions = {"python": platform.python_version()}
  for name in (*_PACKAGES, *_PEERS, *_DATA_PEERS):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  cpu = {"model": platform.processor(), "cores": os.cpu_count(), "flags": []}
  if os.path.exists("/proc/cpuinfo"):
    fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    values = {key.strip(): value.strip() for key, value in fields.items()}
    cpu["model"] = values.get("model name", cpu["model"])
    cpu["flags"] = [f for f in values.get("flags", "").split() if f.startswith(("avx", "amx", "fma", "sse4"))]
  commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False)
  return {"versions": versions, "cpu": cpu, "platform": os.environ["JAX_PLATFORMS"], "commit": commit.stdout.strip()}


def load() -> float:
  """Processes that wanted to run, averaged over the last minute; 0 where the system does not say."""
  return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def main(argv: list[str]) -> int:
  """Measures the sections asked for; returns the exit code."""
  names = _SECTIONS.value or list(_MEASURE)
  unknown = [name for name in names if name not in _MEASURE]
  if unknown or len(argv) > 1:
    print(f"what is {', '.join(unknown or argv[1:])}? --sections takes {','.join(_MEASURE)}", file=sys.stderr)
    return EXIT_CONFIG
  load_before = load()
  if load_before > MAX_LOAD and not _FORCE.value:
    print(f"noisy: load average {load_before:.2f}, more than {MAX_LOAD}; wait, or measure anyway with --force", file=sys.stderr)
    return NOISY
  logging.set_verbosity(logging.WARNING)  # the checkpoints' own diary
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  cores = [int(core) for core in _CORES.value] or bench_step.cores()
  with tempfile.TemporaryDirectory(prefix="cpt_jax_bench_") as directory:
    bench = Bench(pathlib.Path(directory), quick=_QUICK.value, peers=_PEERS_FLAG.value, cores=cores, seed=_SEED.value)
    for name in names:
      measure, title, columns = _MEASURE[name]
      header = {"section": name, "quick": bench.quick, "seed": bench.seed, **environment(), "load_before": load()}
      begin = time.perf_counter()
      try:
        result, rows = measure(bench)
      except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
      bench.results[name] = result
      header |= {"load_after": load(), "is_noisy": load_before > MAX_LOAD, "elapsed_secs": time.perf_counter() - begin}
      (output / f"{name}.json").write_text(json.dumps({**header, **result}, indent=1), encoding="utf-8")
      console.table(title, columns, rows)
  console.say(f"every sample: {output}")
  return 0


def _run_side(bench: Bench, base: pathlib.Path, side: str, *, num_steps: int, skip: int) -> dict[str, Any]:
  cores = ",".join(map(str, bench.cores))
  command = [sys.executable, bench_step.__file__, side, str(base), str(num_steps), str(skip), cores]
  return json.loads(bench_samples.call(command, env=bench_step.environment(bench.cores)).splitlines()[-1])


def _write_tokens(bench: Bench, base: pathlib.Path, *, num_steps: int, rows: int, row_len: int) -> None:
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


def _bare(training: bench_step.Training, batches: Iterator[Any], *, num_steps: int) -> float:
  """Seconds a step, after one that compiles and one that warms."""
  device_batches = [training.to_device(next(batches)) for _ in range(num_steps)]
  _dispatch(training, device_batches[:1] * 2)
  begin = time.perf_counter()
  _dispatch(training, device_batches)
  return (time.perf_counter() - begin) / num_steps


def _sized(bench: Bench, target_secs: float, *, row_len: int) -> tuple[Any, bench_step.Training]:
  """Inputs and training of so many rows that a step takes about `target_secs` (0: one row)."""
  rows = 1
  for _ in range(3):
    inputs = bench.inputs(rows=rows, row_len=row_len, num_steps=100_000)
    training = bench_step.Training(inputs.config, bench.base, num_sources=2)
    step_secs = _bare(training, inputs.loader.batches(0), num_steps=10)
    wanted = max(1, round(rows * target_secs / step_secs))
    if target_secs == 0 or wanted == rows:
      break
    rows = wanted
  return inputs, training


def _start(
  bench: Bench, workdir: pathlib.Path, *, base: pathlib.Path, stores: pathlib.Path, cache: pathlib.Path, eval_tokens: int
) -> float:
  """Runs a quickstart of one step; seconds from the command to the record of that step."""
  command = [sys.executable, "-m", "cpt_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
  command += [f"--config.start.hf={base}", "--config.debug.stop_after=1", "--config.log.every=1"]
  command += [f"--config.eval.tokens={eval_tokens // 20 if bench.quick else eval_tokens}"]
  for name, text in bench.texts.items():
    command += [f"--config.data.sources.{name}.store={stores / name}", f"--config.data.sources.{name}.text={text}"]
  environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
  begin, first_secs = time.perf_counter(), None
  with tempfile.TemporaryFile("w+") as output:
    process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
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


if __name__ == "__main__":
  app.run(main)
