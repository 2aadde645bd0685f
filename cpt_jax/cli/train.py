"""`cpt train`, and `python -m cpt_jax.main`: flags to one call of `cpt_jax.train`, or of the dry run."""

import pathlib
from argparse import Namespace

from cpt_jax import config as config_lib, exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "train",
    description="""Trains what a config file says, and keeps everything in --workdir: config.json, metrics.jsonl, ledger.jsonl,
    summary.json, checkpoints, and at the end a Hugging Face directory. The same command, given again, goes on from the newest
    checkpoint, and ends with the same parameters as if it had never stopped.

    --config.KEY=VALUE changes a key of the file; the keys are listed below. On several hosts the same command runs on each:
    Slurm, Open MPI and TPU pods need nothing more, others --coordinator, --num_processes and --process_id.

    A first SIGTERM or Ctrl-C saves at the next step and ends with 75; a second one ends at once.""",
    example="""cpt train --config=configs/quickstart.py --dry_run
    cpt train --config=configs/quickstart.py --config.train.length='40 steps' --workdir=runs/short

    Says what the run would do; then trains a short version of it.""",
    exit_codes=(exits.BAD_TEXT, exits.STOPPED, exits.NOT_FINITE, exits.LOST, exits.GUARD),
    overrides=True,
    more=lambda: {"KEYS": config_lib.describe_keys()},
  )
  p.flag("--config=FILE", "A file of configs/, or one of your own.", required=True)
  p.flag("--workdir=DIR", "Where the run keeps everything; runs/NAME OF THE CONFIG by default.", None)
  p.switch("dry_run", default=False, help="Say what the run would do, and end.")
  p.flag("--coordinator=HOST:PORT", "Where process 0 of several is found.")
  p.flag("--num_processes=N", "Processes of this run, one per host.", None, type=int)
  p.flag("--process_id=N", "Which of them this is, from 0.", None, type=int)
  p.flag("--wait_secs=N", "How long to wait for the others at the start.", 300, low=1)
  p.flag("--verbosity=N", "0 shows the diaries of the libraries too; -1, the default, none.", "-1")
  return p


def run(args: Namespace) -> int:
  """Trains or describes."""
  config = config_lib.load(args.config, args.overrides)
  workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / pathlib.Path(args.config.partition(":")[0]).stem)
  if args.dry_run:
    from cpt_jax.preview import dry_run

    return dry_run.describe(config, workdir)
  from cpt_jax import library

  processes = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id", "wait_secs")}
  return library.train(config, workdir, **processes).exit_code
