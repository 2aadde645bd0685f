"""The processes of one run over several hosts, real ones over loopback, and what it has trained so far."""

import contextlib
import os
import socket
import subprocess
import sys
import time

from cpt_jax import journal


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def by_flags(port: int, num: int, i: int):
  return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num}", f"--process_id={i}"], {}


def by_slurm(port: int, num: int, i: int):
  step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": str(num), "SLURM_NTASKS": str(num)}
  return [], {**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(port)}


def by_open_mpi(port: int, num: int, i: int):
  uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "JAX_COORDINATOR_PORT": str(port)}
  rank = {"SIZE": num, "RANK": i, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
  return [], {**uri, **{f"OMPI_COMM_WORLD_{key}": str(value) for key, value in rank.items()}}


class Fleet:
  """The processes of one run, started together; `each` adds options and `cwds` a working directory to one of them."""

  def __init__(self, root, place, workdir, *options, num, launcher=by_flags, each=None, cwds=None, python_paths=None):
    self.num, self.workdir = num, workdir
    self._log = workdir.parent / f"{workdir.name}-output"
    self._log.mkdir(exist_ok=True)
    port = free_port()
    self.processes = []
    for i in range(num):
      flags, started_by = launcher(port, num, i) if num > 1 else ([], {})
      env = {**os.environ, "PYTHONPATH": str((python_paths or {}).get(i, root)), "JAX_NUM_CPU_DEVICES": "1", **started_by}
      command = [sys.executable, "-m", "cpt_jax.main", f"--config={place}/config.py", f"--workdir={workdir}", *flags, *options]
      with open(self._log / f"{i}.out", "w") as out, open(self._log / f"{i}.err", "w") as err:
        self.processes.append(
          subprocess.Popen(
            [*command, *(each or {}).get(i, [])], cwd=(cwds or {}).get(i, place), env=env, stdout=out, stderr=err, text=True
          )
        )

  def codes(self, timeout=240):
    """Exit codes of all; on a timeout all are killed."""
    try:
      return [process.wait(timeout=timeout) for process in self.processes]
    except subprocess.TimeoutExpired:
      self.kill()
      raise AssertionError(f"hanging: {self}") from None

  def kill(self):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.wait()

  def until(self, is_so):
    while not is_so() and all(process.poll() is None for process in self.processes):
      time.sleep(0.02)
    assert is_so(), str(self)

  def out(self, i):
    return (self._log / f"{i}.out").read_text()

  def err(self, i):
    return (self._log / f"{i}.err").read_text()

  def __str__(self):
    return "\n".join(f"---- process {i}\n{self.out(i)}{self.err(i)[-3000:]}" for i in range(self.num))


def trained(workdir):
  return [record for record in journal.read(workdir / "metrics.jsonl") if record["kind"] == "train"]
