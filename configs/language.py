"""Take a base to another language: its share rises little by little from what the base saw, general text is replayed.

Run:   python tools/prepare_data.py --input 'texts/en/*.jsonl.gz' --tokenizer path/to/base --output store/en
       python tools/prepare_data.py --input 'texts/zh/*.jsonl.gz' --tokenizer path/to/base --output store/zh
       python -m cpt_jax.main --config=configs/language.py --config.start.hf=path/to/base --workdir=runs/zh --dry_run
       and the same without --dry_run

Practice that it starts from: re-warm to about the base's own peak over 1% of the tokens, cosine to a tenth of it, 25% replay
for a new language (Ibrahim et al. 2403.08763); the share rises from about 5%, since a jump can make the loss collapse. Set
schedule.lr_peak to between 1/10 and 1 of the base's peak rate: higher learns and forgets faster.
"""

from cpt_jax import config


def get_config():
  c = config.default()
  c.data.row_len = 2048
  c.data.sources.general = config.source(store="store/en", role="replay", share=[(0, 0.95), ("20%", 0.25)])
  c.data.sources.language = config.source(store="store/zh", role="domain", share=[(0, 0.05), ("20%", 0.75)])
  c.train.length = "2B tokens"
  c.train.batch_rows = 512
  c.train.microbatches = 16
  c.schedule.lr_peak = 1e-4
  c.schedule.lr_final = 1e-5
  c.schedule.warmup = "1%"
  c.model.remat = "dots"
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.eval.every = "5%"
  c.eval.tokens = 500_000
  c.checkpoint.every = "2%"
  c.checkpoint.keep_every = "25%"
  return c
