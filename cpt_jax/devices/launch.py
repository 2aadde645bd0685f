"""The options of cpt_jax.main -> the commands that its hosts are given, by gcloud, XPK, Slurm or ssh.

Invariant: a host hands cpt_jax.main exactly the options that the launcher was given, whatever is in them.
"""

import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpt_jax import config as config_lib, exits, shipped
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


def home() -> str:
  """The directory that hosts with this machine's files start in: the clone, or the current one where cpt_jax is installed."""
  root = shipped.root()
  return str(root if (root / "cpt_jax").is_dir() else pathlib.Path.cwd())


def check(run: Run, *, sees_our_disk: bool) -> None:
  """Finds here what a thousand hosts would find.

  `sees_our_disk`: the hosts have this machine's files, so that a config that is not here is nowhere.
  Raises ConfigError: options that the launcher sees to itself, variables that are none, a config with a mistake: a line each.
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
    _check_config(run.options, sees_our_disk=sees_our_disk)
  problems.raise_if_any()


def _check_config(options: list[str], *, sees_our_disk: bool) -> None:
  given = [option.partition("=")[2] for option in options if re.match(r"--?config=", option)]
  if not given:
    raise ConfigError("name a config behind --, as in: -- --config=configs/domain.py --workdir=/shared/runs/domain")
  path, _, argument = given[-1].partition(":")
  if pathlib.Path(path).is_absolute() and not pathlib.Path(path).exists() and not sees_our_disk:
    return
  # Relative ones are looked for in the clone, where the hosts start.
  there = pathlib.Path(home()) / path
  config = config_lib.load_file(str(there) if there.exists() else path, *([argument] if argument else []))
  config_lib.check_overrides(config, options)


def on_tpu_vm(run: Run, *, tpu: str = "", queued_resource: str = "", zone: str = "", project: str = "") -> list[str]:
  """gcloud's arguments for a run on every worker of one TPU VM, or of all slices of a queued resource."""
  if bool(tpu) == bool(queued_resource):
    raise ConfigError("name the TPUs: either --tpu=NAME (one slice) or --queued_resource=NAME (all of its slices)")
  group, name = ("tpu-vm", tpu) if tpu else ("queued-resources", queued_resource)
  where = [f"--{flag}={value}" for flag, value in (("zone", zone), ("project", project)) if value]
  everywhere = ["--worker=all"] if tpu else ["--node=all", "--worker=all"]
  return ["gcloud", "compute", "tpus", group, "ssh", name, *where, *everywhere, f"--command={run.shell()}"]


def by_xpk(run: Run, options: Mapping[str, Any]) -> list[str]:
  """xpk's arguments for a run as one workload; `options` are its own, and None or "" where one is not given."""
  given = {**options, "command": run.shell()}
  return ["xpk", "workload", "create", *(f"--{name}={value}" for name, value in given.items() if value not in (None, ""))]


def slurm_script(run: Run, options: Mapping[str, Any], more: Sequence[str], *, nodes: int, stop_secs: int) -> str:
  """The script that sbatch is given: one task for each node; a job that ends before its run does goes back into the queue.

  All nodes see the directory of `run`. `options` are of sbatch, None where one is not given; `more` are others, name=value, which
  win. So many `stop_secs` before the limit the run is told to save and end.
  """
  if any("\n" in str(option) for option in (*options.values(), *more)):
    raise ConfigError("an option of sbatch is one line: --name, --output and --sbatch take no line breaks")
  # The signal goes to the processes, not to this script: each of them tells the others, and all save the same step.
  known = {**options, "signal": f"TERM@{stop_secs}", "requeue": "", "open-mode": "append"}
  known |= {option.partition("=")[0]: option.partition("=")[2] for option in more}
  given = {name: f"={shlex.quote(str(value))}" if value != "" else "" for name, value in known.items() if value is not None}
  lines = [f"#SBATCH --{name}{value}" for name, value in given.items()]
  srun = ["srun", "--kill-on-bad-exit=1", *(["--label"] if nodes > 1 else []), *run.arguments()]
  return "\n".join(
    [
      "#!/bin/bash",
      *lines,
      f"cd {shlex.quote(run.directory)} || exit {exits.CONFIG}",
      shlex.join(srun),
      "code=$?",
      "# 75: stopped by the signal, with everything saved. The job goes back into the queue and on from there.",
      'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
      'exit "$code"',
      "",
    ]
  )


def print_commands(commands: Sequence[str], *, kind: str) -> None:
  """What --print says: a command a line, and as comments what each process sets for itself on devices of this kind."""
  print("# what cpt_jax.main sets on each host where it is not set (cpt_jax/devices/environment.py):")
  for setting in environment.settings(kind, gpu_model="NVIDIA H100"):
    value = shlex.quote(setting.value).replace(str(pathlib.Path.home()), "~")
    print(f"#   {setting.name}={value}: {setting.reason}")
  print("\n".join(commands))


def call(arguments: Sequence[str], *, why: str, stdin: str | None = None) -> int:
  """Runs a program of the cloud or cluster to its end; its exit code.
  Raises ConfigError: the program is not there; `why` says what it is and where it comes from."""
  if shutil.which(arguments[0]) is None:
    raise ConfigError(f"{arguments[0]} is not on the PATH: {why}; --print shows the command")
  return subprocess.run(arguments, input=stdin, text=True, check=False).returncode
