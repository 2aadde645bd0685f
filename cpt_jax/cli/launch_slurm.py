"""`cpt launch slurm`: an sbatch script of one task for each node, submitted or printed."""

import sys
from argparse import Namespace

from cpt_jax.cli import launching, manual
from cpt_jax.devices import launch


def parser() -> manual.Parser:
  """The flags."""
  p = launching.parser(
    "launch slurm",
    """Submits a script of one task for each node. All nodes see --dir and the run's files. A job that ends before
    its run does has saved, goes back into the queue, and on from there. The exit code is sbatch's.""",
    example="""cpt launch slurm --nodes=2 --time=1-00:00:00 --print -- --config=configs/domain.py --workdir=/shared/runs/domain

    Shows the script.""",
  )
  p.flag("--nodes=N", "Nodes, and so processes.", low=1, required=True)
  p.flag("--gpus_per_node=N", "GPUs of a node; 0 where Slurm does not count them. 8 by default.", 8, low=0)
  p.flag("--cpus_per_task=N", "Cores of a node that the process may use; 0, the default, is what the partition gives.", 0, low=0)
  p.flag("--time", "Limit, e.g. 1-00:00:00; the partition's by default.", None)
  p.flag("--partition=NAME", "Partition.", None)
  p.flag("--name", "Name of the job.", "cpt_jax")
  p.flag("--output=FILE", "What the run prints; %%x is the job's name, %%j its number.", "%x-%j.out")
  p.repeated("--sbatch=NAME=VALUE", "Another option of sbatch, e.g. account=me; repeatable.")
  p.flag("--stop_secs=N", "So long before the limit the run is told to save and end. 180 by default.", 180, low=1)
  launching.add_flags(p, directory=launch.home(), python=sys.executable)
  return p


def run(args: Namespace) -> int:
  """Submits the script, or prints it."""
  options = {"job-name": args.name, "nodes": args.nodes, "ntasks-per-node": 1, "gpus-per-node": args.gpus_per_node or None}
  options |= {"cpus-per-task": args.cpus_per_task or None, "time": args.time, "partition": args.partition, "output": args.output}
  of_nodes = launching.run_of(args, sees_our_disk=True)
  script = launch.slurm_script(of_nodes, options, args.sbatch, nodes=args.nodes, stop_secs=args.stop_secs)
  why = "it is Slurm's; start this on a login node of the cluster"
  return launching.run_or_print(args, ["sbatch"], kind="gpu", why=why, stdin=script)
