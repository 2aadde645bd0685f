"""A GPU -> what its memory and its products reach, and the seconds and errors of each implementation of attention on it.

Invariant: times are medians over repeats of calls that are dispatched one behind the other; errors are distances from float32.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any


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
