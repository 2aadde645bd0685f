"""A run on TPU slices of a GKE cluster, as one XPK workload.

Invariant: the image has a clone and its dependencies at the run's directory; jax finds the slices by itself.
"""

import shlex
from typing import NamedTuple

from cpt_jax.launch import command


class Workload(NamedTuple):
  """What XPK is told about a run."""

  cluster: str
  name: str  # that the run gets there
  tpu_type: str  # a slice, e.g. v5p-64
  image: str  # of Docker, which has cpt_jax
  num_slices: int  # mesh.data must be a multiple
  max_restarts: int  # after a failure; each goes on from the newest checkpoint
  zone: str  # "" = gcloud's configured one
  project: str  # the same


def launch(run: command.Run, workload: Workload, *, only_print: bool) -> int:
  """Submits it, or prints the command; the exit code is xpk's.

  Raises:
    ConfigError: a mistake in the run's options, or no xpk.
  """
  command.check(run, sees_our_disk=False)
  given = {
    "cluster": workload.cluster,
    "workload": workload.name,
    "tpu-type": workload.tpu_type,
    "num-slices": workload.num_slices,
    "docker-image": workload.image,
    "max-restarts": workload.max_restarts,
    "zone": workload.zone,
    "project": workload.project,
    "command": run.shell(),
  }
  xpk = ["xpk", "workload", "create", *(f"--{name}={value}" for name, value in given.items() if value != "")]
  if only_print:
    command.print_plan([shlex.join(xpk)], kind="tpu")
    return 0
  return command.call(xpk, why="it is installed by pip install xpk (https://github.com/AI-Hypercomputer/xpk)")
