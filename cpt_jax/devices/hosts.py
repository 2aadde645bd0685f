"""One process per host -> one run: they connect, agree on what they run, wait for each other, and end together.

Invariant: with one process nothing here does anything; nothing here enters a compiled program; the first error of any process
ends every process, with its words and its exit code.
"""

import collections
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from cpt_jax import exits
from cpt_jax.config import ConfigError

# Chosen by hand: a look a second costs the coordinator little even for a thousand hosts, and nobody waits long for bad news.
_LISTEN_SECS, _REMIND_SECS, _FAREWELL_SECS = 1.0, 60.0, 10.0
_FAILURE = "cpt_jax/failure"
_uses: collections.Counter[str] = collections.Counter()  # of a name; every process uses it as often as the others
_ending = threading.Lock()  # held by the first thread that ends this process
_listener: tuple[threading.Thread, threading.Event] | None = None


# ---- connecting ----


def join_arguments(
  environ: Mapping[str, str], *, coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize`, from the flags or from what started this process; None = run alone.

  Flags win. Slurm, Open MPI and TPU machines are known by their environment alone, so that a laptop never waits for anybody.
  Raises ConfigError: flags that do not fit together, or a launcher that does not say enough.
  """
  given = {"--coordinator": coordinator or None, "--num_processes": num_processes, "--process_id": process_id}
  if any(value is not None for value in given.values()):
    return _by_flags(given)
  if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    if "OMPI_MCA_orte_hnp_uri" not in environ:
      raise ConfigError(
        "Open MPI 5 starts processes without saying where the first one is: add --coordinator=HOST:PORT of rank 0, "
        "--num_processes=$OMPI_COMM_WORLD_SIZE and --process_id=$OMPI_COMM_WORLD_RANK"
      )
    alone_here = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return {"cluster_detection_method": "ompi", **_devices(environ, alone_here=alone_here)}
  # SLURM_STEP_NODELIST is set by srun, not for a batch script itself, which is one process whatever the job's size.
  if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
    alone_here = environ.get("SLURM_STEP_NUM_NODES") == environ["SLURM_NTASKS"]
    return {"cluster_detection_method": "slurm", **_devices(environ, alone_here=alone_here)}
  # jax sets the first where it finds TPU chips and their library; a pod's hosts know each other, a single host finds itself.
  if environ.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in environ.get("JAX_PLATFORMS", "tpu"):
    return {}
  return None


def _by_flags(given: dict[str, Any]) -> dict[str, Any] | None:
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise ConfigError(
      f"{' and '.join(missing)} missing: --coordinator=HOST:PORT (of process 0), --num_processes=N and --process_id=I (0 to N-1) "
      "go together; leave all three out for one process, under Slurm, under Open MPI and on TPU pods"
    )
  coordinator, num_processes, process_id = given.values()
  if num_processes < 1:
    raise ConfigError(f"--num_processes={num_processes}: use 1 or more")
  if not 0 <= process_id < num_processes:
    raise ConfigError(f"--process_id={process_id}: with --num_processes={num_processes} use 0 to {num_processes - 1}")
  if not re.fullmatch(r".+:\d+", coordinator):
    raise ConfigError(
      f"--coordinator={coordinator}: write HOST:PORT, e.g. 10.0.0.1:8476, a port that is free on process 0's host"
    )
  if num_processes == 1:
    return None
  where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
  return {**where, "cluster_detection_method": "deactivate"}


def _devices(environ: Mapping[str, str], *, alone_here: bool) -> dict[str, Any]:
  """One process per host has all of its devices; jax would give it the first alone (one process per device)."""
  return {"local_device_ids": []} if alone_here and "JAX_LOCAL_DEVICE_IDS" not in environ else {}


def connect(*, coordinator: str, num_processes: int | None, process_id: int | None, wait_secs: int) -> None:
  """Joins the run's other processes, if there are any; before anything touches a device.

  Ends this process with exits.LOST where they have not all come after `wait_secs`.
  Raises ConfigError: as `join_arguments`; a coordinator that cannot listen at its port.
  """
  global _listener
  arguments = join_arguments(os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
  if arguments is None:
    return
  address = arguments.get("coordinator_address", "the coordinator")
  name = f"process {process_id} of {num_processes}" if arguments.get("coordinator_address") else "this process"

  def remind() -> None:
    _tell(f"{name} on {socket.gethostname()}: waiting for the other processes at {address}")

  def give_up() -> None:
    _tell(
      f"{name} on {socket.gethostname()}: not all processes came to {address} within {wait_secs} s. Look at the output of the "
      "others; is the address reachable, and was every --process_id started? --wait_secs=N waits longer."
    )
    os._exit(exits.LOST)

  timers = [threading.Timer(min(10, wait_secs / 2), remind), threading.Timer(wait_secs, give_up)]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    # jax would abort the process at its own timeout.
    jax.distributed.initialize(**arguments, initialization_timeout=wait_secs + 60)
    jax.devices()  # every process must come here within minutes of each other: now, not after one of them has prepared data
  except (RuntimeError, ValueError) as error:
    raise ConfigError(f"{name} on {socket.gethostname()}: cannot join the others at {address}: {error}") from None
  finally:
    for timer in timers:
      timer.cancel()
  if num_processes_connected() > 1:
    stop = threading.Event()
    _listener = (threading.Thread(target=_listen, args=(stop,), daemon=True), stop)
    _listener[0].start()


def disconnect() -> None:
  """Leaves the run after it has ended well; waits for the others to do the same."""
  global _listener
  if _listener is not None:
    thread, stop = _listener
    stop.set()
    thread.join()
    _listener = None
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def num_processes_connected() -> int:
  """Processes of this run; touches no device in a run of one."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
  """Is this the process that writes the run's records and speaks to people."""
  return num_processes_connected() == 1 or jax.process_index() == 0


# ---- agreeing and waiting ----


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
  """The block is run by process 0, then by the others, which find what it made; they come to each `name` equally often."""
  several, key = num_processes_connected() > 1, f"cpt_jax/first/{name}/{_nth_use(name)}"
  if several and not is_main():
    _wait_for(key, "process 0")
  yield
  if several and is_main():
    _client().key_value_set(key, "done")


def agree(record: Mapping[str, str]) -> None:
  """Goes on only if every process's `record` is the same; each calls it equally often.
  Raises ConfigError: on process 0, and so the end of all: each key in which a process differs from it, with both values."""
  if num_processes_connected() == 1:
    return
  index, nth = jax.process_index(), _nth_use("agree")
  _client().key_value_set(f"cpt_jax/record/{nth}/{index}", json.dumps([socket.gethostname(), dict(record)]))
  if index != 0:
    _wait_for(f"cpt_jax/agreed/{nth}", "process 0")
    return
  lines = []
  for other in range(1, jax.process_count()):
    host, found = json.loads(_wait_for(f"cpt_jax/record/{nth}/{other}", f"process {other}"))
    for key in sorted(record | found):
      here, there = record.get(key, "absent"), found.get(key, "absent")
      if here != there:
        lines.append(f"  process {other} ({host}): {key}: {there}, process 0 ({socket.gethostname()}): {here}")
  if lines:
    raise ConfigError(
      "\n".join(["the processes of this run differ:", *lines, "start all with the same code, command, data and --workdir"])
    )
  _client().key_value_set(f"cpt_jax/agreed/{nth}", "yes")


def reached_stop(step: int) -> bool:
  """Have all processes reached the step at which they stop together, after a SIGTERM to any; call it at every step, by all.

  jax carries the signal to the others in the background and finds a step that none has passed; a call costs microseconds.
  """
  return multihost_utils.reached_preemption_sync_point(step)


# ---- ending together ----


def end_all(text: str, code: int) -> None:
  """Ends every process of the run with `text` on stderr and exit code `code`; returns only in a run of one.

  Where another process failed first, its words and its code are what this one ends with: they are the cause.
  """
  if num_processes_connected() == 1:
    return
  failure = json.dumps([jax.process_index(), socket.gethostname(), text, code])
  # The coordinator may be gone, or another process was first.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _client().key_value_set(_FAILURE, failure)
  _end(_failure() or failure)


def explain(error: BaseException) -> tuple[str, int]:
  """Words and exit code for an error that nobody expected: a broken connection is not this process's own fault."""
  is_broken = re.search(r"gloo|nccl|socket|connection|unavailable", str(error), re.IGNORECASE)
  if isinstance(error, jax.errors.JaxRuntimeError) and is_broken:
    cause = str(error).splitlines()[0]
    return f"lost another process: {cause}. The same command on every host goes on from the newest checkpoint.", exits.LOST
  return "".join(traceback.format_exception(error)), 1


def _listen(stop: threading.Event) -> None:
  # A thread, since the main one may be inside a collective that waits for a process which has failed.
  while not stop.wait(_LISTEN_SECS):
    failure = _failure()
    if failure is not None:
      _end(failure)


def _failure() -> str | None:
  """What the first process to fail has said; None while all is well."""
  try:
    return _client().key_value_try_get(_FAILURE)
  except jax.errors.JaxRuntimeError:  # not there, or no coordinator: then jax itself ends this process
    return None


def _end(failure: str) -> NoReturn:
  if not _ending.acquire(blocking=False):
    threading.Event().wait()  # the other thread ends the process
  process, host, text, code = json.loads(failure)
  index = jax.process_index()
  _tell(text if process == index else f"process {process} ({host}) has ended this run: {text}")
  with contextlib.suppress(jax.errors.JaxRuntimeError, OSError):
    _client().key_value_set(f"cpt_jax/farewell/{index}", "")
    sys.stdout.flush()
    if index == 0:
      # ORDER: the coordinator leaves last; jax aborts a process that loses it.
      _wait_for_farewells()
  # Not sys.exit: the main thread may hang, and jax's own farewell would wait minutes for the others.
  os._exit(code)


def _wait_for_farewells() -> None:
  deadline, missing = time.monotonic() + _FAREWELL_SECS, {0}
  while missing and time.monotonic() < deadline:
    time.sleep(_LISTEN_SECS)  # also for what they do after their farewell
    heard = {int(key.rsplit("/", 1)[1]) for key, _ in _client().key_value_dir_get("cpt_jax/farewell/")}
    missing = set(range(jax.process_count())) - heard
  if missing:
    _tell(f"no answer from process {', '.join(map(str, sorted(missing)))}: killed, or hanging; end what is left of it")


def _nth_use(name: str) -> int:
  """How often this process has used the name before: a key of the store is set once."""
  _uses[name] += 1
  return _uses[name]


def _wait_for(key: str, whom: str) -> str:
  """The value of a key as soon as it is set; a failure elsewhere ends the process meanwhile."""
  while True:
    try:
      return _client().blocking_key_value_get(key, int(_REMIND_SECS * 1000))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    _tell(f"process {jax.process_index()} on {socket.gethostname()}: waiting for {whom} ({key})")


def _client() -> Any:
  # jax has no public name for its key-value store; orbax and others reach for it here too.
  from jax._src import distributed

  return distributed.global_state.client


def _tell(text: str) -> None:
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr, flush=True)
