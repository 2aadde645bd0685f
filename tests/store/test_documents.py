"""Reading texts: every record comes out once, as a document or as a named bad record."""

import gzip
import json
import os
import random

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cpt_jax.config import ConfigError
from cpt_jax.store import compressed, documents, parquet
from cpt_jax.store.records import ROLES, BadRecord, Document, Part, Rules


def read(path, **rules):
  return list(documents.open_part(Part(str(path)), Rules(**rules)))


def read_in_parts(path, part_bytes, **rules):
  """What the parts give, lines counted from the file's start."""
  found = []
  for part in documents.split(str(path), part_bytes=part_bytes):
    before = documents.lines_before(part)
    found += [r._replace(line=r.line + before) for r in documents.open_part(part, Rules(**rules))]
  return found


def save(path, data: bytes):
  if path.suffix == ".gz":
    path.write_bytes(gzip.compress(data, mtime=0))
  elif path.suffix == ".zst":
    path.write_bytes(zstandard.compress(data))
  else:
    path.write_bytes(data)
  return path


def outcome(records):
  return [r.text if isinstance(r, Document) else r.reason.split(":")[0][:24] for r in records]


# Text without what separates records of .txt files: form feed lines and the last line break.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\f\ufeff"), min_size=1, max_size=30).filter(
  lambda t: not t.isspace() and not t.endswith(("\n", "\r"))
)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
@hypothesis.given(texts=st.lists(TEXTS, min_size=1, max_size=8), ends=st.sampled_from(["", "\n", "\n\f\n"]))
def test_texts_with_form_feeds_round_trip(tmp_path_factory, suffix, texts, ends):
  path = save(tmp_path_factory.mktemp("d") / f"a{suffix}", ("\n\f\n".join(texts) + ends).encode())
  found = read(path)
  assert [d.text for d in found] == texts
  content = ("\n\f\n".join(texts) + ends).encode()
  for d in found:
    assert content[d.offset :].startswith(d.utf8)
    assert d.line == content[: d.offset].count(b"\n") + 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@hypothesis.given(texts=st.lists(TEXTS, min_size=1, max_size=8), ascii_only=st.booleans())
def test_records_round_trip(tmp_path_factory, suffix, texts, ascii_only):
  path = tmp_path_factory.mktemp("d") / f"a{suffix}"
  if suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=3)
  else:
    save(path, "".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + "\n" for t in texts).encode())
  found = read(path)
  assert [(d.text, d.line) for d in found] == [(t, i + 1) for i, t in enumerate(texts)]


@hypothesis.given(
  lines=st.lists(st.sampled_from([b"a", b"\f", b"\f\r", b"", b" ", b"bcd\xff", b"\xe6\x97\xa5", b"x" * 40, b"\r"]), max_size=14),
  end=st.sampled_from([b"", b"\n"]),
  part_bytes=st.integers(1, 40),
)
def test_parts_of_a_text_file_give_what_the_whole_gives(tmp_path_factory, lines, end, part_bytes):
  path = save(tmp_path_factory.mktemp("d") / "a.txt", b"\n".join(lines) + end)
  assert read_in_parts(path, part_bytes, max_document_bytes=30) == read(path, max_document_bytes=30)


@hypothesis.given(
  lines=st.lists(st.sampled_from([b'{"text": "a"}', b"", b"{}", b"[", b'{"text": "' + b"x" * 60 + b'"}', b"\xff"]), max_size=10),
  end=st.sampled_from([b"", b"\n", b'\n{"text": "c']),
  part_bytes=st.integers(1, 60),
)
def test_parts_of_a_jsonl_file_give_what_the_whole_gives(tmp_path_factory, lines, end, part_bytes):
  path = save(tmp_path_factory.mktemp("d") / "a.jsonl", b"\n".join(lines) + end)
  whole = read(path, max_document_bytes=10)
  assert read_in_parts(path, part_bytes, max_document_bytes=10) == whole
  if os.path.getsize(path):
    assert len(whole) == sum(not line.isspace() for line in path.read_bytes().split(b"\n") if line)


def test_parts_of_a_parquet_file(tmp_path):
  path = tmp_path / "a.parquet"
  texts = [f"text {i}" * 50 for i in range(40)]
  pyarrow.parquet.write_table(pyarrow.table({"text": [*texts[:20], None, *texts[21:]]}), path, row_group_size=7)
  assert len(documents.split(str(path), part_bytes=1)) == 6
  assert read_in_parts(path, 1) == read(path)
  assert outcome(read(path))[20] == "column 'text' is null" and read(path)[20].line == 21


def test_text_file_rules(tmp_path):
  path = save(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n\f\nthree\r\n\f\r\n \n\f\nfo\fur\n\f\n\f\nlast\n\n")
  assert outcome(read(path)) == ["one\ntwo", "three", "empty text", "fo\fur", "empty text", "last\n"]
  assert [r.line for r in read(path)] == [1, 4, 6, 8, 10, 11]


BAD_LINES = [
  (b'{"text": "a\xff"}', "invalid UTF-8 at byte 11"),
  (b'{"text": "a\xed\xa0\x80"}', "invalid UTF-8"),
  (b'{"text": "a\\ud800"}', "lone surrogate U+D800 at character 1"),
  (b'{"text": ', "broken JSON"),
  (b'{"text": "a\x00"}', "broken JSON"),  # a NUL byte is no JSON; the escape is
  (b"[" * 100_000, "broken JSON"),
  (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "broken JSON"),
  (b'["a"]', "a list, expected an object"),
  (b"null", "null, expected an object"),
  (b'{"txet": "a"}', "field 'text' is missing. Did you mean txet?"),
  (b'{"text": null}', "field 'text' is null, expected a string"),
  (b'{"text": 3}', "field 'text' is a number"),
  (b'{"text": ""}', "empty text"),
  (b'{"text": " \\n\\u3000"}', "empty text"),
  (b'{"text": "' + b"x" * 2000 + b'"}', "2000 bytes, more than the 1000"),
  (b'{"text": "a", "other": "' + b"x" * 5000 + b'"}', "5027 bytes, more than the 1000"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_reported_and_its_neighbours_are_kept(tmp_path, suffix, line, reason):
  limit = 1000 if b"x" * 100 in line else 200_000
  path = save(tmp_path / f"a{suffix}", b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}\n')
  before, bad, after = read(path, max_document_bytes=limit)
  assert (before.text, after.text, before.line, after.line) == ("before", "after", 1, 4)
  assert isinstance(bad, BadRecord) and bad.reason.startswith(reason) and (bad.file, bad.line, bad.offset) == (str(path), 3, 20)


def test_what_is_no_fault(tmp_path):
  path = save(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a\\u0000b"}\r\n \r\n{"text": "\\ud83d\\ude00", "x": NaN}')
  assert outcome(read(path)) == ["a\0b", "\U0001f600"]


def test_last_line_cut(tmp_path):
  *_, bad = read(save(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b'))
  assert bad.line == 2 and bad.reason.startswith("the last line is cut off: broken JSON")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.zst"])
def test_empty_file(tmp_path, suffix):
  (tmp_path / f"a{suffix}").write_bytes(b"")
  assert outcome(read(tmp_path / f"a{suffix}")) == ["empty file"]


LINES = b"".join(b'{"text": "%d %d"}\n' % (i, random.Random(i).getrandbits(64)) for i in range(2000))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "last byte", "garbage behind", "flip", "not compressed"])
def test_damaged_compressed_file(tmp_path, suffix, damage):
  path = tmp_path / f"a{suffix}"
  if suffix == ".jsonl.zst":
    path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(LINES))
  else:
    save(path, LINES)
  good = path.read_bytes()
  flipped = bytearray(good)
  flipped[-20] ^= 16
  bad = {
    "cut": good[: len(good) // 2],
    "last byte": good[:-1],
    "garbage behind": good + b"garbage",
    "flip": bytes(flipped),
    "not compressed": LINES,
  }[damage]
  path.write_bytes(bad)
  *found, last = read(path)
  assert isinstance(last, BadRecord) and last.reason.startswith(f"corrupt .{suffix.split('.')[-1]}"), last
  expected = [json.loads(line)["text"] for line in LINES.splitlines()]
  texts = [d.text for d in found]
  if damage != "flip":  # the checksum, at the end, comes too late for what was read before
    assert texts == expected[: len(texts)]
  assert last.line == len(found) + 1
  if damage == "garbage behind":
    assert len(found) == 2000


def test_several_members_and_frames(tmp_path):
  path = tmp_path / "a.txt.gz"
  path.write_bytes(gzip.compress(b"a\n\f\n") + gzip.compress(b"b"))
  assert outcome(read(path)) == ["a", "b"]
  path = tmp_path / "a.txt.zst"
  skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
  path.write_bytes(zstandard.compress(b"a\n\f\n") + skippable + zstandard.compress(b"b"))
  assert outcome(read(path)) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.zst"])
def test_decompression_bomb_stops_early(tmp_path, suffix, monkeypatch):
  monkeypatch.setattr(compressed, "BOMB_BYTES", 4 << 20)
  monkeypatch.setattr(parquet, "BOMB_BYTES", 4 << 20)
  path = tmp_path / f"a{suffix}"
  data = bytes(1 << 20)
  if suffix.endswith("gz"):
    with gzip.open(path, "wb") as f:
      for _ in range(64):
        f.write(data)
  else:
    context = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(b"".join(context.compress(data) for _ in range(64)) + context.flush())
  (bad,) = read(path, max_document_bytes=1 << 20)
  assert bad.reason.startswith("decompresses to more than 250 times its size")


def test_zstd_window_is_bounded(tmp_path):
  parameters = zstandard.ZstdCompressionParameters(window_log=29)
  context = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  (tmp_path / "a.txt.zst").write_bytes(context.compress(b"some text") + context.flush())
  (bad,) = read(tmp_path / "a.txt.zst")
  assert bad.reason.startswith("corrupt .zst")


def test_memory_is_bounded_for_a_huge_line(tmp_path):
  import tracemalloc

  path = tmp_path / "a.jsonl"
  with open(path, "wb") as f:
    f.write(b'{"text": "')
    for _ in range(64):
      f.write(b"x" * (1 << 20))
    f.write(b'"}\n{"text": "b"}\n')
  tracemalloc.start()
  bad, good = read(path, max_document_bytes=1 << 20)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert bad.reason.startswith(f"{(64 << 20) + 12 + 1} bytes") and good.text == "b"
  assert peak < 16 << 20


def test_bad_parquet_files(tmp_path):
  path = tmp_path / "a.parquet"
  table = pyarrow.table({"text": pyarrow.array(["a", "b"]).dictionary_encode(), "number": [1, 2]})
  pyarrow.parquet.write_table(table, path)
  assert outcome(read(path)) == ["a", "b"]
  assert read(path, text_field="texts")[0].reason.startswith("field 'texts' is missing. Did you mean text?")
  assert read(path, text_field="number")[0].reason.startswith("column 'number' is int64, expected strings; none of its 2 rows")
  good = path.read_bytes()
  for bad in good[: len(good) // 2], good[:-1], b"PAR1" + bytes(200) + b"PAR1", b"hello":
    path.write_bytes(bad)
    assert [r.reason[:16] for r in read(path)] == ["corrupt .parquet"]
    assert documents.split(str(path), part_bytes=1)[0] == Part(str(path))


def test_invalid_utf8_in_parquet(tmp_path):
  raw = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
  text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
  pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
  assert outcome(read(tmp_path / "a.parquet")) == ["a", "invalid UTF-8 at byte 0 ", "c"]


# Conversations.

CONVERSATIONS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXTS}), min_size=1, max_size=5)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
@hypothesis.given(conversations=st.lists(CONVERSATIONS, min_size=1, max_size=6))
def test_messages_round_trip(tmp_path_factory, suffix, conversations):
  path = tmp_path_factory.mktemp("d") / f"a{suffix}"
  if suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(conversations)), "chat": conversations}), path, row_group_size=2)
  else:
    save(path, "".join(json.dumps({"chat": c}) + "\n" for c in conversations).encode())
  found = read(path, records="messages", text_field="chat")
  assert [d.messages for d in found] == conversations
  assert [d.text for d in found] == ["\n\n".join(m["content"] for m in c) for c in conversations]
  assert [(d.line, d.utf8) for d in found] == [(i + 1, d.text.encode()) for i, d in enumerate(found)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_become_two_messages(tmp_path, suffix):
  path, rows = tmp_path / f"a{suffix}", [{"q": "a", "a": "b"}, {"q": "", "a": "c"}, {"q": "d", "a": " "}, {"q": None, "a": "e"}]
  if suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    save(path, "".join(json.dumps(r) + "\n" for r in rows).encode())
  first, second, empty, null = read(path, records="prompt", text_field="q", answer_field="a")
  assert first.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  assert second.messages[0]["content"] == "" and first.text == "a\n\nb"
  assert empty.reason == "empty answer in 'a'" and " is null" in null.reason
  (*_, missing) = read(path, records="prompt", text_field="q", answer_field="aa")
  assert missing.reason.startswith("field 'aa' is missing. Did you mean a?") and "(--answer_field)" in missing.reason


def message(**kwargs):
  return {"role": "user", "content": "a", **kwargs}


BAD_MESSAGES = [
  ("a", "field 'messages' is a string, expected a list of messages"),
  (None, "field 'messages' is null"),
  ([], "field 'messages' holds no message"),
  (["a"], "message 1 is a string, expected an object"),
  ([{"from": "human", "value": "a"}], "message 1 has the fields 'from' and 'value' (ShareGPT's form), expected 'role' and"),
  ([{"role": "user", "text": "a"}], "message 1 has no 'content'; its fields: role, text"),
  ([{"content": "a"}], "message 1 has no 'role'"),
  ([message(role="human")], "message 1 has the role 'human', expected one of system, developer, user, assistant"),
  ([message(role=["user"])], "the role of message 1 is a list"),
  ([message(content=None)], "the content of message 1 is null"),
  ([message(content=[{"type": "text", "text": "a"}])], "the content of message 1 is a list of parts, expected a string; join"),
  ([message(), message(tool_calls=[{}])], "message 2 has 'tool_calls', which would be lost"),
  ([message(weight=0)], "message 1 has 'weight', which would be lost"),
  ([message(content="\ud800")], "lone surrogate U+D800"),
  ([message(content=" "), message(content="")], "empty text"),
  ([message(content="x" * 900), message(content="x" * 200)], "1102 bytes, more than the 1000"),
]


@pytest.mark.parametrize(("value", "reason"), BAD_MESSAGES)
def test_bad_messages_are_reported(tmp_path, value, reason):
  path = tmp_path / "a.jsonl"
  good = [message(name="Emma", weight=1, tool_calls=None), message(role="assistant", thinking="")]
  path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (good, value, good)))
  before, bad, after = read(path, records="messages", text_field="messages", max_document_bytes=1000)
  assert before.messages == after.messages == [message(), message(role="assistant")]
  assert isinstance(bad, BadRecord) and bad.line == 2 and bad.reason.startswith(reason), bad


def test_messages_in_parquet_that_are_bad(tmp_path):
  path = tmp_path / "a.parquet"
  rows = [[message()], None, [], [message(role="bot")], [None], [message(content=None)], [message(), message(role="assistant")]]
  rows += [[message(content="x" * 2000)], [{**message(), "tool_calls": ["f"]}]]
  kind = pyarrow.list_(
    pyarrow.struct([("role", "string"), ("content", "string"), ("tool_calls", pyarrow.list_(pyarrow.string()))])
  )
  pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array(rows, kind)}), path, row_group_size=4)
  found = read(path, records="messages", text_field="messages", max_document_bytes=1000)
  assert [r.messages and len(r.messages) if isinstance(r, Document) else r.reason[:30] for r in found] == [
    1,
    "column 'messages' is null",
    "field 'messages' holds no mess",
    "message 1 has the role 'bot', ",
    "the role of message 1 is null,",
    "the content of message 1 is nu",
    2,
    "2000 bytes, more than the 1000",
    "message 1 has 'tool_calls', wh",
  ]
  assert [r.line for r in found] == list(range(1, 10))
  for column, words in (
    (["a"], "is string, expected list<struct<role: string"),
    ([["a"]], "expected list<struct<role: string"),
    ([[{"role": 1, "content": "a"}]], "expected list<struct<role: string"),
    ([[{"from": "human", "value": "a"}]], "these are 'from' and 'value' (ShareGPT's form)"),
  ):
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), path)
    (bad,) = read(path, records="messages", text_field="messages")
    assert words in bad.reason and bad.reason.endswith("none of its 1 rows is read")


def test_invalid_utf8_in_messages_in_parquet(tmp_path):
  raw = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
  text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
  structs = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 3), text], ["role", "content"])
  column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), structs)
  pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
  found = read(tmp_path / "a.parquet", records="messages", text_field="messages")
  assert outcome(found) == ["a", "invalid UTF-8 at byte 0 ", "c"]


def test_find_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.makedirs("d/e")
  for name in "b.txt", "a.jsonl.gz", "d/c.TXT", "d/e/a.parquet", "x[1].txt":
    open(name, "w").close()
  assert documents.find_files(["d/**/*", "*.txt", "b.txt", "./b.txt"]) == ["d/c.TXT", "d/e/a.parquet", "b.txt", "x[1].txt"]
  assert documents.find_files(["x[1].txt"]) == ["x[1].txt"]
  for inputs, words in (["*.zip"], "no file matches"), (["d"], "a directory"), ([], "no file matches"):
    with pytest.raises(ConfigError, match=words):
      documents.find_files(inputs)
  open("notes.md", "w").close()
  with pytest.raises(ConfigError, match=r"notes\.md: expected \.txt"):
    documents.find_files(["*"])
