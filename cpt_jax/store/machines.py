"""How a store is to be made: in this machine's processes, or by datatrove's executors on one machine or many.

Invariant: everything that is wrong with what was asked is said at once, before datatrove is imported.
"""

import importlib.util
import os
import pathlib
import shutil
from typing import Any

from cpt_jax.config import Problems, did_you_mean
from cpt_jax.store import decontaminate
from cpt_jax.store.prepare import PrepareReport
from cpt_jax.store.work import Asked, Task

FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
EXECUTORS = ("local", "slurm", "ray")


def check(inputs: list[str], asked: Asked, task: Task, *, dry_run: bool) -> None:
  """Raises a ConfigError that lists all that is wrong."""
  problems, records = Problems(), task.rules.records
  given = {"input": inputs, "tokenizer": task.tokenizer, "output": task.output}
  if missing := [f"--{name}" for name, value in given.items() if not value]:
    problems.add(f"{' and '.join(missing)} missing, e.g. --input='texts/*.jsonl' --tokenizer=path/to/base --output=store/name")
  for name in (name for name in asked.filters if name not in FILTERS):
    problems.add(f"--filters: {name!r} is none of {', '.join(FILTERS)}.{did_you_mean(name, list(FILTERS))}")
  if "c4" in asked.filters and records != "text":
    problems.add(f"--filters=c4: takes lines out of texts, which --records={records} do not have; leave it out")
  for name in "max_tasks", "cpus_per_task", "mem_per_cpu_gb":
    if getattr(asked, name) < 1:
      problems.add(f"--{name}={getattr(asked, name)}: must be 1 or more")
  if asked.num_workers < 0:
    problems.add(f"--num_workers={asked.num_workers}: must be 1 or more, or 0 for no limit")
  if importlib.util.find_spec("datatrove") is None:
    problems.add("datatrove is not installed; add it with: pip install 'cpt_jax[prep]'")
  if asked.executor == "ray" and importlib.util.find_spec("ray") is None:
    problems.add("--executor=ray: ray is not installed; add it with: pip install ray")
  if asked.executor == "slurm":
    problems.lines += [f"--{name} missing, which Slurm needs" for name in ("partition", "time") if not getattr(asked, name)]
    problems.lines += [f"--sbatch={o!r}: expected name=value, e.g. account=me" for o in asked.sbatch if "=" not in o]
    if not dry_run and shutil.which("sbatch") is None:
      problems.add("--executor=slurm: there is no sbatch on the PATH; give the command on a login node of the cluster")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
      problems.add("--executor=slurm: this is a task of a Slurm job already; give the command on a login node")
  problems.raise_if_any()


def prepare(
  inputs: list[str], asked: Asked, *, task: Task, contamination: decontaminate.Contamination | None = None, dry_run: bool = False
) -> list[str]:
  """Prepares a store by datatrove's executors, or with `dry_run` only says how; returns lines for people.
  Raises ConfigError: settings; DataError: bad records; OSError: the disk."""
  check(inputs, asked, task, dry_run=dry_run)
  from cpt_jax.store import cluster

  work: dict[str, Any] = {"task": task, "contamination": contamination}
  if dry_run:
    return cluster.describe(asked, inputs, **work)
  report: PrepareReport | None = cluster.prepare_on(asked, inputs, **work)
  if report is None:
    job = f"{pathlib.Path(task.output).name}-store"
    return [f"{task.output}: handed to Slurm; the job {job} finishes it. Logs: {task.output}.work"]
  return report.lines()
