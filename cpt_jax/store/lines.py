"""A part of a .txt or .jsonl file -> its records, line by line.

Invariant: memory is bounded by the longest document that the rules allow, whatever the file holds.

A .txt file is one document, or several with a line holding one form feed between them; the line break before such a line,
and that at the end of the file, are no part of the text. A .jsonl line is an object with the text in one field; blank
lines are no records. A byte order mark at the start of a file is dropped. Otherwise text is taken as it is.
"""

import json
import os
from collections.abc import Iterator
from typing import BinaryIO

from cpt_jax.store import compressed
from cpt_jax.store.records import BadRecord, Document, Fields, Part, RecordError, json_type

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_GROWTH = 4  # bytes of a JSON line for a byte of its text: escapes double Chinese, other fields take room
_READ_BYTES = 1 << 20


class _LineReader:
  """Iterates a part's records. Lines are counted from the part's start; `num_lines` says how many started in it."""

  def __init__(self, part: Part, fields: Fields, *, compression: str):
    self.part, self.num_lines = part, 0
    self.consumed_bytes = 0  # of the file as it lies on disk
    self._fields, self._compression = fields, compression

  def __iter__(self) -> Iterator[Document | BadRecord]:
    if os.path.getsize(self.part.file) == 0:
      yield self._fields.bad(1, 0, "empty file")
      return
    with open(self.part.file, "rb", buffering=_READ_BYTES) as raw:
      self._raw = raw
      try:
        yield from self._records(compressed.decompressed(raw, self._compression))
      except compressed.ERRORS as error:  # ends the reading of the file
        reason = f"{compressed.reason(error, self._compression)}; nothing is read from here on"
        yield self._fields.bad(self.num_lines + 1, -1, reason)

  def _records(self, stream: BinaryIO) -> Iterator[Document | BadRecord]:
    raise NotImplementedError

  def _lines(self, stream: BinaryIO, limit: int) -> Iterator[tuple[bytes | None, int, int]]:
    """(line or None where it is over the limit, offset, bytes) from the first line that starts in the part."""
    position = 0
    if self.part.start:
      position = stream.seek(self.part.start - 1)
      while True:  # to the first line start; the byte before the part may be the line break
        piece = stream.readline(_READ_BYTES)
        position += len(piece)
        if piece[-1:] in (b"\n", b""):
          break
    while True:
      line, start = stream.readline(limit + 1), position
      position += len(line)
      if len(line) > limit and line[-1:] != b"\n":
        piece = line = line[:0]
        while piece[-1:] != b"\n" and (piece := stream.readline(_READ_BYTES)):
          position += len(piece)
          self._note_progress(position)
        yield None, start, position - start
      elif line:
        yield line, start, len(line)
      else:
        return
      self._note_progress(position)

  def _note_progress(self, position: int) -> None:
    self.consumed_bytes = self._raw.tell() if self._compression else position - self.part.start

  def _starts_here(self, offset: int) -> bool:
    return self.part.end < 0 or offset < self.part.end


class TextReader(_LineReader):
  """The documents of a .txt file."""

  def _records(self, stream: BinaryIO) -> Iterator[Document | BadRecord]:
    max_bytes = self._fields.max_bytes + 2  # 2: a line break that is not part of the text
    is_open, is_first = self.part.start == 0, True
    pieces, size, start, first_line = [], 0, 0, 1
    for line, offset, length in self._lines(stream, max_bytes):
      here = self._starts_here(offset)
      if not here and not is_open:
        return
      self.num_lines += here
      if line is not None and line.rstrip(b"\r\n") == b"\f":
        if is_open and (size or not is_first):
          yield self._document(pieces, size, start, first_line)
        if not here:
          return
        is_open, is_first = True, False
        pieces, size, start, first_line = [], 0, offset + length, self.num_lines + 1
      elif is_open:
        size += length
        if size > max_bytes:
          pieces = []
        elif line is not None:
          pieces.append(line)
    if is_open and size:
      yield self._document(pieces, size, start, first_line)

  def _document(self, pieces: list[bytes], size: int, start: int, line: int) -> Document | BadRecord:
    data = b"".join(pieces)
    if start == 0:
      data = data.removeprefix(_BYTE_ORDER_MARK)
    data = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    if (size and not pieces) or len(data) > self._fields.max_bytes:
      return self._fields.bad(line, start, self._fields.too_long(size))
    return self._fields.text(data, line, start)


class JsonReader(_LineReader):
  """The records of a .jsonl file."""

  def _records(self, stream: BinaryIO) -> Iterator[Document | BadRecord]:
    for line, offset, length in self._lines(stream, _JSON_GROWTH * self._fields.max_bytes):
      if not self._starts_here(offset):
        return
      self.num_lines += 1
      if line is None:
        yield self._fields.bad(self.num_lines, offset, self._fields.too_long(length))
        continue
      if offset == 0:
        line = line.removeprefix(_BYTE_ORDER_MARK)
      if not line.isspace() and line:
        try:
          yield self._document(line, offset)
        except RecordError as error:
          yield self._fields.bad(self.num_lines, offset, str(error))

  def _document(self, line: bytes, offset: int) -> Document | BadRecord:
    try:
      record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
      raise RecordError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
      is_cut = isinstance(error, ValueError) and not line.endswith(b"\n")
      cut = "the last line is cut off: " if is_cut else ""
      raise RecordError(f"{cut}broken JSON: {str(error)[:100]}") from None
    if not isinstance(record, dict):
      raise RecordError(f"{json_type(record)}, expected an object")
    for name in self._fields.names:
      if name not in record:
        raise RecordError(self._fields.missing(name, list(record)))
    return self._fields.document([record[name] for name in self._fields.names], self.num_lines, offset)
