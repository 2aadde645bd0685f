"""Llama-3.1-70B's shape on 512 chips of TPU v5p, 8 x 8 x 8 ("v5p-1024" to Google's cloud, which counts cores).

Compile, without a chip:  cpt compile --config=configs/recipes/llama3_70b_v5p_512.py --topology=v5p:8x8x8
It ends with:             verdict       fits: 81.84 of 95.74 GiB a chip (15% free); bound by
                          compute; at most 68.8% MFU causal (71.4% palm), 729 tokens/s a chip

One row a chip, of which only norms, rotations and gates are computed again: 2,097,152 tokens a step in one
part. The state is divided over a plane of 8 x 8 chips, 8 planes have a copy each: see llama3_8b_v5p_64.

A run needs a base and texts besides: see docs/guide/compile.md, "From a recipe to a run".
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "configs/architectures/llama3_70b.json"
  c.model.remat = "dots"
  c.data.row_len = 4096
  c.train.batch_rows = 512
  c.train.microbatches = 1
  c.mesh.data = 8
  c.mesh.fsdp = -1
  return c
