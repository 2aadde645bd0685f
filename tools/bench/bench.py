"""This machine -> how fast cpt_jax trains, reads, prepares, converts and starts on it: tables, and JSON with every sample.

Invariant: nothing is compared across processes that did not take turns in this very run, and nothing here is a test.

Exit codes: 0 done, 3 the machine is too busy to measure (--force goes on), 78 wrong settings.
"""

import contextlib
import functools
import gzip
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from cpt_jax.config import ConfigError
from cpt_jax.training import console
from tools.bench import bench_data, bench_endurance, bench_loss, bench_memory, bench_samples, bench_start, bench_step, bench_train
from tools.bench.bench_samples import ROOT, Section

NOISY, EXIT_CONFIG = 3, 78
MAX_LOAD = 1.5  # a busier machine measures its neighbours
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "orbax-checkpoint", "tokenizers", "safetensors")
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

    from cpt_jax.model import pretrained, spec as spec_lib, transformer

    hf_config = json.loads((ROOT / "examples/base/config.json").read_text()) | changes
    if self.quick:
      hf_config |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
      hf_config |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    shape = spec_lib.from_hf(hf_config)
    params = transformer.init(shape, jax.random.key(self.seed))
    with contextlib.redirect_stdout(io.StringIO()):
      pretrained.save_params(
        params, shape, self.directory / name, source_dir=ROOT / "examples/base", hf_config=hf_config, dtype="float32"
      )
    return self.directory / name

  @functools.cached_property
  def texts(self) -> dict[str, pathlib.Path]:
    """The corpora of the quickstart by its names of them; their first documents where quick."""
    found = {"general": ROOT / "examples/corpora/english.jsonl.gz", "poetry": ROOT / "examples/corpora/poetry_ci.jsonl.gz"}
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
    from cpt_jax.training import inputs as inputs_lib

    c = bench_step.settings(self.base, rows=rows, row_len=row_len, num_steps=num_steps)
    c.data.heldout_frac = 0.02
    for name, role, share in (("general", "replay", 0.25), ("poetry", "domain", 0.75)):
      store = str(self.directory / "store" / name)
      c.data.sources[name] = config_lib.source(store=store, text=str(self.texts[name]), role=role, share=share)
    with contextlib.redirect_stdout(io.StringIO()):
      return inputs_lib.open_inputs(c)

  @functools.cached_property
  def training_rate(self) -> float:
    """Positions a second of the bare step, from the step section where it was run."""
    if "step" in self.results:
      return self.results["step"]["positions_per_sec"]["cpt_jax step"]
    rows, row_len = (2, 64) if self.quick else (16, 256)
    inputs = self.inputs(rows=rows, row_len=row_len, num_steps=100)
    step_secs = bench_train.bare(
      bench_step.of_base(inputs.config, self.base, num_sources=2), inputs.loader.batches(0), num_steps=5
    )
    return rows * row_len / step_secs


_STEP_TITLE = "float32; ratios are times of cpt_jax over times of its peer, so below 1 is faster"
_STEP_COLUMNS = ["side", "positions/s", "wall ms", "min", "MAD", "CPU ms", "wall ratio", "CPU ratio", "loss differs by"]
_MEASURE: dict[str, tuple[Callable[[Bench], Section], str, list[str]]] = {
  "step": (bench_train.measure_step, f"training step, {_STEP_TITLE}", _STEP_COLUMNS),
  "step_5m": (bench_train.measure_step_5m, f"training step of 5.0M parameters, {_STEP_TITLE}", _STEP_COLUMNS),
  "loss": (
    bench_loss.measure_loss,
    "cross-entropy with its gradients, float32; ratios are cpt_jax over optax on whole logits, so below 1 is better; the "
    "bars: 1/4 of the memory at 128k, 1.1 of the CPU time, an error of 1e-6",
    ["vocabulary", "side", "peak MB", "wall ms", "CPU ms", "MAD", "error", "memory ratio", "wall ratio", "CPU ratio", "held"],
  ),
  "overhead": (
    bench_train.measure_overhead,
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
    bench_train.measure_loader,
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
    bench_memory.measure_memory,
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
    bench_start.measure_startup,
    "start, seconds to the first finished step and to the end, which evaluates and saves once more; ratios to the same with "
    "nothing compiled; the bar is half",
    ["what", "first step", "end", "min", "MAD", "CPU", "samples", "ratio, first step", "ratio, CPU"],
  ),
}


def environment() -> dict[str, Any]:
  """What the figures depend on beside the code."""
  versions = {"python": platform.python_version()}
  for name in (*_PACKAGES, *bench_train.PEERS, *_DATA_PEERS):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  cpu = {"model": platform.processor(), "cores": os.cpu_count(), "flags": []}
  if os.path.exists("/proc/cpuinfo"):
    fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    values = {key.strip(): value.strip() for key, value in fields.items()}
    cpu["model"] = values.get("model name", cpu["model"])
    cpu["flags"] = [f for f in values.get("flags", "").split() if f.startswith(("avx", "amx", "fma", "sse4"))]
  commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
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
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what the peers and the processes of their own are held to as well
  load_before = load()
  if load_before > MAX_LOAD and not _FORCE.value:
    print(f"noisy: load average {load_before:.2f}, more than {MAX_LOAD}; wait, or measure anyway with --force", file=sys.stderr)
    return NOISY
  logging.set_verbosity(logging.WARNING)  # the checkpoints' own diary
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  cores = [int(core) for core in _CORES.value] or bench_samples.cores()
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


if __name__ == "__main__":
  app.run(main)
