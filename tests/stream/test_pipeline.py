"""The loader: rows are a function of their number, each training pair once an epoch, held-out documents never, exact ledger."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import threading
import time

import factory
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from loaders import UNIQUE, assert_same, write
from store_writer import StoreWriter

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.store import tokenization
from cpt_jax.store.token_store import open_store
from cpt_jax.stream import heldout, layout_files, mixture, packing, pipeline, shuffle, sources, summary, tally
from cpt_jax.stream.batch import Batch


class Opening:
  """A tokenizer whose ids spell 0, 1 or 2 bytes where a document begins with them."""

  opening_bytes_V = np.arange(1 << 20) % 3

  def decode(self, ids):
    return "\u00e9" * len(ids)


def source(store, *, name="a", share=1.0, role="domain", heldout_frac=0.2, max_epochs=0.0):
  return factory.source(name, store, role=role, share=share, heldout_frac=heldout_frac, max_epochs=max_epochs)


def loader(found, **options):
  return factory.loader(
    found, **{"num_steps": 20, "batch_rows": 4, "row_len": 16, "tokenizer": Opening(), "num_threads": 3, **options}
  )


def rows_of(batch: Batch) -> list[Batch]:
  return [Batch(*(x[i : i + 1] for x in batch)) for i in range(len(batch.source_B))]


def pairs_of(rows) -> list[tuple[int, int]]:
  found = []
  for row in rows:
    real = row.weights_BT > 0
    found += zip(row.tokens_BT[real].tolist(), row.targets_BT[real].tolist(), strict=True)
  return found


@pytest.fixture
def two(tmp_path):
  rng = np.random.default_rng(0)
  zh, en = (write(tmp_path / n, rng.integers(1, 60, size), name=n) for n, size in (("zh", 60), ("en", 90)))
  return [source(zh, name="zh", share=[(0, 0.2), (15, 0.9)]), source(en, name="en", share=0.5, role="replay")]


def test_a_row_is_a_function_of_its_number(two):
  first, second = loader(two), loader(two, num_threads=1, num_steps=30)
  assert first.fingerprint == second.fingerprint
  walked = [row for batch in first.batches(0) for row in rows_of(batch)]
  assert len(walked) == 80
  for i in (79, 0, 41, 7, 40):
    assert_same(second.row(i), walked[i])
  assert {int(row.source_B[0]) for row in walked} == {0, 1}


def test_no_row_holds_more_documents_than_is_said(two, tmp_path):
  # Attention has room for so many; a document more, and two would be taken for one.
  short = source(write(tmp_path / "short", [3] * 40), name="short")
  for found in (two, [short, *two], [*two, short]):
    made = loader(found, num_steps=100)
    assert made.max_documents == max(batch.segments_BT.max() for batch in made.batches(0))
    for name in made.names:
      held = made.heldout_rows(name, max_tokens=10_000, max_bytes=0)
      assert held.max_documents == max(batch.segments_BT.max() for batch in held.batches)


def test_resume_at_any_step_reads_on(two):
  whole = list(loader(two).batches(0))
  for start in (0, 1, 13, 19, 20):
    again = list(loader(two).batches(start))
    assert len(again) == 20 - start
    for a, b in zip(again, whole[start:], strict=True):
      assert_same(a, b)


def test_earlier_rows_are_not_read(two, monkeypatch):
  reader, read = loader(two, num_steps=100_000), []
  locate = reader.order.locate
  monkeypatch.setattr(reader.order, "locate", lambda row: (read.append(row), locate(row))[1])
  rows = reader.batches(90_000)
  next(rows)
  rows.close()
  assert read and min(read) >= 90_000 * 4 and len(read) < 100


@settings(max_examples=12)
@given(
  st.lists(st.integers(0, 50), min_size=10, max_size=40),
  st.sampled_from(["concat", "best_fit", "pad"]),
  st.booleans(),
  st.integers(0, 3),
)
def test_each_training_pair_once_an_epoch_and_no_held_out_document_ever(tmp_path_factory, lengths, policy, crossing, seed):
  store = write(tmp_path_factory.mktemp("s") / "s", [60, 50, *(n + 1 for n in lengths)], copies=2)
  found = source(store, heldout_frac=0.3)
  train, held = ({i % (len(lengths) + 2) for i in documents} for documents in (found.train_documents, found.heldout_documents))
  assert not train & held  # copies go together
  if not train or not held:
    return
  options = {"row_len": 12, "packing": policy, "cross_documents": crossing, "seed": seed, "batch_rows": 1}
  epoch_rows = loader([found], **options).layouts[0].num_rows
  reader = loader([found], num_steps=3 * epoch_rows, **options)
  wanted = sorted(2 * [(UNIQUE * d + i, UNIQUE * d + i + 1) for d in train for i in range(int(store.lengths[d]) - 1)])
  order = []
  for epoch in range(3):
    rows = [reader.row(epoch * epoch_rows + i) for i in range(epoch_rows)]
    pairs = pairs_of(rows)
    assert not {token // UNIQUE for pair in pairs for token in pair} & held
    assert sorted(pair for pair in pairs if pair[0] + 1 == pair[1]) == wanted  # the others join documents
    order.append(pairs)
  if epoch_rows > 8:
    assert order[0] != order[1] != order[2]  # shuffled afresh


def test_another_source_disturbs_nobodys_order(two, tmp_path):
  third = source(write(tmp_path / "third", [30] * 40, name="third"), name="third", share=0.4)

  def rows_read(found, name, **options):
    reader = loader(found, num_steps=60, **options)
    m = reader.names.index(name)
    rows = (reader.row(i) for i in range(240) if reader.locate(i)[0] == m)
    return [row.tokens_BT.tolist() for row in rows][:40]

  expected = rows_read(two, "en")
  assert rows_read([third, *two], "en") == expected == rows_read(two[::-1], "en")
  assert rows_read(two, "en", seed=1) != expected


def test_a_source_without_a_share_is_evaluated_only(two):
  reader = loader([two[0], sources.dataclasses.replace(two[1], share=((0, 0.0, "linear"),))])
  assert {int(s) for batch in reader.batches(0) for s in batch.source_B} == {0}
  assert reader.ledger(20)[1] == {
    "source": "en",
    "role": "replay",
    "rows": 0,
    "tokens": 0,
    "documents": 0,
    "epochs": 0.0,
    "bytes": 0,
  }
  assert reader.heldout_rows("en", max_tokens=100, max_bytes=0).num_tokens > 0
  assert "not trained on" in summary.describe(reader)[1].notes[0]


@pytest.mark.parametrize("crossing", [False, True])
def test_the_ledger_counts_every_row(two, crossing):
  reader = loader(two, cross_documents=crossing, num_steps=90)
  rows, tokens, documents, num_bytes, asked = [0, 0], [0, 0], [0, 0], [0, 0], {}
  for step, batch in enumerate(reader.batches(0)):
    counted, keys = zip(rows, tokens, documents, num_bytes, strict=True), ("rows", "tokens", "documents", "bytes")
    asked[step] = [dict(zip(keys, x, strict=True)) for x in counted]
    for m in range(2):
      rows[m] += int((batch.source_B == m).sum())
      tokens[m] += int(batch.weights_BT[batch.source_B == m].sum())
    for i in range(4 * step, 4 * step + 4):
      m, _, pieces = reader.locate(i)
      documents[m] += sum(start == 0 for _, start, _ in pieces)
      store = two[m].store
      for d, start, length in pieces:  # byte by byte: each is in one pair, as evenly as whole bytes allow
        size, pairs = int(store.doc_bytes()[d]), int(store.lengths[d]) - 1
        num_bytes[m] += sum(start <= (byte * pairs + pairs - 1) // size < start + length for byte in range(size))
  assert reader.ledger(90)[0]["epochs"] > 2
  for step in (0, 1, 5, 89, 17, 18, 38):  # back and forth
    for entry, expected, layout in zip(reader.ledger(step), asked[step], reader.layouts, strict=True):
      assert {k: entry[k] for k in expected} == expected
      assert entry["epochs"] == expected["rows"] / layout.num_rows
  assert json.loads(json.dumps(reader.ledger(90))) == reader.ledger(90)


@settings(max_examples=12)
@given(st.integers(1, 400), st.integers(1, 9))
def test_held_out_rows_are_whole_documents_each_target_once(tmp_path_factory, max_tokens, batch_rows):
  lengths = np.random.default_rng(1).integers(1, 70, 60)
  found = source(write(tmp_path_factory.mktemp("s") / "s", lengths), heldout_frac=0.4)
  held = loader([found], cross_documents=True).heldout_rows("a", max_tokens=max_tokens, max_bytes=0, batch_rows=batch_rows)
  pairs = pairs_of(held.batches)
  documents = {token // UNIQUE for token, _ in pairs}
  assert sorted(pairs) == sorted((UNIQUE * d + i, UNIQUE * d + i + 1) for d in documents for i in range(int(lengths[d]) - 1))
  assert documents <= set(found.heldout_documents.tolist())
  assert held.num_tokens == len(pairs) and held.num_documents == len(documents)
  assert held.num_bytes == sum(len(f" {d}") for d in documents)
  assert held.num_target_bytes == sum(len(f" {d}") - UNIQUE * d % 3 for d in documents)
  # In the order of hashes: whatever was passed over did not fit.
  left = max_tokens
  for d in found.heldout_documents.tolist():
    size = int(lengths[d]) - 1
    if size and held.num_tokens <= max_tokens:  # else none fits
      assert (d in documents) == (size <= left)
      left -= size if d in documents else 0
  for batch in held.batches:
    assert batch.tokens_BT.shape == (batch_rows, 16) and (batch.source_B == 0).all()
    np.testing.assert_array_equal(batch.weights_BT > 0, batch.segments_BT > 0)
  rows = [{int(t) // UNIQUE for t, _ in pairs_of([row])} for batch in held.batches for row in rows_of(batch)]
  for d in documents:  # a document that fits in a row is never cut, so its loss has all of its context
    least = -(-(int(lengths[d]) - 1) // 16)
    assert sum(d in row for row in rows) == 1 if least == 1 else sum(d in row for row in rows) >= least


@pytest.mark.parametrize("kind", ["examples/base", "tests/fixtures/sentencepiece"])
def test_bits_per_byte_divide_by_what_the_targets_spell(tmp_path, root, kind):
  loaded = tokenization.load(root / kind)
  texts = [f"{word} {i}, \u4eba\u751f" for i, word in enumerate(["The", "a", "\u98ce", "\n\nOnce", "x1", "Emma"] * 5)]
  with StoreWriter(tmp_path / "s", vocab_size=loaded.vocab_size, eos_id=loaded.eos_id) as writer:
    for ids, text in zip(loaded.encode_documents(texts).ids, texts, strict=True):
      writer.add(ids, text=text)
  held = loader([source(open_store(tmp_path / "s"), heldout_frac=0.5)], tokenizer=loaded).heldout_rows(
    "a", max_tokens=10**6, max_bytes=0
  )
  targets = [int(target) for batch in held.batches for target in batch.targets_BT[batch.weights_BT > 0]]
  if kind == "examples/base":  # byte-level, without BOS: a character of a piece is a byte
    piece_of = tokenizers.Tokenizer.from_file(str(loaded.path)).id_to_token
    assert held.num_target_bytes == sum(len(piece_of(target)) for target in targets if target != loaded.eos_id) < held.num_bytes
  else:  # every document begins with BOS, which spells nothing
    assert held.num_target_bytes == held.num_bytes


@settings(max_examples=12)
@given(st.integers(1, 120), st.integers(2, 5))
def test_by_bytes_the_same_documents_are_held_out_whatever_the_tokenizer(tmp_path_factory, max_bytes, shorter):
  path, lengths = tmp_path_factory.mktemp("s"), np.random.default_rng(1).integers(2, 70, 60)
  texts = ["x" * int(n) for n in np.random.default_rng(2).integers(1, 30, 60)]
  found = []
  for name, tokens in (("long", lengths), ("short", -(-lengths // shorter) + 1)):
    with StoreWriter(path / name, vocab_size=1 << 20, eos_id=0) as writer:
      for i, (text, n) in enumerate(zip(texts, tokens, strict=True)):
        writer.add(list(range(UNIQUE * i, UNIQUE * i + int(n))), text=f"{text} {i}")
    one = source(open_store(path / name), heldout_frac=0.4)
    held = loader([one]).heldout_rows("a", max_tokens=7, max_bytes=max_bytes)
    found.append(sorted({token // UNIQUE for token, _ in pairs_of(held.batches)}))
    left, expected = max_bytes, []
    for d in one.heldout_documents.tolist():
      size = len(f"{texts[d]} {d}")
      if size <= left:
        expected.append(d)
        left -= size
    assert found[-1] == sorted(expected) or (not expected and len(found[-1]) == 1)
    assert held.num_bytes == sum(len(f"{texts[d]} {d}") for d in found[-1])
  assert found[0] == found[1]


def test_where_no_held_out_document_fits_the_smallest_is_taken(tmp_path):
  found = source(write(tmp_path / "s", [*range(40, 20, -1)]), heldout_frac=0.5)
  held = loader([found]).heldout_rows("a", max_tokens=3, max_bytes=0)
  assert held.num_documents == 1 and held.num_tokens == found.store.lengths[found.heldout_documents].min() - 1
  assert found.store.lengths[found.heldout_documents[0]] - 1 > held.num_tokens  # not merely the first


def test_bytes_come_from_decoding_where_the_store_does_not_say(two, monkeypatch):
  monkeypatch.setattr(two[0].store, "doc_bytes", lambda: None)
  monkeypatch.setattr(two[0].store, "num_bytes", None)
  reader = loader(two)
  held = reader.heldout_rows("zh", max_tokens=10**6, max_bytes=0)
  assert held.num_bytes == 2 * (held.num_tokens + held.num_documents)
  assert [entry["bytes"] is None for entry in reader.ledger(20)] == [True, False]
  with pytest.raises(ConfigError, match=r"data\.sources\.zh\.store=.*set data\.tokenizer"):
    loader(two, tokenizer=None).heldout_rows("zh", max_tokens=100, max_bytes=0)
  with pytest.raises(ConfigError, match=r"data\.sources\.zh\.store=.*set eval\.bytes=0, and eval\.tokens"):
    reader.heldout_rows("zh", max_tokens=100, max_bytes=100)


def test_description_for_people(two):
  reader = loader(two, num_steps=200)
  zh, en = summary.describe(reader)
  assert (zh.source, zh.role, en.source, en.role) == ("zh", "domain", "en", "replay")
  assert zh.rows + en.rows == 800
  assert zh.share_start + en.share_start == pytest.approx(1) and zh.share_end == pytest.approx(0.9 / 1.4)
  assert zh.train_documents + zh.heldout_documents == 60
  assert zh.train_tokens + zh.heldout_tokens == zh.store_tokens - 60
  assert zh.epochs == zh.rows / zh.train_rows and 0.9 < zh.efficiency <= 1
  assert "2305.16264" in zh.notes[0] and "2406.01375" in zh.notes[0]
  assert re.fullmatch(r"step \d+: it is repeated", zh.end)
  step = int(re.findall(r"\d+", zh.end)[0])  # after so many steps it was read once
  assert reader.order.rows(step - 1)["zh"] < zh.train_rows <= reader.order.rows(step)["zh"]
  short = summary.describe(loader(two, num_steps=5))[0]
  assert short.notes == () and short.end == ""


def test_state_goes_on_and_is_refused_for_other_rows(two):
  reader = loader(two)
  state = json.loads(json.dumps(reader.state(7)))
  assert state["next_row"] == 28 and state["fingerprint"] == reader.fingerprint and len(state["periods"]) == 1
  assert loader(two, begin=pipeline.Begin(7, state)).fingerprint == reader.fingerprint == loader(two, num_steps=50).fingerprint
  options = {"seed": 1, "batch_rows": 2, "row_len": 8, "packing": "concat", "cross_documents": True}
  options["split_positions"] = "continue"
  for name, value in options.items():
    assert loader(two, **{name: value}).fingerprint != reader.fingerprint
    with pytest.raises(ConfigError, match=rf"{name} was .*, now it is {value!r}"):
      loader(two, **{name: value}, begin=pipeline.Begin(7, state))
  for field, value in {"heldout_frac": 0.1, "min_tokens": 9, "max_tokens": 30, "length_shares": ((0, 0.5), (20, 0.5))}.items():
    other = [sources.dataclasses.replace(two[0], **{field: value}), two[1]]
    assert loader(other).fingerprint != reader.fingerprint
    with pytest.raises(ConfigError, match=rf"data\.sources\.zh: {field}.* was"):
      loader(other, begin=pipeline.Begin(7, state))
  with pytest.raises(
    ConfigError, match=r"rows are of format \[2, 2\], this version's of \[3, 2\]: finish the run with the version"
  ):
    loader(two, begin=pipeline.Begin(7, {**state, "formats": [2, 2]}))


def test_from_config(two, monkeypatch):
  config = config_lib.default()
  config.train.length, config.train.batch_rows, config.train.microbatches, config.data.row_len = "12 steps", 8, 2, 16
  reader = pipeline.from_config(config, two)
  assert (reader.num_steps, reader.batch_rows, reader.row_len, reader.eval_batch_rows) == (12, 8, 16, 4)
  assert reader.names == ("zh", "en") and len(list(reader.batches(10))) == 2
  config.train.length = "4000 steps"
  with pytest.raises(ConfigError, match=r"zh\.max_epochs=2: "):
    pipeline.from_config(config, [sources.dataclasses.replace(two[0], max_epochs=2.0), two[1]])


def test_a_loader_that_is_dropped_leaves_no_thread(two):
  before = threading.active_count()
  rows = loader(two, num_steps=10_000).batches(0)
  next(rows)
  assert threading.active_count() > before
  rows.close()
  for _ in range(200):  # grain tells its threads to end, and does not wait for them
    if threading.active_count() == before:
      return
    time.sleep(0.02)
  raise AssertionError(f"{threading.enumerate()} are still there")


def test_data_never_touches_jax(root):
  """grain imports jax for itself; our modules do not, and no device is started."""
  for module in (heldout, layout_files, mixture, packing, pipeline, shuffle, sources, summary, tally):
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name.split(".")[0] in ("jax", "flax")]
  code = """
import sys
import cpt_jax.stream.mixture, cpt_jax.stream.packing, cpt_jax.stream.shuffle, cpt_jax.stream.sources
assert "jax" not in sys.modules
import cpt_jax.stream.pipeline
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
  subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_an_id_past_the_vocabulary_is_refused_even_if_the_store_was_changed_later(tmp_path):
  reader = loader([source(write(tmp_path / "s", [20] * 30))], vocab_size=100 * UNIQUE)
  assert reader.row(0).tokens_BT.max() < 100 * UNIQUE
  tokens = np.memmap(tmp_path / "s" / "00000.ds", "<u4", mode="r+")
  tokens[:] = 100 * UNIQUE  # as many bytes as before
  tokens.flush()
  with pytest.raises(ConfigError, match=r"s: holds token id 10000, the model's vocabulary has 10000 rows.*--verify"):
    next(reader.batches(0))


def masked_store(path, lengths):
  """Every token but the first three of each document counts."""
  with StoreWriter(path, vocab_size=1 << 20, eos_id=0) as writer:
    for i, n in enumerate(lengths):
      mask = np.arange(n) >= 3
      writer.add(list(range(UNIQUE * i, UNIQUE * i + n)), text=f"masked {i}", loss_mask=mask)
  return open_store(path)


@pytest.mark.parametrize("policy", ["concat", "best_fit", "pad"])
@pytest.mark.parametrize("crossing", [False, True])
def test_the_loss_mask_of_a_store_reaches_batches_ledger_and_evaluation(tmp_path, policy, crossing):
  lengths = np.random.default_rng(3).integers(4, 60, 50)
  reader = loader([source(masked_store(tmp_path / "s", lengths))], packing=policy, cross_documents=crossing, num_steps=40)
  counted = 0
  for batch in reader.batches(0):
    weight = batch.weights_BT > 0
    assert (batch.targets_BT[weight] % UNIQUE >= 3).all()
    inside = (batch.segments_BT > 0) & (batch.targets_BT == batch.tokens_BT + 1)  # not the joints between documents
    np.testing.assert_array_equal(weight[inside], batch.targets_BT[inside] % UNIQUE >= 3)
    counted += int(weight.sum())
  assert reader.ledger(40)[0]["tokens"] == counted > 0
  held = reader.heldout_rows("a", max_tokens=10**6, max_bytes=0)
  assert held.num_tokens == sum(int((b.weights_BT > 0).sum()) for b in held.batches)
  assert held.num_tokens == int((lengths[reader.sources[0].heldout_documents] - 3).sum())
  assert held.num_target_bytes == held.num_bytes  # no first token counts, so no store counts its bytes
