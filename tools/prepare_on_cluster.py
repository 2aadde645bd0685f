"""Raw text files -> a token store by datatrove's executors (cpt_jax.store.cluster): this machine, Slurm or Ray.

Invariant: the same command, given again, does what is not done yet; the store is the one that tools/prepare_data.py makes. (as
tools/prepare_data.py, whose flags and exit codes this has too).
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone that is not installed

import prepare_data

from cpt_jax.config import Problems, did_you_mean
from cpt_jax.store.prepare import Task

_FILTER_NAMES = ("gopher_repetition", "gopher_quality", "c4", "fineweb")

_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "slurm", "ray"], "Where the tasks run.")
_MAX_TASKS = flags.DEFINE_integer(
  "max_tasks", 256, "Tasks in a stage at most, and so token files; each has 8 MiB of input or more."
)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Say what would be done, with the scripts of Slurm, and write nothing.")
_FILTERS = flags.DEFINE_list("filters", [], f"datatrove's rules for English web text, in this order: {','.join(_FILTER_NAMES)}.")
_DEDUP = flags.DEFINE_boolean("dedup", False, "Keep one document of those that are nearly alike (datatrove's MinHash).")
_LANGUAGE = flags.DEFINE_string("language", "", "datatrove's splitter of words, e.g. eng (needs its packages); empty = our own.")
_CPUS_PER_TASK = flags.DEFINE_integer("cpus_per_task", 1, "slurm, ray: cores of a task.")
_MEM_PER_CPU_GB = flags.DEFINE_integer("mem_per_cpu_gb", 4, "slurm, ray: memory of a task for each of its cores.")
_PARTITION = flags.DEFINE_string("partition", "", "slurm: partition.")
_TIME = flags.DEFINE_string("time", "", "slurm: limit of a task, e.g. 04:00:00.")
_QOS = flags.DEFINE_string("qos", "", "slurm: quality of service.")
_ENV_COMMAND = flags.DEFINE_string("env_command", "", "slurm: first line of a job; empty = activates this virtual environment.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "slurm: another option of sbatch, e.g. account=me; repeatable.")


def run() -> list[str]:
  """Does what the flags ask for; returns the lines to print."""
  _check()
  from cpt_jax.store import cluster

  values = flags.FLAGS
  machines = cluster.Machines(
    executor=_EXECUTOR.value,
    workers=values.num_workers,
    cpus_per_task=_CPUS_PER_TASK.value,
    mem_per_cpu_gb=_MEM_PER_CPU_GB.value,
    partition=_PARTITION.value,
    time=_TIME.value,
    qos=_QOS.value,
    env_command=_ENV_COMMAND.value,
    sbatch_args=dict(option.split("=", 1) for option in _SBATCH.value),
  )
  task = Task(
    output=values.output,
    tokenizer=values.tokenizer,
    eos_token=values.eos_token,
    records=values.records,
    train_on=values.train_on,
    text_field=values.text_field or values.records,
    answer_field=values.answer_field,
    max_document_bytes=int(values.max_document_mb * (1 << 20)),
    on_bad=values.on_bad,
    max_bad=values.max_bad,
  )
  work = {
    "task": task,
    "contamination": prepare_data.contamination(),
    "selection": cluster.Selection(_FILTERS.value, _DEDUP.value, _LANGUAGE.value),
    "max_units": _MAX_TASKS.value,
  }
  if _DRY_RUN.value:
    return cluster.describe(machines, values.input, **work)
  report = cluster.prepare_on(machines, values.input, **work)
  if report is None:
    return [f"{task.output}: handed to Slurm; the job {Path(task.output).name}-store finishes it. Logs: {task.output}.work"]
  return report.lines()


def _check() -> None:
  """Raises a ConfigError that lists all that is wrong with the flags."""
  problems, values = Problems(), flags.FLAGS
  missing = [f"--{name}" for name in ("input", "tokenizer", "output") if not getattr(values, name)]
  if missing:
    problems.add(f"{' and '.join(missing)} missing, e.g. --input 'texts/*.jsonl' --tokenizer path/to/base --output store/name")
  for name in [n for n in _FILTERS.value if n not in _FILTER_NAMES]:
    problems.add(f"--filters: {name!r} is none of {', '.join(_FILTER_NAMES)}.{did_you_mean(name, list(_FILTER_NAMES))}")
  if "c4" in _FILTERS.value and values.records != "text":
    problems.add(f"--filters=c4: takes lines out of texts, which --records={values.records} do not have; leave it out")
  for name in "max_tasks", "cpus_per_task", "mem_per_cpu_gb":
    if values[name].value < 1:
      problems.add(f"--{name}={values[name].value}: must be 1 or more")
  if values.num_workers < 0:
    problems.add(f"--num_workers={values.num_workers}: must be 1 or more, or 0 for no limit")
  if importlib.util.find_spec("datatrove") is None:
    problems.add("datatrove is not installed; add it with: pip install 'cpt_jax[prep]'")
  if _EXECUTOR.value == "ray" and importlib.util.find_spec("ray") is None:
    problems.add("--executor=ray: ray is not installed; add it with: pip install ray")
  if _EXECUTOR.value == "slurm":
    problems.lines += [f"--{name} missing, which Slurm needs" for name in ("partition", "time") if not values[name].value]
    problems.lines += [f"--sbatch={o!r}: expected name=value, e.g. account=me" for o in _SBATCH.value if "=" not in o]
    if not _DRY_RUN.value and shutil.which("sbatch") is None:
      problems.add("--executor=slurm: there is no sbatch on the PATH; give the command on a login node of the cluster")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
      problems.add("--executor=slurm: this is a task of a Slurm job already; give the command on a login node")
  problems.raise_if_any()


def main(argv: list[str]) -> int:
  """Exit code, after printing what was done or what is wrong."""
  return prepare_data.finish(argv, run)


if __name__ == "__main__":
  app.run(main)
