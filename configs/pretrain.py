"""Make the shipped base: 2.4M parameters from scratch on public-domain English with 5% Chinese. The same trainer, start scratch.

Run:   tools/fixtures/make_example_data.py first (see examples/README.md), then
       python -m cpt_jax.main --config=configs/pretrain.py --workdir=runs/base
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.scratch = "examples/base/config.json"
  c.data.tokenizer = "examples/base"
  c.data.row_len = 256
  c.data.heldout_frac = 0.02
  c.data.sources.english = config_lib.source(
    store="store/pretrain/english", text="store/text/english.jsonl.gz", role="replay", share=0.95
  )
  c.data.sources.chinese = config_lib.source(
    store="store/pretrain/chinese", text="store/text/chinese.jsonl.gz", role="domain", share=0.05
  )
  c.train.length = "6M tokens"
  c.train.batch_rows = 16
  c.schedule.name = "wsd"
  c.schedule.lr_peak = 3e-3
  c.schedule.lr_final = 1e-4
  c.schedule.warmup = "2%"
  c.schedule.anneal = "25%"
  c.eval.every = "20%"
  c.eval.tokens = 30_000
  c.checkpoint.every = "5%"
  return c
