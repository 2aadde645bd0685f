"""`cpt launch tpu-vm`: one gcloud command, whose output is all workers'."""

from argparse import Namespace

from cpt_jax.cli import launching, manual
from cpt_jax.devices import launch


def parser() -> manual.Parser:
  """The flags."""
  p = launching.parser(
    "launch tpu-vm",
    """Runs the same command on every worker of a TPU VM, or of all slices of a queued resource, by gcloud; jax
    finds the pod and its slices by itself. The exit code is gcloud's.""",
    example="""cpt launch tpu-vm --tpu=mine --zone=us-east5-a --print -- --config=configs/domain.py --workdir=/gcs/runs/domain

    Shows the command for one slice.""",
  )
  p.flag("--tpu=NAME", "A TPU VM, one slice.")
  p.flag("--queued_resource=NAME", "A queued resource instead: a run over all of its slices.")
  p.flag("--zone", "Its zone, e.g. us-east5-a; gcloud's configured one by default.")
  p.flag("--project", "Its project; gcloud's configured one by default.")
  launching.add_flags(p, directory="cpt_jax", python="python3")
  return p


def run(args: Namespace) -> int:
  """Runs it, or prints the command."""
  of_hosts = launching.run_of(args, sees_our_disk=False)
  where = {"tpu": args.tpu, "queued_resource": args.queued_resource, "zone": args.zone, "project": args.project}
  gcloud = launch.on_tpu_vm(of_hosts, **where)
  return launching.run_or_print(args, gcloud, kind="tpu", why="it is part of the Google Cloud CLI (https://cloud.google.com/sdk)")
