"""A run under Slurm: an sbatch script of one task for each node, submitted or printed.

Invariant: all nodes see the run's directory and files; a job that ends before its run does has saved, and the same script goes
on from there.
"""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from cpt_jax.config import ConfigError
from cpt_jax.launch import command


class Job(NamedTuple):
  """What Slurm is told about a run."""

  name: str
  nodes: int  # and so processes
  gpus_per_node: int  # 0 where Slurm does not count them
  cpus_per_task: int  # cores of a node that the process may use; 0 = what the partition gives
  time: str  # limit, e.g. 1-00:00:00; "" = the partition's
  partition: str  # "" = the cluster's own choice
  output: str  # file of what the run prints; %x is the job's name, %j its number
  stop_secs: int  # so long before the limit the run is told to save and end
  more: Sequence[str] = ()  # other options of sbatch, e.g. account=me


def script(run: command.Run, job: Job) -> str:
  """The script that sbatch is given."""
  options = {
    "job-name": job.name,
    "nodes": job.nodes,
    "ntasks-per-node": 1,
    "gpus-per-node": job.gpus_per_node or None,
    "cpus-per-task": job.cpus_per_task or None,
    "time": job.time or None,
    "partition": job.partition or None,
    "output": job.output,
    # To the processes, not to this script: each of them tells the others, and all save the same step.
    "signal": f"TERM@{job.stop_secs}",
    "requeue": "",
    "open-mode": "append",
  }
  options |= dict(option.partition("=")[::2] for option in job.more)
  lines = [
    f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if value != "" else "")
    for name, value in options.items()
    if value is not None
  ]
  srun = ["srun", "--kill-on-bad-exit=1", *(["--label"] if job.nodes > 1 else []), *run.arguments()]
  return "\n".join(
    [
      "#!/bin/bash",
      *lines,
      f"cd {shlex.quote(run.directory)} || exit 78",
      shlex.join(srun),
      "code=$?",
      "# 75: stopped by the signal, with everything saved. The job goes back into the queue and on from there.",
      'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
      'exit "$code"',
      "",
    ]
  )


def launch(run: command.Run, job: Job, *, only_print: bool) -> int:
  """Submits the script, or prints it; the exit code is sbatch's.

  Raises:
    ConfigError: a mistake in the options of the run or of the job, or no sbatch.
  """
  command.check(run, sees_our_disk=True)
  if any("\n" in option for option in (job.name, job.output, *job.more)):
    raise ConfigError("an option of sbatch is one line: --name, --output and --sbatch take no line breaks")
  text = script(run, job)
  if only_print:
    command.print_plan([text], kind="gpu")
    return 0
  return command.call(["sbatch"], why="it is Slurm's; start this on a login node of the cluster", stdin=text)
