"""Peak host memory of import and export, against the promise: twice the largest stacked tensor + 300 MB beside the parameters.

Invariant: each measurement is a process of its own, on the CPU, with float32 weights made here.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from typing import Any

from tools.bench import bench_samples
from tools.bench.bench_samples import Section

# 4.6 and 18.5 layers' worth of 51 MB: a model of 0.25 GB and one four times as large by its depth.
_LAYERS = (4, 19)
_SPEC = {
  "family": "llama", "vocab_size": 16_384, "width": 1024, "num_heads": 16, "num_kv_heads": 8, "head_dim": 64, "mlp_width": 2816,
  "max_positions": 2048, "tied": True,
}  # fmt: skip
_EXTRA_BYTES = 300_000_000


class Peak:
  """While open, the peak of anonymous memory less what the devices hold at that moment (on the CPU, host memory too)."""

  def __enter__(self):
    self._done, self.excess_bytes = threading.Event(), 0
    self._thread = threading.Thread(target=self._watch)
    self._start_secs = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, *error):
    self.elapsed_secs = time.monotonic() - self._start_secs
    self._done.set()
    self._thread.join()

  def _watch(self):
    import jax

    while not self._done.wait(0.002):
      # ORDER: memory first. An array that appears in between is then missing from both sums or counted as host memory.
      (anonymous_bytes,) = bench_samples.status("RssAnon")
      held_bytes = sum(array.nbytes for array in jax.live_arrays())
      self.excess_bytes = max(self.excess_bytes, anonymous_bytes - held_bytes)


def _measure(directory: str, num_layers: int) -> dict:
  """In a fresh process: import, then export, of a model in `directory`."""
  import jax

  from cpt_jax.devices import mesh as mesh_lib
  from cpt_jax.model import pretrained, transformer
  from cpt_jax.model.spec import ModelSpec

  spec = ModelSpec(num_layers=num_layers, **_SPEC)
  with jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])):
    abstract = transformer.abstract_params(spec)
    largest_bytes = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with Peak() as reading:
      params = pretrained.load_params(directory, spec, abstract)
    (after_import,) = bench_samples.status("VmHWM")
    with Peak() as writing:
      pretrained.save_params(params, spec, pathlib.Path(directory) / "out", source_dir=directory)
  (after_export,) = bench_samples.status("VmHWM")
  params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  return {
    "params_bytes": params_bytes,
    "largest_bytes": largest_bytes,
    "allowed_bytes": 2 * largest_bytes + _EXTRA_BYTES,
    "import": {"excess_bytes": reading.excess_bytes, "secs": reading.elapsed_secs, "rss_peak_bytes": after_import},
    "export": {"excess_bytes": writing.excess_bytes, "secs": writing.elapsed_secs, "rss_peak_bytes": after_export},
  }


def _make_model(directory: pathlib.Path, num_layers: int) -> None:
  """Random float32 weights, in a few shards, never whole in memory."""
  import numpy as np

  from cpt_jax.model import hf_files, pretrained
  from cpt_jax.model.spec import ModelSpec

  spec = ModelSpec(num_layers=num_layers, **_SPEC)
  (directory / "config.json").write_text(json.dumps(pretrained.to_hf(spec)))
  rng = np.random.default_rng(0)
  weight_map = {}
  dtypes = pretrained.stored_dtypes(spec, None, "float32")
  for file_name, entries in pretrained.plan_shards(spec, dtypes, max_shard_bytes=200_000_000).items():
    chunks = (rng.standard_normal(shape, np.float32) for _, shape in entries.values())
    hf_files.write_safetensors(directory / file_name, entries, chunks)
    weight_map |= dict.fromkeys(entries, file_name)
  (directory / hf_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def import_export_memory(layers: tuple[int, ...]) -> list[dict]:
  """Measures one model for each number of layers; needs about 2.5 GB of temporary disk space for the default."""
  results = []
  for num_layers in layers:
    directory = pathlib.Path(tempfile.mkdtemp(prefix="cpt_jax_bench_"))
    try:
      _make_model(directory, num_layers)
      command = bench_samples.command("bench_memory", directory, num_layers)
      done = bench_samples.call(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
      results.append({"num_layers": num_layers, **json.loads(done.splitlines()[-1])})
    finally:
      shutil.rmtree(directory)
  return results


def measure_memory(bench: Any) -> Section:
  """Peak host memory of import and export beside the parameters, for a model and one four times as deep."""
  models = import_export_memory((1,) if bench.quick else _LAYERS)
  table = []
  for m in models:
    held = max(m[way]["excess_bytes"] for way in ("import", "export")) <= m["allowed_bytes"]
    mb = [m["params_bytes"], m["largest_bytes"], m["allowed_bytes"], m["import"]["excess_bytes"], m["export"]["excess_bytes"]]
    speed = [f"{m['params_bytes'] / 1e6 / m[way]['secs']:,.0f}" for way in ("import", "export")]
    table.append([m["num_layers"], *(f"{x / 1e6:,.0f}" for x in mb), *speed, "yes" if held else "NO"])
  return {"models": models}, table


if __name__ == "__main__":
  print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
