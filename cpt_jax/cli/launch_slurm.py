"""`cpt launch slurm`: an sbatch script of one task for each node, submitted or printed."""

import sys
from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import launching, manual
from cpt_jax.devices import launch


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "launch slurm",
    description="""
    Submits a script of one task for each node. All nodes see --dir and the run's files. A job that ends before its
    run does has saved, goes back into the queue, and on from there. The exit code is sbatch's."""
    + launching.ABOUT,
    example="""
    cpt launch slurm --nodes=2 --time=1-00:00:00 --print -- --config=configs/domain.py --workdir=/shared/runs/domain

    Shows the script.""",
    rest=launching.REST,
  )
  p.add_argument("--nodes", type=manual.at_least(1), required=True, metavar="N", help="Nodes, and so processes.")
  p.add_argument(
    "--gpus_per_node", type=manual.at_least(0), default=8, metavar="N",
    help="GPUs of a node; 0 where Slurm does not count them. 8 by default.",
  )  # fmt: skip
  p.add_argument(
    "--cpus_per_task", type=manual.at_least(0), default=0, metavar="N",
    help="Cores of a node that the process may use; 0, the default, is what the partition gives.",
  )  # fmt: skip
  p.add_argument("--time", help="Limit, e.g. 1-00:00:00; the partition's by default.")
  p.add_argument("--partition", metavar="NAME", help="Partition.")
  p.add_argument("--name", default="cpt_jax", help="Name of the job.")
  p.add_argument(
    "--output", default="%x-%j.out", metavar="FILE", help="What the run prints; %%x is the job's name, %%j its number."
  )
  p.add_argument(
    "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="Another option of sbatch, e.g. account=me; repeatable."
  )
  p.add_argument(
    "--stop_secs", type=manual.at_least(1), default=180, metavar="N",
    help="So long before the limit the run is told to save and end. 180 by default.",
  )  # fmt: skip
  launching.add_flags(p, directory=launch.home(), python=sys.executable)
  return p


def run(args: Namespace) -> int:
  """Submits the script, or prints it."""
  options = {
    "job-name": args.name,
    "nodes": args.nodes,
    "ntasks-per-node": 1,
    "gpus-per-node": args.gpus_per_node or None,
    "cpus-per-task": args.cpus_per_task or None,
    "time": args.time,
    "partition": args.partition,
    "output": args.output,
  }
  of_nodes = launching.run_of(args, sees_our_disk=True)
  script = launch.slurm_script(of_nodes, options, args.sbatch, nodes=args.nodes, stop_secs=args.stop_secs)
  if args.print:
    launch.print_plan([script], kind="gpu")
    return exits.DONE
  return launch.call(["sbatch"], why="it is Slurm's; start this on a login node of the cluster", stdin=script)
