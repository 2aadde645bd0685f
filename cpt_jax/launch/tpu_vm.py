"""A run on every worker of a TPU VM, or of all slices of a queued resource: one gcloud command, whose output is all workers'.

Invariant: the same command everywhere; jax finds the pod and its slices by itself.
"""

import shlex

from cpt_jax.config import ConfigError
from cpt_jax.launch import command


def launch(run: command.Run, *, tpu: str, queued_resource: str, zone: str, project: str, only_print: bool) -> int:
  """Starts the run and follows it, or prints the command; the exit code is gcloud's.

  Args:
    run: its directory is that of the clone on every worker.
    tpu: name of a TPU VM, one slice; "" = none.
    queued_resource: name of a queued resource instead, for a run over all of its slices; "" = none.
    zone: e.g. us-east5-a; "" = gcloud's configured one.
    project: "" = gcloud's configured one.
    only_print: runs nothing.

  Raises:
    ConfigError: a mistake in the run's options, neither or both names, or no gcloud.
  """
  command.check(run, sees_our_disk=False)
  if bool(tpu) == bool(queued_resource):
    raise ConfigError("name the TPUs: either --tpu=NAME (one slice) or --queued_resource=NAME (all of its slices)")
  group, name = ("tpu-vm", tpu) if tpu else ("queued-resources", queued_resource)
  where = [f"--{flag}={value}" for flag, value in (("zone", zone), ("project", project)) if value]
  everywhere = ["--worker=all"] if tpu else ["--node=all", "--worker=all"]
  gcloud = ["gcloud", "compute", "tpus", group, "ssh", name, *where, *everywhere, f"--command={run.shell()}"]
  if only_print:
    command.print_plan([shlex.join(gcloud)], kind="tpu")
    return 0
  return command.call(gcloud, why="it is part of the Google Cloud CLI (https://cloud.google.com/sdk)")
