"""Llama-3.2-1B's shape on one H100 or H200.

Compile, without a chip:  cpt compile --config=configs/recipes/llama3_1b_1xh100.py --topology=h100:1x1
It ends with:             verdict       fits: 62.91 of 71.20 GiB a chip (12% free); bound by
                          compute; at most 73.4% MFU causal (80.6% palm), 88,291 tokens/s a chip

Nothing is computed again and the layers stand one by one (model.scan=False): the fastest of docs/results/gpu.md: an H200 made
64,627 tokens/s with 8 rows. 8 parts of 8 rows make 262,144 tokens a step. An H200 (h200:1x1) has room for parts of 16.

A run needs a base and texts besides: see docs/guide/compile.md, "From a recipe to a run".
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "configs/architectures/llama3_1b.json"
  c.model.remat = "none"
  c.model.scan = False
  c.data.row_len = 4096
  c.train.batch_rows = 64
  c.train.microbatches = 8
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
