"""A .parquet file -> parts of it by row groups, and the records of a part.

Invariant: a file of other columns than the rules name, a damaged one, and one that grows beyond all reason are bad records.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any

from cpt_jax.store.compressed import BOMB_BYTES, BOMB_RATIO
from cpt_jax.store.records import MEANT_FIELDS, BadRecord, Document, Fields, Part, RecordError

_READ_BYTES = 1 << 20
_ROWS = 128  # read at a time


def split(file: str, *, part_bytes: int) -> list[Part]:
  """Parts of whole row groups, of about `part_bytes` each."""
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


class ParquetReader:
  """Iterates a part's records. Rows are counted from the file's start."""

  def __init__(self, part: Part, fields: Fields):
    self.part, self.num_lines = part, 0
    self.consumed_bytes = 0  # of the file as it lies on disk
    self._fields = fields

  def __iter__(self) -> Iterator[Document | BadRecord]:
    import pyarrow

    if os.path.getsize(self.part.file) == 0:
      yield self._fields.bad(1, 0, "empty file")
      return
    try:
      yield from self._rows()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: in a part of a message
      if isinstance(error, OSError) and error.errno is not None:  # the disk or the path, not the content
        raise
      reason = f"corrupt .parquet: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
      yield self._fields.bad(self.num_lines + 1, -1, f"{reason}; nothing is read from here on")

  def _rows(self) -> Iterator[Document | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    names = self._fields.names
    with pyarrow.parquet.ParquetFile(self.part.file, pre_buffer=False, buffer_size=_READ_BYTES) as file:
      metadata, schema = file.metadata, file.schema_arrow
      groups = range(self.part.start, metadata.num_row_groups if self.part.end < 0 else self.part.end)
      self.num_lines = sum(metadata.row_group(g).num_rows for g in range(self.part.start))
      problem = next(filter(None, (self._column_problem(schema, name) for name in names)), "")
      if problem:
        yield self._fields.bad(self.num_lines + 1, -1, f"{problem}; none of its {metadata.num_rows} rows is read")
        return
      if _growth(metadata, groups, names) > BOMB_RATIO:
        raise pyarrow.ArrowException(f"decompresses to more than {BOMB_RATIO} times its size")
      total = max(sum(metadata.row_group(g).num_rows for g in groups), 1)
      size = os.path.getsize(self.part.file) * len(groups) // max(metadata.num_row_groups, 1)
      first = self.num_lines
      to_values = _message_values if self._fields.hold_messages else _text_values
      for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=names, use_threads=False):
        for values in zip(*(to_values(batch.column(name)) for name in names), strict=True):
          self.num_lines += 1
          yield self._document(values)
        self.consumed_bytes = size * (self.num_lines - first) // total

  def _column_problem(self, schema: Any, name: str) -> str:
    """What is wrong with the column of a field, "" where it can be read."""
    import pyarrow

    if name not in schema.names:
      return self._fields.missing(name, schema.names)
    kind = schema.field(name).type
    if not self._fields.hold_messages:
      return "" if _is_text(kind) else f"column {name!r} is {kind}, expected strings"
    expected = f"column {name!r} is {str(kind)[:200]}, expected list<struct<role: string, content: string>>"
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    value = kind.value_type if is_list else None
    if value is None or not pyarrow.types.is_struct(value):
      return expected
    keys = [value.field(i).name for i in range(value.num_fields)]
    if "content" not in keys and "value" in keys:
      return f"{expected}; these are 'from' and 'value' (ShareGPT's form): rename them, and human to user, gpt to assistant"
    is_right = all(keys.count(key) == 1 and _is_text(value.field(key).type) for key in ("role", "content"))
    return "" if is_right else expected

  def _document(self, values: tuple[Any, ...]) -> Document | BadRecord:
    fields = self._fields
    try:
      for value, name in zip(values, fields.names, strict=True):
        if value is None:
          raise RecordError(f"column {name!r} is null")
        if isinstance(value, bytes) and len(value) > fields.max_bytes:
          raise RecordError(fields.too_long(len(value)))
      if fields.hold_texts:
        return fields.text(values[0], self.num_lines, -1)
      return fields.document(list(values), self.num_lines, -1)
    except RecordError as error:
      return fields.bad(self.num_lines, -1, str(error))


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
  keys = [name for name in parts if name in ("role", "content", "weight", *MEANT_FIELDS)]
  lists = [_text_values(parts[key]) if _is_text(parts[key].type) else parts[key].to_pylist() for key in keys]
  messages = [dict(zip(keys, row, strict=True)) for row in zip(*lists, strict=True)]
  found, start = [], 0
  for length in lengths:
    found.append(None if length is None else messages[start : start + length])
    start += length or 0
  return found


def _growth(metadata: Any, groups: range, names: list[str]) -> float:
  """How many times the read columns grow, 0 where they are small."""
  compressed_bytes = num_bytes = 0
  for g in groups:
    group = metadata.row_group(g)
    for c in range(group.num_columns):
      path = group.column(c).path_in_schema  # of a list: "messages.list.element.content"
      if any(path == name or path.startswith(f"{name}.") for name in names):
        compressed_bytes += group.column(c).total_compressed_size
        num_bytes += group.column(c).total_uncompressed_size
  return num_bytes / max(compressed_bytes, 1) if num_bytes > BOMB_BYTES else 0.0
