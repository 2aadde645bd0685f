"""`cpt launch xpk`: a run on TPU slices of a GKE cluster, as one XPK workload."""

from argparse import Namespace

from cpt_jax.cli import launching, manual
from cpt_jax.devices import launch


def parser() -> manual.Parser:
  """The flags."""
  p = launching.parser(
    "launch xpk",
    """Submits a run as one workload of XPK. The image has cpt_jax at --dir and its dependencies; jax finds the
    slices by itself. The exit code is xpk's.""",
    example="""
    cpt launch xpk --cluster=c --workload=domain --tpu_type=v5p-64 --image=gcr.io/me/cpt --print -- --config=configs/domain.py

    Shows the command.""",
  )
  p.flag("--cluster=NAME", "The cluster.", required=True)
  p.flag("--workload=NAME", "What the run is called there.", required=True)
  p.flag("--tpu_type=TYPE", "A slice, e.g. v5p-64.", required=True)
  p.flag("--image", "Docker image that has cpt_jax.", required=True)
  p.flag("--num_slices=N", "Slices; mesh.data must be a multiple. 1 by default.", 1, low=1)
  p.flag("--zone", "Its zone; gcloud's configured one by default.", None)
  p.flag("--project", "Its project; gcloud's configured one by default.", None)
  p.flag("--max_restarts=N", "Starts after a failure; each goes on from the newest checkpoint. 10 by default.", 10, low=0)
  launching.add_flags(p, directory="/app", python="python3")
  return p


def run(args: Namespace) -> int:
  """Submits it, or prints the command."""
  names = ("cluster", "workload", "tpu_type", "num_slices", "docker_image", "max_restarts", "zone", "project")
  options = {name.replace("_", "-"): getattr(args, name.removeprefix("docker_")) for name in names}
  xpk = launch.by_xpk(launching.run_of(args, sees_our_disk=False), options)
  why = "it is installed by pip install xpk (https://github.com/AI-Hypercomputer/xpk)"
  return launching.run_or_print(args, xpk, kind="tpu", why=why)
