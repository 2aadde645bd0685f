"""`cpt launch xpk`: a run on TPU slices of a GKE cluster, as one XPK workload."""

import shlex
from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import launching, manual
from cpt_jax.devices import launch


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "launch xpk",
    description="""
    Submits a run as one workload of XPK. The image has cpt_jax at --dir and its dependencies; jax finds the slices by
    itself. The exit code is xpk's."""
    + launching.ABOUT,
    example="""
    cpt launch xpk --cluster=c --workload=domain --tpu_type=v5p-64 --image=gcr.io/me/cpt --print -- --config=configs/domain.py

    Shows the command.""",
    rest=launching.REST,
  )
  p.add_argument("--cluster", required=True, metavar="NAME", help="The cluster.")
  p.add_argument("--workload", required=True, metavar="NAME", help="What the run is called there.")
  p.add_argument("--tpu_type", required=True, metavar="TYPE", help="A slice, e.g. v5p-64.")
  p.add_argument("--image", required=True, help="Docker image that has cpt_jax.")
  p.add_argument(
    "--num_slices", type=manual.at_least(1), default=1, metavar="N", help="Slices; mesh.data must be a multiple. 1 by default."
  )
  p.add_argument("--zone", help="Its zone; gcloud's configured one by default.")
  p.add_argument("--project", help="Its project; gcloud's configured one by default.")
  p.add_argument(
    "--max_restarts", type=manual.at_least(0), default=10, metavar="N",
    help="Starts after a failure; each goes on from the newest checkpoint. 10 by default.",
  )  # fmt: skip
  launching.add_flags(p, directory="/app", python="python3")
  return p


def run(args: Namespace) -> int:
  """Submits it, or prints the command."""
  options = {
    "cluster": args.cluster,
    "workload": args.workload,
    "tpu-type": args.tpu_type,
    "num-slices": args.num_slices,
    "docker-image": args.image,
    "max-restarts": args.max_restarts,
    "zone": args.zone,
    "project": args.project,
  }
  xpk = launch.by_xpk(launching.run_of(args, sees_our_disk=False), options)
  if args.print:
    launch.print_plan([shlex.join(xpk)], kind="tpu")
    return exits.DONE
  return launch.call(xpk, why="it is installed by pip install xpk (https://github.com/AI-Hypercomputer/xpk)")
