"""Raw text files -> a token store, by several processes, with a progress bar; interrupted, it goes on where it stopped.

Invariant: what is written depends on the texts, the tokenizer and how records are read only, never on the number of processes
or on interruptions; `store.json` is written last.

The input is cut into work units (whole small files, or parts of big ones), a token file each. A unit is written under
names of its own in `in_progress/`, moved into place, and then marked as finished there.

Records are texts, or conversations (`messages`, `prompt`) that store.chat renders; trained on their answers only, they make a
masked store, see store.store. A chat template that asks for the date is told that of the first start, also after interruptions.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import rich.console
import rich.progress

from cpt_jax.config import ConfigError
from cpt_jax.store import chat, decontaminate, documents, store
from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.store.documents import BadRecord, DataError, Document, Part

BAD_RECORDS = "bad_records.jsonl"
CONTAMINATED = "contaminated.jsonl"
_PLAN, _LOCK, _CONTAMINATION = "plan.json", "lock", "contamination.npz"
_UNIT_BYTES = 8 << 20  # lost at most by an interruption, and enough to feed a process for seconds
_MAX_UNITS = 256  # of one store: keeps the number of its files small
_GROWTH = 4  # a compressed file counts for so many times its size
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 1024
_COUNTED_BYTES = 1 << 20  # of input, before the display hears of them
_LISTS = ("bad", "contaminated")  # of records that a unit left out
_SHOWN_BAD, _SHOWN_FREQUENT = 10, 5
# What a store says that was made before records had kinds.
_UNSAID = {"records": "text", "train_on": "all", "answer_field": "", "chat_template": ""}

# (number of the unit, its documents, counts to fill) -> the documents that are kept; counts are of those left out, by reason.
Select = Callable[[int, Iterable[Document], dict[str, int]], Iterable[Document]]


class Piece(NamedTuple):
  """A part of an input file within a unit, and the bytes of the file that its digest covers."""

  part: Part
  digest_start: int
  digest_end: int


class Task(NamedTuple):
  """What decides the content of a store, apart from the texts; and how to go about bad records."""

  output: str
  tokenizer: str
  eos_token: str
  records: str  # "text", "messages" or "prompt"
  train_on: str  # "all" or "answers"
  text_field: str
  answer_field: str
  max_document_bytes: int
  on_bad: str
  max_bad: int  # -1 = no limit
  rendered_at: str = ""  # ISO time that chat templates are told; set at the first start
  contamination: str = ""  # file of the evaluation texts' runs of words (decontaminate.load)


class Job(NamedTuple):
  """All the work of a store."""

  task: Task
  units: list[list[Piece]]
  stats: list[list[dict[str, Any]]]  # of the files of each unit's pieces
  settings: dict[str, Any]  # of the store


class Contaminated(NamedTuple):
  """A document that was left out because it shares words with an evaluation text."""

  file: str
  line: int  # or row, from 1
  offset: int
  ngram: str
  eval_file: str


class Frequent(NamedTuple):
  """A run of words for which many documents were left out: of a benchmark, or mere boilerplate?"""

  ngram: str
  num_documents: int
  eval_file: str


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
  inputs: list[str],
  *,
  tokenizer: str,
  output: str,
  records: str = "text",
  train_on: str = "all",
  text_field: str = "",
  answer_field: str = "answer",
  on_bad: str = "skip",
  max_bad: int = -1,
  num_workers: int = 0,
  eos_token: str = "",
  max_document_bytes: int = documents.MAX_DOCUMENT_BYTES,
  contamination: decontaminate.Contamination | None = None,
  unit_bytes: int = 0,
  progress: bool = True,
) -> PrepareReport:
  """Tokenises text files into a token store, or goes on doing so.

  >>> cpt_jax.prepare(["texts/*.jsonl"], tokenizer="examples/base", output="store/mine").lines()  # doctest: +SKIP

  Args:
    inputs: paths and globs.
    tokenizer: as `tokenizer.load` takes it.
    output: the store's directory.
    records: what a record of .jsonl and .parquet files holds: a "text"; "messages", a list of {role, content}; or a "prompt"
      and its answer, as two messages where the tokenizer has a chat template, else as one text.
    train_on: which tokens of conversations count in the loss: "all" or those of the "answers".
    text_field: field of the text, the messages or the prompt; "" = named as `records`.
    answer_field: field of a prompt's answer.
    on_bad: "skip" bad records, or "fail" at one.
    max_bad: fail at more bad records than this; -1 = no limit.
    num_workers: processes; 0 = as many as there are cores and work.
    eos_token: overrides the EOS that the tokenizer's files name.
    max_document_bytes: a longer document is a bad record; bounds the memory: about 110 bytes for each of prose, 400 where each
      byte is a token.
    contamination: leave out documents that share words with these evaluation texts.
    unit_bytes: input in a unit of work; 0 = 8 MiB, more where there would be more than 256 units.
    progress: show it.

  Raises:
    ConfigError: nothing to read, settings that do not fit, or a store that is of something else.
    DataError: bad records, where `on_bad` or `max_bad` forbids them, or nothing but bad records.
    OSError: the disk.
  """
  if num_workers < 0:
    raise ConfigError(f"--num_workers={num_workers}: must be 1 or more, or 0 for as many as there are cores")
  report = prepare_with(
    lambda job, loaded: _run(job, loaded, num_workers=num_workers, progress=progress),
    inputs,
    task=Task(
      output=output,
      tokenizer=tokenizer,
      eos_token=eos_token,
      records=records,
      train_on=train_on,
      text_field=text_field or records,
      answer_field=answer_field,
      max_document_bytes=max_document_bytes,
      on_bad=on_bad,
      max_bad=max_bad,
    ),
    contamination=contamination,
    selection=None,
    unit_bytes=unit_bytes,
    max_units=_MAX_UNITS,
  )
  assert report is not None
  return report


def prepare_with(
  run_units: Callable[[Job, tokenizer_lib.Tokenizer], bool],
  inputs: list[str],
  *,
  task: Task,
  contamination: decontaminate.Contamination | None,
  selection: dict[str, Any] | None,
  unit_bytes: int,
  max_units: int,
) -> PrepareReport | None:
  """`prepare`, with the units done by `run_units`; None where that says that they are not done yet.

  Args:
    run_units: does the units that have no marker yet (`run_unit`), or hands them to others and returns False.
    inputs: paths and globs.
    task: settings.
    contamination: leave out documents that share words with these evaluation texts.
    selection: what else decides which documents are in the store, in values that JSON keeps.
    unit_bytes: as of `plan`.
    max_units: as of `plan`.

  Raises:
    ConfigError: as `prepare`.
    DataError: as `prepare`.
    OSError: the disk.
  """
  output = task.output
  if task.on_bad not in ("skip", "fail"):
    raise ConfigError(f"--on_bad={task.on_bad!r}: choose skip or fail")
  if task.records not in documents.RECORDS:
    raise ConfigError(f"--records={task.records!r}: choose {', '.join(documents.RECORDS)}")
  if task.train_on not in chat.TRAIN_ON:
    raise ConfigError(f"--train_on={task.train_on!r}: choose {' or '.join(chat.TRAIN_ON)}")
  if task.train_on == "answers" and task.records == "text":
    raise ConfigError("--train_on answers: a text has no answers; choose --records messages or prompt, or --train_on all")
  if not 0 < task.max_document_bytes < 1 << 31:
    raise ConfigError(f"--max_document_mb: {task.max_document_bytes} bytes; must be above 0 and below 2 GiB")
  if os.path.exists(output) and not os.path.isdir(output):
    raise ConfigError(f"--output {output}: is a file; name a directory")
  start_secs = time.monotonic()
  files = documents.find_files(inputs)
  texts = [f for f in files if (documents.kind_of(f) or ("", ""))[0] == "txt"]
  if texts and task.records != "text":
    raise ConfigError(f"--records {task.records}: {texts[0]} holds no such records; give .jsonl or .parquet files")
  loaded = tokenizer_lib.load(task.tokenizer, eos_token=task.eos_token)
  loaded.require_eos()
  task = task._replace(rendered_at=datetime.datetime.now().isoformat())
  _encoder(task, loaded)  # says what is wrong with the chat template
  settings = _settings(task, loaded, files)
  settings["decontaminate"] = {"words": contamination.ngram_words, "digest": contamination.digest} if contamination else None
  settings["selection"] = selection
  stats = [_stat(f) for f in files]
  with _plain_disk_errors(output), contextlib.ExitStack() as stack:
    finished = _finished(Path(output), settings, stats)
    if finished is None:
      task = task._replace(rendered_at=stack.enter_context(_locked(Path(output), settings, task.rendered_at)))
      finished = _finished(Path(output), settings, stats)  # by another process, meanwhile
    if finished is not None:
      shutil.rmtree(Path(output) / store.IN_PROGRESS, ignore_errors=True)  # left by a kill after the last step but one
      return _report(output, finished, seconds=0.0, was_finished=True)
    if contamination:
      task = task._replace(contamination=str(Path(output) / store.IN_PROGRESS / _CONTAMINATION))
      contamination.save(task.contamination)
    by_file = {s["path"]: s for s in stats}
    units = plan(files, unit_bytes=unit_bytes, max_units=max_units)
    job = Job(task, units, [[by_file[p.part.file] for p in unit] for unit in units], settings)
    if not run_units(job, loaded):
      return None
    markers = [m for m in read_markers(job) if m]
    assert len(markers) == len(units)
    num_bad = sum(m["num_bad"] for m in markers)
    if 0 <= task.max_bad < num_bad:  # by tasks that do not know of each other
      raise DataError(f"{num_bad} bad records, more than --max_bad={task.max_bad}")
    manifest = _finish(Path(output), loaded, settings, units, markers, stats, task.rendered_at)
  return _report(output, manifest, seconds=time.monotonic() - start_secs, was_finished=False)


def plan(files: list[str], *, unit_bytes: int = 0, max_units: int = _MAX_UNITS) -> list[list[Piece]]:
  """The units of work, in the order of the documents; depends on the files' sizes only (.parquet: row groups).

  A unit has about `unit_bytes`; 0 = 8 MiB, or more where there would be more than `max_units`.
  """
  weights = [os.path.getsize(f) * (_GROWTH if (documents.kind_of(f) or ("", ""))[1] else 1) for f in files]
  target = unit_bytes or max(_UNIT_BYTES, sum(weights) // max_units)
  units: list[list[Piece]] = []
  filled = 0  # of the last unit
  for file, weight in zip(files, weights, strict=True):
    parts, size = documents.split(file, part_bytes=target), os.path.getsize(file)
    for i, part in enumerate(parts):
      if not units or filled + weight // len(parts) > target:
        units.append([])
        filled = 0
      units[-1].append(Piece(part, size * i // len(parts), size * (i + 1) // len(parts)))
      filled += weight // len(parts)
  return units


def _encoder(task: Task, tokenizer: tokenizer_lib.Tokenizer) -> chat.Encoder | None:
  """None for texts."""
  if task.records == "text":
    return None
  now = datetime.datetime.fromisoformat(task.rendered_at)
  return chat.Encoder(tokenizer, records=task.records, train_on=task.train_on, now=now)


# One unit.


class _BadRecords:
  """Writes down a unit's bad records in order, though rendering may find one bad after reading has found later ones."""

  _MAX_HELD = 1024  # a file of nothing else is not kept in memory

  def __init__(self, file: TextIO, unit: list[Piece], check: Callable[[BadRecord, Part], None]):
    self._file, self._unit, self._check = file, unit, check
    self._held: list[tuple[int, BadRecord]] = []
    self.is_held = False  # are there documents that may turn out to be bad?
    self.num = 0

  def add(self, index: int, bad: BadRecord) -> None:
    """Notes a bad record of piece `index`."""
    self._held.append((index, bad))
    if not self.is_held or len(self._held) >= self._MAX_HELD:
      self.flush()

  def flush(self) -> None:
    """Writes what is held."""
    held, self._held, self.is_held = sorted(self._held, key=lambda item: (item[0], item[1].line)), [], False
    for index, bad in held:
      self._file.write(json.dumps([index, *bad]) + "\n")
      self.num += 1
      self._check(bad, self._unit[index].part)


class _Worker:
  """Does units of work; one in each process."""

  def __init__(
    self,
    task: Task,
    tokenizer: tokenizer_lib.Tokenizer,
    counters: Any,
    tick: Callable[[], None],
    select: Select = lambda number, found, left_out: found,
  ):
    self._task, self._tokenizer, self._select = task, tokenizer, select
    self._encoder = _encoder(task, tokenizer)
    self._contamination = decontaminate.load(task.contamination) if task.contamination else None
    self._counters = counters  # shared by the processes: input bytes, documents, tokens, bad records, stop
    self._tick = tick
    self._output = Path(task.output)
    self._progress = self._output / store.IN_PROGRESS

  def run(self, number: int, unit: list[Piece], stats: list[dict[str, Any]]) -> None:
    """Writes the unit's token file and its marker."""
    name, own = f"{number:05d}.ds", f"{number:05d}.{os.getpid()}"
    dtype = store.token_dtype(self._tokenizer.vocab_size)
    temporary = self._progress / f"{own}.ds"
    writer = store.TokenFileWriter(temporary, dtype=dtype, tokenizer_name=self._tokenizer.name)
    notes = {"special_text": 0, "control_ids": 0, "nul": 0}
    num_lines, left_out, is_done = [], {}, False
    lists = [self._progress / f"{own}.{kind}" for kind in _LISTS]
    try:
      with open(lists[0], "w", encoding="utf-8") as bad_file, open(lists[1], "w", encoding="utf-8") as contaminated_file:
        bad = _BadRecords(bad_file, unit, self._check_bad)
        for batch in _batches(self._select(number, self._documents(unit, bad, num_lines), left_out)):
          for record in self._write(self._clean(batch, unit, contaminated_file, left_out), writer, notes):
            bad.add(_piece_of(record, unit), record)
          bad.flush()
        bad.flush()
      digests = [_file_digest(p) for p in unit]
      for piece, stat in zip(unit, stats, strict=True):  # ORDER: after all reading, that of the digests too
        _check_unchanged(piece.part.file, stat)
      info = writer.close()
      is_done = True
    finally:
      if not is_done:
        writer.abandon()
        for path in lists:
          path.unlink(missing_ok=True)
    if info.num_documents:
      finals, parts = (store.part_names(n, has_loss_mask=writer.has_loss_mask) for n in (name, f"{own}.ds"))
      for final, part in zip(finals, parts, strict=True):
        os.replace(self._progress / part, self._output / final)
    else:
      writer.abandon()
    for path, kind in zip(lists, _LISTS, strict=True):
      os.replace(path, self._progress / f"{number:05d}.{kind}")
    store.sync_directory(self._output)
    marker = {
      "unit": unit_key(unit, stats),
      "info": info._replace(name=name)._asdict(),
      "digests": digests,
      "num_lines": num_lines,
      "num_bad": bad.num,
      "notes": notes,
      "left_out": left_out,
    }
    # ORDER: the marker after the files, or an interruption between them would count a unit that is not there.
    store.write_atomically(self._progress / f"{number:05d}.json", json.dumps(marker).encode("utf-8"))

  def _documents(self, unit: list[Piece], bad: _BadRecords, num_lines: list[int]) -> Iterator[Document]:
    """The unit's documents; notes bad records and the lines of each piece, and counts what was read."""
    for index, piece in enumerate(unit):
      reader = open_part(self._task, piece.part)
      size, counted = piece.digest_end - piece.digest_start, 0
      for record in reader:
        if isinstance(record, Document):
          bad.is_held = self._encoder is not None
          yield record
        else:
          bad.add(index, record)
        consumed = min(reader.consumed_bytes, size)
        if consumed > counted + _COUNTED_BYTES:
          self._count(0, consumed - counted)
          counted = consumed
      num_lines.append(reader.num_lines)
      self._count(0, size - counted)

  def _clean(self, batch: list[Document], unit: list[Piece], file: TextIO, left_out: dict[str, int]) -> list[Document]:
    """The batch without the documents that share words with an evaluation text, which are written down."""
    if self._contamination is None:
      return batch
    left_out.setdefault("contaminated", 0)
    matches, kept = self._contamination.find([d.text for d in batch]), []
    for document, match in zip(batch, matches, strict=True):
      if match is None:
        kept.append(document)
      else:
        at = (_piece_of(document, unit), document.file, document.line, document.offset)
        file.write(json.dumps([*at, *match]) + "\n")
        left_out["contaminated"] += 1
    return kept

  def _write(self, batch: list[Document], writer: store.TokenFileWriter, notes: dict[str, int]) -> list[BadRecord]:
    """Writes documents; returns those that turn out to be bad."""
    num_before, bad = writer.num_tokens, []
    if self._encoder is None:
      encoded = self._tokenizer.encode_documents([d.text for d in batch])
      for document, ids in zip(batch, encoded.ids, strict=True):
        writer.add(ids, num_bytes=len(document.utf8), text_hash=store.text_hash(document.utf8))
        notes["nul"] += "\0" in document.text
      notes["special_text"] += encoded.num_special_text
      notes["control_ids"] += encoded.num_control_ids
    else:
      bad = self._write_conversations(self._encoder, batch, writer, notes)
    self._count(1, len(batch) - len(bad))
    self._count(2, writer.num_tokens - num_before)
    self._tick()
    if self._counters[4]:
      raise KeyboardInterrupt
    return bad

  def _write_conversations(self, encoder: chat.Encoder, batch, writer, notes) -> list[BadRecord]:
    bad = []
    conversations = [document.messages for document in batch]
    for document, found in zip(batch, encoder.encode(conversations), strict=True):
      if isinstance(found, chat.RenderError):
        bad.append(BadRecord(document.file, document.line, document.offset, str(found)))
        continue
      text_hash = store.text_hash(chat.canonical(document.messages))  # not of the rendering, which is the tokenizer's
      writer.add(found.ids, num_bytes=found.num_bytes, text_hash=text_hash, loss_mask=found.loss_mask)
      notes["nul"] += "\0" in document.text
      notes["special_text"] += found.has_special_text
      notes["control_ids"] += found.has_control_ids
    return bad

  def _check_bad(self, bad: BadRecord, part: Part) -> None:
    num_bad = self._count(3, 1)
    if self._task.on_bad != "fail" and not 0 <= self._task.max_bad < num_bad:
      return
    found = f"{bad.file}:{bad.line + documents.lines_before(part)}: {bad.reason}"
    if self._task.on_bad == "fail":
      raise DataError(f"{found}; mend it, or use --on_bad skip to leave bad records out")
    raise DataError(f"{num_bad} bad records, more than --max_bad={self._task.max_bad}; the last is {found}")

  def _count(self, what: int, number: int) -> int:
    with self._counters.get_lock():
      self._counters[what] += number
      return self._counters[what]


def open_part(task: Task, part: Part) -> documents.PartReader:
  """The reader of a part, as the task reads it."""
  return documents.PartReader(
    part,
    records=task.records,
    text_field=task.text_field,
    answer_field=task.answer_field,
    max_document_bytes=task.max_document_bytes,
  )


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
  batch, batch_bytes = [], 0
  for document in found:
    batch.append(document)
    batch_bytes += len(document.utf8)
    if batch_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, batch_bytes = [], 0
  if batch:
    yield batch


def _piece_of(document: Document | BadRecord, unit: list[Piece]) -> int:
  """The number of the piece in which a record starts."""
  for index, (part, _, _) in enumerate(unit):
    if part.file == document.file and (part.end < 0 or document.offset < 0 or part.start <= document.offset < part.end):
      return index
  raise AssertionError(f"{document.file} is not in the unit")


def run_unit(job: Job, number: int, select: Select) -> None:
  """Does a unit in this process."""
  counters = multiprocessing.get_context("spawn").Array("q", 5)
  loaded = tokenizer_lib.load(job.task.tokenizer, eos_token=job.task.eos_token)
  worker = _Worker(job.task, loaded, counters, tick=lambda: None, select=select)
  worker.run(number, job.units[number], job.stats[number])


_process_worker: _Worker | None = None  # of this worker process


def _start_process(task: Task, counters: Any, num_threads: int) -> None:
  global _process_worker
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
  os.environ["RAYON_NUM_THREADS"] = str(num_threads)
  parent = multiprocessing.parent_process()
  assert parent is not None
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # do not outlive a killed parent
  loaded = tokenizer_lib.load(task.tokenizer, eos_token=task.eos_token)
  _process_worker = _Worker(task, loaded, counters, tick=lambda: None)


def _run_in_process(number: int, unit: list[Piece], stats: list[dict[str, Any]]) -> None:
  assert _process_worker is not None
  _process_worker.run(number, unit, stats)


# All units.


def _run(job: Job, loaded: tokenizer_lib.Tokenizer, *, num_workers: int, progress: bool) -> bool:
  """Does the units that are not finished yet."""
  task, units, unit_stats, _ = job
  for path in (Path(task.output) / store.IN_PROGRESS).iterdir():  # what interrupted processes left
    if path.name.count(".") > 1:
      path.unlink()
  markers = read_markers(job)
  todo = [i for i, marker in enumerate(markers) if marker is None]
  counters = multiprocessing.get_context("spawn").Array("q", 5)
  for marker, unit in zip(markers, units, strict=True):
    if marker:
      counters[0] += sum(p.digest_end - p.digest_start for p in unit)
      counters[1] += marker["info"]["num_documents"]
      counters[2] += marker["info"]["num_tokens"]
      counters[3] += marker["num_bad"]
  todo_bytes = sum(p.digest_end - p.digest_start for i in todo for p in units[i])
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  wanted = num_workers or min(cores, -(-todo_bytes // _UNIT_BYTES))
  num_processes = max(min(wanted, len(todo)), 1)
  total_bytes = sum(p.digest_end - p.digest_start for unit in units for p in unit)
  with _Display(progress, task.output, total_bytes, counters, len(units) - len(todo), len(units)) as display:
    if num_processes == 1:
      worker = _Worker(task, loaded, counters, tick=display.show)
      for i in todo:
        worker.run(i, units[i], unit_stats[i])
    else:
      _run_processes(task, units, unit_stats, todo, counters, num_processes, max(wanted // num_processes, 1), display.show)
  return True


def read_markers(job: Job) -> list[dict[str, Any] | None]:
  """What each finished unit holds; None for one that is not finished."""
  directory = Path(job.task.output) / store.IN_PROGRESS
  return [_read_marker(directory, i, unit, s) for i, (unit, s) in enumerate(zip(job.units, job.stats, strict=True))]


def _run_processes(task, units, unit_stats, todo, counters, num_processes: int, num_threads: int, show) -> None:
  pool = concurrent.futures.ProcessPoolExecutor(
    num_processes,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_process,
    initargs=(task, counters, num_threads),
  )
  try:
    pending = {pool.submit(_run_in_process, i, units[i], unit_stats[i]) for i in todo}
    while pending:
      done, pending = concurrent.futures.wait(pending, timeout=0.25, return_when=concurrent.futures.FIRST_EXCEPTION)
      show()
      for future in done:
        future.result()
  except concurrent.futures.process.BrokenProcessPool:
    raise OSError(
      errno.ENOMEM, f"{task.output}: a worker process died, most likely for want of memory; run again with fewer --num_workers"
    ) from None
  finally:
    counters[4] = 1  # those still at work stop at their next batch
    pool.shutdown(wait=True, cancel_futures=True)


def _read_marker(directory: Path, number: int, unit: list[Piece], stats: list[dict[str, Any]]) -> dict[str, Any] | None:
  """What a finished unit holds; None where it is not finished, or was of other inputs."""
  try:
    marker = json.loads((directory / f"{number:05d}.json").read_bytes())
  except FileNotFoundError:
    return None
  if marker["unit"] == unit_key(unit, stats):
    return marker
  is_same = [k[:-1] for k in marker["unit"]] == [k[:-1] for k in unit_key(unit, stats)]  # but for the files' times
  return marker if is_same and marker["digests"] == [_file_digest(p) for p in unit] else None


def unit_key(unit: list[Piece], stats: list[dict[str, Any]]) -> list[list[Any]]:
  """What tells a unit from one of other inputs, in values that JSON keeps."""
  return [[*piece.part, s["bytes"], s["mtime_ns"]] for piece, s in zip(unit, stats, strict=True)]


# What was read: is it what lies there now?


def _stat(path: str) -> dict[str, Any]:
  found = os.stat(path)
  return {"path": path, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _check_unchanged(path: str, stat: dict[str, Any]) -> None:
  if _stat(path) != stat:
    raise DataError(f"{path}: was changed while it was read; run the command again when nothing writes to it")


def _file_digest(piece: Piece) -> str:
  digest, left = hashlib.blake2b(digest_size=16), piece.digest_end - piece.digest_start
  with open(piece.part.file, "rb") as f:
    f.seek(piece.digest_start)
    while left and (data := f.read(min(left, 1 << 20))):
      digest.update(data)
      left -= len(data)
  return digest.hexdigest()


def _differences(manifest: dict[str, Any], settings: dict[str, Any], stats: list[dict[str, Any]]) -> list[str]:
  """In what a finished store differs from what is asked for; reads files only where their time is another."""
  before = _UNSAID | manifest
  found = [f"{k}: {before.get(k)!r} in the store, now {v!r}" for k, v in settings.items() if before.get(k) != v]
  old, new = manifest["inputs"], stats
  if len(old) != len(new):
    return [*found, f"inputs: {len(old)} files in the store, now {len(new)}"]
  for before, now in zip(old, new, strict=True):
    if before["bytes"] != now["bytes"]:
      found.append(f"{now['path']}: {before['bytes']} bytes when the store was made, now {now['bytes']}")
    elif before["mtime_ns"] != now["mtime_ns"]:
      size, count = now["bytes"], len(before["digests"])
      pieces = [Piece(Part(now["path"]), size * i // count, size * (i + 1) // count) for i in range(count)]
      if [_file_digest(p) for p in pieces] != before["digests"]:
        found.append(f"{now['path']}: other content than when the store was made")
  return found


def _settings(task: Task, loaded: tokenizer_lib.Tokenizer, files: list[str]) -> dict[str, Any]:
  has_fields = any((documents.kind_of(f) or ("", ""))[0] != "txt" for f in files)
  return {
    "tokenizer_fingerprint": loaded.fingerprint,
    "eos_id": loaded.require_eos(),
    "records": task.records,
    "train_on": task.train_on,
    "text_field": task.text_field if has_fields else "",
    "answer_field": task.answer_field if task.records == "prompt" else "",
    "chat_template": "" if task.records == "text" else chat.template_digest(loaded.chat_template),
    "max_document_bytes": task.max_document_bytes,
  }


def _finished(output: Path, settings: dict[str, Any], stats: list[dict[str, Any]]) -> dict[str, Any] | None:
  """The manifest of a finished store of the same things, None where there is none.

  Raises:
    ConfigError: the store is of other things.
  """
  manifest = store.read_manifest(output)
  if manifest is None:
    return None
  found = _differences(manifest, settings, stats)
  if found:
    shown = "\n".join(f"  {line}" for line in found[:10])
    raise ConfigError(
      f"--output {output}: holds a finished store of something else; choose another --output or remove it. Different:\n{shown}"
    )
  store.open_store(output)  # nothing of it is missing
  return manifest


@contextlib.contextmanager
def _locked(output: Path, settings: dict[str, Any], now: str) -> Iterator[str]:
  """Makes the directory, or takes it up again; holds it against other processes. Yields when it was made: `now`, or earlier."""
  directory = output / store.IN_PROGRESS
  others = {p.name for p in output.iterdir()} - {BAD_RECORDS, CONTAMINATED, store.MANIFEST} if output.is_dir() else set()
  if others and not directory.exists():
    raise ConfigError(f"--output {output}: holds other files; name a new or empty directory")
  directory.mkdir(parents=True, exist_ok=True)
  with open(directory / _LOCK, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f"--output {output}: another process is preparing this store; wait for it or stop it") from None
    plan_file = directory / _PLAN
    if plan_file.exists():
      before = json.loads(plan_file.read_bytes())
      found = [f"{k}: {before.get(k)!r} before, now {v!r}" for k, v in settings.items() if before.get(k) != v]
      if found:
        shown = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
          f"--output {output}: holds an unfinished store with other settings; give the same ones to go on, or remove it. "
          f"Different:\n{shown}"
        )
    else:
      before = {**settings, "rendered_at": now}
      store.write_atomically(plan_file, json.dumps(before).encode("utf-8"))
    yield before["rendered_at"]


@contextlib.contextmanager
def _plain_disk_errors(output: str) -> Iterator[None]:
  """Says what to do about a disk that cannot be written."""
  advice = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, it goes on where it stopped",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, it goes on where it stopped",
    errno.EROFS: "the file system is read-only; choose another --output",
    errno.EACCES: "permission denied; change the permissions or choose another place",
    errno.EFBIG: "the file size limit is reached (ulimit -f); raise it and run the same command again",
  }
  try:
    yield
  except OSError as error:
    if error.errno not in advice:
      raise
    raise OSError(error.errno, f"{error.filename or output}: {advice[error.errno]}") from error


def _finish(output: Path, loaded, settings, units, markers, stats, rendered_at: str) -> dict[str, Any]:
  """Gathers the records that were left out, writes `store.json`, removes what is no longer needed."""
  directory = output / store.IN_PROGRESS
  num_bad, left_out, frequent = sum(m["num_bad"] for m in markers), {}, collections.Counter()
  for reason, number in (item for m in markers for item in m["left_out"].items()):
    left_out[reason] = left_out.get(reason, 0) + number
  first = [BadRecord(*record) for record in itertools.islice(_gathered(output, units, markers, "bad"), _SHOWN_BAD)]
  if num_bad:
    _write_list(output, BAD_RECORDS, (BadRecord(*record) for record in _gathered(output, units, markers, "bad")))
  if left_out.get("contaminated"):
    frequent.update((ngram, file) for *_, ngram, file in _gathered(output, units, markers, "contaminated"))
    _write_list(output, CONTAMINATED, (Contaminated(*record) for record in _gathered(output, units, markers, "contaminated")))
  if not any(m["info"]["num_documents"] for m in markers):
    shutil.rmtree(directory)  # the next try may well use another --text_field
    example = f"; the first: {first[0].file}:{first[0].line}: {first[0].reason}" if first else ""
    lost = "".join(f", {number} left out ({reason})" for reason, number in left_out.items())
    raise DataError(f"no document in {len(stats)} files: {num_bad} bad records{lost}{example}")
  files = [store.FileInfo(**m["info"]) for m in markers if m["info"]["num_documents"]]
  digests: dict[str, list[str]] = {s["path"]: [] for s in stats}
  for unit, marker in zip(units, markers, strict=True):
    for piece, digest in zip(unit, marker["digests"], strict=True):
      digests[piece.part.file].append(digest)
  names = {part for f in files for part in store.part_names(f.name, has_loss_mask="loss" in f.digests)}
  for path in output.glob("*.ds*"):  # of units that an earlier, interrupted run with other files had
    if path.name not in names:
      path.unlink()
  notes = {k: sum(m["notes"][k] for m in markers) for k in markers[0]["notes"]}
  store.write_manifest(
    output,
    files=files,
    vocab_size=loaded.vocab_size,
    tokenizer_fingerprint=loaded.fingerprint,
    eos_id=loaded.require_eos(),
    extra={
      **{key: settings[key] for key in ("records", "train_on", "text_field", "answer_field", "chat_template")},
      **({"rendered_at": rendered_at} if settings["chat_template"] and "strftime_now" in loaded.chat_template else {}),
      "max_document_bytes": settings["max_document_bytes"],
      "inputs": [{**s, "digests": digests[s["path"]]} for s in stats],
      "bad_records": {"num": num_bad, "first": [b._asdict() for b in first]},
      "notes": notes,
      "decontaminate": settings["decontaminate"],
      "selection": settings["selection"],
      "left_out": left_out,
      "frequent": [(ngram, num, file) for (ngram, file), num in frequent.most_common(_SHOWN_FREQUENT)],
    },
  )
  shutil.rmtree(directory, ignore_errors=True)  # a second process that finds the store finished does so too
  manifest = store.read_manifest(output)
  assert manifest is not None
  return manifest


def _gathered(output: Path, units, markers, kind: str) -> Iterator[list[Any]]:
  """The records of all units' lists (file, line, offset, ...), with lines counted from the start of each input file."""
  lines_before = {}
  for number, (unit, marker) in enumerate(zip(units, markers, strict=True)):
    starts = []
    for piece, num_lines in zip(unit, marker["num_lines"], strict=True):
      is_absolute = documents.kind_of(piece.part.file) == ("parquet", "")
      starts.append(0 if is_absolute else lines_before.get(piece.part.file, 0))
      lines_before[piece.part.file] = starts[-1] + num_lines
    with open(output / store.IN_PROGRESS / f"{number:05d}.{kind}", encoding="utf-8") as unit_file:
      for line in unit_file:
        index, file, at, *rest = json.loads(line)
        yield [file, at + starts[index], *rest]


def _write_list(output: Path, name: str, records: Iterable[BadRecord | Contaminated]) -> None:
  temporary = output / store.IN_PROGRESS / name
  with open(temporary, "w", encoding="utf-8") as f:
    for record in records:
      f.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, output / name)


def _report(output: str, manifest: dict[str, Any], *, seconds: float, was_finished: bool) -> PrepareReport:
  bad = manifest["bad_records"]
  return PrepareReport(
    output=output,
    num_documents=manifest["num_documents"],
    num_tokens=manifest["num_tokens"],
    num_bytes=manifest["num_bytes"],
    num_bad=bad["num"],
    bad_records=[BadRecord(**b) for b in bad["first"]],
    notes=manifest["notes"],
    seconds=seconds,
    was_finished=was_finished,
    left_out=manifest.get("left_out", {}),  # not in stores of before there was a reason to leave documents out
    frequent=[Frequent(*f) for f in manifest.get("frequent", [])],
    num_targets=manifest.get("num_targets", manifest["num_tokens"]),
  )


class _Display:
  """A progress bar on a terminal, a plain line now and then elsewhere."""

  _LINE_SECS = 20.0

  def __init__(self, is_shown: bool, output: str, total_bytes: int, counters: Any, num_done: int, num_units: int):
    console = rich.console.Console(stderr=True)
    self._counters, self._total = counters, total_bytes
    self._is_plain = is_shown and not console.is_terminal
    self._start_bytes, self._start_secs = counters[0], time.monotonic()
    self._line_secs = self._start_secs
    self._bar = None
    if is_shown and num_done:
      print(f"{output}: goes on; {num_done} of {num_units} units of work are finished", file=sys.stderr)
    if is_shown and console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("prepare"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[figures]}"),
        rich.progress.TimeRemainingColumn(compact=True),
        console=console,
      )
      self._row = self._bar.add_task("", total=total_bytes, completed=self._start_bytes, figures="")

  def __enter__(self) -> "_Display":
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._bar:
      self.show()
      self._bar.stop()

  def show(self) -> None:
    """Brings the display up to date."""
    now = time.monotonic()
    if not self._bar and not (self._is_plain and now - self._line_secs >= self._LINE_SECS):
      return
    done, num_documents, num_tokens, num_bad = self._counters[:4]
    rate = (done - self._start_bytes) / max(now - self._start_secs, 1e-3)
    bad = f"  {num_bad:,} bad" if num_bad else ""
    figures = f"{rate / 1e6:.2f} MB/s  {num_documents:,} documents  {num_tokens / 1e6:,.1f} M tokens{bad}"
    if self._bar:
      self._bar.update(self._row, completed=done, figures=figures)
    else:
      self._line_secs = now
      left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else ""
      print(f"prepare: {100 * done / max(self._total, 1):.0f}%  {figures}  {left}", file=sys.stderr, flush=True)
