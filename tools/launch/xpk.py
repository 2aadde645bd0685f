"""A run on TPU slices of a GKE cluster, as one XPK workload.

Invariant: the image has this clone at --dir and its dependencies; jax finds the slices by itself.

Exit codes: xpk's, 78 wrong settings.
"""

import shlex

import command
from absl import flags

_CLUSTER = flags.DEFINE_string("cluster", None, "Name of the cluster.", required=True)
_WORKLOAD = flags.DEFINE_string("workload", None, "Name that the run gets there.", required=True)
_TPU_TYPE = flags.DEFINE_string("tpu_type", None, "A slice, e.g. v5p-64.", required=True)
_IMAGE = flags.DEFINE_string("image", None, "Docker image that has cpt_jax.", required=True)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices; mesh.data must be a multiple.", lower_bound=1)
_ZONE = flags.DEFINE_string("zone", None, "Its zone; gcloud's configured one by default.")
_PROJECT = flags.DEFINE_string("project", None, "Its project; gcloud's configured one by default.")
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 10, "Starts after a failure; each goes on from the newest checkpoint.", lower_bound=0
)


def launch(run: command.Run) -> int:
  """Submits it, or prints the command."""
  given = {
    "cluster": _CLUSTER.value,
    "workload": _WORKLOAD.value,
    "tpu-type": _TPU_TYPE.value,
    "num-slices": _NUM_SLICES.value,
    "docker-image": _IMAGE.value,
    "max-restarts": _MAX_RESTARTS.value,
    "zone": _ZONE.value,
    "project": _PROJECT.value,
    "command": run.shell(),
  }
  xpk = ["xpk", "workload", "create", *(f"--{name}={value}" for name, value in given.items() if value is not None)]
  if command.PRINT.value:
    command.print_plan([shlex.join(xpk)], kind="tpu")
    return 0
  return command.call(xpk, why="it is installed by pip install xpk (https://github.com/AI-Hypercomputer/xpk)")


if __name__ == "__main__":
  command.start(launch, directory="/app", python="python3", sees_our_disk=False)
