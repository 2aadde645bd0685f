"""The options of cpt_jax.main -> the command that a host's shell is given; what every launcher asks for, prints and refuses.

Invariant: a host hands cpt_jax.main exactly the options that the launcher was given, whatever is in them.
"""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # a clone that is not installed

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import environment

_GIVEN_BY_LAUNCHERS = ("coordinator", "num_processes", "process_id")

PRINT = flags.DEFINE_bool("print", False, "Print what would be run, and run nothing.")
_DIR = flags.DEFINE_string("dir", None, "The clone of cpt_jax on every host; a relative one is looked for where a shell starts.")
_PYTHON = flags.DEFINE_string(
  "python", None, "Python on every host, with cpt_jax's dependencies; relative to --dir, or on the PATH."
)
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for every process; repeatable.")


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


def start(launch: Callable[[Run], int], *, directory: str, python: str, sees_our_disk: bool) -> None:
  """The whole tool: reads and checks flags and options, and calls `launch`, whose result is the exit code.

  Args:
    directory: of the clone, where --dir is not given.
    python: where --python is not given.
    sees_our_disk: the hosts have this machine's files, so that a config that is not here is nowhere.
  """

  def main(argv: list[str]) -> int:
    try:
      return launch(_read(argv[1:], directory, python, sees_our_disk))
    except ConfigError as error:
      print(error, file=sys.stderr)
      return error.exit_code

  app.run(main, flags_parser=_read_flags)


def _read_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f"{error}\nThe run's own options come after --, as in: {argv[0]} ... -- --config=configs/domain.py", file=sys.stderr)
    sys.exit(ConfigError.exit_code)


def _read(options: list[str], directory: str, python: str, sees_our_disk: bool) -> Run:
  problems = Problems()
  for option in options:
    name = re.match(r"--?([\w.]*)", option)
    if name and name.group(1) in _GIVEN_BY_LAUNCHERS:
      problems.add(f"{option}: the launcher sees to it; leave it out")
  for variable in _ENV.value:
    if not re.match(r"[A-Za-z_]\w*=", variable):
      problems.add(f"--env={variable}: write --env=NAME=VALUE")
  with problems.collect():
    _check_config(options, sees_our_disk=sees_our_disk)
  problems.raise_if_any()
  return Run(options, _DIR.value or directory, _PYTHON.value or python, _ENV.value)


def _check_config(options: list[str], *, sees_our_disk: bool) -> None:
  """A typing error is found here, not by a thousand hosts."""
  given = [option.partition("=")[2] for option in options if re.match(r"--?config=", option)]
  if not given:
    raise ConfigError("name a config behind --, as in: -- --config=configs/domain.py --workdir=/shared/runs/domain")
  path, _, argument = given[-1].partition(":")
  if pathlib.Path(path).is_absolute() and not pathlib.Path(path).exists() and not sees_our_disk:
    return
  # Relative ones are looked for in the clone, where the hosts start.
  here = f"--config={ROOT / path}" + (f":{argument}" if argument else "")
  config_lib.check_overrides([here if re.match(r"--?config=", option) else option for option in options])


def print_plan(commands: Sequence[str], *, kind: str) -> None:
  """What --print says: a command a line, and as comments what each process sets for itself on devices of this kind."""
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
