"""A run on a list of hosts by plain ssh: started together, their output told apart by the host's name, stopped together.

Invariant: when one process ends badly, at ctrl-c, and when this program is gone, every process gets a SIGTERM; the run then saves
and ends (exit code 75), and the same command goes on from there.
"""

import contextlib
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
from typing import IO

from cpt_jax import exits
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices.launch import Run

# ORDER: the signal before the wait. The shell's background jobs read nothing, so its own input is kept as 3; ssh closes it when
# this program closes its end or is gone.
_TIED = "exec 3<&0; {{ {run}; }} & child=$!; (cat <&3; kill -TERM $child) >/dev/null 2>&1 & wait $child"


def hosts(names: list[str], file: str | None) -> list[str]:
  """The hosts, of a list or of a file with one a line.
  Raises ConfigError: none, or names that ssh would take for something else, or one twice."""
  if bool(names) == bool(file):
    raise ConfigError("name the hosts: either --hosts=a,b or --hosts_file=FILE with one a line")
  found = [name.strip() for name in names]
  if file:
    try:
      lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
      raise ConfigError(f"--hosts_file={file}: {error.strerror}") from None
    found = [name for line in lines if (name := line.partition("#")[0].strip())]
    if not found:
      raise ConfigError(f"--hosts_file={file}: there is no host in it")
  problems = Problems()
  for name in found:
    if not re.fullmatch(r"([\w.-]+@)?[\w.:\[\]][\w.:\[\]-]*", name):
      problems.add(f"host {name!r}: write a name or an address, or user@name")
    if found.count(name) > 1:
      problems.add(f"host {name!r} is named {found.count(name)} times: a host runs one process, which has all of its devices")
  problems.raise_if_any()
  return found


def commands(run: Run, names: list[str], *, coordinator: str | None, port: int, options: list[str]) -> list[list[str]]:
  """ssh's arguments for each host; `options` are of its -o."""
  where = coordinator or f"{names[0].rpartition('@')[2]}:{port}"
  # Never a question: nobody could answer it.
  ssh = ["ssh", "-o", "BatchMode=yes", *(part for option in options for part in ("-o", option))]
  several = [f"--coordinator={where}", f"--num_processes={len(names)}"] if len(names) > 1 else []
  return [
    [*ssh, name, _TIED.format(run=run.shell([*several, f"--process_id={i}"] if several else []))] for i, name in enumerate(names)
  ]


def run_all(names: list[str], started: list[list[str]], *, grace_secs: float) -> int:
  """Runs the commands together to their end; the exit code of the first that failed, or 0."""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
  processes = [subprocess.Popen(each, **pipes, start_new_session=True) for each in started]
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
      found = processes[who].wait() if who >= 0 else exits.STOPPED
      if found and not code:
        code = found
        reason = f"{names[who]} ended with {found}" if who >= 0 else "stopping"
        if running:
          _say(f"{reason}; the others are told to save and end", speaking)
          for i in running:
            _close_input(processes[i])
          patience = grace_secs
  finally:
    for i in running:
      processes[i].kill()
    for number, handler in before.items():
      signal.signal(number, handler)
  for process, reader in zip(processes, readers, strict=True):
    reader.join(timeout=10)
    process.wait()
    _close_input(process)
    if process.stdout and not reader.is_alive():  # a host's own children may hold its output open
      process.stdout.close()
  return code


def _close_input(process: subprocess.Popen) -> None:
  """What the host's shell waits for: it then tells the run to save and end."""
  assert process.stdin is not None
  with contextlib.suppress(BrokenPipeError):
    process.stdin.close()


def _follow(i: int, prefix: str, process: subprocess.Popen, ends: queue.SimpleQueue, speaking: threading.Lock) -> None:
  """Hands on what a host says, line by line."""
  assert process.stdout is not None
  for line in process.stdout:
    _say(f"{prefix}{line.rstrip()}", speaking, file=sys.stdout)
  ends.put(i)


def _say(text: str, speaking: threading.Lock, *, file: IO[str] | None = None) -> None:
  with speaking:
    print(text, file=file or sys.stderr, flush=True)
