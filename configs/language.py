"""Take a base to another language: its share rises little by little from what the base saw, general text is replayed.

Run:   cpt prepare --input 'texts/en/*.jsonl.gz' --tokenizer path/to/base --output store/en
       cpt prepare --input 'texts/zh/*.jsonl.gz' --tokenizer path/to/base --output store/zh
       python -m cpt_jax.main --config=configs/language.py --config.start.hf=path/to/base --workdir=runs/zh --dry_run
       and the same without --dry_run
Try:   on the shipped base, English to Song poetry, in minutes on two cores, offline:
python -m cpt_jax.main --config=configs/language.py --workdir=runs/language_small --config.start.hf=examples/base --config.data.sources.general.store=store/quickstart/english --config.data.sources.general.text=examples/corpora/english.jsonl.gz --config.data.sources.language.store=store/quickstart/poetry --config.data.sources.language.text=examples/corpora/poetry_ci.jsonl.gz --config.data.row_len=256 --config.data.heldout_frac=0.02 --config.train.length='100 steps' --config.train.batch_rows=16 --config.train.microbatches=1 --config.schedule.lr_peak=1e-3 --config.schedule.lr_final=1e-4 --config.eval.every=20% --config.eval.tokens=20000 --config.checkpoint.every=50%

Practice that it starts from:

- Re-warm to about the base's own peak over 1% of the tokens, cosine to a tenth of it, 25% replay for a new language (Ibrahim
  et al. 2403.08763: English to German at 405M parameters forgot 0.16 nats with 25% replay, 0.29 with 10%, 1.39 with none).
- schedule.lr_peak between 1/10 and 1 of the base's peak: higher learns and forgets faster. Disclosed recipes: 1 (Code Llama
  2308.12950), 1/3 (Swallow 2404.17790, 10% English), 1/60 held constant (ChipNeMo 2311.00176; 60 times that lost most of MMLU).
- General text most of all in the first tenth: without it a 7B model's in-context learning was gone within 100 to 1000 steps
  (2506.00288, Llama 2 to Basque). So the new language's share rises from 5%. Others jumped to their shares and saw a transient
  only (2403.08763, 2404.17790); no controlled comparison of ramp and jump is known.
- A guard (docs/guide/guards.md): where the general loss is more than 0.3 nats above the base's, about what 10% replay cost above, the
  run goes back to the last evaluation that was within and takes the ramp at half its speed.
"""  # noqa: E501 - a command that can be copied

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.data.row_len = 2048
  c.data.sources.general = config_lib.source(store="store/en", role="replay", share=[(0, 0.95), ("20%", 0.25)])
  c.data.sources.language = config_lib.source(store="store/zh", role="domain", share=[(0, 0.05), ("20%", 0.75)])
  c.train.length = "2B tokens"
  c.train.batch_rows = 512
  c.train.microbatches = 16
  c.schedule.lr_peak = 1e-4
  c.schedule.lr_final = 1e-5
  c.schedule.warmup = "1%"
  c.model.remat = "dots"
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.guard.general_loss_rise = 0.3
  c.guard.on_collapse = "rewind"
  c.eval.every = "5%"
  c.eval.tokens = 500_000
  c.checkpoint.every = "2%"
  c.checkpoint.keep_every = "25%"
  return c
