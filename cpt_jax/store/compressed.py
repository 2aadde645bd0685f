"""A compressed file -> its bytes, as far as they make sense.

Invariant: damage, a file that is cut off, and one that grows beyond all reason are errors, never a shorter text.
"""

import gzip
import io
import os
import zlib
from typing import Any, BinaryIO

import zstandard

# A compressed file may grow this many times, once it has given so much: text shrinks 3 to 20 times, logs up to 100.
BOMB_RATIO, BOMB_BYTES = 250, 256 << 20
_ZSTD_WINDOW_BYTES = 128 << 20  # what the zstd program accepts unless told otherwise
_READ_BYTES = 1 << 20


class BombError(Exception):
  """Decompression gives far more than text would."""


ERRORS = (BombError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
  """The file's bytes; `compression` is "gz", "zst" or ""."""
  if not compression:
    return raw
  source = gzip.GzipFile(fileobj=raw) if compression == "gz" else _ZstdFrames(raw)
  return io.BufferedReader(_Capped(raw, source), buffer_size=_READ_BYTES)


def reason(error: Exception, compression: str) -> str:
  """What one of ERRORS means for the records of a file."""
  if isinstance(error, BombError):
    return f"decompresses to more than {BOMB_RATIO} times its size; decompress it yourself if that is meant"
  return f"corrupt .{compression}: {error}; what was read of it before may be damaged too"


class _Capped(io.RawIOBase):
  """A decompressed stream that stops when it has grown beyond all reason."""

  def __init__(self, raw: BinaryIO, source: Any):
    self._raw, self._source, self._given = raw, source, 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._source.read1(min(len(buffer), _READ_BYTES))  # read() would lose what precedes a damaged place
    self._given += len(data)
    if self._given > BOMB_BYTES and self._given > BOMB_RATIO * self._raw.tell():
      raise BombError
    buffer[: len(data)] = data
    return len(data)


class _ZstdFrames:
  """Frames of a .zst file one after another; unlike zstandard's own reader it notices a file that is cut off."""

  # At most 128 KiB come out of 4 bytes (a block that repeats one byte), so little goes in at a time.
  _INPUT_BYTES = 2048

  def __init__(self, raw: BinaryIO):
    self._raw = raw
    self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    self._frame: Any = None
    self._ready = memoryview(b"")

  def read1(self, size: int) -> bytes:
    while not self._ready:
      data = self._raw.read(self._INPUT_BYTES)
      if not data:
        if self._frame is not None:
          raise EOFError("the file ends in the middle of a frame")
        return b""
      if self._frame is None:
        self._frame = self._context.decompressobj()
      self._ready = memoryview(self._frame.decompress(data))
      if self._frame.eof:
        self._raw.seek(-len(self._frame.unused_data), os.SEEK_CUR)
        self._frame = None
    data, self._ready = bytes(self._ready[:size]), self._ready[size:]
    return data
