"""Raw text files -> a token store, by datatrove's executors: this machine, Slurm or Ray; with filters and deduplication.

Invariant: a unit of work is done by the same code as in store.prepare, so without filters the store's files are the same bytes.

The phases: with deduplication `signatures` (a task for each unit), `buckets` (a task for each bucket of MinHash) and
`clusters` (one task), which find near-duplicates; then `tokens` (a task for each unit). datatrove marks finished tasks in
`OUTPUT.work/PHASE/completions`. The end of it, `store.json`, is written by the caller, or under Slurm by one more phase.
"""

import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datatrove.data
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from cpt_jax.config import ConfigError
from cpt_jax.journal import write_atomically
from cpt_jax.store import decontaminate, documents, prepare, units, work
from cpt_jax.store.prepare import PrepareReport
from cpt_jax.store.records import Document
from cpt_jax.store.units import InputFile
from cpt_jax.store.work import Asked, Job, Task

FILTERS = {
  "gopher_repetition": GopherRepetitionFilter,
  "gopher_quality": GopherQualityFilter,
  "c4": C4QualityFilter,
  "fineweb": FineWebQualityFilter,
}
NEAR_DUPLICATE = "near-duplicate"


class Words(WordTokenizer):
  """Splits text of any language without models: runs of letters and digits, signs, and each character of spaceless scripts."""

  _ALONE = "".join(f"{chr(first)}-{chr(last)}" for first, last in decontaminate.SPACELESS)
  _WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")
  _SENTENCE_END = re.compile(r"[.!?\u2026]+[\"')\]\u201d]*(?=\s|$)|[\u3002\uff01\uff1f]+[\"'\u201d\u300d\u300f]*")

  def word_tokenize(self, text: str) -> list[str]:
    """The words."""
    return self._WORD.findall(text)

  def sent_tokenize(self, text: str) -> list[str]:
    """The sentences."""
    return [text[a:b].strip() for a, b in self.span_tokenize(text)]

  def span_tokenize(self, text: str) -> list[tuple[int, int]]:
    """The sentences as (first character, end)."""
    edges = [0, *(match.end() for match in self._SENTENCE_END.finditer(text)), len(text)]
    return [(a, b) for a, b in itertools.pairwise(edges) if text[a:b].strip()]


WORDS = Words()


def selection(asked: Asked) -> dict[str, Any] | None:
  """What decides which documents are in the store, apart from evaluation texts; None where every document is kept."""
  if not asked.filters and not asked.dedup:
    return None
  minhash_says = str(minhash_config()) if asked.dedup else ""
  return {"filters": list(asked.filters), "minhash": minhash_says, "language": asked.language}


def filters(asked: Asked) -> list[tuple[str, PipelineStep]]:
  """The filters by name."""
  return [(name, FILTERS[name](language=asked.language or WORDS)) for name in asked.filters]


def minhash_config() -> minhash.MinhashConfig:
  """datatrove's own, FineWeb's: 5-grams, 14 buckets of 8 hashes, which finds documents from about 0.75 alike."""
  return minhash.MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # its default, xxhash, is one more package


# The steps.


class _Step(PipelineStep):
  """Runs where the command was given, since paths may be relative and the workers of Ray start elsewhere."""

  type = "cpt_jax"

  def __init__(self):
    super().__init__()
    self._directory = os.getcwd()

  def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
    os.chdir(self._directory)
    return self.run(data, rank, world_size)


class Texts(_Step):
  """The documents of a unit, for other steps."""

  name = "texts"

  def __init__(self, job: Job):
    super().__init__()
    self._job = job

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[datatrove.data.Document]:
    """Yields them; bad records are listed by the phase that writes tokens."""
    for piece in self._job.units[rank]:
      for record in documents.open_part(piece.part, self._job.task.rules):
        if isinstance(record, Document):
          yield _to_datatrove(record)


class Tokens(_Step):
  """Writes the token file of a unit, as store.prepare does, of the documents that pass the filters."""

  name = "tokens"

  def __init__(self, job: Job, steps: list[tuple[str, PipelineStep]], *, num_threads: int):
    super().__init__()
    self._job, self._steps, self._num_threads = job, steps, num_threads

  def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Does unit `rank`."""
    os.environ["RAYON_NUM_THREADS"] = str(self._num_threads)  # of the tokenizers library
    with self.track_time("unit"):
      work.run_unit(self._job, rank, self._select)

  def _select(self, number: int, found: Iterable[Document], left_out: dict[str, int]) -> Iterator[Document]:
    passed: Any = map(_to_datatrove, found)
    for _, step in self._steps:
      passed = step.run(passed, number, len(self._job.units))
    yield from map(_from_datatrove, passed)
    for name, step in self._steps:
      counts = {label: int(stat.total) for label, stat in step.stats.stats.items()}
      reasons = {label.removeprefix("dropped_"): n for label, n in counts.items() if label.startswith("dropped_")}
      left_out |= {f"{name}: {reason}": number for reason, number in reasons.items()}
      left_out[name] = counts.get("dropped", 0) - sum(reasons.values())


def _to_datatrove(document: Document) -> datatrove.data.Document:
  return datatrove.data.Document(document.text, id=f"{document.file}:{document.line}", metadata={"document": document})


def _from_datatrove(passed: datatrove.data.Document) -> Document:
  document = passed.metadata["document"]
  if passed.text == document.text:
    return document
  return document._replace(text=passed.text, utf8=passed.text.encode("utf-8"))  # C4's filter leaves out lines


class Close(_Step):
  """Writes `store.json` when all units are done."""

  name = "store"

  def __init__(self, arguments: dict[str, Any]):
    super().__init__()
    self._arguments = arguments

  def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Does so, and prints the summary."""
    report = prepare.prepare_with(_check_done, **self._arguments)
    assert report is not None
    print("\n".join(report.lines()))


def _check_done(job: Job, loaded: Any = None) -> bool:
  missing = [i for i, marker in enumerate(units.read_markers(job.task.output, job.units)) if marker is None]
  if missing:
    raise ConfigError(
      f"--output {job.task.output}: {len(missing)} of {len(job.units)} units are not done (the first: {missing[0]}), or their "
      f"texts were changed meanwhile; see {work_directory(job.task.output)}/tokens/logs and give the same command again"
    )
  return True


# The phases.


class Phase(NamedTuple):
  """Tasks that can run at the same time, after those of the phase before."""

  name: str
  num_tasks: int
  pipeline: list[PipelineStep]


def work_directory(output: str) -> Path:
  """Where logs, finished tasks and signatures are; may be removed when the store is finished."""
  return Path(f"{output.rstrip(os.sep)}.work")


def phases(job: Job, asked: Asked, *, num_threads: int) -> list[Phase]:
  """All phases up to the token files."""
  found, steps, num_units = [], filters(asked), len(job.units)
  folder = str(work_directory(job.task.output).absolute() / "minhash")
  if asked.dedup:
    config = minhash_config()
    words: Any = asked.language or WORDS
    signature = minhash.MinhashDedupSignature(f"{folder}/signatures", config=config, language=words)
    buckets = minhash.MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)
    clusters = minhash.MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config)
    found.append(Phase("signatures", num_units, [Texts(job), *(step for _, step in steps), signature]))
    found += [Phase("buckets", config.num_buckets, [buckets]), Phase("clusters", 1, [clusters])]
    steps = [*filters(asked), (NEAR_DUPLICATE, minhash.MinhashDedupFilter(f"{folder}/remove"))]
  return [*found, Phase("tokens", num_units, [Tokens(job, steps, num_threads=num_threads)])]


def prepare_on(
  asked: Asked, inputs: list[str], *, task: Task, contamination: decontaminate.Contamination | None, unit_bytes: int = 0
) -> PrepareReport | None:
  """`prepare.prepare` by datatrove's executors, or goes on with it; None where the work was handed to Slurm.

  Inputs lie on a disk that all machines share, as does the output; a phase has as many tasks as there are units of work.
  Raises as prepare.prepare; ConfigError: also units that could not be done.
  """
  arguments = {"inputs": inputs, "task": task, "contamination": contamination, "selection": selection(asked)}
  arguments |= {"unit_bytes": unit_bytes, "max_units": asked.max_tasks}
  handed_in: list[PipelineExecutor] = []

  def run_units(job: Job, loaded: Any) -> bool:
    directory = work_directory(task.output)
    _forget(job, directory)
    found = phases(job, asked, num_threads=_num_threads(asked))
    if asked.executor == "slurm":
      found.append(Phase("store", 1, [Close(arguments)]))
    executors = _executors(asked, found, directory, job_name=Path(task.output).name)
    if asked.executor == "slurm":
      handed_in.append(executors[-1])
      return False
    for executor in executors:
      executor.run()
    return _check_done(job)

  report = prepare.prepare_with(run_units, **arguments)
  for executor in handed_in:  # ORDER: after the store is unlocked, since the last job, which locks it, may start at once
    executor.run()  # hands in those that it depends on first
  return report


def describe(asked: Asked, inputs: list[str], *, task: Task, contamination: decontaminate.Contamination | None) -> list[str]:
  """What `prepare_on` would do, for people; writes nothing."""
  files = [InputFile.of(path) for path in documents.find_files(inputs)]
  job = Job(task, units.cut(files, unit_bytes=0, max_units=asked.max_tasks), {})
  found = phases(job, asked, num_threads=_num_threads(asked))
  if asked.executor == "slurm":
    found.append(Phase("store", 1, [Close({})]))
  lines = [f"{len(files)} files, {sum(file.bytes for file in files):,} bytes -> {task.output}, by executor {asked.executor}"]
  if contamination:
    lines.append(f"  without documents that share words with {contamination.num_texts:,} evaluation texts")
  for number, phase in enumerate(found):
    steps = [name for name, _ in filters(asked)] if phase.name in ("signatures", "tokens") else []
    if phase.name == "tokens":
      steps += [NEAR_DUPLICATE] * asked.dedup + ["contamination"] * (contamination is not None)
    through = f" through {', '.join(steps)}" if steps else ""
    lines.append(f"  phase {number + 1}  {phase.name:<10} {phase.num_tasks:>5} tasks{through}")
  lines.append(f"  logs and finished tasks: {work_directory(task.output)}")
  if asked.executor == "slurm":
    with tempfile.TemporaryDirectory() as temporary:  # datatrove makes a directory for logs when it is asked for the script
      executors = _executors(asked, found, Path(temporary), job_name=Path(task.output).name)
      scripts = [_script(executor, phase) for executor, phase in zip(executors, found, strict=True)]
    lines += [script.replace(temporary, str(work_directory(task.output).absolute())) for script in scripts]
  return lines


def _script(executor: Any, phase: Phase) -> str:
  command = f"srun -l -n 1 launch_pickled_pipeline {executor.logging_dir.resolve_paths('executor.pik')}"
  return f"\n{phase.name}:\n{executor.get_launch_file_contents(executor.get_sbatch_args(phase.num_tasks), command)}"


def _forget(job: Job, directory: Path) -> None:
  """Removes what was done for other texts or settings, and marks of finished tasks whose result is gone."""
  said = json.dumps({"settings": job.settings, "units": [units.key(unit) for unit in job.units]}).encode("utf-8")
  file = directory / "job.json"
  if not file.exists() or file.read_bytes() != said:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_atomically(file, said)
  for number, marker in enumerate(units.read_markers(job.task.output, job.units)):
    if marker is None:
      (directory / "tokens" / "completions" / f"{number:05d}").unlink(missing_ok=True)
  shutil.rmtree(directory / "store", ignore_errors=True)


def _num_threads(asked: Asked) -> int:
  return asked.cpus_per_task if asked.executor != "local" else max(_cores() // _workers(asked), 1)


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(asked: Asked) -> int:
  return asked.num_workers or (_cores() if asked.executor == "local" else -1)


def _executors(asked: Asked, found: list[Phase], directory: Path, *, job_name: str) -> list[PipelineExecutor]:
  """An executor for each phase; those of Slurm depend on the one before."""
  root = str(Path(__file__).resolve().parents[2])  # for a clone that is not installed
  executors: list[Any] = []
  for phase in found:
    common = {"pipeline": phase.pipeline, "tasks": phase.num_tasks, "logging_dir": str(directory.absolute() / phase.name)}
    if asked.executor == "local":
      executors.append(LocalPipelineExecutor(**common, workers=min(_workers(asked), phase.num_tasks)))
      continue
    common |= {"workers": _workers(asked), "cpus_per_task": asked.cpus_per_task, "mem_per_cpu_gb": asked.mem_per_cpu_gb}
    if asked.executor == "ray":
      paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
      environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
      executors.append(RayPipelineExecutor(**common, ray_remote_kwargs={"runtime_env": environment}))
      continue
    activate = f"source {sys.prefix}/bin/activate" if sys.prefix != sys.base_prefix else "true"
    executors.append(
      SlurmPipelineExecutor(
        **common,
        job_name=f"{job_name}-{phase.name}",
        **{name: getattr(asked, name) for name in ("partition", "time", "qos")},
        env_command=f"{asked.env_command or activate}; export PYTHONPATH={root}:$PYTHONPATH",
        sbatch_args=dict(option.split("=", 1) for option in asked.sbatch),
        depends=executors[-1] if executors else None,
      )
    )
  return executors
