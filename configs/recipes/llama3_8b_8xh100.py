"""Llama-3.1-8B's shape on one host of eight H100.

Compile, without a chip:  python tools/aot_compile.py --config=configs/recipes/llama3_8b_8xh100.py --topology=h100:1x8
It ends with:             verdict       fits: TODO

WHY

A run needs a base and texts besides: see docs/scaling.md, "From a recipe to a run".
"""

from cpt_jax import config


def get_config():
  c = config.default()
  c.model.scratch = "configs/architectures/llama3_8b.json"
  c.model.remat = "dots"
  c.data.row_len = 4096
  c.train.batch_rows = 128
  c.train.microbatches = 16
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
