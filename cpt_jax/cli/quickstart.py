"""`cpt quickstart`: the config of that name, trained from the files that came with the package."""

from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import manual, train


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "quickstart",
    description="""Continues a model of 2.4 million parameters, which came with this package, on Song poetry, while it reads
    English again so that it does not forget it. Needs no network and about two minutes on two cores. It is `cpt train
    --config=configs/quickstart.py`, and writes store/quickstart and runs/quickstart in the current directory.""",
    example="""cpt quickstart

    Ends with held-out losses of 3.7442 (general, from 3.6834: what was forgotten) and 3.2458 (poetry, from 3.8235: what was
    learnt), and a Hugging Face directory in runs/quickstart/hf.""",
    exit_codes=(exits.STOPPED, exits.NOT_FINITE, exits.GUARD),
    overrides=True,
  )
  p.flag("--workdir=DIR", "Where the run keeps everything.", "runs/quickstart")
  p.switch("dry_run", default=False, help="Say what the run would do, and end.")
  return p


def run(args: Namespace) -> int:
  """Trains it."""
  of_train = train.parser().read(["--config=configs/quickstart.py", f"--workdir={args.workdir}", *args.overrides])
  of_train.dry_run = args.dry_run
  return train.run(of_train)
