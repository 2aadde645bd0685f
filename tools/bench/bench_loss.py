"""A vocabulary -> memory, time and error of the chunked cross-entropy with its gradients, beside the plain one's.

Invariant: both get the same hidden states, head and targets, in fresh processes on the cores that they are told.
"""

import functools
import json
import statistics
import sys
from typing import Any

from tools.bench import bench_samples, bench_step
from tools.bench.bench_samples import Section

OURS, PLAIN = "cpt_jax, chunks", "optax, whole logits"
_MAX_MEMORY, _MAX_TIME, _MAX_ERROR = 1 / 4, 1.1, 1e-6  # bars: memory and time of the plain one's, error of the gradient itself


def measure_loss(bench: Any) -> Section:
  """Peak temporary memory, time and gradient error at two sizes of vocabulary."""
  shapes = ((256, 256, 16),) if bench.quick else ((32_000, 2048, 256), (128_256, 2048, 256))  # vocabulary, positions, width
  num_timed, rounds = (2, 1) if bench.quick else (3, 2)
  result: dict[str, Any] = {"cores": bench.cores, "timed": num_timed, "rounds": rounds, "shapes": []}
  table = []
  for shape in shapes:
    run = functools.partial(_run, shape, cores=bench.cores, seed=bench.seed)
    samples: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: []}
    for side in bench_samples.in_turns([OURS, PLAIN], rounds=rounds):
      samples[side].append(run(side, num_timed))
    errors = run("errors", 0)
    clocks = ("wall_secs", "cpu_secs")
    stats = {
      side: {clock: bench_samples.stats([t for turn in turns for t in turn[clock]]) for clock in clocks}
      for side, turns in samples.items()
    }
    ratios = {
      clock: [statistics.median(a[clock]) / statistics.median(b[clock]) for a, b in zip(*samples.values(), strict=True)]
      for clock in clocks
    }
    temp_bytes = {side: turns[0]["temp_bytes"] for side, turns in samples.items()}
    memory_ratio = temp_bytes[OURS] / temp_bytes[PLAIN]
    # The bar of memory is for large vocabularies: the head's own gradient is in both.
    held = (shape[0] < 100_000 or memory_ratio <= _MAX_MEMORY) and errors[OURS] <= _MAX_ERROR
    held = held and statistics.median(ratios["cpu_secs"]) <= _MAX_TIME
    for side in samples:
      wall, cpu = stats[side]["wall_secs"], stats[side]["cpu_secs"]
      cells = [f"{shape[0]:,}", side, f"{temp_bytes[side] / 1e6:,.0f}"]
      cells += [f"{wall['median'] * 1e3:,.0f}", f"{cpu['median'] * 1e3:,.0f}", f"{cpu['mad'] * 1e3:,.0f}", f"{errors[side]:.1e}"]
      ours = [f"{memory_ratio:.2f}", *bench_samples.ratio_cells(ratios), "yes" if held else "NO"]
      table.append([*cells, *(ours if side == OURS else [""] * 4)])
    names = ("vocabulary", "positions", "width")
    result["shapes"].append(
      {
        **dict(zip(names, shape, strict=True)),
        "chunk": samples[OURS][0]["chunk"],
        "temp_bytes": temp_bytes,
        "memory_ratio": memory_ratio,
        "secs": stats,
        "ratios": ratios,
        "errors": errors,
        "samples": samples,
      }
    )
  return result, table


def _run(shape: tuple[int, ...], side: str, num_timed: int, *, cores: list[int], seed: int) -> dict[str, Any]:
  command = bench_samples.command("bench_loss", side, *shape, num_timed, seed, ",".join(map(str, cores)))
  return json.loads(bench_samples.call(command, env=bench_samples.environment(cores)).splitlines()[-1])


def _given(vocab_size: int, positions: int, width: int, *, seed: int) -> tuple[Any, Any, Any]:
  """Head [V, D], hidden states [1, T, D] and a batch, of the size that a trained model's have: logits of a few nats."""
  import numpy as np

  from cpt_jax.stream.batch import Batch

  random = np.random.default_rng(seed)
  embedding_VD = random.standard_normal((vocab_size, width), np.float32) * np.float32(2 / width**0.5)
  hidden_BTD = random.standard_normal((1, positions, width), np.float32)
  integers = np.zeros((1, positions), np.int32)
  targets_BT = random.integers(vocab_size, size=(1, positions)).astype(np.int32)
  weights_BT = np.ones((1, positions), np.float32)
  return embedding_VD, hidden_BTD, Batch(integers, targets_BT, weights_BT, integers, integers, integers[0, :1])


def _gradient(side: str, vocab_size: int, width: int) -> tuple[Any, int]:
  """The jitted gradient of the summed loss with respect to head and hidden states, and the chunk of it."""
  import jax
  import jax.numpy as jnp
  import optax

  from cpt_jax import config as config_lib
  from cpt_jax.model import loss
  from cpt_jax.model.spec import ModelSpec
  from cpt_jax.training import step

  chunk = step.settings_from_config(config_lib.default()).loss_chunk if side == OURS else 0
  spec = ModelSpec("llama", vocab_size, width, 1, 1, 1, 64, 64, max_positions=1, tied=True)

  def chunked(embedding_VD, hidden_BTD, batch):
    params = {"embedding": embedding_VD}
    return loss.objective(params, spec, hidden_BTD, batch, source_weights=(1.0,), z_loss=0.0, chunk=chunk)[0]

  def plain(embedding_VD, hidden_BTD, batch):
    logits_NV = hidden_BTD[0] @ embedding_VD.T
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits_NV, batch.targets_BT[0]))

  return jax.jit(jax.grad(chunked if side == OURS else plain, argnums=(0, 1))), chunk


def _time(side: str, shape: tuple[int, ...], num_timed: int, seed: int) -> dict[str, Any]:
  import jax

  given = jax.device_put(_given(*shape, seed=seed))
  gradient, chunk = _gradient(side, shape[0], shape[2])
  compiled = gradient.lower(*given).compile()
  jax.block_until_ready(compiled(*given))  # warm
  clock = bench_step.Clock()
  clock.tick()
  for _ in range(num_timed):
    jax.block_until_ready(compiled(*given))
    clock.tick()
  return {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "chunk": chunk, **clock.seconds(skip=0)}


def _errors(shape: tuple[int, ...], seed: int) -> dict[str, float]:
  """Of each side's gradients: the larger one of the two arrays' |found - float64's| / |float64's|, over two chunks' positions."""
  import numpy as np

  vocab_size, positions, width = shape[0], min(shape[1], 512), shape[2]
  embedding_VD, hidden_BTD, batch = _given(vocab_size, positions, width, seed=seed)
  wide_VD, wide_ND = embedding_VD.astype(np.float64), hidden_BTD[0].astype(np.float64)
  d_logits_NV = wide_ND @ wide_VD.T
  d_logits_NV -= d_logits_NV.max(axis=1, keepdims=True)
  np.exp(d_logits_NV, out=d_logits_NV)
  d_logits_NV /= d_logits_NV.sum(axis=1, keepdims=True)
  d_logits_NV[np.arange(positions), batch.targets_BT[0]] -= 1
  expected = d_logits_NV.T @ wide_ND, (d_logits_NV @ wide_VD)[None]
  size, errors = np.linalg.norm, {}
  for side in (OURS, PLAIN):
    gradient, _ = _gradient(side, vocab_size, width)
    found = gradient(embedding_VD, hidden_BTD, batch)
    errors[side] = float(max(size(a - b) / size(b) for a, b in zip(found, expected, strict=True)))
  return errors


if __name__ == "__main__":
  bench_samples.take_cores(sys.argv[7])
  side, numbers = sys.argv[1], list(map(int, sys.argv[2:7]))
  shape, num_timed, seed = tuple(numbers[:3]), *numbers[3:]
  print(json.dumps(_errors(shape, seed) if side == "errors" else _time(side, shape, num_timed, seed)))
