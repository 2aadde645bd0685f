"""A unit of work -> its token file, the list of records that it left out, and the marker that says that it is finished.

Invariant: what is written depends on the unit's texts, the tokenizer and the rules only. It is written under names of its own in
`in_progress/`, moved into place, and then marked as finished there.
"""

import contextlib
import datetime
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from cpt_jax.journal import sync_directory, write_atomically
from cpt_jax.store import chat, decontaminate, documents, token_files, tokenization, units
from cpt_jax.store.documents import DataError
from cpt_jax.store.records import BadRecord, Document, Part, Rules
from cpt_jax.store.token_files import IN_PROGRESS, FileInfo, TokenFileWriter
from cpt_jax.store.units import Unit

LISTS = ("bad", "contaminated")  # of records that a unit left out
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 1024
_COUNTED_BYTES = 1 << 20  # of input, before the display hears of them

# (number of the unit, its documents, counts to fill) -> the documents that are kept; counts are of those left out, by reason.
Select = Callable[[int, Iterable[Document], dict[str, int]], Iterable[Document]]


class Task(NamedTuple):
  """What decides the content of a store, apart from the texts."""

  output: str
  tokenizer: str
  rules: Rules
  rendered_at: str = ""  # ISO time that chat templates are told; set at the first start
  contamination: str = ""  # file of the evaluation texts' runs of words (decontaminate.load)

  def load_tokenizer(self) -> tokenization.Tokenizer:
    """The task's."""
    return tokenization.load(self.tokenizer, eos_token=self.rules.eos_token)

  def encoder(self, tokenizer: tokenization.Tokenizer) -> chat.Encoder | None:
    """Of conversations; None for texts."""
    if self.rules.records == "text":
      return None
    now = datetime.datetime.fromisoformat(self.rendered_at)
    return chat.Encoder(tokenizer, records=self.rules.records, train_on=self.rules.train_on, now=now)


class Asked(NamedTuple):
  """Where the tasks of a preparation run, and which documents they leave out."""

  executor: str = "local"
  max_tasks: int = 256  # in a phase, and so token files; each has 8 MiB of input or more
  filters: tuple[str, ...] = ()  # of FILTERS, in this order
  dedup: bool = False  # keep one document of those that are nearly alike
  language: str = ""  # datatrove's splitter of words, e.g. "eng" (needs the packages that it names); "" = our own
  num_workers: int = 0  # tasks at a time; 0 = as many as there are cores (local), or no limit
  # For Slurm and Ray:
  cpus_per_task: int = 1
  mem_per_cpu_gb: int = 4
  # For Slurm:
  partition: str = ""
  time: str = ""
  qos: str = ""
  env_command: str = ""  # what a job does first; "" = activates the virtual environment of this process, where it has one
  sbatch: tuple[str, ...] = ()  # other options, "name=value"


class Job(NamedTuple):
  """All the work of a store."""

  task: Task
  units: list[Unit]
  settings: dict[str, Any]  # of the store


class Counters:
  """What all processes have done, in memory that they share; "stop" above 0 tells them to stop."""

  _FIELDS = ("bytes", "documents", "tokens", "bad", "stop")  # bytes of input

  def __init__(self):
    self._values = multiprocessing.get_context("spawn").Array("q", len(self._FIELDS))

  def __getitem__(self, field: str) -> int:
    return self._values[self._FIELDS.index(field)]

  def add(self, field: str, number: int) -> int:
    """The sum after it."""
    at = self._FIELDS.index(field)
    with self._values.get_lock():
      self._values[at] += number
      return self._values[at]


class _BadRecords:
  """Writes down a unit's bad records in order, though rendering may find one bad after reading has found later ones."""

  _MAX_HELD = 1024  # a file of nothing else is not kept in memory

  def __init__(self, file: TextIO, unit: Unit, check: Callable[[BadRecord, Part], None]):
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


class Worker:
  """Does units of work; one in each process."""

  def __init__(
    self,
    task: Task,
    tokenizer: tokenization.Tokenizer,
    counters: Counters,
    *,
    tick: Callable[[], None] = lambda: None,  # called often, to show progress
    select: Select = lambda number, found, left_out: found,
  ):
    self._task, self._tokenizer, self._select = task, tokenizer, select
    self._encoder = task.encoder(tokenizer)
    self._contamination = decontaminate.load(task.contamination) if task.contamination else None
    self._counters, self._tick = counters, tick
    self._output = Path(task.output)
    self._progress = self._output / IN_PROGRESS

  def run(self, number: int, unit: Unit) -> None:
    """Writes the unit's token file and its marker."""
    own = f"{number:05d}.{os.getpid()}"
    dtype = token_files.token_dtype(self._tokenizer.vocab_size)
    writer = TokenFileWriter(self._progress / f"{own}.ds", dtype=dtype, tokenizer_name=self._tokenizer.name)
    with contextlib.ExitStack() as undo:
      undo.callback(self._abandon, writer, own)
      found = self._write_unit(number, unit, writer, own)
      digests = [piece.digest() for piece in unit]
      for piece in unit:  # ORDER: after all reading, that of the digests too
        piece.file.check_unchanged()
      info = writer.close()
      undo.pop_all()
    self._move_into_place(number, own, info, writer)
    said = {"unit": units.key(unit), "info": info._replace(name=f"{number:05d}.ds")._asdict(), "digests": digests}
    # ORDER: the marker after the files, or an interruption between them would count a unit that is not there.
    write_atomically(self._progress / f"{number:05d}.json", json.dumps(said | found).encode("utf-8"))

  def _abandon(self, writer: TokenFileWriter, own: str) -> None:
    writer.abandon()
    for kind in LISTS:
      (self._progress / f"{own}.{kind}").unlink(missing_ok=True)

  def _write_unit(self, number: int, unit: Unit, writer: TokenFileWriter, own: str) -> dict[str, Any]:
    """Writes the documents and the lists of records that are left out; returns what the marker says of them."""
    notes = {"special_text": 0, "control_ids": 0, "nul": 0}
    num_lines, left_out = [], {}
    lists = [self._progress / f"{own}.{kind}" for kind in LISTS]
    with open(lists[0], "w", encoding="utf-8") as bad_file, open(lists[1], "w", encoding="utf-8") as contaminated_file:
      bad = _BadRecords(bad_file, unit, self._check_bad)
      for batch in _batches(self._select(number, self._documents(unit, bad, num_lines), left_out)):
        for record in self._write(self._clean(batch, unit, contaminated_file, left_out), writer, notes):
          bad.add(_piece_of(record, unit), record)
        bad.flush()
      bad.flush()
    return {"num_lines": num_lines, "num_bad": bad.num, "notes": notes, "left_out": left_out}

  def _move_into_place(self, number: int, own: str, info: FileInfo, writer: TokenFileWriter) -> None:
    if info.num_documents:
      for part in info.digests:
        temporary, final = self._progress / f"{own}.ds", self._output / f"{number:05d}.ds"
        os.replace(token_files.part_path(temporary, part), token_files.part_path(final, part))
    else:
      writer.abandon()
    for kind in LISTS:
      os.replace(self._progress / f"{own}.{kind}", self._progress / f"{number:05d}.{kind}")
    sync_directory(self._output)

  def _documents(self, unit: Unit, bad: _BadRecords, num_lines: list[int]) -> Iterator[Document]:
    """The unit's documents; notes bad records and the lines of each piece, and counts what was read."""
    for index, piece in enumerate(unit):
      reader = documents.open_part(piece.part, self._task.rules)
      counted = 0
      for record in reader:
        if isinstance(record, Document):
          bad.is_held = self._encoder is not None
          yield record
        else:
          bad.add(index, record)
        consumed = min(reader.consumed_bytes, piece.num_bytes)
        if consumed > counted + _COUNTED_BYTES:
          self._counters.add("bytes", consumed - counted)
          counted = consumed
      num_lines.append(reader.num_lines)
      self._counters.add("bytes", piece.num_bytes - counted)

  def _clean(self, batch: list[Document], unit: Unit, file: TextIO, left_out: dict[str, int]) -> list[Document]:
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

  def _write(self, batch: list[Document], writer: TokenFileWriter, notes: dict[str, int]) -> list[BadRecord]:
    """Writes documents; returns those that turn out to be bad."""
    num_before, bad = writer.num_tokens, []
    if self._encoder is None:
      self._write_texts(batch, writer, notes)
    else:
      bad = self._write_conversations(self._encoder, batch, writer, notes)
    self._counters.add("documents", len(batch) - len(bad))
    self._counters.add("tokens", writer.num_tokens - num_before)
    self._tick()
    if self._counters["stop"]:
      raise KeyboardInterrupt
    return bad

  def _write_texts(self, batch: list[Document], writer: TokenFileWriter, notes: dict[str, int]) -> None:
    encoded = self._tokenizer.encode_documents([d.text for d in batch])
    for document, ids in zip(batch, encoded.ids, strict=True):
      writer.add(ids, num_bytes=len(document.utf8), text_hash=token_files.text_hash(document.utf8))
      notes["nul"] += "\0" in document.text
    notes["special_text"] += encoded.num_special_text
    notes["control_ids"] += encoded.num_control_ids

  def _write_conversations(
    self, encoder: chat.Encoder, batch: list[Document], writer: TokenFileWriter, notes: dict[str, int]
  ) -> list[BadRecord]:
    bad, conversations = [], [document.messages or [] for document in batch]
    for document, messages, found in zip(batch, conversations, encoder.encode(conversations), strict=True):
      if isinstance(found, chat.RenderError):
        bad.append(BadRecord(document.file, document.line, document.offset, str(found)))
        continue
      text_hash = token_files.text_hash(chat.canonical(messages))  # not of the rendering, which is the tokenizer's
      writer.add(found.ids, num_bytes=found.num_bytes, text_hash=text_hash, loss_mask=found.loss_mask)
      notes["nul"] += "\0" in document.text
      notes["special_text"] += found.has_special_text
      notes["control_ids"] += found.has_control_ids
    return bad

  def _check_bad(self, bad: BadRecord, part: Part) -> None:
    """Raises DataError where the rules allow no bad record more."""
    num_bad, rules = self._counters.add("bad", 1), self._task.rules
    if rules.on_bad != "fail" and not 0 <= rules.max_bad < num_bad:
      return
    found = f"{bad.file}:{bad.line + documents.lines_before(part)}: {bad.reason}"
    if rules.on_bad == "fail":
      raise DataError(f"{found}; mend it, or use --on_bad skip to leave bad records out")
    raise DataError(f"{num_bad} bad records, more than --max_bad={rules.max_bad}; the last is {found}")


def run_unit(job: Job, number: int, select: Select) -> None:
  """Does a unit in this process."""
  Worker(job.task, job.task.load_tokenizer(), Counters(), select=select).run(number, job.units[number])


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


def _piece_of(document: Document | BadRecord, unit: Unit) -> int:
  """The number of the piece in which a record starts."""
  for index, (part, *_) in enumerate(unit):
    if part.file == document.file and (part.end < 0 or document.offset < 0 or part.start <= document.offset < part.end):
      return index
  raise AssertionError(f"{document.file} is not in the unit")
