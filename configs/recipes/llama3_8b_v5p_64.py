"""Llama-3.1-8B's shape on 64 chips of TPU v5p, a cube of 4 x 4 x 4 ("v5p-128" to Google's cloud, which counts cores).

Compile, without a chip:  cpt compile --config=configs/recipes/llama3_8b_v5p_64.py --topology=v5p:4x4x4
It ends with:             verdict       fits: 35.50 of 95.74 GiB a chip (63% free); bound by
                          compute; at most 77.0% MFU causal (82.1% palm), 7,321 tokens/s a chip

Two rows a chip, of which only norms, rotations and gates are computed again: 524,288 tokens a step in one part.
The state is divided over a plane of 4 x 4 chips, 4 planes have a copy each: over all 64 chips (mesh.fsdp=64) libtpu 0.0.42 makes
an all-reduce of every gather, with twice the bytes.

A run needs a base and texts besides: see docs/guide/compile.md, "From a recipe to a run".
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "configs/architectures/llama3_8b.json"
  c.model.remat = "dots"
  c.data.row_len = 4096
  c.train.batch_rows = 128
  c.train.microbatches = 1
  c.mesh.data = 4
  c.mesh.fsdp = -1
  return c
