"""`cpt COMMAND --flag=value ...` -> the function that does it, and its exit code: one table of commands.

Invariant: a person's mistake ends with a plain message and its code of `cpt_jax.exits`, never with a traceback. Nothing heavy is
imported before a command is known.
"""

import importlib
import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple, NoReturn

from absl import logging

from cpt_jax import exits


class Command(NamedTuple):
  """A line of the table."""

  name: str  # one word, or two: a group and what it does
  summary: str  # "cpt NAME - summary" begins its manual page
  module: str  # of cpt_jax.cli: parser() gives its flags, run(args) does it
  devices: str = ""  # "own": computes on this machine's; "cpu": needs no other; "" = computes nothing, or sees to it itself

  def parser(self):
    """Its flags, which print as a manual page: `format_help()`."""
    found = importlib.import_module(f"cpt_jax.cli.{self.module}").parser()
    found.summary = self.summary
    return found

  def run(self, args) -> int:
    """Does what the flags ask for; returns the exit code."""
    return importlib.import_module(f"cpt_jax.cli.{self.module}").run(args)


COMMANDS = (
  Command("quickstart", "train a small model on the examples, in minutes and offline", "quickstart", "own"),
  Command("prepare", "raw texts to a store of tokens", "prepare"),
  Command("diagnose", "what kind of continual pretraining this is, and where to begin", "diagnose", "own"),
  Command("vocab assess", "does the base's vocabulary fit the texts, and what would more pieces bring", "vocab_assess"),
  Command("vocab grow", "a base with new pieces in its vocabulary, and initialised rows for them", "vocab_grow", "cpu"),
  Command("vocab compare", "runs with one vocabulary and another, compared in bits per byte", "vocab_compare"),
  Command("plan", "small runs of one budget to the rate and replay share of the run itself", "plan", "own"),
  Command("train", "train what a config says, or say what it would do", "train", "own"),
  Command("report", "what a run learnt and forgot, beside what was predicted: tables and a figure", "report"),
  Command("export", "a checkpoint of a run to a Hugging Face directory", "export", "cpu"),
  Command("show", "the texts in the rows of one batch of a run", "show"),
  Command("fit-laws", "scaling laws fitted to measured losses, and what they predict", "fit_laws"),
  Command("compile", "a config's training step compiled for chips that are not here: memory and speed", "compile"),
  Command("launch tpu-vm", "start a run on every worker of a TPU VM or a queued resource", "launch_tpu_vm"),
  Command("launch xpk", "start a run on TPU slices of a GKE cluster, by XPK", "launch_xpk"),
  Command("launch slurm", "start a run on the nodes of a Slurm cluster", "launch_slurm"),
  Command("launch ssh", "start a run on a list of hosts, by ssh", "launch_ssh"),
)


def main(argv: Sequence[str], *, environ: MutableMapping[str, str] | None = None) -> int:
  """Runs one command line, e.g. ["show", "--run=runs/quickstart", "--step=3"]; returns the exit code.
  `environ`: where the variables of jax are set before it starts; None = nothing is set."""
  try:
    return _main(list(argv), {} if environ is None else environ)
  except BaseException as error:
    found = exits.explain(error)
    if found is None:
      raise
    print(found[0], file=sys.stderr)
    return found[1]


def _main(argv: list[str], environ: MutableMapping[str, str]) -> int:
  if not argv or argv[0] in ("--help", "-h", "help"):
    print(overview())
    return exits.DONE
  if argv[0] == "--version":
    from cpt_jax import __version__

    print(f"cpt_jax {__version__}")
    return exits.DONE
  command, rest = find(argv)
  if command is None:  # a group: what is in it
    print(overview(argv[0]))
    return exits.DONE
  if command.devices:
    from cpt_jax.devices import environment

    if command.devices == "cpu":
      environ.setdefault("JAX_PLATFORMS", "cpu")
    environment.prepare(environ)  # before anything imports jax
  parser = command.parser()
  args = parser.read(rest)
  if args.help:
    print(parser.format_help(), end="")
    return exits.DONE
  level = getattr(args, "verbosity", "-1")
  logging.set_verbosity(int(level) if level.lstrip("-").isdigit() else level)  # the libraries' own diaries
  try:
    return command.run(args)
  except OSError as error:
    if error.filename is None:  # a full disk says no more than that
      error.filename = getattr(args, "output", None) or getattr(args, "workdir", None)
    raise


def find(argv: list[str]) -> tuple[Command | None, list[str]]:
  """The command that a line begins with, and its arguments; None for a group that is named alone or with --help.
  Raises ConfigError: there is none of that name."""
  from cpt_jax.config import ConfigError, did_you_mean

  for command in COMMANDS:
    size = len(command.name.split())
    if argv[:size] == command.name.split():
      return command, argv[size:]
  groups = {command.name.split()[0] for command in COMMANDS if " " in command.name}
  if argv[0] in groups:
    inside = [command.name.split()[1] for command in COMMANDS if command.name.startswith(f"{argv[0]} ")]
    if len(argv) == 1 or argv[1] in ("--help", "-h"):
      return None, []
    raise ConfigError(f"cpt {argv[0]}: {argv[1]} is none of {', '.join(inside)}.{did_you_mean(argv[1], inside)}")
  names = list(dict.fromkeys(command.name.split()[0] for command in COMMANDS))
  raise ConfigError(f"cpt: there is no command {argv[0]}.{did_you_mean(argv[0], names)} All commands: cpt --help")


def overview(group: str = "") -> str:
  """What `cpt --help` prints."""
  chosen = [command for command in COMMANDS if not group or command.name.startswith(f"{group} ")]
  width = max(len(command.name) for command in chosen)
  lines = [f"  {command.name:<{width}}  {command.summary}" for command in chosen]
  return "\n".join(
    [f"cpt {group or 'COMMAND'} ...: continual pretraining of language models, planned, exact and measured", "", *lines, ""]
    + [f"cpt {group + ' ' if group else ''}COMMAND --help says what one does; cpt --version says which version this is"]
  )


def entry(argv: Sequence[str] | None = None) -> NoReturn:
  """The program `cpt`."""
  logging.use_absl_handler()
  sys.exit(main(sys.argv[1:] if argv is None else argv, environ=os.environ))
