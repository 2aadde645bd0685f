"""A run under Slurm: an sbatch script of one task for each node, submitted or printed.

Invariant: all nodes see --dir and the run's files; a job that ends before its run does has saved, and the same script goes on
from there.

Exit codes: sbatch's, 78 wrong settings.
"""

import shlex
import sys

import command
from absl import flags

from cpt_jax.config import ConfigError

_NODES = flags.DEFINE_integer("nodes", None, "Nodes, and so processes.", required=True, lower_bound=1)
_GPUS = flags.DEFINE_integer("gpus_per_node", 8, "GPUs of a node; 0 where Slurm does not count them.", lower_bound=0)
_CPUS = flags.DEFINE_integer(
  "cpus_per_task", 0, "Cores of a node that the process may use; 0 = what the partition gives.", lower_bound=0
)
_TIME = flags.DEFINE_string("time", None, "Limit, e.g. 1-00:00:00; the partition's by default.")
_PARTITION = flags.DEFINE_string("partition", None, "Partition.")
_NAME = flags.DEFINE_string("name", "cpt_jax", "Name of the job.")
_OUTPUT = flags.DEFINE_string("output", "%x-%j.out", "What the run prints; %x is the job's name, %j its number.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "Another option of sbatch, e.g. account=me; repeatable.")
_STOP_SECS = flags.DEFINE_integer("stop_secs", 180, "So long before the limit the run is told to save and end.", lower_bound=1)


def script(run: command.Run) -> str:
  """The script that sbatch is given."""
  options = {
    "job-name": _NAME.value,
    "nodes": _NODES.value,
    "ntasks-per-node": 1,
    "gpus-per-node": _GPUS.value or None,
    "cpus-per-task": _CPUS.value or None,
    "time": _TIME.value,
    "partition": _PARTITION.value,
    "output": _OUTPUT.value,
    # To the processes, not to this script: each of them tells the others, and all save the same step.
    "signal": f"TERM@{_STOP_SECS.value}",
    "requeue": "",
    "open-mode": "append",
  }
  options |= dict(option.partition("=")[::2] for option in _SBATCH.value)
  lines = [
    f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if value != "" else "")
    for name, value in options.items()
    if value is not None
  ]
  srun = ["srun", "--kill-on-bad-exit=1", *(["--label"] if _NODES.value > 1 else []), *run.arguments()]
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


def launch(run: command.Run) -> int:
  """Submits the script, or prints it."""
  text = script(run)
  if any("\n" in option for option in (_NAME.value, _OUTPUT.value, *_SBATCH.value)):
    raise ConfigError("an option of sbatch is one line: --name, --output and --sbatch take no line breaks")
  if command.PRINT.value:
    command.print_plan([text], kind="gpu")
    return 0
  return command.call(["sbatch"], why="it is Slurm's; start this on a login node of the cluster", stdin=text)


if __name__ == "__main__":
  command.start(launch, directory=str(command.ROOT), python=sys.executable, sees_our_disk=True)
