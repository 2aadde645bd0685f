"""Text files (.txt, .jsonl, .parquet; plain, .gz, .zst) -> documents in a fixed order, or what is wrong with them.

Invariant: every record comes out once, as a Document or as a BadRecord; none is lost in silence, and memory is bounded
by `max_document_bytes`, whatever the file holds.
"""

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from cpt_jax import exits, shipped
from cpt_jax.config import ConfigError, Problems
from cpt_jax.store import lines, parquet
from cpt_jax.store.records import BadRecord, Document, Fields, Part, Rules

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_READ_BYTES = 1 << 20


class DataError(ConfigError):
  """The input texts are at fault, not the settings."""

  exit_code = exits.BAD_TEXT


class Reader(Protocol):
  """Iterates a part's records, in order."""

  num_lines: int  # that started in the part, so far; in .parquet the row, counted from the file's start
  consumed_bytes: int  # so far, of the file as it lies on disk

  def __iter__(self) -> Iterator[Document | BadRecord]:
    """Each record once."""
    ...


def open_part(part: Part, rules: Rules) -> Reader:
  """The reader of a part. Lines are counted from the part's start, rows from the file's."""
  kind, compression = file_kind(part.file)
  fields = Fields(part.file, rules)
  if kind == "parquet":
    return parquet.ParquetReader(part, fields)
  reader = {"txt": lines.TextReader, "jsonl": lines.JsonReader}[kind]
  return reader(part, fields, compression=compression)


def find_files(inputs: Sequence[str], *, flag: str = "--input") -> list[str]:
  """The files of paths and globs (`**` too): in the order of the inputs, sorted within each glob, each file once.
  Raises ConfigError: an input matches nothing, or something that is no text file."""
  problems, files, seen = Problems(), [], set()
  for pattern in map(shipped.find, inputs):
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not matches:
      problems.add(f"{flag} {pattern!r}: no file matches; check the path and quote the pattern against the shell")
    for path in matches:
      if os.path.isdir(path):
        if path == pattern:
          example = os.path.join(pattern, "**", "*.jsonl")
          problems.add(f"{flag} {pattern!r}: a directory; say which of its files, e.g. {example!r}")
      elif not file_kind(path)[0]:
        expected = f"{', '.join(KINDS)}, plain or with {' or '.join(COMPRESSIONS)}"
        problems.add(f"{flag} {pattern!r}: {path}: expected {expected}; narrow the pattern or rename the file")
      elif os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        files.append(path)
  if problems.lines:
    raise ConfigError("\n".join(problems.lines))
  if not files:
    raise ConfigError(f"{flag} {' '.join(map(repr, inputs))}: no file matches; name .txt, .jsonl or .parquet files")
  return files


def file_kind(path: str) -> tuple[str, str]:
  """("jsonl", "gz") of "a.jsonl.gz", ("txt", "") of "b.txt", ("", "") for files of other kinds."""
  stem, extension = os.path.splitext(path.lower())
  compression = extension if extension in COMPRESSIONS else ""
  if compression:
    extension = os.path.splitext(stem)[1]
  if extension not in KINDS or (compression and extension == ".parquet"):
    return "", ""
  return extension[1:], compression[1:]


def split(file: str, *, part_bytes: int) -> list[Part]:
  """Parts of about `part_bytes` where a file can be read from the middle, else the file as a whole."""
  kind, compression = file_kind(file)
  size = os.path.getsize(file)
  if compression or size <= part_bytes:
    return [Part(file)]
  if kind == "parquet":
    return parquet.split(file, part_bytes=part_bytes)
  count = -(-size // part_bytes)
  edges = [size * i // count for i in range(count + 1)]
  return [Part(file, a, b) for a, b in itertools.pairwise(edges)]


def lines_before(part: Part) -> int:
  """Lines of the file that start before the part, by reading them; 0 where the reader counts from the file's start."""
  if part.start == 0 or file_kind(part.file) == ("parquet", ""):
    return 0
  count, left = 1, part.start - 1
  with open(part.file, "rb") as f:
    while data := f.read(min(left, _READ_BYTES)):
      count += data.count(b"\n")
      left -= len(data)
  return count
