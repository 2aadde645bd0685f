"""Text files (.txt, .jsonl, .parquet; plain, .gz, .zst) -> documents in a fixed order, or what is wrong with them.

Invariant: every record comes out once, as a Document or as a BadRecord; none is lost in silence, and memory is bounded
by `max_document_bytes`, whatever the file holds.

A .txt file is one document, or several with a line holding one form feed between them; the line break before such a line,
and that at the end of the file, are no part of the text. A .jsonl line is an object with the text in one field; blank
lines are no records. A byte order mark at the start of a file is dropped. Otherwise text is taken as it is.

Instead of a text a record may hold a conversation: a list of {role, content} in one field, or a prompt and its answer in
two. Of a message only role and content are read; one with a field that would be lost with meaning is a bad record.
"""

import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import zstandard

from cpt_jax.config import ConfigError, Problems, did_you_mean

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
RECORDS = ("text", "messages", "prompt")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
MAX_DOCUMENT_BYTES = 16 << 20
# A compressed file may grow this many times, once it has given so much: text shrinks 3 to 20 times, logs up to 100.
_BOMB_RATIO, _BOMB_BYTES = 250, 256 << 20
_ZSTD_WINDOW_BYTES = 128 << 20  # what the zstd program accepts unless told otherwise
_JSON_GROWTH = 4  # bytes of a JSON line for a byte of its text: escapes double Chinese, other fields take room
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 128
# Fields of a message beside role and content that change what is said; the rest (names, times, ids) may go.
_MEANT_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class DataError(ConfigError):
  """The input texts are at fault, not the settings."""

  exit_code = 65  # sysexits.h: data


class Document(NamedTuple):
  """A text or a conversation; `line` is that of its first character (.txt, .jsonl), or the row (.parquet), from 1."""

  text: str  # of a conversation: what is said in it, the messages' contents with a blank line between them
  utf8: bytes
  file: str
  line: int
  offset: int  # byte in the (decompressed) file where the record starts; -1 in .parquet
  messages: list[dict[str, str]] | None = None  # {role, content} each; None for a text


class BadRecord(NamedTuple):
  """A record, or the rest of a file, that could not be read."""

  file: str
  line: int  # or row, from 1
  offset: int
  reason: str


class Part(NamedTuple):
  """A file, or a part of it: bytes [start, end) of a plain file, row groups [start, end) of a .parquet file.

  A record belongs to the part in which it starts. `end` is -1 for a file that is read as a whole.
  """

  file: str
  start: int = 0
  end: int = -1


class _BombError(Exception):
  """Decompression gives far more than text would."""


def find_files(inputs: list[str], *, flag: str = "--input") -> list[str]:
  """The files of paths and globs (`**` too): in the order of the inputs, sorted within each glob, each file once.

  Raises:
    ConfigError: an input matches nothing, or something that is no text file.
  """
  problems, files, seen = Problems(), [], set()
  for pattern in inputs:
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not matches:
      problems.add(f"{flag} {pattern!r}: no file matches; check the path and quote the pattern against the shell")
    for path in matches:
      if os.path.isdir(path):
        if path == pattern:
          example = os.path.join(pattern, "**", "*.jsonl")
          problems.add(f"{flag} {pattern!r}: a directory; say which of its files, e.g. {example!r}")
      elif kind_of(path) is None:
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


def kind_of(path: str) -> tuple[str, str] | None:
  """("jsonl", "gz") of "a.jsonl.gz", ("txt", "") of "b.txt", None for files of other kinds."""
  stem, extension = os.path.splitext(path.lower())
  compression = extension if extension in COMPRESSIONS else ""
  if compression:
    extension = os.path.splitext(stem)[1]
  if extension not in KINDS or (compression and extension == ".parquet"):
    return None
  return extension[1:], compression[1:]


def split(file: str, *, part_bytes: int) -> list[Part]:
  """Parts of about `part_bytes` where a file can be read from the middle, else the file as a whole."""
  kind, compression = kind_of(file) or ("", "")
  size = os.path.getsize(file)
  if compression or size <= part_bytes:
    return [Part(file)]
  if kind == "parquet":
    return _split_parquet(file, part_bytes)
  count = -(-size // part_bytes)
  edges = [size * i // count for i in range(count + 1)]
  return [Part(file, a, b) for a, b in itertools.pairwise(edges)]


def _split_parquet(file: str, part_bytes: int) -> list[Part]:
  import pyarrow
  import pyarrow.parquet

  try:
    metadata = pyarrow.parquet.read_metadata(file)
  except (pyarrow.ArrowException, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:  # the disk or the path, not the content
      raise
    return [Part(file)]  # the reader says what is wrong with it
  edges, filled = [0], 0
  for group in range(metadata.num_row_groups - 1):
    columns = metadata.row_group(group)
    filled += sum(columns.column(c).total_compressed_size for c in range(columns.num_columns))
    if filled >= part_bytes:
      edges.append(group + 1)
      filled = 0
  edges.append(metadata.num_row_groups)
  return [Part(file, a, b) for a, b in itertools.pairwise(edges)]


def lines_before(part: Part) -> int:
  """Lines of the file that start before the part, by reading them; 0 where the reader counts from the file's start."""
  if part.start == 0 or kind_of(part.file) == ("parquet", ""):
    return 0
  count, left = 1, part.start - 1
  with open(part.file, "rb") as f:
    while data := f.read(min(left, _READ_BYTES)):
      count += data.count(b"\n")
      left -= len(data)
  return count


class PartReader:
  """Iterates a part's records. Lines are counted from the part's start; `num_lines` says how many started in it."""

  def __init__(
    self,
    part: Part,
    *,
    records: str = "text",
    text_field: str = "text",
    answer_field: str = "answer",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
  ):
    assert records in RECORDS
    self.part = part
    self.num_lines = 0
    self.consumed_bytes = 0  # of the file as it lies on disk
    self._records = records
    self._fields = [text_field, answer_field] if records == "prompt" else [text_field]
    self._max_bytes = max_document_bytes
    kind, self._compression = kind_of(part.file) or ("", "")
    self._read = {"txt": self._read_txt, "jsonl": self._read_jsonl}.get(kind)

  def __iter__(self) -> Iterator[Document | BadRecord]:
    file = self.part.file
    if os.path.getsize(file) == 0:
      yield BadRecord(file, 1, 0, "empty file")
    elif self._read is None:
      yield from self._read_parquet()
    else:
      with open(file, "rb", buffering=_READ_BYTES) as raw:
        self._raw = raw
        yield from self._guarded(self._read(_decompressed(raw, self._compression)))

  def _guarded(self, records: Iterator[Document | BadRecord]) -> Iterator[Document | BadRecord]:
    """Turns damage of a compressed file, which ends the reading of it, into a bad record."""
    try:
      yield from records
    except _BombError:
      reason = f"decompresses to more than {_BOMB_RATIO} times its size; decompress it yourself if that is meant"
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
      reason = f"corrupt .{self._compression}: {error}; what was read of it before may be damaged too"
    else:
      return
    yield BadRecord(self.part.file, self.num_lines + 1, -1, f"{reason}; nothing is read from here on")

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

  def _read_txt(self, stream: BinaryIO) -> Iterator[Document | BadRecord]:
    is_open, is_first = self.part.start == 0, True
    pieces, size, start, first_line = [], 0, 0, 1
    for line, offset, length in self._lines(stream, self._max_bytes + 2):
      here = self._starts_here(offset)
      if not here and not is_open:
        return
      self.num_lines += here
      if line is not None and line.rstrip(b"\r\n") == b"\f":
        if is_open and (size or not is_first):
          yield self._text_record(pieces, size, start, first_line)
        if not here:
          return
        is_open, is_first = True, False
        pieces, size, start, first_line = [], 0, offset + length, self.num_lines + 1
      elif is_open:
        size += length
        if size > self._max_bytes + 2:  # 2: a line break that is not part of the text
          pieces = []
        elif line is not None:
          pieces.append(line)
    if is_open and size:
      yield self._text_record(pieces, size, start, first_line)

  def _text_record(self, pieces: list[bytes], size: int, start: int, line: int) -> Document | BadRecord:
    data = b"".join(pieces)
    if start == 0:
      data = data.removeprefix(b"\xef\xbb\xbf")
    data = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    if (size and not pieces) or len(data) > self._max_bytes:
      return BadRecord(self.part.file, line, start, self._too_long(size))
    return self._document(data, line, start)

  def _document(self, data: bytes, line: int, offset: int) -> Document | BadRecord:
    try:
      text = data.decode("utf-8")
    except UnicodeDecodeError as error:
      return BadRecord(self.part.file, line, offset, f"invalid UTF-8 at byte {error.start} of the record")
    if not text or text.isspace():
      return BadRecord(self.part.file, line, offset, "empty text")
    return Document(text, data, self.part.file, line, offset)

  def _too_long(self, size: int) -> str:
    limit = f"{size} bytes, more than the {self._max_bytes} of --max_document_mb"
    return f"{limit}; split it into documents (.txt: with lines that hold one form feed) or raise the limit"

  def _read_jsonl(self, stream: BinaryIO) -> Iterator[Document | BadRecord]:
    for line, offset, length in self._lines(stream, _JSON_GROWTH * self._max_bytes):
      if not self._starts_here(offset):
        return
      self.num_lines += 1
      if line is None:
        yield BadRecord(self.part.file, self.num_lines, offset, self._too_long(length))
        continue
      if offset == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
      if not line.isspace() and line:
        yield self._json_record(line, offset)

  def _json_record(self, line: bytes, offset: int) -> Document | BadRecord:
    def bad(reason: str) -> BadRecord:
      return BadRecord(self.part.file, self.num_lines, offset, reason)

    try:
      record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
      return bad(f"invalid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
      is_cut = isinstance(error, ValueError) and not line.endswith(b"\n")
      cut = "the last line is cut off: " if is_cut else ""
      return bad(f"{cut}broken JSON: {str(error)[:100]}")
    if not isinstance(record, dict):
      return bad(f"{_json_type(record)}, expected an object")
    for field in self._fields:
      if field not in record:
        return bad(self._missing(field, list(record)))
    try:
      return self._record([record[field] for field in self._fields], offset)
    except _RecordError as error:
      return bad(str(error))

  def _missing(self, field: str, found: list[str]) -> str:
    names, flag = ", ".join(name[:40] for name in found[:10]) or "none", "--text_field"
    if field != self._fields[0]:
      flag = "--answer_field"
    return f"field {field!r} is missing.{did_you_mean(field, [name[:40] for name in found])} Its fields: {names} ({flag})"

  def _record(self, values: list[Any], offset: int) -> Document | BadRecord:
    """A record of the values of its fields; strings may be given as UTF-8."""
    if self._records == "messages":
      return self._conversation(_messages(values[0], self._fields[0]), offset)
    texts = [_string(value, f"field {field!r}") for value, field in zip(values, self._fields, strict=True)]
    if self._records == "prompt":
      if not texts[1] or texts[1].isspace():
        raise _RecordError(f"empty answer in {self._fields[1]!r}")
      return self._conversation([_message("user", texts[0]), _message("assistant", texts[1])], offset)
    data = _utf8(texts[0], f"{self._fields[0]!r}")
    if len(data) > self._max_bytes:
      raise _RecordError(self._too_long(len(data)))
    return self._document(data, self.num_lines, offset)

  def _conversation(self, messages: list[dict[str, str]], offset: int) -> Document:
    text = "\n\n".join(message["content"] for message in messages)
    data = _utf8(text, "what is said")
    if len(data) > self._max_bytes:
      raise _RecordError(self._too_long(len(data)))
    if not text or text.isspace():
      raise _RecordError("empty text")
    return Document(text, data, self.part.file, self.num_lines, offset, messages)

  def _read_parquet(self) -> Iterator[Document | BadRecord]:
    import pyarrow

    try:
      yield from self._parquet_rows()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: in a part of a message
      if isinstance(error, OSError) and error.errno is not None:  # the disk or the path, not the content
        raise
      reason = f"corrupt .parquet: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
      yield BadRecord(self.part.file, self.num_lines + 1, -1, f"{reason}; nothing is read from here on")

  def _parquet_rows(self) -> Iterator[Document | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(self.part.file, pre_buffer=False, buffer_size=_READ_BYTES) as file:
      metadata, schema = file.metadata, file.schema_arrow
      groups = range(self.part.start, metadata.num_row_groups if self.part.end < 0 else self.part.end)
      self.num_lines = sum(metadata.row_group(g).num_rows for g in range(self.part.start))
      problem = next(filter(None, (self._column_problem(schema, field) for field in self._fields)), "")
      if problem:
        yield BadRecord(self.part.file, self.num_lines + 1, -1, f"{problem}; none of its {metadata.num_rows} rows is read")
        return
      if _parquet_ratio(metadata, groups, self._fields) > _BOMB_RATIO:
        raise pyarrow.ArrowException(f"decompresses to more than {_BOMB_RATIO} times its size")
      total = max(sum(metadata.row_group(g).num_rows for g in groups), 1)
      size = os.path.getsize(self.part.file) * len(groups) // max(metadata.num_row_groups, 1)
      first = self.num_lines
      to_values = _message_values if self._records == "messages" else _text_values
      for batch in file.iter_batches(_PARQUET_ROWS, row_groups=list(groups), columns=self._fields, use_threads=False):
        for values in zip(*(to_values(batch.column(field)) for field in self._fields), strict=True):
          self.num_lines += 1
          yield self._parquet_record(values)
        self.consumed_bytes = size * (self.num_lines - first) // total

  def _column_problem(self, schema: Any, field: str) -> str:
    """What is wrong with the column of a field, "" where it can be read."""
    import pyarrow

    if field not in schema.names:
      return self._missing(field, schema.names)
    kind = schema.field(field).type
    if self._records != "messages":
      return "" if _is_text(kind) else f"column {field!r} is {kind}, expected strings"
    expected = f"column {field!r} is {str(kind)[:200]}, expected list<struct<role: string, content: string>>"
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    value = kind.value_type if is_list else None
    if value is None or not pyarrow.types.is_struct(value):
      return expected
    names = [value.field(i).name for i in range(value.num_fields)]
    if "content" not in names and "value" in names:
      return f"{expected}; these are 'from' and 'value' (ShareGPT's form): rename them, and human to user, gpt to assistant"
    is_right = all(names.count(key) == 1 and _is_text(value.field(key).type) for key in ("role", "content"))
    return "" if is_right else expected

  def _parquet_record(self, values: tuple[Any, ...]) -> Document | BadRecord:
    try:
      for value, field in zip(values, self._fields, strict=True):
        if value is None:
          raise _RecordError(f"column {field!r} is null")
        if isinstance(value, bytes) and len(value) > self._max_bytes:
          raise _RecordError(self._too_long(len(value)))
      if self._records == "text":
        return self._document(values[0], self.num_lines, -1)
      return self._record(list(values), -1)
    except _RecordError as error:
      return BadRecord(self.part.file, self.num_lines, -1, str(error))


class _RecordError(Exception):
  """A record is bad; the text is the reason."""


def _string(value: Any, what: str) -> str:
  if isinstance(value, bytes):  # of a .parquet file, where nothing has checked it
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise _RecordError(f"invalid UTF-8 at byte {error.start} of {what}") from None
  if not isinstance(value, str):
    raise _RecordError(f"{what} is {_json_type(value)}, expected a string")
  return value


def _utf8(text: str, what: str) -> bytes:
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    found = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start} of {what}"
    raise _RecordError(found) from None


def _message(role: str, content: str) -> dict[str, str]:
  return {"role": role, "content": content}


def _messages(value: Any, field: str) -> list[dict[str, str]]:
  if not isinstance(value, list):
    raise _RecordError(f"field {field!r} is {_json_type(value)}, expected a list of messages")
  if not value:
    raise _RecordError(f"field {field!r} holds no message")
  return [_checked_message(item, f"message {i}") for i, item in enumerate(value, 1)]


def _checked_message(item: Any, what: str) -> dict[str, str]:
  if not isinstance(item, dict):
    raise _RecordError(f"{what} is {_json_type(item)}, expected an object with role and content")
  if "content" not in item and "value" in item:
    raise _RecordError(
      f"{what} has the fields 'from' and 'value' (ShareGPT's form), expected 'role' and 'content'; "
      "rename them, and human to user, gpt to assistant"
    )
  for key in "role", "content":
    if key not in item:
      names = ", ".join(str(name)[:40] for name in list(item)[:10]) or "none"
      raise _RecordError(f"{what} has no {key!r}; its fields: {names}")
  # A weight of 0 takes a message out of the loss in OpenAI's form.
  lost = [key for key in _MEANT_FIELDS if item.get(key)] + ["weight"] * (item.get("weight") not in (None, 1))
  if lost:
    raise _RecordError(f"{what} has {lost[0]!r}, which would be lost: only role and content are read; remove or rewrite it")
  role = _string(item["role"], f"the role of {what}")
  if role not in ROLES:
    raise _RecordError(f"{what} has the role {role[:40]!r}, expected one of {', '.join(ROLES)}; rename it")
  content = item["content"]
  if isinstance(content, list):
    raise _RecordError(f"the content of {what} is a list of parts, expected a string; join its texts")
  return _message(role, _string(content, f"the content of {what}"))


def _json_type(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
  return names.get(type(value), "a number")


def _is_text(kind: Any) -> bool:
  import pyarrow

  value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
  return pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value) or pyarrow.types.is_string_view(value)


def _text_values(column: Any) -> list[bytes | None]:
  """The strings of a column as UTF-8 that nothing has checked."""
  import pyarrow

  if isinstance(column, pyarrow.DictionaryArray):
    column = column.dictionary_decode()
  return column.cast(pyarrow.large_binary()).to_pylist()


def _message_values(column: Any) -> list[list[dict[str, Any] | None] | None]:
  """The lists of messages of a column, their strings as UTF-8 that nothing has checked."""
  lengths, values = column.value_lengths().to_pylist(), column.flatten()
  parts = {values.type.field(i).name: part for i, part in enumerate(values.flatten())}
  fields = [name for name in parts if name in ("role", "content", "weight", *_MEANT_FIELDS)]
  lists = [_text_values(parts[f]) if _is_text(parts[f].type) else parts[f].to_pylist() for f in fields]
  messages = [dict(zip(fields, row, strict=True)) for row in zip(*lists, strict=True)]
  found, start = [], 0
  for length in lengths:
    found.append(None if length is None else messages[start : start + length])
    start += length or 0
  return found


def _parquet_ratio(metadata: Any, groups: range, fields: list[str]) -> float:
  """How many times the read columns grow, 0 where they are small."""
  compressed = uncompressed = 0
  for g in groups:
    group = metadata.row_group(g)
    for c in range(group.num_columns):
      path = group.column(c).path_in_schema  # of a list: "messages.list.element.content"
      if any(path == field or path.startswith(f"{field}.") for field in fields):
        compressed += group.column(c).total_compressed_size
        uncompressed += group.column(c).total_uncompressed_size
  return uncompressed / max(compressed, 1) if uncompressed > _BOMB_BYTES else 0.0


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
  if not compression:
    return raw
  source = gzip.GzipFile(fileobj=raw) if compression == "gz" else _ZstdFrames(raw)
  return io.BufferedReader(_Capped(raw, source), buffer_size=_READ_BYTES)


class _Capped(io.RawIOBase):
  """A decompressed stream that stops when it has grown beyond all reason."""

  def __init__(self, raw: BinaryIO, source: Any):
    self._raw, self._source, self._given = raw, source, 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._source.read1(min(len(buffer), _READ_BYTES))  # read() would lose what precedes a damaged place
    self._given += len(data)
    if self._given > _BOMB_BYTES and self._given > _BOMB_RATIO * self._raw.tell():
      raise _BombError
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
