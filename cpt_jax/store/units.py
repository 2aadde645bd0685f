"""Input files -> units of work, a token file each, and which of them are finished.

Invariant: units depend on the files' sizes only (.parquet: row groups); what was done for other content is not finished.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from cpt_jax.store import documents
from cpt_jax.store.documents import DataError
from cpt_jax.store.records import Part
from cpt_jax.store.token_files import IN_PROGRESS

UNIT_BYTES = 8 << 20  # lost at most by an interruption, and enough to feed a process for seconds
_GROWTH = 4  # a compressed file counts for so many times its size


class InputFile(NamedTuple):
  """An input file as it was when the work was laid out."""

  path: str
  bytes: int
  mtime_ns: int

  @classmethod
  def of(cls, path: str) -> "InputFile":
    """As it is now."""
    found = os.stat(path)
    return cls(path, found.st_size, found.st_mtime_ns)

  def check_unchanged(self) -> None:
    """Raises DataError where it is another now."""
    if InputFile.of(self.path) != self:
      raise DataError(f"{self.path}: was changed while it was read; run the command again when nothing writes to it")


class Piece(NamedTuple):
  """A part of an input file within a unit, and the bytes of the file that its digest covers."""

  part: Part
  digest_start: int
  digest_end: int
  file: InputFile

  @property
  def num_bytes(self) -> int:
    """Of the file as it lies on disk."""
    return self.digest_end - self.digest_start

  def digest(self) -> str:
    """Of these bytes of the file, as they are now."""
    digest, left = hashlib.blake2b(digest_size=16), self.num_bytes
    with open(self.file.path, "rb") as f:
      f.seek(self.digest_start)
      while left and (data := f.read(min(left, 1 << 20))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


Unit = list[Piece]


def pieces(file: InputFile, parts: list[Part]) -> list[Piece]:
  """The parts of a file, each with an equal stretch of its bytes to digest."""
  edges = [file.bytes * i // len(parts) for i in range(len(parts) + 1)]
  return [Piece(part, edges[i], edges[i + 1], file) for i, part in enumerate(parts)]


def cut(files: list[InputFile], *, unit_bytes: int, max_units: int) -> list[Unit]:
  """The units of work, in the order of the documents.

  A unit has about `unit_bytes`; 0 = 8 MiB, or more where there would be more than `max_units`.
  """
  weights = [file.bytes * (_GROWTH if documents.file_kind(file.path)[1] else 1) for file in files]
  target = unit_bytes or max(UNIT_BYTES, sum(weights) // max_units)
  units: list[Unit] = []
  filled = 0  # of the last unit
  for file, weight in zip(files, weights, strict=True):
    parts = documents.split(file.path, part_bytes=target)
    for piece in pieces(file, parts):
      if not units or filled + weight // len(parts) > target:
        units.append([])
        filled = 0
      units[-1].append(piece)
      filled += weight // len(parts)
  return units


def key(unit: Unit) -> list[list[Any]]:
  """What tells a unit from one of other inputs, in values that JSON keeps."""
  return [[*piece.part, piece.file.bytes, piece.file.mtime_ns] for piece in unit]


def read_markers(output: str, units: list[Unit]) -> list[dict[str, Any] | None]:
  """What each finished unit of a store holds; None for one that is not finished, or was of other inputs."""
  return [_read_marker(Path(output) / IN_PROGRESS / f"{i:05d}.json", unit) for i, unit in enumerate(units)]


def _read_marker(file: Path, unit: Unit) -> dict[str, Any] | None:
  try:
    marker = json.loads(file.read_bytes())
  except FileNotFoundError:
    return None
  if marker["unit"] == key(unit):
    return marker
  is_same = [k[:-1] for k in marker["unit"]] == [k[:-1] for k in key(unit)]  # but for the files' times
  return marker if is_same and marker["digests"] == [piece.digest() for piece in unit] else None
