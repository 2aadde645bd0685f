"""A model's shape -> seconds of a training step on one GPU, of the loop around it, of PyTorch's, and whether runs resume exactly.

Invariant: the step is training.step's, as the program runs it, on batches that lie on the device.
"""

import functools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from tools.bench import bench_step
from tools.bench.bench_gpu_attention import packed_segments
from tools.bench.bench_samples import ROOT

MODELS = {
  # The shapes of Llama-3.2-1B and Llama-3.1-8B.
  "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)
  | dict(head_dim=64, tie_word_embeddings=True),
  "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
  | dict(head_dim=128, tie_word_embeddings=False),
}
_COMMON = dict(model_type="llama", vocab_size=128_256, max_position_embeddings=131_072, rope_theta=500_000.0, rms_norm_eps=1e-5)
_TINY = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
_TINY |= dict(head_dim=32, vocab_size=1_000)
WARM_STEPS, BLOCKS, BLOCK_STEPS = 3, 5, 4


def hf_config(model: str, *, quick: bool) -> dict[str, Any]:
  """A config.json of the model's shape."""
  return {**_COMMON, **MODELS[model], **(_TINY if quick else {})}


class Training(bench_step.Training):
  """As written in a part's name: model, rows x row length, keys; with random weights and batches of random tokens."""

  def __init__(self, text: str, *, quick: bool):
    import jax
    import numpy as np

    from cpt_jax.model import spec as spec_lib, transformer

    model, shape, *changes = text.split(",")
    rows, row_len = (int(x) for x in shape.split("x"))
    rows, row_len = (2, 256) if quick else (rows, row_len)
    keys = dict(change.split("=", 1) for change in changes if not change.startswith("env."))
    documents = int(keys.pop("documents", 1))
    config, spec = _config(rows=rows, row_len=row_len, keys=keys, quick=quick), spec_lib.from_hf(hf_config(model, quick=quick))
    make_params = functools.partial(transformer.init, spec, jax.random.key(0))
    super().__init__(config, spec, make_params, lambda step: 1e-4, source_weights=(1.0,), max_documents=documents)
    random = np.random.default_rng(0)
    self.batches = [_batch(random, spec.vocab_size, rows, row_len, documents) for _ in range(2)]
    self.num_positions = rows * row_len


def _config(*, rows: int, row_len: int, keys: dict[str, str], quick: bool) -> Any:
  import ast

  from cpt_jax import config as config_lib

  c = config_lib.default()
  c.data.row_len, c.train.batch_rows = row_len, rows
  c.model.compute_dtype = "float32" if quick else "bfloat16"
  for key, value in keys.items():
    section, name = key.split(".") if "." in key else ("model", key)
    c[section][name] = value if isinstance(c[section][name], str) else ast.literal_eval(value)
  return c


def _batch(random: Any, vocab_size: int, rows: int, row_len: int, documents: int) -> Any:
  import numpy as np

  from cpt_jax.stream.batch import Batch

  tokens_BT = random.integers(vocab_size, size=(rows, row_len)).astype(np.int32)
  segments_BT = packed_segments(rows, row_len, documents)
  begins_BT = np.diff(segments_BT, axis=1, prepend=0) > 0
  ramp_BT = np.broadcast_to(np.arange(row_len, dtype=np.int32), (rows, row_len))
  positions_BT = ramp_BT - np.maximum.accumulate(np.where(begins_BT, ramp_BT, 0), axis=1)
  weights_BT = np.ones((rows, row_len), np.float32)
  return Batch(tokens_BT, np.roll(tokens_BT, -1, axis=1), weights_BT, segments_BT, positions_BT, np.zeros(rows, np.int32))


def measure_train(text: str, *, quick: bool) -> dict[str, Any]:
  """Seconds of the train step on batches that lie on the device."""
  import jax

  from cpt_jax.model import spec as spec_lib

  begin = time.perf_counter()
  training = Training(text, quick=quick)
  batches = [training.to_device(batch) for batch in training.batches]
  first = jax.block_until_ready(training.step(batches[0]))
  start_secs = time.perf_counter() - begin
  for index in range(WARM_STEPS - 1):
    measured = training.step(batches[index % 2])
  jax.block_until_ready(measured)
  samples = []
  for _ in range(1 if quick else BLOCKS):
    begin = time.perf_counter()
    for index in range(BLOCK_STEPS):
      measured = training.step(batches[index % 2])
    jax.block_until_ready((measured, training.state))
    samples.append((time.perf_counter() - begin) / BLOCK_STEPS)
  causal, palm = spec_lib.flops_per_token(training.spec, training.config.data.row_len, frozen=())
  return {
    **_speed(samples, training.num_positions, causal, palm),
    "start_secs": start_secs,
    "first_loss": float(first.sums.loss / first.sums.tokens),
    "last_loss": float(measured.sums.loss / measured.sums.tokens),
    "peak_bytes": _peak_bytes(),
  }


def _speed(samples: list[float], num_positions: int, causal: float, palm: float) -> dict[str, Any]:
  import jax

  from cpt_jax.training import metrics

  peak = metrics.peak_flops(jax.devices()[0].device_kind) or math.nan
  rate = num_positions / statistics.median(samples)
  return {"step_secs": samples, "tokens_per_sec": rate, "mfu_palm": palm * rate / peak, "mfu_causal": causal * rate / peak}


def _peak_bytes() -> int | None:
  import jax

  stats = jax.local_devices()[0].memory_stats()
  return stats and stats.get("peak_bytes_in_use")


def measure_loop(text: str, *, quick: bool) -> dict[str, Any]:
  """The loop's seconds a step less the bare step's, in blocks that take turns."""
  import jax

  training = Training(text, quick=quick)
  placed = [training.to_device(batch) for batch in training.batches]
  pairs, block = (2, 3) if quick else (5, 4)

  def endless() -> Iterator[Any]:
    while True:
      yield from training.batches

  with tempfile.TemporaryDirectory() as directory:
    loop = bench_step.Loop(training, endless(), pathlib.Path(directory), names=("text",), num_steps=(pairs + 1) * block)
    loop.run(block)
    bare, whole = [], []
    for pair in range(pairs):
      for is_loop in (False, True) if pair % 2 == 0 else (True, False):
        begin = time.perf_counter()
        if is_loop:
          loop.run(block)
        else:
          for index in range(block):
            measured = training.step(placed[index % 2])
          jax.block_until_ready((measured, training.state))
        (whole if is_loop else bare).append((time.perf_counter() - begin) / block)
    loop.close()
  overheads = [w - b for w, b in zip(whole, bare, strict=True)]
  return {"bare_secs": bare, "loop_secs": whole, "overhead_secs": statistics.median(overheads)}


def measure_torch(text: str, *, quick: bool) -> dict[str, Any]:
  """The same mathematics in PyTorch."""
  from cpt_jax.model import spec as spec_lib
  from tools.bench import bench_torch

  model, shape = text.split(",")
  rows, row_len = (2, 256) if quick else (int(x) for x in shape.split("x"))
  hf = hf_config(model, quick=quick)
  samples, losses, peak_bytes = bench_torch.train(
    hf, rows=rows, row_len=row_len, warm_steps=WARM_STEPS, blocks=1 if quick else BLOCKS, block_steps=BLOCK_STEPS, quick=quick
  )
  causal, palm = spec_lib.flops_per_token(spec_lib.from_hf(hf), row_len, frozen=())
  found = _speed(samples, rows * row_len, causal, palm)
  return {**found, "first_loss": losses[0], "last_loss": losses[-1], "peak_bytes": peak_bytes}


def measure_correctness(*, quick: bool) -> dict[str, Any]:
  """Is a run that was stopped and went on the same to the bit as one that was not, with deterministic kernels."""
  flags_of_xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
  environment = {**os.environ, "XLA_FLAGS": flags_of_xla}
  config = ["--config=configs/quickstart.py", "--config.train.length=12 steps", "--config.eval.tokens=2000"]
  config += ["--config.checkpoint.every=6 steps", "--config.train.batch_rows=4"]
  with tempfile.TemporaryDirectory() as scratch:
    for run, stops in (("whole", ((),)), ("stopped", (("--config.debug.stop_after=6",), ()))):
      for stop in stops:
        command = [sys.executable, "-m", "cpt_jax.main", *config, f"--workdir={scratch}/{run}", *stop]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        if done.returncode:
          raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    files = [sorted(pathlib.Path(scratch, run).rglob("*.safetensors")) for run in ("whole", "stopped")]
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True)]
  return {"files": len(same), "is_resumed_to_the_bit": bool(same) and all(same)}
