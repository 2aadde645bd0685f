"""A run on a list of hosts by plain ssh: started together, their output told apart by the host's name, stopped together.

Invariant: when one process ends badly, at ctrl-c, and when this program is gone, every process gets a SIGTERM; the run then saves
and ends (exit code 75), and the same command goes on from there.
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
from collections.abc import Sequence
from typing import IO

from cpt_jax.config import ConfigError, Problems
from cpt_jax.launch import command

# ORDER: the signal before the wait. The shell's background jobs read nothing, so its own input is kept as 3; ssh closes it when
# this program closes its end or is gone.
_TIED = "exec 3<&0; {{ {run}; }} & child=$!; (cat <&3; kill -TERM $child) >/dev/null 2>&1 & wait $child"


def read_hosts(names: Sequence[str], hosts_file: str) -> list[str]:
  """The hosts as ssh knows them, named or else in a file with one a line, where # begins a comment; the first is process 0.

  Raises:
    ConfigError: none, or names that ssh would take for something else, or one twice.
  """
  if bool(names) == bool(hosts_file):
    raise ConfigError("name the hosts: either --hosts=a,b or --hosts_file=FILE with one a line")
  found = [name.strip() for name in names]
  if hosts_file:
    try:
      lines = pathlib.Path(hosts_file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
      raise ConfigError(f"--hosts_file={hosts_file}: {error.strerror}") from None
    found = [name for line in lines if (name := line.partition("#")[0].strip())]
    if not found:
      raise ConfigError(f"--hosts_file={hosts_file}: there is no host in it")
  problems = Problems()
  for name in found:
    if not re.fullmatch(r"([\w.-]+@)?[\w.:\[\]][\w.:\[\]-]*", name):
      problems.add(f"host {name!r}: write a name or an address, or user@name")
    if found.count(name) > 1:
      problems.add(f"host {name!r} is named {found.count(name)} times: a host runs one process, which has all of its devices")
  problems.raise_if_any()
  return found


def commands(run: command.Run, names: Sequence[str], *, coordinator: str, ssh_options: Sequence[str]) -> list[list[str]]:
  """ssh's arguments for each host; `coordinator` is HOST:PORT of the first, at which the others find it."""
  # Never a question: nobody could answer it.
  ssh = ["ssh", "-o", "BatchMode=yes", *(part for option in ssh_options for part in ("-o", option))]
  several = [f"--coordinator={coordinator}", f"--num_processes={len(names)}"] if len(names) > 1 else []
  return [
    [*ssh, name, _TIED.format(run=run.shell([*several, f"--process_id={i}"] if several else []))] for i, name in enumerate(names)
  ]


def run_all(names: Sequence[str], started: Sequence[Sequence[str]], *, grace_secs: float) -> int:
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
  for process, reader in zip(processes, readers, strict=True):
    reader.join(timeout=10)
    process.wait()
    with contextlib.suppress(BrokenPipeError):
      process.stdin.close()
    if not reader.is_alive():  # a host's own children may hold its output open
      process.stdout.close()
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


def launch(
  run: command.Run, names: Sequence[str], *, coordinator: str, ssh_options: Sequence[str], grace_secs: float, only_print: bool
) -> int:
  """Starts the run on all hosts and follows it, or prints the commands; the exit code is that of the first process that failed.

  Args:
    run: the same on each host.
    names: as `read_hosts` gives them.
    coordinator: HOST:PORT at which the others find the first host; without HOST, as ":8476", by the name that ssh has for it.
    ssh_options: of ssh's -o, e.g. Port=2222.
    grace_secs: how long the others may take to save and end, after one has ended badly.
    only_print: starts nothing.

  Raises:
    ConfigError: a mistake in the run's options, or no ssh.
  """
  command.check(run, sees_our_disk=True)
  if coordinator.startswith(":"):
    coordinator = names[0].rpartition("@")[2] + coordinator
  started = commands(run, names, coordinator=coordinator, ssh_options=ssh_options)
  if only_print:
    command.print_plan([shlex.join(each) for each in started], kind="gpu")
    return 0
  if shutil.which("ssh") is None:
    raise ConfigError("ssh is not on the PATH: install OpenSSH's client; --print shows the commands")
  return run_all(names, started, grace_secs=grace_secs)
