"""A run on every worker of a TPU VM, or of all slices of a queued resource: one gcloud command, whose output is all workers'.

Invariant: the same command everywhere; jax finds the pod and its slices by itself.

Exit codes: gcloud's, 78 wrong settings.
"""

import shlex

import command
from absl import flags

from cpt_jax.config import ConfigError

_TPU = flags.DEFINE_string("tpu", None, "Name of a TPU VM, one slice.")
_QUEUED_RESOURCE = flags.DEFINE_string(
  "queued_resource", None, "Name of a queued resource instead: a run over all of its slices."
)
_ZONE = flags.DEFINE_string("zone", None, "Its zone, e.g. us-east5-a; gcloud's configured one by default.")
_PROJECT = flags.DEFINE_string("project", None, "Its project; gcloud's configured one by default.")


def launch(run: command.Run) -> int:
  """Runs it, or prints the command."""
  if bool(_TPU.value) == bool(_QUEUED_RESOURCE.value):
    raise ConfigError("name the TPUs: either --tpu=NAME (one slice) or --queued_resource=NAME (all of its slices)")
  group, name = ("tpu-vm", _TPU.value) if _TPU.value else ("queued-resources", _QUEUED_RESOURCE.value)
  where = [f"--{flag}={value}" for flag, value in (("zone", _ZONE.value), ("project", _PROJECT.value)) if value]
  everywhere = ["--worker=all"] if _TPU.value else ["--node=all", "--worker=all"]
  gcloud = ["gcloud", "compute", "tpus", group, "ssh", name, *where, *everywhere, f"--command={run.shell()}"]
  if command.PRINT.value:
    command.print_plan([shlex.join(gcloud)], kind="tpu")
    return 0
  return command.call(gcloud, why="it is part of the Google Cloud CLI (https://cloud.google.com/sdk)")


if __name__ == "__main__":
  command.start(launch, directory="cpt_jax", python="python3", sees_our_disk=False)
