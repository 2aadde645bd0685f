"""One GPU -> how near to its ceilings cpt_jax trains on it, PyTorch on the same card beside it: tables, and JSON of every sample.

Invariant: every part is a process of its own and what it has measured is written down at once, so that a cut leaves results; the
step is training.step's, as the program runs it.

    python tools/bench/bench_gpu.py [--parts=ceilings,attention,...] [--minutes=9] [--output=DIR] [--quick]

--quick shrinks every shape and runs anywhere, a CPU too: its figures mean nothing. A part of one's own is written as
--parts=train:1b,8x4096,remat=full,scan=False (model, rows x row length, then keys of c.model, of c.train as train.x, of
c.optimizer as optimizer.x, documents=N, and variables of the environment as env.X), or tiles:4x4096,64,16 (rows x row length,
head size, documents: the tiles of model.flash that may be the fastest).
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

_ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(_ROOT))  # a clone that is not installed

_PARTS = flags.DEFINE_list("parts", [], "Of those that the docs name, or train:...; separated by ';' where one has commas.")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "No part is begun after this.")
_OUTPUT = flags.DEFINE_string("output", "runs/bench_gpu", "Directory for results.json and the parts' logs.")
_QUICK = flags.DEFINE_bool("quick", False, "Tiny shapes, on any device.")
_PART = flags.DEFINE_string("part", "", "Run one part in this process and print its JSON: what the tool calls itself with.")

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
WARM_STEPS, BLOCKS, BLOCK_STEPS = 3, 5, 4


def hf_config(model: str, *, quick: bool) -> dict[str, Any]:
  """A config.json of the model's shape."""
  return {**_COMMON, **MODELS[model], **(_TINY if quick else {})}


def measure_ceilings(*, quick: bool) -> dict[str, Any]:
  """Bytes a second of a device copy, and FLOP/s of a large bfloat16 product of random numbers."""
  import jax
  import jax.numpy as jnp

  size, words = (256, 1 << 16) if quick else (8192, 1 << 30)
  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
  x = jax.random.normal(jax.random.key(2), (words,), jnp.bfloat16)
  product, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: -x)
  product_secs, copy_secs = _secs(lambda: product(a, b), number=20), _secs(lambda: copy(x), number=20)
  return {"product_flops": 2 * size**3 / product_secs, "copy_bytes_per_sec": 2 * x.nbytes / copy_secs, "size": size}


def _secs(run: Callable[[], Any], *, number: int, repeats: int = 5) -> float:
  """Median over repeats of the mean time of `number` calls that are dispatched one behind the other."""
  import jax

  jax.block_until_ready(run())
  samples = []
  for _ in range(repeats):
    begin = time.perf_counter()
    for _ in range(number):
      out = run()
    jax.block_until_ready(out)
    samples.append((time.perf_counter() - begin) / number)
  return statistics.median(samples)


def packed_segments(rows: int, row_len: int, documents: int) -> Any:
  """Rows of so many documents of different lengths, cut at random places; int32 [B, T]."""
  import numpy as np

  random = np.random.default_rng(0)
  segments_BT = np.ones((rows, row_len), np.int32)
  for b in range(rows):
    for cut in random.choice(np.arange(1, row_len), size=documents - 1, replace=False):
      segments_BT[b, cut:] += 1
  return segments_BT


def attention_kinds(row_len: int, head_dim: int, documents: int, platform: str) -> dict[str, Callable[..., Any]]:
  """What is compared on this shape: the implementations that can run on it."""
  from cpt_jax.model import attention, blockwise, cudnn, flash

  call = attention.Call(platform, "bfloat16", row_len, head_dim, (), documents, 0, True)
  whole = dict(start=0, window=row_len)
  kinds: dict[str, Callable[..., Any]] = {}
  if not attention.why_not("cudnn", call):
    kinds["cudnn"] = lambda q, k, v, s: cudnn.attend(q, k, v, s, window=None, max_documents=documents)
    if documents > 1:
      kinds["cudnn, 4 times the places"] = lambda q, k, v, s: cudnn.attend(q, k, v, s, window=None, max_documents=4 * documents)
  if not attention.why_not("flash", call):
    kinds["flash"] = lambda q, k, v, s: flash.flash(q, k, v, s, s, **whole)
  kinds["blockwise"] = lambda q, k, v, s: blockwise.blockwise(q, k, v, s, s, **whole)
  return kinds


def flash_tiles(head_dim: int) -> list[Any]:
  """Tiles to try: that of flash.tuning first."""
  from cpt_jax.model import flash

  tile = flash.Tiles
  if head_dim <= 64:
    others = [
      flash.Tuning(tile(64, 64, 4, 4), tile(64, 64, 4, 2), tile(64, 64, 4, 2)),
      flash.Tuning(tile(64, 64, 4, 3), tile(64, 32, 4, 3), tile(128, 64, 4, 3)),
      flash.Tuning(tile(128, 64, 4, 2), tile(128, 64, 4, 2), tile(64, 128, 4, 2)),
      flash.Tuning(tile(128, 64, 8, 2), tile(64, 64, 8, 2), tile(64, 32, 4, 3)),
    ]
  else:
    others = [
      flash.Tuning(tile(128, 128, 8, 2), tile(64, 128, 8, 3), tile(128, 128, 8, 2)),
      flash.Tuning(tile(128, 64, 8, 2), tile(32, 128, 8, 2), tile(128, 32, 8, 2)),
      flash.Tuning(tile(128, 64, 8, 3), tile(64, 64, 8, 2), tile(64, 128, 8, 2)),
      flash.Tuning(tile(128, 64, 4, 2), tile(128, 128, 8, 2), tile(128, 64, 8, 1)),
    ]
  return list(dict.fromkeys([flash.tuning(head_dim), *others]))


def measure_tiles(text: str, *, quick: bool) -> dict[str, Any]:
  """Seconds forward and backward of flash with each of `flash_tiles`."""
  import jax
  import jax.numpy as jnp

  from cpt_jax.model import flash

  shape, head_dim, documents = text.split(",")
  rows, row_len = (1, 256) if quick else (int(x) for x in shape.split("x"))
  q, k, v, weights = _random_heads(rows, row_len, int(head_dim), *((4, 2) if quick else (32, 8)))
  segments = jnp.asarray(packed_segments(rows, row_len, int(documents)))
  found = {}
  for tiles in flash_tiles(int(head_dim)):

    def kind(q, k, v, s, tiles=tiles):
      return flash.flash(q, k, v, s, s, start=0, window=row_len, tiles=tiles, interpret=quick)

    name = " ".join("x".join(map(str, tile)) for tile in tiles)
    parts = {"forward": kind, "both": functools.partial(_out_and_gradients, kind)}
    arguments = {"forward": (q, k, v, segments), "both": ([q, k, v], segments, weights)}
    try:
      found[name] = {way: _secs(functools.partial(jax.jit(parts[way]), *arguments[way]), number=5, repeats=3) for way in parts}
    except Exception as error:
      found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
  return {"tiles": found}


def _random_heads(rows: int, row_len: int, head_dim: int, heads: int, kv_heads: int) -> list[Any]:
  """Queries, keys and values in bfloat16, and weights of the output in float32."""
  import jax
  import jax.numpy as jnp

  keys, numbers = jax.random.split(jax.random.key(0), 4), (heads, kv_heads, kv_heads, heads)
  arrays = [jax.random.normal(key, (rows, row_len, n, head_dim)) for key, n in zip(keys, numbers, strict=True)]
  return [*(x.astype(jnp.bfloat16) for x in arrays[:3]), arrays[3]]


def measure_attention(*, quick: bool) -> dict[str, Any]:
  """Seconds forward and backward of each implementation at the models' shapes, and its distance from float32."""
  import jax
  import jax.numpy as jnp

  from cpt_jax.devices import mesh as mesh_lib

  shapes = [(4, 4096, 64, 1), (4, 4096, 64, 4), (4, 4096, 64, 16), (4, 4096, 128, 1), (4, 4096, 128, 4), (4, 4096, 128, 16)]
  shapes += [(1, 32768, 64, 1), (1, 32768, 64, 32)]
  shapes = [(1, 256, 32, 1), (1, 256, 32, 4)] if quick else shapes
  heads, kv_heads = (4, 2) if quick else (32, 8)
  result: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "shapes": []}
  for rows, row_len, head_dim, documents in shapes:
    q, k, v, weights = _random_heads(rows, row_len, head_dim, heads, kv_heads)
    segments = jnp.asarray(packed_segments(rows, row_len, documents))
    # One row and one key head are enough to see a wrong kernel, and the scores of long rows do not fit.
    of_one = (slice(0, 1), slice(None), slice(0, heads // kv_heads))
    part = ([q[of_one], k[:1, :, :1], v[:1, :, :1]], segments[:1], weights[of_one])
    expected = None
    if row_len <= 4096:
      plain = functools.partial(_plain, row_len=row_len)
      expected = _out_and_gradients(plain, [x.astype(jnp.float32) for x in part[0]], *part[1:])
    timed = {}
    for name, kind in attention_kinds(row_len, head_dim, documents, mesh_lib.platform()).items():
      slow = name == "blockwise" and row_len > 4096
      if slow and not quick:
        continue
      entry: dict[str, Any] = {}
      try:
        forward = jax.jit(kind)
        both = jax.jit(functools.partial(_out_and_gradients, kind))
        entry["forward_secs"] = _secs(lambda: forward(q, k, v, segments), number=5, repeats=3)  # noqa: B023 (called here)
        entry["both_secs"] = _secs(lambda: both([q, k, v], segments, weights), number=5, repeats=3)  # noqa: B023
        if expected is not None:
          pairs = zip(both(*part), expected, strict=True)
          entry["errors"] = [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]
      except Exception as error:
        entry["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
      timed[name] = entry
    flops = 4 * rows * heads * head_dim * row_len * row_len / 2  # of the causal half, forward
    result["shapes"].append(
      dict(rows=rows, row_len=row_len, head_dim=head_dim, documents=documents, causal_flops=flops, kinds=timed)
    )
  return result


def _plain(q: Any, k: Any, v: Any, segments: Any, *, row_len: int) -> Any:
  from cpt_jax.model import attention

  return attention.plain(q, k, v, segments, segments, start=0, window=row_len)


def _out_and_gradients(kind: Callable[..., Any], arrays: list[Any], segments: Any, weights: Any) -> tuple[Any, ...]:
  import jax
  import jax.numpy as jnp

  def objective(q, k, v):
    out = kind(q, k, v, segments)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), gradients = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)(*arrays)
  return out, *gradients


class Training:
  """What training.loop has built when its loop begins, with random weights and batches of random tokens."""

  def __init__(self, text: str, *, quick: bool):
    import jax
    import numpy as np

    from cpt_jax.devices import mesh as mesh_lib
    from cpt_jax.model import spec as spec_lib
    from cpt_jax.model import transformer
    from cpt_jax.training import optimizer, state, step

    model, shape, *changes = text.split(",")
    rows, row_len = (int(x) for x in shape.split("x"))
    rows, row_len = (2, 256) if quick else (rows, row_len)
    keys = dict(change.split("=", 1) for change in changes if not change.startswith("env."))
    self.documents = int(keys.pop("documents", 1))
    self.config = _config(rows=rows, row_len=row_len, keys=keys, quick=quick)
    self.spec = spec_lib.from_hf(hf_config(model, quick=quick))
    self.mesh = mesh_lib.make_mesh(**self.config.mesh)
    jax.set_mesh(self.mesh)
    tx = optimizer.from_config(self.config, self.spec)
    self.state = state.create(transformer.init(self.spec, jax.random.key(0)), tx)
    update = step.from_config(self.config, self.spec, source_weights=(1.0,), max_documents=self.documents)
    self._step = jax.jit(update, donate_argnums=0)
    random = np.random.default_rng(0)
    self.batches = [_batch(random, self.spec.vocab_size, rows, row_len, self.documents) for _ in range(2)]
    self.num_positions = rows * row_len

  def step(self, batch: Any) -> Any:
    """One update; returns its metrics."""
    self.state, measured = self._step(self.state, batch, 1e-4)
    return measured

  def to_device(self, batch: Any) -> Any:
    """As training.loop does."""
    from cpt_jax.devices import mesh as mesh_lib

    return mesh_lib.to_global(self.mesh, batch)


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
  causal, palm = spec_lib.flops_per_token(training.spec, training.config.data.row_len)
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
  return {
    "step_secs": samples,
    "tokens_per_sec": rate,
    "mfu_palm": palm * rate / peak,
    "mfu_causal": causal * rate / peak,
  }


def _peak_bytes() -> int | None:
  import jax

  stats = jax.local_devices()[0].memory_stats()
  return stats and stats.get("peak_bytes_in_use")


def measure_loop(text: str, *, quick: bool) -> dict[str, Any]:
  """The loop's seconds a step less the bare step's, in blocks that take turns."""
  import bench_step
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
  import bench_torch

  from cpt_jax.model import spec as spec_lib

  model, shape = text.split(",")
  rows, row_len = (2, 256) if quick else (int(x) for x in shape.split("x"))
  hf = hf_config(model, quick=quick)
  samples, losses, peak_bytes = bench_torch.train(
    hf, rows=rows, row_len=row_len, warm_steps=WARM_STEPS, blocks=1 if quick else BLOCKS, block_steps=BLOCK_STEPS, quick=quick
  )
  causal, palm = spec_lib.flops_per_token(spec_lib.from_hf(hf), row_len)
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
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=_ROOT, check=False)
        if done.returncode:
          raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    files = [sorted(pathlib.Path(scratch, run).rglob("*.safetensors")) for run in ("whole", "stopped")]
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True)]
  return {"files": len(same), "is_resumed_to_the_bit": bool(same) and all(same)}


MEASURE: dict[str, Callable[..., dict[str, Any]]] = {
  "ceilings": measure_ceilings,
  "attention": measure_attention,
  "tiles": measure_tiles,
  "train": measure_train,
  "torch": measure_torch,
  "loop": measure_loop,
  "correctness": measure_correctness,
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
  command = [sys.executable, __file__, f"--part={part}", *(["--quick"] if _QUICK.value else [])]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
  environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  begin = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
  log.write_text(done.stdout + done.stderr, encoding="utf-8")
  if done.returncode:
    words = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": " | ".join(words[-3:])[-800:], "secs": time.perf_counter() - begin}
  return {**json.loads(done.stdout.splitlines()[-1]), "secs": time.perf_counter() - begin}


def machine() -> dict[str, Any]:
  """What this was measured on and with."""
  import importlib.metadata

  found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
  for name in ("jax", "jaxlib", "flax", "optax", "torch", "triton"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  with contextlib.suppress(OSError):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
  return found


if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  app.run(main)
