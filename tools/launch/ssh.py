"""A run on a list of hosts by plain ssh: started together, their output told apart by the host's name, stopped together.

Invariant: when one process ends badly, at ctrl-c, and when this program is gone, every process gets a SIGTERM; the run then saves
and ends (exit code 75), and the same command goes on from there.

Exit codes: that of the first process that failed, 78 wrong settings.
"""

import contextlib
import pathlib
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from typing import IO

import command
from absl import flags

from cpt_jax.config import ConfigError, Problems

_HOSTS = flags.DEFINE_list("hosts", [], "Hosts as ssh knows them, the first one is process 0: a,b or me@a,me@b.")
_HOSTS_FILE = flags.DEFINE_string("hosts_file", None, "A file with a host a line instead; # begins a comment.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT at which the others find the first host, if not its name and --port."
)
_PORT = flags.DEFINE_integer("port", 8476, "A port that is free on the first host.", lower_bound=1, upper_bound=65535)
_SSH_OPTION = flags.DEFINE_multi_string("ssh_option", [], "Another of ssh's -o options, e.g. Port=2222; repeatable.")
_GRACE_SECS = flags.DEFINE_integer(
  "grace_secs", 120, "So long the others may take to save and end, after one has ended badly.", lower_bound=0
)

# ORDER: the signal before the wait. The shell's background jobs read nothing, so its own input is kept as 3; ssh closes it when
# this program closes its end or is gone.
_TIED = "exec 3<&0; {{ {run}; }} & child=$!; (cat <&3; kill -TERM $child) >/dev/null 2>&1 & wait $child"


def hosts() -> list[str]:
  """Of --hosts or --hosts_file.

  Raises:
    ConfigError: none, or names that ssh would take for something else, or one twice.
  """
  if bool(_HOSTS.value) == bool(_HOSTS_FILE.value):
    raise ConfigError("name the hosts: either --hosts=a,b or --hosts_file=FILE with one a line")
  found = [name.strip() for name in _HOSTS.value]
  if _HOSTS_FILE.value:
    try:
      lines = pathlib.Path(_HOSTS_FILE.value).read_text(encoding="utf-8").splitlines()
    except OSError as error:
      raise ConfigError(f"--hosts_file={_HOSTS_FILE.value}: {error.strerror}") from None
    found = [name for line in lines if (name := line.partition("#")[0].strip())]
    if not found:
      raise ConfigError(f"--hosts_file={_HOSTS_FILE.value}: there is no host in it")
  problems = Problems()
  for name in found:
    if not re.fullmatch(r"([\w.-]+@)?[\w.:\[\]][\w.:\[\]-]*", name):
      problems.add(f"host {name!r}: write a name or an address, or user@name")
    if found.count(name) > 1:
      problems.add(f"host {name!r} is named {found.count(name)} times: a host runs one process, which has all of its devices")
  problems.raise_if_any()
  return found


def commands(run: command.Run, names: list[str]) -> list[list[str]]:
  """ssh's arguments for each host."""
  where = _COORDINATOR.value or f"{names[0].rpartition('@')[2]}:{_PORT.value}"
  # Never a question: nobody could answer it.
  ssh = ["ssh", "-o", "BatchMode=yes", *(part for option in _SSH_OPTION.value for part in ("-o", option))]
  several = [f"--coordinator={where}", f"--num_processes={len(names)}"] if len(names) > 1 else []
  return [
    [*ssh, name, _TIED.format(run=run.shell([*several, f"--process_id={i}"] if several else []))] for i, name in enumerate(names)
  ]


def run_all(names: list[str], started: list[list[str]], *, grace_secs: float) -> int:
  """Runs the commands together to their end; the exit code of the first that failed, or 0."""
  processes = [
    subprocess.Popen(
      each,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      start_new_session=True,
    )
    for each in started
  ]
  ends: queue.SimpleQueue[int] = queue.SimpleQueue()  # who has ended, in that order; -1 at ctrl-c or SIGTERM
  speaking = threading.Lock()
  readers = [
    threading.Thread(target=_follow, args=(i, f"{names[i]}: " if len(names) > 1 else "", process, ends, speaking), daemon=True)
    for i, process in enumerate(processes)
  ]
  before = {number: signal.signal(number, lambda *_: ends.put(-1)) for number in (signal.SIGINT, signal.SIGTERM)}
  for reader in readers:
    reader.start()
  code, running, patience = 0, set(range(len(names))), None
  try:
    while running:
      try:
        who = ends.get(timeout=patience)
      except queue.Empty:
        _say(f"no end after {grace_secs} s on {', '.join(names[i] for i in sorted(running))}: ended from here", speaking)
        break
      running.discard(who)
      found = processes[who].wait() if who >= 0 else 75
      if found and not code:
        code = found
        reason = f"{names[who]} ended with {found}" if who >= 0 else "stopping"
        if running:
          _say(f"{reason}; the others are told to save and end", speaking)
          for i in running:
            with contextlib.suppress(BrokenPipeError):
              processes[i].stdin.close()
          patience = grace_secs
  finally:
    for i in running:
      processes[i].kill()
    for number, handler in before.items():
      signal.signal(number, handler)
  for reader in readers:
    reader.join(timeout=10)
  return code


def _follow(i: int, prefix: str, process: subprocess.Popen, ends: queue.SimpleQueue, speaking: threading.Lock) -> None:
  """Hands on what a host says, line by line."""
  assert process.stdout is not None
  for line in process.stdout:
    _say(f"{prefix}{line.rstrip()}", speaking, file=sys.stdout)
  ends.put(i)


def _say(text: str, speaking: threading.Lock, *, file: IO[str] | None = None) -> None:
  with speaking:
    print(text, file=file or sys.stderr, flush=True)


def launch(run: command.Run) -> int:
  """Runs it on all hosts, or prints the commands."""
  names = hosts()
  started = commands(run, names)
  if command.PRINT.value:
    command.print_plan([shlex.join(each) for each in started], kind="gpu")
    return 0
  if shutil.which("ssh") is None:
    raise ConfigError("ssh is not on the PATH: install OpenSSH's client; --print shows the commands")
  return run_all(names, started, grace_secs=_GRACE_SECS.value)


if __name__ == "__main__":
  command.start(launch, directory=str(command.ROOT), python=sys.executable, sees_our_disk=True)
