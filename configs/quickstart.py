"""Continue the shipped 2.4M base on Song poetry while replaying English: the main job, offline, in minutes on two cores.

Run:   python -m cpt_jax.main --config=configs/quickstart.py
Or:    the same with --config.data.sources.general.share=0.0 --workdir=runs/no_replay, to see what replay is for.
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
  c.data.sources.poetry = config_lib.source(
    store="store/quickstart/poetry", text="examples/corpora/poetry_ci.jsonl.gz", role="domain", share=0.75
  )
  c.train.length = "120 steps"
  c.train.batch_rows = 16
  c.schedule.lr_peak = 1e-3
  c.schedule.lr_final = 1e-4
  c.schedule.warmup = "5%"
  c.eval.every = "25%"
  c.eval.tokens = 20_000
  c.checkpoint.every = "25%"
  return c
