"""Text files -> parts of documents, and samples of them that are chosen by hash and split into training and held-out parts.

Invariant: whether a part is in a sample, and on which side, follows from its text alone; memory holds the sample, not the files.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cpt_jax.store import documents
from cpt_jax.store.documents import DataError
from cpt_jax.store.records import BadRecord, Part, Rules

# A long document is cut at line ends, so that samples of a few books are of all of them, and encoding uses every core.
PART_CHARACTERS = 32_768
_GROWTH = 4  # bytes of text from a byte of a compressed file, about
BATCH_BYTES = 4 << 20  # of text that is encoded at once


class Sample(NamedTuple):
  """Parts of documents."""

  train: list[str]
  heldout: list[str]


def parts(files: list[str], *, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[str]:
  """Every document of the files, long ones in parts; `on_bytes` hears of the bytes of the files that were read.

  Raises DataError: a record that cannot be read; its file and line are named.
  """
  for file in files:
    reader = documents.open_part(Part(file), Rules())
    told = 0
    for record in reader:
      if isinstance(record, BadRecord):
        if record.reason == "empty text":
          continue
        raise DataError(f"{record.file}:{record.line}: {record.reason}; correct the file or leave it out")
      yield from cut(record.text)
      on_bytes(reader.consumed_bytes - told)
      told = reader.consumed_bytes
    on_bytes(max(os.path.getsize(file) - told, 0))


def cut(text: str, *, size: int = PART_CHARACTERS) -> Iterator[str]:
  """The text in parts of at most `size` characters, cut behind line breaks where there are any; joined they are the text."""
  start = 0
  while start < len(text):
    end = min(start + size, len(text))
    if end < len(text):
      end = text.rfind("\n", start, end) + 1 or end
    yield text[start:end]
    start = end


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
  """Lists of texts of about 4 MB."""
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text.encode())
    if size >= BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def place(text: str) -> float:
  """A number in [0, 1) drawn by the text's hash."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def total_bytes(files: list[str]) -> int:
  """Bytes of text in the files, by their sizes."""
  return sum(os.path.getsize(f) * (_GROWTH if f.endswith(documents.COMPRESSIONS) else 1) for f in files)


class Sampler:
  """Takes parts by their hashes: held out below `heldout_frac`, so the same whatever the sample's size."""

  def __init__(self, *, wanted_bytes: int, there_bytes: int, heldout_frac: float):
    self.sample = Sample([], [])
    self._heldout_frac = heldout_frac
    self._kept_frac = min(1.0, wanted_bytes / max(there_bytes, 1))

  def add(self, text: str) -> bool:
    """Takes the part or leaves it; is it held out?"""
    at = place(text)
    is_heldout = at < self._heldout_frac
    # Within each side the position is uniform again.
    within = at / self._heldout_frac if is_heldout else (at - self._heldout_frac) / (1 - self._heldout_frac)
    if within < self._kept_frac:
      (self.sample.heldout if is_heldout else self.sample.train).append(text)
    return is_heldout


def sample(files: list[str], *, max_bytes: int, heldout_frac: float, on_bytes: Callable[[int], None] = lambda _: None) -> Sample:
  """About `max_bytes` of the files' text, held-out parts among them; copies of a part are on one side."""
  sampler = Sampler(wanted_bytes=max_bytes, there_bytes=total_bytes(files), heldout_frac=heldout_frac)
  for text in parts(files, on_bytes=on_bytes):
    sampler.add(text)
  return sampler.sample
