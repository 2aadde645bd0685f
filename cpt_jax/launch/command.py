"""The options of cpt_jax.main -> the command that a host's shell is given; what every launcher checks, prints and runs.

Invariant: a host hands cpt_jax.main exactly the options that the launcher was given, whatever is in them.
"""

import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import environment

_GIVEN_BY_LAUNCHERS = ("coordinator", "num_processes", "process_id")


class Run(NamedTuple):
  """A run of cpt_jax.main, the same on every host."""

  options: list[str]
  directory: str
  python: str
  variables: list[str]  # NAME=VALUE

  def arguments(self, more: Sequence[str] = ()) -> list[str]:
    """The process itself, with `more` options that are one host's own."""
    variables = ["env", *self.variables] if self.variables else []
    return [*variables, self.python, "-m", "cpt_jax.main", *self.options, *more]

  def shell(self, more: Sequence[str] = ()) -> str:
    """The same for a shell.

    >>> Run(["--config=a b.py"], "/d", "python3", []).shell()
    "cd /d && exec python3 -m cpt_jax.main '--config=a b.py'"
    """
    return f"cd {shlex.quote(self.directory)} && exec {shlex.join(self.arguments(more))}"


def check(run: Run, *, sees_our_disk: bool) -> None:
  """Finds what is wrong with a run here, before a thousand hosts do.

  Args:
    run: not started yet. A relative config is looked for where the hosts start, or in this directory if that is not here.
    sees_our_disk: the hosts have this machine's files, so that an absolute path of a config that is not here is nowhere.

  Raises:
    ConfigError: all that is wrong with its options, its variables and its config.
  """
  problems = Problems()
  for option in run.options:
    name = re.match(r"--?([\w.]*)", option)
    if name and name.group(1) in _GIVEN_BY_LAUNCHERS:
      problems.add(f"{option}: the launcher sees to it; leave it out")
  for variable in run.variables:
    if not re.match(r"[A-Za-z_]\w*=", variable):
      problems.add(f"--env={variable}: write --env=NAME=VALUE")
  with problems.collect():
    _check_config(run, sees_our_disk=sees_our_disk)
  problems.raise_if_any()


def _check_config(run: Run, *, sees_our_disk: bool) -> None:
  given = [option.partition("=")[2] for option in run.options if re.match(r"--?config=", option)]
  if not given:
    raise ConfigError("name a config behind --, as in: -- --config=configs/domain.py --workdir=/shared/runs/domain")
  path, _, argument = given[-1].partition(":")
  if pathlib.Path(path).is_absolute() and not pathlib.Path(path).exists() and not sees_our_disk:
    return
  start = pathlib.Path(run.directory)
  here = f"--config={(start if start.is_absolute() and start.is_dir() else pathlib.Path()) / path}"
  here += f":{argument}" if argument else ""
  config_lib.check_overrides([here if re.match(r"--?config=", option) else option for option in run.options])


def print_plan(commands: Sequence[str], *, kind: str) -> None:
  """What a launcher would do: a command a line, and as comments what each process sets for itself on devices of this kind."""
  print("# what cpt_jax.main sets on each host where it is not set (cpt_jax/devices/environment.py):")
  for setting in environment.settings(kind, gpu_model="NVIDIA H100"):
    value = shlex.quote(setting.value).replace(str(pathlib.Path.home()), "~")
    print(f"#   {setting.name}={value}: {setting.reason}")
  print("\n".join(commands))


def call(arguments: Sequence[str], *, why: str, stdin: str | None = None) -> int:
  """Runs a program of the cloud or cluster to its end; its exit code.

  Raises:
    ConfigError: the program is not there; `why` says what it is and where it comes from.
  """
  if shutil.which(arguments[0]) is None:
    raise ConfigError(f"{arguments[0]} is not on the PATH: {why}; --print shows the command")
  return subprocess.run(arguments, input=stdin, text=True, check=False).returncode
