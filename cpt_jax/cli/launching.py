"""What all `cpt launch` commands ask for, beside the options of the run itself."""

from argparse import Namespace

from cpt_jax.cli import manual
from cpt_jax.devices import launch

REST = "the options of cpt train"
ABOUT = """

    What stands behind -- is given to cpt_jax.main on every host, exactly as it is. The config is looked at here first, so that a
    misspelt key is not found by a thousand hosts. --print shows what would be run."""


def add_flags(p: manual.Parser, *, directory: str, python: str) -> None:
  """Adds the flags, with what holds where they are not given."""
  p.switch("print", default=False, help="Print what would be run, and run nothing.")
  p.add_argument(
    "--dir", default=directory, metavar="DIR",
    help="The clone of cpt_jax on every host, or where to start if it is installed; a relative one is looked for where a shell"
    " starts.",
  )  # fmt: skip
  p.add_argument(
    "--python", default=python, metavar="FILE",
    help="Python on every host, with cpt_jax's dependencies; relative to --dir, or on the PATH.",
  )  # fmt: skip
  p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="A variable for every process; repeatable.")


def run_of(args: Namespace, *, sees_our_disk: bool) -> launch.Run:
  """The run that the flags ask for, checked."""
  run = launch.Run(args.rest, args.dir, args.python, args.env)
  launch.check(run, sees_our_disk=sees_our_disk)
  return run
