"""One update of R stacked trials against R updates one after the other -> the speed-up of training trials at once.

Invariant: the same update (training.step's), batches and device on both sides, timed in turn, compiled before; medians of ratios.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from cpt_jax import config as config_lib
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import from_hf, load_hf_config, num_parameters
from cpt_jax.stream import packing
from cpt_jax.training import console, optimizer, state, step

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run whose update is timed: its model, rows and row length.")
_STACKS = flags.DEFINE_list("stacks", ["2", "4", "8"], "Trials in a stack.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Pairs that are timed for each size.")


def main(_: list[str]) -> None:
  """Prints the table."""
  config = config_lib.resolve(_CONFIG.value)
  spec = from_hf(load_hf_config(config.start.hf or config.model.scratch))
  mesh = mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])
  jax.set_mesh(mesh)
  tx = optimizer.from_config(config, spec)
  update = step.from_config(config, spec, source_weights=[1.0])
  one, many = jax.jit(update), jax.jit(jax.vmap(update))
  empty = packing.empty_batch(config.train.batch_rows, config.data.row_len)
  rng = np.random.default_rng(0)
  ids = rng.integers(0, spec.vocab_size, (2, *empty.tokens_BT.shape), np.int32)
  positions = np.tile(np.arange(config.data.row_len, dtype=np.int32), (config.train.batch_rows, 1))
  batch = empty._replace(
    tokens_BT=ids[0], targets_BT=ids[1], weights_BT=np.ones_like(empty.weights_BT), segments_BT=positions * 0 + 1
  )
  batch = mesh_lib.to_global(mesh, batch._replace(positions_BT=positions))
  single = state.create(transformer.init(spec, jax.random.key(0)), tx)
  rows = []
  for R in map(int, _STACKS.value):
    stacked_state, stacked_batch = (jax.tree.map(lambda x, R=R: jnp.stack([x] * R), tree) for tree in (single, batch))
    rates_R = np.full(R, 1e-4, np.float32)
    jax.block_until_ready((one(single, batch, rates_R[0]), many(stacked_state, stacked_batch, rates_R)))  # compiles
    pairs = []
    for _ in range(_REPEATS.value):
      start_secs = time.perf_counter()
      for rate in rates_R:
        jax.block_until_ready(one(single, batch, rate))
      middle_secs = time.perf_counter()
      jax.block_until_ready(many(stacked_state, stacked_batch, rates_R))
      pairs.append((middle_secs - start_secs, time.perf_counter() - middle_secs))
    ratios = sorted(alone / together for alone, together in pairs)
    alone, together = (statistics.median(side) for side in zip(*pairs, strict=True))
    rows.append([R, f"{alone * 1e3:.1f}", f"{together * 1e3:.1f}", f"{statistics.median(ratios):.2f}"])
    rows[-1].append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
  rows_len = f"{config.train.batch_rows} rows of {config.data.row_len}"
  console.table(
    f"{num_parameters(spec):,} parameters, {rows_len}, on {jax.devices()[0].device_kind}",
    ["trials", "one by one, ms", "at once, ms", "speed-up, median", "range"],
    rows,
  )


if __name__ == "__main__":
  app.run(main)
