"""A plan to try: the shipped base on the texts of software licences, replaying English. It has seen no legal English.

Run:   cpt plan --config=tools/experiments/legal.py --output=plan/legal
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.start.hf = "examples/base"
  c.data.row_len = 256
  c.data.heldout_frac = 0.02
  c.data.sources.general = config_lib.source(
    store="store/quickstart/english", text="examples/corpora/english.jsonl.gz", role="replay", share=0.25
  )
  c.data.sources.legal = config_lib.source(
    store="store/legal", text="store/text/legal/licence-texts.txt", role="domain", share=0.75
  )
  c.train.length = "262_144 tokens"
  c.train.batch_rows = 8
  c.schedule.name = "wsd"
  c.schedule.lr_peak = 1e-3
  c.schedule.lr_final = 0.0
  c.schedule.warmup = "5%"
  c.schedule.anneal = "25%"
  c.eval.tokens = 8_000
  return c
