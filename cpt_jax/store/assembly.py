"""Finished units -> a finished store: lists of what was left out, `store.json`, and nothing else.

Invariant: `store.json` is written when all else is in place; lines are counted from the start of each input file.
"""

import collections
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cpt_jax.store import documents, token_files
from cpt_jax.store.documents import DataError
from cpt_jax.store.records import BadRecord
from cpt_jax.store.token_files import IN_PROGRESS, FileInfo
from cpt_jax.store.tokenization import Tokenizer
from cpt_jax.store.units import InputFile
from cpt_jax.store.work import Job

BAD_RECORDS = "bad_records.jsonl"
CONTAMINATED = "contaminated.jsonl"
_SHOWN_BAD, _SHOWN_FREQUENT = 10, 5


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


class _LeftOut(NamedTuple):
  """What was left out of a store."""

  num_bad: int
  first_bad: list[BadRecord]
  by_reason: dict[str, int]  # documents
  frequent: list[Frequent]


def finish(job: Job, tokenizer: Tokenizer, markers: list[dict[str, Any]], files: list[InputFile]) -> dict[str, Any]:
  """Gathers the records that were left out, writes `store.json`, removes what is no longer needed; returns the manifest.
  Raises DataError: no document is left."""
  output, settings = Path(job.task.output), job.settings
  left_out = _gather(output, job, markers)
  if not any(m["info"]["num_documents"] for m in markers):
    shutil.rmtree(output / IN_PROGRESS)  # the next try may well use another --text_field
    raise DataError(_nothing_left(left_out, num_files=len(files)))
  infos = [FileInfo(**m["info"]) for m in markers if m["info"]["num_documents"]]
  _remove_unlisted(output, infos)
  digests: dict[str, list[str]] = {file.path: [] for file in files}
  for unit, marker in zip(job.units, markers, strict=True):
    for piece, digest in zip(unit, marker["digests"], strict=True):
      digests[piece.file.path].append(digest)
  says_time = settings["chat_template"] and "strftime_now" in tokenizer.chat_template
  token_files.write_manifest(
    output,
    files=infos,
    vocab_size=tokenizer.vocab_size,
    tokenizer_fingerprint=tokenizer.fingerprint,
    eos_id=tokenizer.require_eos(),
    extra={
      **{key: settings[key] for key in ("records", "train_on", "text_field", "answer_field", "chat_template")},
      **({"rendered_at": job.task.rendered_at} if says_time else {}),
      "max_document_bytes": settings["max_document_bytes"],
      "inputs": [{**file._asdict(), "digests": digests[file.path]} for file in files],
      "bad_records": {"num": left_out.num_bad, "first": [bad._asdict() for bad in left_out.first_bad]},
      "notes": {note: sum(m["notes"][note] for m in markers) for note in markers[0]["notes"]},
      "decontaminate": settings["decontaminate"],
      "selection": settings["selection"],
      "left_out": left_out.by_reason,
      "frequent": [list(found) for found in left_out.frequent],
    },
  )
  shutil.rmtree(output / IN_PROGRESS, ignore_errors=True)  # a second process that finds the store finished does so too
  manifest = token_files.read_manifest(output)
  assert manifest is not None
  return manifest


def _gather(output: Path, job: Job, markers: list[dict[str, Any]]) -> _LeftOut:
  """Writes the lists of all units' records that were left out."""
  num_bad, by_reason, frequent = sum(m["num_bad"] for m in markers), collections.Counter(), collections.Counter()
  for marker in markers:
    by_reason.update(marker["left_out"])
  first = [BadRecord(*record) for record in itertools.islice(_records(output, job, markers, "bad"), _SHOWN_BAD)]
  if num_bad:
    _write_list(output, BAD_RECORDS, (BadRecord(*record) for record in _records(output, job, markers, "bad")))
  if by_reason["contaminated"]:
    frequent.update((ngram, file) for *_, ngram, file in _records(output, job, markers, "contaminated"))
    _write_list(output, CONTAMINATED, (Contaminated(*record) for record in _records(output, job, markers, "contaminated")))
  shown = [Frequent(ngram, num, file) for (ngram, file), num in frequent.most_common(_SHOWN_FREQUENT)]
  return _LeftOut(num_bad, first, dict(by_reason), shown)


def _nothing_left(left_out: _LeftOut, *, num_files: int) -> str:
  first = left_out.first_bad
  example = f"; the first: {first[0].file}:{first[0].line}: {first[0].reason}" if first else ""
  lost = "".join(f", {number} left out ({reason})" for reason, number in left_out.by_reason.items())
  return f"no document in {num_files} files: {left_out.num_bad} bad records{lost}{example}"


def _remove_unlisted(output: Path, infos: list[FileInfo]) -> None:
  """Removes token files of units that an earlier, interrupted run with other files had."""
  names = {part for info in infos for part in token_files.part_names(info.name, has_loss_mask="loss" in info.digests)}
  for path in output.glob("*.ds*"):
    if path.name not in names:
      path.unlink()


def _records(output: Path, job: Job, markers: list[dict[str, Any]], kind: str) -> Iterator[list[Any]]:
  """The records of all units' lists (file, line, offset, ...), with lines counted from the start of each input file."""
  lines_before = {}
  for number, (unit, marker) in enumerate(zip(job.units, markers, strict=True)):
    starts = []
    for piece, num_lines in zip(unit, marker["num_lines"], strict=True):
      is_absolute = documents.file_kind(piece.part.file) == ("parquet", "")
      starts.append(0 if is_absolute else lines_before.get(piece.part.file, 0))
      lines_before[piece.part.file] = starts[-1] + num_lines
    with open(output / IN_PROGRESS / f"{number:05d}.{kind}", encoding="utf-8") as unit_file:
      for line in unit_file:
        index, file, at, *rest = json.loads(line)
        yield [file, at + starts[index], *rest]


def _write_list(output: Path, name: str, records: Iterable[BadRecord | Contaminated]) -> None:
  temporary = output / IN_PROGRESS / name
  with open(temporary, "w", encoding="utf-8") as f:
    for record in records:
      f.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, output / name)
