"""Llama-3.1-8B's shape on 16 chips of TPU v5e, a slice of 4 x 4.

Compile, without a chip:  cpt compile --config=configs/recipes/llama3_8b_v5e_16.py --topology=v5e:4x4
It ends with:             verdict       fits: 14.08 of 15.75 GiB a chip (11% free); bound by
                          compute; at most 64.8% MFU causal (69.2% palm), 2,648 tokens/s a chip

A chip of 16 GB holds its part of the state and of the base's copy and little else: one row a chip, each layer again, small chunks
of the loss and no accumulation, so 65,536 tokens a step.

A run needs a base and texts besides: see docs/guide/compile.md, "From a recipe to a run".
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "configs/architectures/llama3_8b.json"
  c.model.remat = "full"
  c.model.loss_chunk = 1024
  c.data.row_len = 4096
  c.train.batch_rows = 16
  c.train.microbatches = 1
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
