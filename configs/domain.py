"""Teach a base the knowledge of a domain, in a language that it knows: mostly the domain's text, a tenth of general text replayed.

Run:   cpt prepare --input 'texts/en/*.jsonl.gz' --tokenizer path/to/base --output store/en
       cpt prepare --input 'texts/law/*.jsonl.gz' --tokenizer path/to/base --output store/law
       cpt diagnose --hf path/to/base --sources general=store/en,domain=store/law    # is it one? where to begin?
       python -m cpt_jax.main --config=configs/domain.py --config.start.hf=path/to/base --workdir=runs/law --dry_run
       and the same without --dry_run

Practice that it starts from. Replay: 5% keeps 78% of what a weak shift would forget, 10% 85% (Ibrahim et al. 2403.08763, table 2);
disclosed runs replay 1% (Meditron), 5% (Llemma) and 9% (ChipNeMo); D-CPT finds 7.6% for chemistry when the general loss may
rise by 3% (2406.01375), CMR half or more when it may rise by 0.05 nats (2407.17467): say first what it may cost, then plan the share.
A domain whose text is far from the base's, as law is, forgets several times as much (2505.07796): take 15% or more.
Rate: a tenth of a usual peak of 3e-4, which is near the base's last rate, and down to a hundredth of that; with a shift as weak
as this, re-warming cost accuracy (Parmar et al. 2407.07263), and ChipNeMo lost a third of MMLU at 3e-4 and nothing at 5e-6. The
warm-up of 1% is for the optimizer, whose moments begin empty. Set schedule.lr_peak to between 1/60 and 1/3 of the base's own peak,
schedule.lr_final to a hundredth of it.

The shipped base on Song poetry, in minutes on two cores (one line):

python -m cpt_jax.main --config=configs/domain.py --workdir=runs/domain_small --config.start.hf=examples/base --config.data.sources.general.store=store/quickstart/english --config.data.sources.general.text=examples/corpora/english.jsonl.gz --config.data.sources.domain.store=store/quickstart/poetry --config.data.sources.domain.text=examples/corpora/poetry_ci.jsonl.gz --config.data.row_len=256 --config.data.heldout_frac=0.02 --config.train.length='100 steps' --config.train.batch_rows=16 --config.train.microbatches=1 --config.schedule.lr_peak=1e-3 --config.schedule.lr_final=1e-5 --config.eval.every=25% --config.eval.tokens=20000 --config.checkpoint.every=50%
"""  # noqa: E501 - a command that can be copied

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.data.row_len = 2048
  c.data.sources.general = config_lib.source(store="store/en", role="replay", share=0.1)
  c.data.sources.domain = config_lib.source(store="store/law", role="domain", share=0.9)
  c.train.length = "2B tokens"
  c.train.batch_rows = 512
  c.train.microbatches = 16
  c.schedule.lr_peak = 3e-5
  c.schedule.lr_final = 3e-7
  c.schedule.warmup = "1%"
  c.model.remat = "dots"
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.eval.every = "5%"
  c.eval.tokens = 500_000
  c.checkpoint.every = "2%"
  c.checkpoint.keep_every = "25%"
  return c
