"""Llama-3.1-70B's shape on 32 hosts of eight H100.

Compile, without a chip:  cpt compile --config=configs/recipes/llama3_70b_256xh100.py --topology=h100:32x8
It ends with:             verdict       fits: 34.23 of 71.20 GiB a chip (52% free); bound by
                          compute; at most 76.3% MFU causal (79.2% palm), 1,743 tokens/s a chip

One row a GPU, of the mlp alone the products are computed again: 1,048,576 tokens a step in one part. The state is divided over
all hosts, since no host's eight GPUs hold it; every layer's gather crosses the network, all ports at once.

A run needs a base and texts besides: see docs/guide/compile.md, "From a recipe to a run".
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "configs/architectures/llama3_70b.json"
  c.model.remat = "attention_dots"
  c.data.row_len = 4096
  c.train.batch_rows = 256
  c.train.microbatches = 1
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
