"""What all `cpt launch` commands ask for, beside the options of the run itself."""

import shlex
from argparse import Namespace
from collections.abc import Sequence

from cpt_jax import exits
from cpt_jax.cli import manual
from cpt_jax.devices import launch

_ABOUT = """

    What stands behind -- is given to cpt_jax.main on every host, exactly as it is. The config is looked at here first, so that a
    misspelt key is not found by a thousand hosts. --print shows what would be run."""


def parser(name: str, description: str, *, example: str, exit_codes: Sequence[int] = ()) -> manual.Parser:
  """The page of one of them, without flags."""
  return manual.Parser(
    name, description=description + _ABOUT, example=example, rest="the options of cpt train", exit_codes=exit_codes
  )


def add_flags(p: manual.Parser, *, directory: str, python: str) -> None:
  """Adds the flags, with what holds where they are not given."""
  p.switch("print", default=False, help="Print what would be run, and run nothing.")
  clone = "The clone of cpt_jax on every host, or where to start if it is installed"
  p.flag("--dir=DIR", f"{clone}; a relative one is looked for where a shell starts.", directory)
  p.flag("--python=FILE", "Python on every host, with cpt_jax's dependencies; relative to --dir, or on the PATH.", python)
  p.repeated("--env=NAME=VALUE", "A variable for every process; repeatable.")


def run_of(args: Namespace, *, sees_our_disk: bool) -> launch.Run:
  """The run that the flags ask for, checked."""
  run = launch.Run(args.rest, args.dir, args.python, args.env)
  launch.check(run, sees_our_disk=sees_our_disk)
  return run


def run_or_print(args: Namespace, program: Sequence[str], *, kind: str, why: str, stdin: str | None = None) -> int:
  """Runs a program of a cloud or cluster, or prints it (`stdin` alone, if given); the rest as launch.call has it."""
  if args.print:
    launch.print_commands([stdin or shlex.join(program)], kind=kind)
    return exits.DONE
  return launch.call(program, why=why, stdin=stdin)
