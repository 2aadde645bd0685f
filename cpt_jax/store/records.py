"""A record of a text file -> a document: a text, or a conversation; or what is wrong with it.

Invariant: a record becomes a Document or a BadRecord; nothing of what is said in it is lost or changed.

A record holds a text in one field, a conversation (a list of {role, content}) in one field, or a prompt and its answer in two.
Of a message only role and content are read; one with a field that would be lost with meaning is a bad record.
"""

from typing import Any, NamedTuple

from cpt_jax.config import FIELDS, KEYS, did_you_mean

RECORDS, TRAIN_ON = FIELDS["records"].choices, FIELDS["train_on"].choices
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
# Fields of a message beside role and content that change what is said; the rest (names, times, ids) may go.
MEANT_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


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


class Rules(NamedTuple):
  """How texts are read, which of their tokens count, and what becomes of bad records."""

  records: str = FIELDS["records"].default  # what a record of .jsonl and .parquet files holds: "text", "messages" or "prompt"
  text_field: str = FIELDS["text_field"].default  # of the text, the messages or the prompt; "" = named as `records`
  answer_field: str = FIELDS["answer_field"].default  # of a prompt's answer
  train_on: str = FIELDS["train_on"].default  # tokens of conversations that count: "all" or those of the "answers"
  max_document_bytes: int = 16 << 20  # a longer document is bad; memory is 110 times this for prose, 400 where a byte is a token
  eos_token: str = ""  # overrides the EOS that the tokenizer's files name
  on_bad: str = KEYS["data.on_bad"].default  # bad records, or "fail" at one
  max_bad: int = KEYS["data.max_bad"].default  # fail at more bad records than this; -1 = no limit

  @property
  def fields(self) -> list[str]:
    """Those that are read of each record."""
    first = self.text_field or self.records
    return [first, self.answer_field] if self.records == "prompt" else [first]


class RecordError(Exception):
  """A record is bad; the text is the reason."""


class Fields:
  """The fields of a file's records that the rules name: their values -> documents."""

  def __init__(self, file: str, rules: Rules):
    assert rules.records in RECORDS
    self.names, self.max_bytes = rules.fields, rules.max_document_bytes
    self._file, self._records = file, rules.records

  @property
  def hold_messages(self) -> bool:
    """Lists of messages."""
    return self._records == "messages"

  @property
  def hold_texts(self) -> bool:
    """A text."""
    return self._records == "text"

  def bad(self, line: int, offset: int, reason: str) -> BadRecord:
    """A bad record of the file."""
    return BadRecord(self._file, line, offset, reason)

  def too_long(self, num_bytes: int) -> str:
    """The reason why so many bytes are no document."""
    limit = f"{num_bytes} bytes, more than the {self.max_bytes} of --max_document_mb"
    return f"{limit}; split it into documents (.txt: with lines that hold one form feed) or raise the limit"

  def missing(self, name: str, found: list[str]) -> str:
    """The reason why a record with the fields `found` is bad."""
    flag = "--text_field" if name == self.names[0] else "--answer_field"
    shown = ", ".join(other[:40] for other in found[:10]) or "none"
    return f"field {name!r} is missing.{did_you_mean(name, [other[:40] for other in found])} Its fields: {shown} ({flag})"

  def text(self, data: bytes, line: int, offset: int) -> Document | BadRecord:
    """The document of a text."""
    try:
      text = data.decode("utf-8")
    except UnicodeDecodeError as error:
      return self.bad(line, offset, f"invalid UTF-8 at byte {error.start} of the record")
    if not text or text.isspace():
      return self.bad(line, offset, "empty text")
    return Document(text, data, self._file, line, offset)

  def document(self, values: list[Any], line: int, offset: int) -> Document | BadRecord:
    """The document of the fields' values, where strings may be given as UTF-8.
    Raises RecordError: the values are not what the rules say."""
    if self.hold_messages:
      return self._conversation(_messages(values[0], self.names[0]), line, offset)
    texts = [_string(value, f"field {name!r}") for value, name in zip(values, self.names, strict=True)]
    if self._records == "prompt":
      if not texts[1] or texts[1].isspace():
        raise RecordError(f"empty answer in {self.names[1]!r}")
      said = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
      return self._conversation(said, line, offset)
    data = _utf8(texts[0], f"{self.names[0]!r}")
    if len(data) > self.max_bytes:
      raise RecordError(self.too_long(len(data)))
    return self.text(data, line, offset)

  def _conversation(self, messages: list[dict[str, str]], line: int, offset: int) -> Document:
    text = "\n\n".join(message["content"] for message in messages)
    data = _utf8(text, "what is said")
    if len(data) > self.max_bytes:
      raise RecordError(self.too_long(len(data)))
    if not text or text.isspace():
      raise RecordError("empty text")
    return Document(text, data, self._file, line, offset, messages)


def json_type(value: Any) -> str:
  """What a value is in JSON, for people."""
  names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
  return names.get(type(value), "a number")


def _string(value: Any, what: str) -> str:
  if isinstance(value, bytes):  # of a .parquet file, where nothing has checked it
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise RecordError(f"invalid UTF-8 at byte {error.start} of {what}") from None
  if not isinstance(value, str):
    raise RecordError(f"{what} is {json_type(value)}, expected a string")
  return value


def _utf8(text: str, what: str) -> bytes:
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    found = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start} of {what}"
    raise RecordError(found) from None


def _messages(value: Any, field: str) -> list[dict[str, str]]:
  if not isinstance(value, list):
    raise RecordError(f"field {field!r} is {json_type(value)}, expected a list of messages")
  if not value:
    raise RecordError(f"field {field!r} holds no message")
  return [_checked_message(item, f"message {i}") for i, item in enumerate(value, 1)]


def _checked_message(item: Any, what: str) -> dict[str, str]:
  if not isinstance(item, dict):
    raise RecordError(f"{what} is {json_type(item)}, expected an object with role and content")
  if "content" not in item and "value" in item:
    raise RecordError(
      f"{what} has the fields 'from' and 'value' (ShareGPT's form), expected 'role' and 'content'; "
      "rename them, and human to user, gpt to assistant"
    )
  for key in "role", "content":
    if key not in item:
      names = ", ".join(str(name)[:40] for name in list(item)[:10]) or "none"
      raise RecordError(f"{what} has no {key!r}; its fields: {names}")
  # A weight of 0 takes a message out of the loss in OpenAI's form.
  lost = [key for key in MEANT_FIELDS if item.get(key)] + ["weight"] * (item.get("weight") not in (None, 1))
  if lost:
    raise RecordError(f"{what} has {lost[0]!r}, which would be lost: only role and content are read; remove or rewrite it")
  role = _string(item["role"], f"the role of {what}")
  if role not in ROLES:
    raise RecordError(f"{what} has the role {role[:40]!r}, expected one of {', '.join(ROLES)}; rename it")
  content = item["content"]
  if isinstance(content, list):
    raise RecordError(f"the content of {what} is a list of parts, expected a string; join its texts")
  return {"role": role, "content": _string(content, f"the content of {what}")}
