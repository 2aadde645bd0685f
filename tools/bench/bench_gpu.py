"""One GPU -> how near to its ceilings cpt_jax trains on it, PyTorch on the same card beside it: tables, and JSON of every sample.

Invariant: every part is a process of its own and what it has measured is written down at once, so that a cut leaves results; the
step is training.step's, as the program runs it.

    python -m tools.bench.bench_gpu [--parts=ceilings,attention,...] [--minutes=9] [--output=DIR] [--quick]

--quick shrinks every shape and runs anywhere, a CPU too: its figures mean nothing. A part of one's own is written as
--parts=train:1b,8x4096,remat=full,scan=False (model, rows x row length, then keys of c.model, of c.train as train.x, of
c.optimizer as optimizer.x, documents=N, and variables of the environment as env.X), or tiles:4x4096,64,16 (rows x row length,
head size, documents: the tiles of model.flash that may be the fastest).
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from tools.bench import bench_gpu_attention, bench_gpu_train, bench_samples
from tools.bench.bench_samples import ROOT

_PARTS = flags.DEFINE_list("parts", [], "Of those that the docs name, or train:...; separated by ';' where one has commas.")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "No part is begun after this.")
_OUTPUT = flags.DEFINE_string("output", "runs/bench_gpu", "Directory for results.json and the parts' logs.")
_QUICK = flags.DEFINE_bool("quick", False, "Tiny shapes, on any device.")
_PART = flags.DEFINE_string("part", "", "Run one part in this process and print its JSON: what the tool calls itself with.")

# In the order in which they are wanted most.
DEFAULT = (
  "ceilings",
  "train:1b,16x4096,scan=False",
  "train:1b,1x32768,scan=False",
  "train:8b,2x4096,remat=dots,scan=False,optimizer.mu_dtype=bfloat16",
  "torch:1b,8x4096",
  "attention",
  "train:1b,8x4096,scan=False,documents=16",
  "train:1b,8x4096,scan=False",
  "loop:1b,8x4096,scan=False",
  "correctness",
  "tiles:4x4096,64,16",
  "tiles:4x4096,128,1",
)
MEASURE: dict[str, Callable[..., dict[str, Any]]] = {
  "ceilings": bench_gpu_attention.measure_ceilings,
  "attention": bench_gpu_attention.measure_attention,
  "tiles": bench_gpu_attention.measure_tiles,
  "train": bench_gpu_train.measure_train,
  "torch": bench_gpu_train.measure_torch,
  "loop": bench_gpu_train.measure_loop,
  "correctness": bench_gpu_train.measure_correctness,
}


def run_part(part: str, *, quick: bool) -> dict[str, Any]:
  """What a part has measured, in this process."""
  from cpt_jax.devices import environment

  name, _, text = part.partition(":")
  for change in text.split(","):
    if change.startswith("env."):
      variable, _, value = change.removeprefix("env.").partition("=")
      os.environ[variable] = value
  environment.prepare(os.environ)  # as the program does
  return MEASURE[name](*([text] if text else []), quick=quick)


def cells(part: str, result: dict[str, Any]) -> list[list[str]]:
  """Rows of the table: part, figure, and what there is to say of it."""
  if "failed" in result:
    return [[part, "failed", result["failed"][-200:]]]
  if "tokens_per_sec" in result:
    mfu = f"MFU {result['mfu_palm']:.1%} full square, {result['mfu_causal']:.1%} causal half"
    peak = f", peak {result['peak_bytes'] / 1e9:.1f} GB" if result.get("peak_bytes") else ""
    first, last = result["first_loss"], result["last_loss"]
    return [[part, f"{result['tokens_per_sec']:,.0f} tokens/s", f"{mfu}{peak}, loss {first:.2f} to {last:.2f}"]]
  if "shapes" in result:
    return [row for shape in result["shapes"] for row in _attention_cells(shape)]
  if "tiles" in result:
    rows = []
    for name, found in result["tiles"].items():
      rows.append([part, name, ", ".join(f"{way} {x if way == 'failed' else f'{x * 1e3:.2f} ms'}" for way, x in found.items())])
    return rows
  if "product_flops" in result:
    copy = f"copy {result['copy_bytes_per_sec'] / 1e12:.2f} TB/s read and written"
    return [[part, f"{result['product_flops'] / 1e12:.0f} TFLOP/s", f"bfloat16 product of {result['size']}^3; {copy}"]]
  return [[part, "", json.dumps(result)]]


def _attention_cells(shape: dict[str, Any]) -> list[list[str]]:
  rows = []
  where = f"{shape['rows']} x {shape['row_len']}, head {shape['head_dim']}, {shape['documents']} documents"
  for name, entry in shape["kinds"].items():
    if "failed" in entry:
      rows.append([where, name, entry["failed"][:150]])
      continue
    forward, both = entry["forward_secs"], entry["both_secs"]
    rate = shape["causal_flops"] * 3.5 / both / 1e12  # the backward pass has 5 products where the forward pass has 2
    errors = ", errors " + " ".join(f"{e:.0e}" for e in entry["errors"]) if "errors" in entry else ""
    rows.append([where, name, f"forward {forward * 1e3:.2f} ms, both {both * 1e3:.2f} ms, {rate:.0f} causal TFLOP/s{errors}"])
  return rows


def main(argv: list[str]) -> int:
  """Runs the parts, each in a process of its own."""
  del argv
  if _PART.value:
    print(json.dumps(run_part(_PART.value, quick=_QUICK.value)))
    return 0
  from cpt_jax.training import console

  asked = ",".join(_PARTS.value)
  parts = (asked.split(";") if ";" in asked or ":" in asked else _PARTS.value) or list(DEFAULT)
  unknown = [part for part in parts if part.partition(":")[0] not in MEASURE]
  if unknown:
    print(f"--parts={', '.join(unknown)}: there are {', '.join(MEASURE)}", file=sys.stderr)
    return 78
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  begin = time.perf_counter()
  results: dict[str, Any] = {"machine": machine(), "quick": _QUICK.value, "parts": {}}
  for number, part in enumerate(parts):
    if time.perf_counter() - begin > 60 * _MINUTES.value:
      results["parts"][part] = {"failed": f"not begun: {_MINUTES.value:g} minutes are over"}
      continue
    results["parts"][part] = in_process(part, output / f"{number:02}.log")
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in cells(part, results["parts"][part]):
      print("  ".join(row), flush=True)
  rows = [row for part, result in results["parts"].items() for row in cells(part, result)]
  console.table(results["machine"].get("gpu", "no GPU"), ["part", "figure", ""], rows, left=3)
  return 0


def in_process(part: str, log: pathlib.Path) -> dict[str, Any]:
  """A part's result, or how it failed; what it printed is in `log`."""
  command = bench_samples.command("bench_gpu", f"--part={part}", *(["--quick"] if _QUICK.value else []))
  environment = {**os.environ}
  environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  begin = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
  log.write_text(done.stdout + done.stderr, encoding="utf-8")
  if done.returncode:
    words = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": " | ".join(words[-3:])[-800:], "secs": time.perf_counter() - begin}
  return {**json.loads(done.stdout.splitlines()[-1]), "secs": time.perf_counter() - begin}


def machine() -> dict[str, Any]:
  """What this was measured on and with."""
  found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
  for name in ("jax", "jaxlib", "flax", "optax", "torch", "triton"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  with contextlib.suppress(OSError):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
  return found


if __name__ == "__main__":
  app.run(main)
