"""Llama-3.1-8B's shape on one host of eight H100.

Compile, without a chip:  cpt compile --config=configs/recipes/llama3_8b_8xh100.py --topology=h100:1x8
It ends with:             verdict       fits: 48.77 of 71.20 GiB a chip (32% free); bound by
                          compute; at most 74.1% MFU causal (79.0% palm), 15,179 tokens/s a chip

One row a GPU and part, 16 parts: 524,288 tokens a step. With two rows XLA finds memory short and computes layers again by itself
(1.18 times the model's FLOPs instead of 1.03, which costs more than the gathers of 16 parts instead of 8).

A run needs a base and texts besides: see docs/guide/compile.md, "From a recipe to a run".
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "configs/architectures/llama3_8b.json"
  c.model.remat = "dots"
  c.data.row_len = 4096
  c.train.batch_rows = 128
  c.train.microbatches = 16
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
