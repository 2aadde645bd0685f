"""Raw text files -> a token store, by several processes, with a progress bar; interrupted, it goes on where it stopped.

Invariant: what is written depends on the texts, the tokenizer and the rules only, never on the number of processes or on
interruptions; `store.json` is written last.

The input is cut into units of work (whole small files, or parts of big ones), a token file each. A .txt file is one document,
or several with a line holding one form feed (the character that Ctrl-L types, \\f) between two of them. A record of a .jsonl or
.parquet file is a text, or a conversation that store.chat renders; trained on their answers only, conversations make a masked
store. A chat template that asks for the date is told that of the first start, also after interruptions.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpt_jax.config import ConfigError
from cpt_jax.journal import write_atomically
from cpt_jax.store import assembly, decontaminate, documents, processes, token_files, tokenization, units
from cpt_jax.store.assembly import BAD_RECORDS, CONTAMINATED, Frequent
from cpt_jax.store.documents import DataError
from cpt_jax.store.records import RECORDS, TRAIN_ON, BadRecord, Part, Rules
from cpt_jax.store.token_files import IN_PROGRESS, MANIFEST
from cpt_jax.store.token_store import open_store
from cpt_jax.store.units import InputFile
from cpt_jax.store.work import Job, Task

_SETTINGS, _LOCK, _CONTAMINATION = "settings.json", "lock", "contamination.npz"
_MAX_UNITS = 256  # of one store: keeps the number of its files small
# What a store says that was made before records had kinds.
_UNSAID = {"records": "text", "train_on": "all", "answer_field": "", "chat_template": ""}
_DISK_ADVICE = {
  errno.ENOSPC: "the disk is full; free some space and run the same command again, it goes on where it stopped",
  errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, it goes on where it stopped",
  errno.EROFS: "the file system is read-only; choose another --output",
  errno.EACCES: "permission denied; change the permissions or choose another place",
  errno.EFBIG: "the file size limit is reached (ulimit -f); raise it and run the same command again",
}


class PrepareReport(NamedTuple):
  """What a finished store holds."""

  output: str
  num_documents: int
  num_tokens: int
  num_bytes: int  # of the documents' UTF-8 text, as far as it counts in the loss
  num_bad: int
  bad_records: list[BadRecord]  # the first few
  notes: dict[str, int]
  seconds: float  # 0 where the store was there already
  was_finished: bool
  left_out: dict[str, int]  # documents, by reason
  frequent: list[Frequent]  # of the contaminated
  num_targets: int  # tokens that count in the loss

  def lines(self) -> list[str]:
    """The summary for people."""
    lines = [
      f"{self.output}: {'already finished, nothing to do' if self.was_finished else f'written in {self.seconds:.1f} s'}",
      f"  documents    {self.num_documents:>16,}",
      f"  tokens       {self.num_tokens:>16,}",
      *([f"  in the loss  {self.num_targets:>16,}"] if self.num_targets < self.num_tokens else []),
      f"  text bytes   {self.num_bytes:>16,}",
      f"  tokens/byte  {self.num_targets / max(self.num_bytes, 1):>16.4f}",
      f"  bad records  {self.num_bad:>16,}",
    ]
    lines += [f"  bad: {bad.file}:{bad.line}: {bad.reason}" for bad in self.bad_records]
    if self.num_bad > len(self.bad_records):
      lines.append(f"  and {self.num_bad - len(self.bad_records)} more")
    if self.num_bad:
      lines.append(f"  all bad records: {os.path.join(self.output, BAD_RECORDS)}")
    lines += [f"  left out     {number:>16,}  {reason}" for reason, number in self.left_out.items()]
    if self.left_out.get("contaminated"):
      lines += [f"  shared by {f.num_documents:,} with {f.eval_file}: {f.ngram!r}" for f in self.frequent]
      lines.append(f"  all contaminated documents: {os.path.join(self.output, CONTAMINATED)}")
    if self.notes["special_text"]:
      lines.append(f"  note: {self.notes['special_text']} documents spell a special token; it was encoded as plain text")
    if self.notes["control_ids"]:
      lines.append(f"  note: {self.notes['control_ids']} documents give the id of EOS or BOS within their text")
    if self.notes["nul"]:
      lines.append(f"  note: {self.notes['nul']} documents hold NUL characters, which were kept")
    return lines


def prepare(
  inputs: str | os.PathLike | Sequence[str | os.PathLike],
  *,
  tokenizer: str | os.PathLike,
  output: str | os.PathLike,
  rules: Rules = Rules(),  # noqa: B008 (never changed)
  contamination: decontaminate.Contamination | None = None,
  num_workers: int = 0,
  unit_bytes: int = 0,
  progress: bool = True,
) -> PrepareReport:
  """Tokenises text files into a token store, or goes on doing so.

  >>> cpt_jax.prepare("texts/*.jsonl", tokenizer="examples/base", output="store/mine").lines()  # doctest: +SKIP

  Args:
    inputs: a path or glob, or several, of .txt, .jsonl and .parquet files, plain or with .gz or .zst.
    tokenizer: as `tokenization.load` takes it.
    output: the store's directory.
    rules: what records hold, which of their tokens count, what is a bad record.
    contamination: leave out documents that share words with these evaluation texts.
    num_workers: processes; 0 = as many as there are cores and work.
    unit_bytes: input in a unit of work; 0 = 8 MiB, more where there would be more than 256 units.
    progress: show it.

  Raises:
    ConfigError: nothing to read, settings that do not fit, or a store that is of something else.
    DataError: bad records, where the rules forbid them, or nothing but bad records.
    OSError: the disk; its text names the path.
  """
  if num_workers < 0:
    raise ConfigError(f"--num_workers={num_workers}: must be 1 or more, or 0 for as many as there are cores")

  def run_units(job: Job, loaded: tokenization.Tokenizer) -> bool:
    processes.run(job, loaded, num_workers=num_workers, progress=progress)
    return True

  paths = [os.fspath(path) for path in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
  task = Task(os.fspath(output), os.fspath(tokenizer), rules)
  sizes = {"unit_bytes": unit_bytes, "max_units": _MAX_UNITS}
  report = prepare_with(run_units, paths, task=task, contamination=contamination, selection=None, **sizes)
  assert report is not None
  return report


def prepare_with(
  run_units: Callable[[Job, tokenization.Tokenizer], bool],
  inputs: list[str],
  *,
  task: Task,
  contamination: decontaminate.Contamination | None,
  selection: dict[str, Any] | None,
  unit_bytes: int,
  max_units: int,
) -> PrepareReport | None:
  """`prepare`, with the units done by `run_units`; None where that says that they are not done yet.

  `run_units` does the units that have no marker yet (`work.run_unit`), or hands them to others and returns False; `selection` is
  what else decides which documents are in the store, in values that JSON keeps; sizes are as of `units.cut`. Raises as `prepare`.
  """
  _check(task)
  start_secs = time.monotonic()
  with _plain_disk_errors(task.output), contextlib.ExitStack() as stack:
    files = [InputFile.of(path) for path in documents.find_files(inputs)]
    _check_kinds(files, task.rules)
    loaded = task.load_tokenizer()
    loaded.require_eos()
    task = task._replace(rendered_at=datetime.datetime.now().isoformat())
    task.encoder(loaded)  # says what is wrong with the chat template
    settings = _settings(task, loaded, files)
    settings["decontaminate"] = {"words": contamination.ngram_words, "digest": contamination.digest} if contamination else None
    settings["selection"] = selection
    finished = _finished(task.output, settings, files)
    if finished is None:
      task = task._replace(rendered_at=stack.enter_context(_locked(task.output, settings, task.rendered_at)))
      finished = _finished(task.output, settings, files)  # by another process, meanwhile
    directory = Path(task.output) / IN_PROGRESS
    if finished is not None:
      shutil.rmtree(directory, ignore_errors=True)  # left by a kill after the last step but one
      return _report(task.output, finished, seconds=0.0, was_finished=True)
    if contamination:
      task = task._replace(contamination=str(directory / _CONTAMINATION))
      contamination.save(task.contamination)
    job = Job(task, units.cut(files, unit_bytes=unit_bytes, max_units=max_units), settings)
    if not run_units(job, loaded):
      return None
    markers = [marker for marker in units.read_markers(task.output, job.units) if marker]
    assert len(markers) == len(job.units)
    num_bad = sum(marker["num_bad"] for marker in markers)
    if 0 <= task.rules.max_bad < num_bad:  # by tasks that do not know of each other
      raise DataError(f"{num_bad} bad records, more than --max_bad={task.rules.max_bad}")
    manifest = assembly.finish(job, loaded, markers, files)
  return _report(task.output, manifest, seconds=time.monotonic() - start_secs, was_finished=False)


def _check(task: Task) -> None:
  """Raises ConfigError for rules that there are not, and for an output that is no directory."""
  rules, output = task.rules, task.output
  if rules.on_bad not in ("skip", "fail"):
    raise ConfigError(f"--on_bad={rules.on_bad!r}: choose skip or fail")
  if rules.records not in RECORDS:
    raise ConfigError(f"--records={rules.records!r}: choose {', '.join(RECORDS)}")
  if rules.train_on not in TRAIN_ON:
    raise ConfigError(f"--train_on={rules.train_on!r}: choose {' or '.join(TRAIN_ON)}")
  if rules.train_on == "answers" and rules.records == "text":
    raise ConfigError("--train_on answers: a text has no answers; choose --records messages or prompt, or --train_on all")
  if not 0 < rules.max_document_bytes < 1 << 31:
    raise ConfigError(f"--max_document_mb: {rules.max_document_bytes} bytes; must be above 0 and below 2 GiB")
  if os.path.exists(output) and not os.path.isdir(output):
    raise ConfigError(f"--output {output}: is a file; name a directory")


def _check_kinds(files: list[InputFile], rules: Rules) -> None:
  texts = [file.path for file in files if documents.file_kind(file.path)[0] == "txt"]
  if texts and rules.records != "text":
    raise ConfigError(f"--records {rules.records}: {texts[0]} holds no such records; give .jsonl or .parquet files")


def _settings(task: Task, tokenizer: tokenization.Tokenizer, files: list[InputFile]) -> dict[str, Any]:
  """What tells a store from one of the same files by other rules, in values that JSON keeps."""
  rules, has_fields = task.rules, any(documents.file_kind(file.path)[0] != "txt" for file in files)
  template = "" if rules.records == "text" else tokenizer.chat_template
  return {
    "tokenizer_fingerprint": tokenizer.fingerprint,
    "eos_id": tokenizer.require_eos(),
    "records": rules.records,
    "train_on": rules.train_on,
    "text_field": rules.fields[0] if has_fields else "",
    "answer_field": rules.answer_field if rules.records == "prompt" else "",
    "chat_template": hashlib.blake2b(template.encode("utf-8"), digest_size=16).hexdigest() if template else "",
    "max_document_bytes": rules.max_document_bytes,
  }


def _finished(output: str, settings: dict[str, Any], files: list[InputFile]) -> dict[str, Any] | None:
  """The manifest of a finished store of the same things, None where there is none.
  Raises ConfigError: the store is of other things."""
  manifest = token_files.read_manifest(output)
  if manifest is None:
    return None
  found = _differences(manifest, settings, files)
  if found:
    shown = "\n".join(f"  {line}" for line in found[:10])
    raise ConfigError(
      f"--output {output}: holds a finished store of something else; choose another --output or remove it. Different:\n{shown}"
    )
  open_store(output)  # nothing of it is missing
  return manifest


def _differences(manifest: dict[str, Any], settings: dict[str, Any], files: list[InputFile]) -> list[str]:
  """In what a finished store differs from what is asked for; reads files only where their time is another."""
  before = _UNSAID | manifest
  found = [f"{k}: {before.get(k)!r} in the store, now {v!r}" for k, v in settings.items() if before.get(k) != v]
  if len(manifest["inputs"]) != len(files):
    return [*found, f"inputs: {len(manifest['inputs'])} files in the store, now {len(files)}"]
  for old, file in zip(manifest["inputs"], files, strict=True):
    if Path(old["path"]).name != Path(file.path).name:
      found.append(f"inputs: {old['path']} in the store, now {file.path}")
    elif old["bytes"] != file.bytes:
      found.append(f"{file.path}: {old['bytes']} bytes when the store was made, now {file.bytes}")
    elif old["mtime_ns"] != file.mtime_ns:
      pieces = units.pieces(file, [Part(file.path)] * len(old["digests"]))
      if [piece.digest() for piece in pieces] != old["digests"]:
        found.append(f"{file.path}: other content than when the store was made")
  return found


@contextlib.contextmanager
def _locked(output: str, settings: dict[str, Any], now: str) -> Iterator[str]:
  """Makes the directory, or takes it up again; holds it against other processes. Yields when it was made: `now`, or earlier."""
  directory = _made(Path(output)) / IN_PROGRESS
  directory.mkdir(exist_ok=True)
  with open(directory / _LOCK, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f"--output {output}: another process is preparing this store; wait for it or stop it") from None
    file = directory / _SETTINGS
    if file.exists():
      before = json.loads(file.read_bytes())
      found = [f"{k}: {before.get(k)!r} before, now {v!r}" for k, v in settings.items() if before.get(k) != v]
      if found:
        shown = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
          f"--output {output}: holds an unfinished store with other settings; give the same ones to go on, or remove it. "
          f"Different:\n{shown}"
        )
    elif next(directory.glob("*.json"), None):
      raise ConfigError(f"--output {output}: holds an unfinished store without {_SETTINGS}, of an older version; remove it")
    else:
      before = {**settings, "rendered_at": now}
      write_atomically(file, json.dumps(before).encode("utf-8"))
    yield before["rendered_at"]


def _made(output: Path) -> Path:
  """The directory of a store that is to be made, which holds nothing else."""
  others = {p.name for p in output.iterdir()} - {BAD_RECORDS, CONTAMINATED, MANIFEST} if output.is_dir() else set()
  if others and not (output / IN_PROGRESS).exists():
    raise ConfigError(f"--output {output}: holds other files; name a new or empty directory")
  try:
    output.mkdir(parents=True, exist_ok=True)
  except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
    reason = (error.strerror or str(error)).lower()
    raise OSError(error.errno, f"no directory can be made there ({reason}); choose another --output", str(output)) from None
  return output


@contextlib.contextmanager
def _plain_disk_errors(output: str) -> Iterator[None]:
  """Names the path of every error of the disk, and says what to do."""
  try:
    yield
  except OSError as error:
    advice = _DISK_ADVICE.get(error.errno or 0, error.strerror or str(error))
    raise OSError(error.errno, f"{error.filename or output}: {advice}") from error


def _report(output: str, manifest: dict[str, Any], *, seconds: float, was_finished: bool) -> PrepareReport:
  bad = manifest["bad_records"]
  return PrepareReport(
    output=output,
    **{key: manifest[key] for key in ("num_documents", "num_tokens", "num_bytes", "notes")},
    num_bad=bad["num"],
    bad_records=[BadRecord(**b) for b in bad["first"]],
    seconds=seconds,
    was_finished=was_finished,
    left_out=manifest.get("left_out", {}),  # not in stores of before there was a reason to leave documents out
    frequent=[Frequent(*f) for f in manifest.get("frequent", [])],
    num_targets=manifest.get("num_targets", manifest["num_tokens"]),
  )
