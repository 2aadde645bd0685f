"""Preparing a store: the same bytes whatever the number of processes and interruptions, and plain words for what goes wrong."""

import contextlib
import errno
import gzip
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cpt_jax.config import ConfigError
from cpt_jax.store import documents, prepare, token_files, token_store, tokenization, units
from cpt_jax.store.records import BadRecord, Part, Rules
from cpt_jax.store.units import InputFile
from cpt_jax.store.work import Worker

UNIT_BYTES = 20_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, texts):
  """Every kind of file, good and bad records; returns the globs."""
  path = tmp_path_factory.mktemp("inputs")
  lines = [json.dumps({"text": t}) for t in texts]
  lines[17:17] = ['{"text": ', "", "[]"]
  (path / "a.jsonl").write_text("\n".join(lines[:150]))
  (path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[150:180]).encode(), mtime=0))
  (path / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[180:]).encode())[:-4])
  (path / "d.txt").write_bytes("\n\f\n".join(texts[:60]).encode() + b"\n\f\n\xff\n\f\n" + "\n\f\n".join(texts[60:99]).encode())
  for i in range(5):
    (path / f"e{i}.txt").write_text(f"A short text, number {i}.\n")
  pyarrow.parquet.write_table(pyarrow.table({"text": [*texts[:40], None]}), path / "f.parquet", row_group_size=9)
  return [str(path / "*.jsonl*"), str(path / "*.txt"), str(path / "f.parquet")]


def run(inputs, output, fixtures, **changes):
  """Prepares; `changes` are of the arguments or of the rules."""
  rules = Rules(**{key: changes.pop(key) for key in Rules._fields if key in changes})
  arguments = {"tokenizer": str(fixtures / "tokenizer"), "num_workers": 1, "unit_bytes": UNIT_BYTES, "progress": False} | changes
  return prepare.prepare([str(i) for i in inputs], output=str(output), rules=rules, **arguments)


def content(path):
  """Every file of a directory."""
  return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, inputs, fixtures):
  """The store of one uninterrupted process."""
  path = tmp_path_factory.mktemp("reference") / "store"
  run(inputs, path, fixtures)
  return path


def test_store_holds_the_documents_in_order(reference, inputs, fixtures):
  loaded, expected, bad = tokenization.load(fixtures / "tokenizer"), [], []
  for file in documents.find_files(inputs):
    for record in documents.open_part(Part(file), Rules()):
      (bad if isinstance(record, BadRecord) else expected).append(record)
  opened = token_store.open_store(reference)
  assert opened.num_documents == len(expected) > 300
  for i, (document, ids) in enumerate(zip(expected, loaded.encode_documents([d.text for d in expected]).ids, strict=True)):
    assert opened.document(i).tolist() == ids, document
  assert opened.doc_bytes().tolist() == [len(d.utf8) for d in expected]
  assert opened.doc_hashes().tolist() == [token_files.text_hash(d.text) for d in expected]
  assert (opened.tokenizer_fingerprint, opened.eos_id, opened.vocab_size) == (loaded.fingerprint, 2, 300)
  found = [json.loads(line) for line in (reference / prepare.BAD_RECORDS).read_text().splitlines()]
  assert found == [b._asdict() for b in bad] and len(bad) == 5
  assert len(opened.manifest["files"]) > 5
  assert not (reference / token_files.IN_PROGRESS).exists()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_number_of_processes_changes_no_byte(tmp_path, inputs, fixtures, reference, num_workers):
  run(inputs, tmp_path / "s", fixtures, num_workers=num_workers)
  assert content(tmp_path / "s") == content(reference)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@hypothesis.given(files=st.lists(st.lists(TEXTS, max_size=6), min_size=1, max_size=4), unit_bytes=st.integers(1, 300))
def test_arbitrary_documents(tmp_path_factory, fixtures, files, unit_bytes):
  path = tmp_path_factory.mktemp("p")
  for i, texts in enumerate(files):
    (path / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  kept = [t for texts in files for t in texts if t and not t.isspace()]
  records = [(str(path / f"{i}.jsonl"), n + 1, t) for i, texts in enumerate(files) for n, t in enumerate(texts or [""])]
  lost = [(file, line) for file, line, text in records if not text or text.isspace()]
  if not kept:
    with pytest.raises(documents.DataError, match="no document"):
      run([path / "*.jsonl"], path / "store", fixtures, unit_bytes=unit_bytes)
    return
  report = run([path / "*.jsonl"], path / "store", fixtures, unit_bytes=unit_bytes)
  opened = token_store.open_store(path / "store")
  ids = tokenization.load(fixtures / "tokenizer").encode_documents(kept).ids
  assert [opened.document(i).tolist() for i in range(opened.num_documents)] == ids
  assert report[1:5] == (len(kept), sum(map(len, ids)), sum(len(t.encode()) for t in kept), len(lost))
  assert [(b.file, b.line) for b in report.bad_records] == lost[:10]


# Interruptions.


class _CrashError(BaseException):
  pass


def test_crash_at_any_rename_then_again_gives_the_same_bytes(tmp_path, inputs, fixtures, reference, monkeypatch):
  replace, points = os.replace, 0
  for crash_at in range(0, 10_000, 5):
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    calls = []

    def crashing(*args, calls=calls, crash_at=crash_at):
      calls.append(args)
      if len(calls) == crash_at + 1:
        raise _CrashError
      replace(*args)

    monkeypatch.setattr(os, "replace", crashing)
    with contextlib.suppress(_CrashError):
      run(inputs, tmp_path / "s", fixtures)
    monkeypatch.setattr(os, "replace", replace)
    if len(calls) <= crash_at:
      break
    with pytest.raises(ConfigError, match=r"not finished|no such token store|no token file"):
      token_store.open_store(tmp_path / "s")
    run(inputs, tmp_path / "s", fixtures)
    assert content(tmp_path / "s") == content(reference), crash_at
    points += 1
  assert points > 10


def start(inputs, output, fixtures, num_workers):
  call = f"prepare.prepare({inputs!r}, tokenizer={str(fixtures / 'tokenizer')!r}, output={str(output)!r}, "
  call += f"num_workers={num_workers}, unit_bytes={UNIT_BYTES}, progress=False)"
  code = f"import signal; from cpt_jax.store import prepare\nsignal.signal(2, signal.default_int_handler)\n{call}"
  root = fixtures.parent.parent
  return subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
  ("kind", "num_workers"),
  [
    (signal.SIGKILL, 2),
    pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
  ],
)
def test_killed_while_it_writes_then_again_gives_the_same_bytes(tmp_path, inputs, fixtures, reference, kind, num_workers):
  output, generator, kills = tmp_path / "s", random.Random(0), 0
  wanted = 0
  while not (output / token_files.MANIFEST).exists():
    process = start(inputs, output, fixtures, num_workers)
    wanted += 3
    while process.poll() is None and num_finished(output) < wanted:
      time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.02))
    kills += process.poll() is None
    process.send_signal(kind)
    process.wait()
    assert kills < 30
  assert kills >= 2
  run(inputs, output, fixtures)
  assert content(output) == content(reference)


def num_finished(output):
  try:
    return len(list(output.glob("in_progress/*.json")))
  except FileNotFoundError:  # the store became whole between a look at the folder and one into it
    return 0


def test_finished_units_are_not_done_again(tmp_path, inputs, fixtures, monkeypatch, capsys):
  write, names = Worker._write, []

  def stop_in_the_middle(self, batch, writer, notes):
    names.append((batch[0].file, batch[0].offset, batch[0].line))
    if len(names) == 5:
      raise KeyboardInterrupt
    return write(self, batch, writer, notes)

  monkeypatch.setattr(Worker, "_write", stop_in_the_middle)
  with pytest.raises(KeyboardInterrupt):
    run(inputs, tmp_path / "s", fixtures)
  run(inputs, tmp_path / "s", fixtures, progress=True)
  assert len(set(names)) == len(names) - 1  # the one at the interruption
  assert "units of work are finished" in capsys.readouterr().err


def interrupted(inputs, output, fixtures, monkeypatch, num_units=3, **kwargs):
  """Leaves an unfinished store with so many finished units."""
  run_unit, calls = Worker.run, []

  def stop(self, *args):
    calls.append(args)
    if len(calls) > num_units:
      raise KeyboardInterrupt
    run_unit(self, *args)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Worker, "run", stop)
    run(inputs, output, fixtures, **kwargs)


def test_unfinished_store_takes_up_changed_inputs(tmp_path, fixtures, texts, monkeypatch):
  for i in range(6):
    (tmp_path / f"{i}.txt").write_text("\n\f\n".join(texts[10 * i : 10 * i + 40]))
  inputs = [tmp_path / "*.txt"]
  interrupted(inputs, tmp_path / "s", fixtures, monkeypatch)
  text = (tmp_path / "1.txt").read_text()
  (tmp_path / "1.txt").write_text(text.replace("the", "teh"))  # of the same size
  (tmp_path / "5.txt").unlink()
  run(inputs, tmp_path / "s", fixtures)
  run(inputs, tmp_path / "again", fixtures)
  assert content(tmp_path / "s") == content(tmp_path / "again")


def test_two_at_once_are_refused(tmp_path, inputs, fixtures):
  with (
    prepare._locked(str(tmp_path / "s"), {}, "now"),
    pytest.raises(ConfigError, match="another process is preparing"),
    prepare._locked(str(tmp_path / "s"), {}, "now"),
  ):
    pass


# A finished store.


@pytest.fixture
def small(tmp_path, texts):
  path = tmp_path / "in.jsonl"
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:20]))
  return path


def test_finished_store_is_left_alone(tmp_path, small, fixtures):
  first = run([small], tmp_path / "s", fixtures)
  before = content(tmp_path / "s")
  again = run([small], tmp_path / "s", fixtures, num_workers=2, on_bad="fail", unit_bytes=100)
  assert again.was_finished and again._replace(seconds=first.seconds, was_finished=False) == first
  assert "already finished" in again.lines()[0]
  os.utime(small, (1, 1))  # another time, the same content
  assert run([small], tmp_path / "s", fixtures).was_finished
  (tmp_path / "s" / token_files.IN_PROGRESS).mkdir()  # a kill after store.json
  assert run([small], tmp_path / "s", fixtures).was_finished
  assert content(tmp_path / "s") == before and not (tmp_path / "s" / token_files.IN_PROGRESS).exists()


def test_finished_store_of_other_things_is_refused(tmp_path, small, fixtures):
  run([small], tmp_path / "s", fixtures)
  before = content(tmp_path / "s")
  other = {"tokenizer": str(fixtures / "sentencepiece")}, {"text_field": "body"}, {"eos_token": "<s>"}
  for change, words in zip(other, ("tokenizer_fingerprint", "text_field", "eos_id"), strict=True):
    with pytest.raises(ConfigError, match=rf"choose another --output or remove it(.|\n)*{words}"):
      run([small], tmp_path / "s", fixtures, **change)
  other = tmp_path / "other.jsonl"
  other.write_bytes(small.read_bytes() * 2)
  with pytest.raises(ConfigError, match=rf"inputs: {small} in the store, now {other}"):
    run([other], tmp_path / "s", fixtures)
  data = small.read_bytes()
  small.write_bytes(data[:30] + b"Q" + data[31:])
  with pytest.raises(ConfigError, match="other content than when the store was made"):
    run([small], tmp_path / "s", fixtures)
  small.write_bytes(data + b"\n")
  with pytest.raises(ConfigError, match="bytes when the store was made"):
    run([small], tmp_path / "s", fixtures)
  shutil.copy(small, tmp_path / "in2.jsonl")
  with pytest.raises(ConfigError, match="1 files in the store, now 2"):
    run([tmp_path / "in*.jsonl"], tmp_path / "s", fixtures)
  assert content(tmp_path / "s") == before


# Bad records and bad places.


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_record_fails_by_file_and_line(tmp_path, fixtures, texts, num_workers):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"text": t}) for t in texts]
  lines[150] = '{"text": 3}'
  path.write_text("\n".join(lines))
  with pytest.raises(documents.DataError, match=r"a\.jsonl:151: field 'text' is a number.*--on_bad skip"):
    run([path], tmp_path / "s", fixtures, on_bad="fail", num_workers=num_workers)
  report = run([path], tmp_path / "s", fixtures)
  assert report.num_bad == 1 and any("a.jsonl:151" in line for line in report.lines())


def test_max_bad(tmp_path, inputs, fixtures):
  messages = []
  for _ in range(2):  # the second time, what finished units found counts
    with pytest.raises(documents.DataError, match="3 bad records, more than --max_bad=2") as raised:
      run(inputs, tmp_path / "s", fixtures, max_bad=2)
    messages.append(str(raised.value))
  assert messages[0] == messages[1]
  assert run(inputs, tmp_path / "s", fixtures, max_bad=5).num_bad == 5


def test_wrong_field_can_be_corrected(tmp_path, small, fixtures):
  with pytest.raises(documents.DataError, match=r"no document in 1 files: 20 bad records; .*:1: field 'body' is missing"):
    run([small], tmp_path / "s", fixtures, text_field="body")
  assert run([small], tmp_path / "s", fixtures).num_documents == 20


def test_special_text_and_nul_are_reported(tmp_path, fixtures):
  (tmp_path / "a.txt").write_bytes(b"a</s>b\n\f\na\0b\n\f\nplain")
  report = run([tmp_path / "a.txt"], tmp_path / "s", fixtures)
  assert report.notes == {"special_text": 1, "control_ids": 0, "nul": 1}
  assert sum("note:" in line for line in report.lines()) == 2


def test_wrong_settings(tmp_path, small, fixtures):
  for change, words in (
    ({"on_bad": "keep"}, "--on_bad"),
    ({"num_workers": -1}, "--num_workers"),
    ({"max_document_bytes": 0}, "--max_document_mb"),
    ({"tokenizer": str(tmp_path / "none")}, "no such tokenizer"),
  ):
    with pytest.raises(ConfigError, match=words):
      run([small], tmp_path / "s", fixtures, **change)
  with pytest.raises(ConfigError, match="no file matches"):
    run([tmp_path / "*.txt"], tmp_path / "s", fixtures)
  with pytest.raises(ConfigError, match="holds other files"):
    run([small], tmp_path, fixtures)
  with pytest.raises(ConfigError, match="is a file"):
    run([small], small, fixtures)
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_disk_errors_are_plain_and_it_goes_on(tmp_path, small, fixtures, monkeypatch, number, words):
  with monkeypatch.context() as patch:
    patch.setattr(token_files._Part, "_flush", mock.Mock(side_effect=OSError(number, os.strerror(number), "a/b")))
    with pytest.raises(OSError, match=f"a/b: .*{words}"):
      run([small], tmp_path / "s", fixtures)
  assert run([small], tmp_path / "s", fixtures).num_documents == 20


@pytest.mark.parametrize("num_workers", [1, 2])
def test_file_size_limit(tmp_path, inputs, fixtures, num_workers):
  """A real write that fails, in the process and in a worker."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(OSError, match=r"/s.*: the file size limit is reached"):
      run(inputs, tmp_path / "s", fixtures, num_workers=num_workers)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_output_that_cannot_be_names_its_path(tmp_path, small, fixtures):
  for output in small / "below" / "s", pathlib.Path("/proc/none/s"):
    with pytest.raises(OSError, match=rf"{output}: no directory can be made there \(.*choose another"):
      run([small], output, fixtures)


def test_every_error_of_the_disk_names_its_path(tmp_path, small, fixtures, monkeypatch):
  def fail(number, *path):
    error = OSError(number, os.strerror(number), *path)
    monkeypatch.setattr(token_files._Part, "_flush", mock.Mock(side_effect=error))
    with pytest.raises(OSError, match=": ") as raised:
      run([small], tmp_path / "s", fixtures)
    return raised.value.strerror

  assert fail(errno.EIO) == f"{tmp_path / 's'}: Input/output error"
  assert fail(errno.EIO, "a/b") == "a/b: Input/output error"
  assert fail(errno.ENOSPC) == f"{tmp_path / 's'}: {prepare._DISK_ADVICE[errno.ENOSPC]}"


def test_an_unfinished_store_of_an_older_version_is_refused(tmp_path, small, fixtures):
  (tmp_path / "s" / token_files.IN_PROGRESS).mkdir(parents=True)
  (tmp_path / "s" / token_files.IN_PROGRESS / "plan.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"unfinished store without settings\.json, of an older version; remove it"):
    run([small], tmp_path / "s", fixtures)


def test_file_that_changes_meanwhile(tmp_path, small, fixtures, monkeypatch):
  write = Worker._write

  def append(self, *args):
    with open(small, "a") as f:
      f.write('{"text": "more"}\n')
    return write(self, *args)

  monkeypatch.setattr(Worker, "_write", append)
  with pytest.raises(documents.DataError, match="was changed while it was read"):
    run([small], tmp_path / "s", fixtures)


def test_units_depend_on_sizes_only_and_covers_every_byte(tmp_path):
  generator = np.random.default_rng(0)
  for i in range(30):
    (tmp_path / f"{i:02d}.txt{'.gz' * (i % 3 == 0)}").write_bytes(bytes(int(generator.integers(0, 5000))))
  files = documents.find_files([str(tmp_path / "*")])
  found = units.cut([InputFile.of(file) for file in files], unit_bytes=3000, max_units=256)
  covered = dict.fromkeys(files, 0)
  for piece in (p for unit in found for p in unit):
    assert piece.digest_start == covered[piece.part.file]
    covered[piece.part.file] = piece.digest_end
  assert covered == {f: os.path.getsize(f) for f in files}
  assert [p.part.file for unit in found for p in unit] == sorted(p.part.file for unit in found for p in unit)


# Conversations.

TEMPLATE = (
  "{% for m in messages %}{{ bos_token if loop.first }}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}"
  "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def chatty(tmp_path, fixtures):
  """A tokenizer's directory with a chat template."""
  path = shutil.copytree(fixtures / "tokenizer", tmp_path / "chatty")
  (path / "chat_template.jinja").write_text(TEMPLATE)
  return path


@pytest.fixture
def talks(tmp_path, texts):
  """Files of messages, some of them bad, as .jsonl and .parquet; returns the globs, the good ones and the bad lines."""
  good = [[{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(texts[i : i + 4])] for i in range(60)]
  lines = [json.dumps({"messages": c}) for c in good]
  bad = {
    10: "[]",
    11: '{"messages": [{"role": "user", "content": "a</s>"}]}',
    30: '{"messages": [{"from": "human", "value": "a"}]}',
  }
  bad[31] = '{"messages": [{"role": "user", "content": "alone"}]}'
  for at, line in bad.items():
    lines.insert(at, line)
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  pyarrow.parquet.write_table(pyarrow.table({"messages": good[:7]}), tmp_path / "b.parquet", row_group_size=3)
  return [tmp_path / "a.jsonl", tmp_path / "b.parquet"], [*good, *good[:7]], [at + 1 for at in bad]


def without_spaces(text):
  """This tokenizer's normaliser puts one behind every special token."""
  return text.replace(" ", "")


@pytest.mark.parametrize("train_on", ["all", "answers"])
def test_messages_make_a_store(tmp_path, fixtures, chatty, talks, train_on):
  inputs, good, bad_lines = talks
  arguments = {"tokenizer": str(chatty), "records": "messages", "train_on": train_on}
  report = run(inputs, tmp_path / "s", fixtures, **arguments)
  opened, loaded = token_store.open_store(tmp_path / "s"), tokenization.load(chatty)
  is_alone = train_on == "all"  # a lone question is no fault then
  assert opened.num_documents == report.num_documents == len(good) + is_alone
  assert opened.has_loss_mask == (not is_alone)
  found = [json.loads(line) for line in (tmp_path / "s" / prepare.BAD_RECORDS).read_text().splitlines()]
  assert [(b["file"], b["line"]) for b in found] == [(str(inputs[0]), line) for line in bad_lines[: 4 - is_alone]]
  assert "spells the control token '</s>'" in found[1]["reason"]
  lone = token_files.text_hash('[["user","alone"]]')
  documents_found = [i for i, found_hash in enumerate(opened.doc_hashes()) if found_hash != lone]
  for i, talk in zip(documents_found, good, strict=True):
    ids, said = opened.document(i), "".join(f"[{m['role']}] {m['content']}" for m in talk)
    assert without_spaces(loaded.decode(ids)) == without_spaces(said) and (ids[0], ids[-1], (ids == 2).sum()) == (1, 2, 2)
    answers = "".join(m["content"] for m in talk if m["role"] == "assistant")
    if not is_alone:
      counted = opened.loss_mask(i, 0, ids.size)
      assert without_spaces(loaded.decode(ids[counted])) == without_spaces(answers) and counted[ids == 2].all()
      assert opened.doc_bytes()[i] == len(answers.encode()) + 2 * len("</s>")
    pairs = json.dumps([[m["role"], m["content"]] for m in talk], ensure_ascii=False, separators=(",", ":"))
    assert opened.doc_hashes()[i] == token_files.text_hash(pairs)
  manifest = opened.manifest
  assert (manifest["records"], manifest["train_on"], manifest["text_field"]) == ("messages", train_on, "messages")
  assert (
    manifest["num_targets"]
    == report.num_targets
    == sum(opened.loss_mask(i, 0, opened.document(i).size).sum() for i in range(opened.num_documents))
  )
  assert any("in the loss" in line for line in report.lines()) == (not is_alone)
  run(inputs, tmp_path / "t", fixtures, num_workers=2, unit_bytes=3000, **arguments)
  run(inputs, tmp_path / "u", fixtures, num_workers=1, unit_bytes=3000, **arguments)
  assert content(tmp_path / "t") == content(tmp_path / "u")
  assert (token_store.open_store(tmp_path / "t").doc_hashes() == opened.doc_hashes()).all()


def test_hashes_of_conversations_do_not_depend_on_the_tokenizer(tmp_path, fixtures, chatty, talks):
  run(talks[0], tmp_path / "a", fixtures, tokenizer=str(chatty), records="messages", train_on="answers")
  (chatty / "chat_template.jinja").write_text(
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
  )
  run(talks[0], tmp_path / "b", fixtures, tokenizer=str(chatty), records="messages", train_on="answers")
  a, b = (token_store.open_store(tmp_path / name) for name in "ab")
  assert (a.doc_hashes() == b.doc_hashes()).all() and a.fingerprint != b.fingerprint


@pytest.mark.parametrize("has_template", [True, False])
def test_prompts_make_a_store(tmp_path, fixtures, chatty, has_template):
  rows = [{"question": f"How many? {i}", "answer": f"{i} of them"} for i in range(9)]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  arguments = {"records": "prompt", "train_on": "answers", "text_field": "question"}
  directory = chatty if has_template else fixtures / "tokenizer"
  run([tmp_path / "a.jsonl"], tmp_path / "s", fixtures, tokenizer=str(directory), **arguments)
  opened, loaded = token_store.open_store(tmp_path / "s"), tokenization.load(directory)
  for i, row in enumerate(rows):
    ids = opened.document(i)
    said = loaded.decode(ids[opened.loss_mask(i, 0, ids.size)])
    assert said.strip() == row["answer"] or (not has_template and row["answer"].endswith(said))
    expected = f"[user] {row['question']}[assistant] {row['answer']}" if has_template else row["question"] + row["answer"]
    assert loaded.decode(ids) == expected


def test_stores_of_other_records_are_told_apart(tmp_path, fixtures, chatty, talks, monkeypatch):
  inputs, *_ = talks
  same = {"tokenizer": str(chatty), "records": "messages", "train_on": "answers"}
  run(inputs, tmp_path / "s", fixtures, **same)
  assert run(inputs, tmp_path / "s", fixtures, **same).was_finished
  for change, words in (
    ({"train_on": "all"}, "train_on: 'answers' in the store, now 'all'"),
    ({"records": "text", "train_on": "all", "text_field": "messages"}, "records: 'messages' in the store, now 'text'"),
    ({"records": "prompt", "text_field": "messages"}, "answer_field: '' in the store, now 'answer'"),
  ):
    with pytest.raises(ConfigError, match=words):
      run(inputs, tmp_path / "s", fixtures, **(same | change))
  interrupted(inputs, tmp_path / "u", fixtures, monkeypatch, **same)
  with pytest.raises(ConfigError, match=r"unfinished store with other settings(.|\n)*train_on: 'answers' before, now 'all'"):
    run(inputs, tmp_path / "u", fixtures, **(same | {"train_on": "all"}))
  run(inputs, tmp_path / "u", fixtures, **same)
  (chatty / "chat_template.jinja").write_text(TEMPLATE.replace("[", "("))
  with pytest.raises(ConfigError, match=r"chat_template: '[0-9a-f]{32}' in the store, now"):
    run(inputs, tmp_path / "s", fixtures, **same)


def test_stores_made_before_records_had_kinds_are_taken(tmp_path, small, fixtures):
  run([small], tmp_path / "s", fixtures)
  file = tmp_path / "s" / token_files.MANIFEST
  manifest = json.loads(file.read_text())
  for key in "records", "train_on", "answer_field", "chat_template", "num_targets":
    del manifest[key]
  for entry in manifest["files"]:
    del entry["num_targets"]
  manifest["digest"] = token_files._digest(manifest)
  file.write_text(json.dumps(manifest))
  assert run([small], tmp_path / "s", fixtures).was_finished
  assert token_store.open_store(tmp_path / "s").verify() == []


def test_template_is_told_the_date_of_the_first_start(tmp_path, fixtures, chatty, talks, monkeypatch):
  (chatty / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}" + TEMPLATE)
  same = {"tokenizer": str(chatty), "records": "messages", "train_on": "answers"}
  interrupted(talks[0], tmp_path / "s", fixtures, monkeypatch, **same)
  run(talks[0], tmp_path / "s", fixtures, num_workers=2, **same)
  opened, loaded = token_store.open_store(tmp_path / "s"), tokenization.load(chatty)
  dates = {loaded.decode(opened.document(i)).split("[user]")[0].strip() for i in range(opened.num_documents)}
  assert dates == {opened.manifest["rendered_at"].replace("T", " ")}
  assert run(talks[0], tmp_path / "s", fixtures, **same).was_finished


def test_wrong_settings_of_records(tmp_path, small, fixtures, chatty):
  (tmp_path / "a.txt").write_text("a")
  for change, words in (
    ({"records": "chat"}, "--records='chat': choose text, messages, prompt"),
    ({"records": "prompt", "train_on": "some"}, "--train_on='some'"),
    ({"train_on": "answers"}, "a text has no answers"),
    ({"records": "messages"}, "has no chat template"),
  ):
    with pytest.raises(ConfigError, match=words):
      run([small], tmp_path / "s", fixtures, **change)
  with pytest.raises(ConfigError, match=r"a\.txt holds no such records"):
    run([small, tmp_path / "a.txt"], tmp_path / "s", fixtures, records="messages", tokenizer=str(chatty))
  with pytest.raises(documents.DataError, match=r"20 bad records; .*in.jsonl:1: field 'messages' is missing"):
    run([small], tmp_path / "s", fixtures, records="messages", tokenizer=str(chatty))


# The command.

TOKENIZER = ("--tokenizer", "tests/fixtures/tokenizer")


def test_command_for_messages(tmp_path, cpt, chatty, talks):
  flags = ("--records", "messages", "--train_on", "answers", "--tokenizer", chatty, "--output", tmp_path / "s")
  done = cpt("prepare", "--input", talks[0][0], "--input", talks[0][1], *flags)
  assert done.returncode == 0 and "documents                  67" in done.stdout and "in the loss" in done.stdout, done.stderr


def test_command(tmp_path, small, fixtures, cpt):
  arguments = ("--input", small, "--tokenizer", fixtures / "tokenizer", "--output", tmp_path / "s")
  done = cpt("prepare", *arguments)
  assert done.returncode == 0 and "documents                  20" in done.stdout, done.stderr
  verified = cpt("prepare", "--verify", tmp_path / "s")
  assert verified.returncode == 0 and "whole; 20 documents" in verified.stdout
  tokens = tmp_path / "s" / "00000.ds"
  tokens.write_bytes(b"\7" + tokens.read_bytes()[1:])
  damaged = cpt("prepare", "--verify", tmp_path / "s")
  assert damaged.returncode == 65 and "00000.ds: digest" in damaged.stderr


@pytest.mark.parametrize(
  ("arguments", "code", "words"),
  [
    ([], 78, "--input and --tokenizer and --output missing"),
    (["--input", "no*.txt", *TOKENIZER, "--output", "{}/s"], 78, "'no*.txt': no file matches"),
    (["--input", "a", "b"], 78, "a pattern like '*.txt' is quoted"),
    (["--input", "{}/bad.txt", *TOKENIZER, "--output", "{}/s", "--on_bad", "fail"], 65, "bad.txt:1: inv"),
  ],
)
def test_command_says_what_is_wrong(tmp_path, cpt, arguments, code, words):
  (tmp_path / "bad.txt").write_bytes(b"\xff")
  done = cpt("prepare", *(a.format(tmp_path) for a in arguments))
  assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_no_heavy_library_is_imported(fixtures):
  heavy = "{'jax', 'torch', 'transformers', 'datatrove'}"
  code = f"import sys; from cpt_jax.store import prepare; sys.exit(bool({heavy} & set(sys.modules)))"
  assert subprocess.run([sys.executable, "-c", code], cwd=fixtures.parent.parent).returncode == 0
