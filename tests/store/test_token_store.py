"""The token store: what is written is what is read, and nothing damaged opens."""

import os
import struct

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from store_writer import StoreWriter

from cpt_jax.config import ConfigError
from cpt_jax.store import documents, token_files, token_store, tokenization
from cpt_jax.store.records import Document, Part, Rules

DOCUMENTS = [([5, 7, 0], "Hi"), ([1, 0], "x"), ([9, 8, 7, 0], "\u65e5\u672c"), ([0], "")]


def write(path, docs=DOCUMENTS, vocab_size=300, **kwargs):
  with StoreWriter(path, vocab_size=vocab_size, eos_id=0, **kwargs) as writer:
    for ids, text in docs:
      writer.add(ids, text=text)
  return path


def write_as_datatrove(path, docs, *, width=2, metadata=True, files=1):
  """The three files, byte by byte as its source packs them."""
  path.mkdir()
  for number in range(files):
    name, ends = path / f"{number:05d}_unshuffled.ds", []
    with open(name, "wb") as f:
      for ids in docs[number::files]:
        f.write(struct.pack(f"<{len(ids)}{'HI'[width == 4]}", *ids))
        ends.append((ends[-1] if ends else 0) + len(ids))
    name.with_name(f"{name.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
      name.with_name(f"{name.name}.metadata").write_text(f"gpt2|{width}\n{ends[-1] if ends else 0}\n1 T")
  return path


@hypothesis.given(
  docs=st.lists(st.tuples(st.lists(st.integers(0, 70_000), min_size=1, max_size=9), st.text(max_size=9)), max_size=12),
  max_file_tokens=st.integers(1, 40),
  small=st.booleans(),
)
def test_round_trip(tmp_path_factory, docs, max_file_tokens, small):
  docs = [([i % 300 for i in ids] if small else ids, text) for ids, text in docs]
  path = tmp_path_factory.mktemp("s") / "store"
  write(path, docs, vocab_size=300 if small else 70_001, max_file_tokens=max_file_tokens)
  opened = token_store.open_store(path)
  assert opened.dtype == (np.uint16 if small else np.uint32)
  assert [opened.document(i).tolist() for i in range(opened.num_documents)] == [ids for ids, _ in docs]
  assert opened.lengths.tolist() == [len(ids) for ids, _ in docs]
  assert opened.doc_bytes().tolist() == [len(text.encode()) for _, text in docs]
  assert opened.doc_hashes().tolist() == [token_files.text_hash(text) for _, text in docs]
  assert opened.num_tokens == sum(len(ids) for ids, _ in docs)
  assert opened.num_bytes == sum(len(text.encode()) for _, text in docs)
  assert opened.max_token_id == opened.read_max_token_id() == max((max(ids) for ids, _ in docs), default=-1)
  assert opened.verify() == []


def test_tokens_are_slices_of_one_document(tmp_path):
  opened = token_store.open_store(write(tmp_path / "s", max_file_tokens=4))
  assert opened.tokens(2, 1, 2).tolist() == [8, 7]
  for i, start, length in (2, 3, 2), (2, -1, 1), (4, 0, 1), (-1, 0, 1), (0, 0, -1):
    with pytest.raises(IndexError):
      opened.tokens(i, start, length)


def test_more_token_files_than_file_descriptors(tmp_path, monkeypatch):
  monkeypatch.setattr(token_store, "_MAX_MAPS", 3)
  opened = token_store.open_store(write(tmp_path / "s", [([i, 0], str(i)) for i in range(20)], max_file_tokens=1))
  assert [opened.document(i).tolist() for i in (0, 5, 19, 7, 0)] == [[i, 0] for i in (0, 5, 19, 7, 0)]
  assert len(opened._maps) <= 4


def test_ids_that_do_not_fit_are_refused(tmp_path):
  for ids in [65536], [-1], []:
    writer = token_files.TokenFileWriter(tmp_path / "00000.ds", dtype=np.dtype("<u2"), tokenizer_name="t")
    with pytest.raises(ValueError):
      writer.add(ids, num_bytes=1, text_hash=1)
    writer.abandon()
  assert list(tmp_path.iterdir()) == []


def test_metadata_is_written_as_datatrove_does(tmp_path):
  write(tmp_path / "s", [([1] * 1234, "a")], tokenizer_name="a|b")
  assert (tmp_path / "s" / "00000.ds.metadata").read_text() == "a_b|2\n1234\n1.23 kT"
  assert [token_files._metric(n) for n in (0, 12, 999, 999_999, 12_345)] == ["0.00 ", "12.0 ", "999 ", "1.00 M", "12.3 k"]


def test_fingerprint_is_of_the_content(tmp_path):
  first = token_store.open_store(write(tmp_path / "a", tokenizer_name="x")).fingerprint
  changed = [*DOCUMENTS[:-1], ([1], "")]
  assert token_store.open_store(write(tmp_path / "b", tokenizer_name="x")).fingerprint == first
  assert token_store.open_store(write(tmp_path / "c", changed, tokenizer_name="x")).fingerprint != first


def test_unfinished_store_does_not_open(tmp_path):
  with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s", vocab_size=300, eos_id=0, max_file_tokens=1) as writer:
    writer.add([1, 0], text="a")
    writer.add([1, 0], text="a")
    raise RuntimeError
  with pytest.raises(ConfigError, match="not finished"):
    token_store.open_store(tmp_path / "s")


def test_finished_store_is_not_written_over(tmp_path):
  write(tmp_path / "s")
  with pytest.raises(ConfigError, match="finished store already"):
    write(tmp_path / "s")


def test_no_store(tmp_path):
  with pytest.raises(ConfigError, match="no such token store"):
    token_store.open_store(tmp_path / "s")
  with pytest.raises(ConfigError, match="no token file"):
    token_store.open_store(tmp_path)


@pytest.mark.parametrize("suffix", [".ds", ".ds.index", ".ds.bytes", ".ds.hash"])
@pytest.mark.parametrize("keep", [0, 1, 8, -1, -2, -8])
def test_cut_files_are_refused_by_name(tmp_path, suffix, keep):
  file = write(tmp_path / "s") / f"00000{suffix}"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ConfigError, match="00000"):
    token_store.open_store(tmp_path / "s")


@pytest.mark.parametrize("suffix", [".ds", ".ds.index", ".ds.bytes", ".ds.hash"])
def test_missing_and_longer_files_are_refused_by_name(tmp_path, suffix):
  file = write(tmp_path / "s") / f"00000{suffix}"
  file.write_bytes(file.read_bytes() + bytes(8))
  with pytest.raises(ConfigError, match="00000"):
    token_store.open_store(tmp_path / "s")
  file.unlink()
  with pytest.raises(ConfigError, match="missing"):
    token_store.open_store(tmp_path / "s")


def test_files_of_another_store_are_refused(tmp_path):
  write(tmp_path / "a")
  write(tmp_path / "b", DOCUMENTS[:2])
  for name in token_files.part_names("00000.ds", has_loss_mask=False):
    os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
  with pytest.raises(ConfigError, match=r"store\.json says"):
    token_store.open_store(tmp_path / "a")
  write(tmp_path / "c")
  (tmp_path / "c" / "00001.ds").write_bytes(b"")
  with pytest.raises(ConfigError, match="not listed"):
    token_store.open_store(tmp_path / "c")


def test_every_flipped_bit_is_found(tmp_path):
  path = write(tmp_path / "s", max_file_tokens=3)
  fingerprint = token_store.open_store(path).fingerprint
  for file in sorted(path.iterdir()):
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), max(8 * len(good) // 40, 1)):
      bad = bytearray(good)
      bad[bit // 8] ^= 1 << bit % 8
      file.write_bytes(bad)
      try:
        opened = token_store.open_store(path)
        found = opened.verify() or opened.fingerprint != fingerprint
      except ConfigError:
        found = True
      assert found, (file, bit)
    file.write_bytes(good)


def test_index_that_falls(tmp_path):
  path = write_as_datatrove(tmp_path / "d", [[1, 2], [3, 4]])
  (path / "00000_unshuffled.ds.index").write_bytes(struct.pack("<3Q", 3, 2, 4))
  with pytest.raises(ConfigError, match="document ends fall"):
    _ = token_store.open_store(path).lengths


@pytest.mark.parametrize("manifest", [b"{", b"[]", b'{"format": 2}', b"\xff"])
def test_broken_manifest(tmp_path, manifest):
  (write(tmp_path / "s") / "store.json").write_bytes(manifest)
  with pytest.raises(ConfigError, match=r"store\.json"):
    token_store.open_store(tmp_path / "s")


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("metadata", [True, False])
def test_store_of_datatrove_opens(tmp_path, width, metadata):
  docs = [[1, 2, 0], [7, 0], [300, 65535, 0]]
  opened = token_store.open_store(write_as_datatrove(tmp_path / "d", docs, width=width, metadata=metadata, files=2))
  assert [opened.document(i).tolist() for i in range(3)] == [docs[0], docs[2], docs[1]]
  assert (opened.num_bytes, opened.doc_bytes(), opened.tokenizer_fingerprint, opened.max_token_id) == (None,) * 4
  assert opened.read_max_token_id() == 65535
  assert len(set(opened.doc_hashes().tolist())) == 3
  assert opened.dtype.itemsize == width


def test_hashes_of_token_ids_do_not_depend_on_their_width(tmp_path):
  docs = [[1, 2, 0], [7, 0]]
  narrow, wide = (token_store.open_store(write_as_datatrove(tmp_path / str(w), docs, width=w)) for w in (2, 4))
  np.testing.assert_array_equal(narrow.doc_hashes(), wide.doc_hashes())


def test_stores_of_datatrove_that_do_not_fit_are_refused(tmp_path):
  path = write_as_datatrove(tmp_path / "d", [[1, 2, 0]])
  (path / "00000_unshuffled.ds.metadata").write_text("gpt2|3\n")
  with pytest.raises(ConfigError, match="expected 'tokenizer"):
    token_store.open_store(path)


# Loss masks.


MASKED = [([5, 7, 0], [0, 1, 1]), ([1, 0], [0, 0]), ([9, 8, 7, 0], [1, 0, 1, 0]), ([0], [1])]


def write_masked(path, docs=MASKED, **kwargs):
  with StoreWriter(path, vocab_size=300, eos_id=0, **kwargs) as writer:
    for ids, mask in docs:
      writer.add(ids, text="ab", loss_mask=np.asarray(mask, bool))
  return path


@hypothesis.given(
  docs=st.lists(st.lists(st.tuples(st.integers(0, 299), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=12),
  max_file_tokens=st.integers(1, 40),
  data=st.data(),
)
def test_masks_round_trip(tmp_path_factory, docs, max_file_tokens, data):
  path = tmp_path_factory.mktemp("s") / "store"
  docs = [tuple(zip(*pairs, strict=True)) for pairs in docs]
  opened = token_store.open_store(write_masked(path, docs, max_file_tokens=max_file_tokens))
  assert opened.has_loss_mask and opened.verify() == []
  i = data.draw(st.integers(0, len(docs) - 1))
  start = data.draw(st.integers(0, len(docs[i][0])))
  length = data.draw(st.integers(0, len(docs[i][0]) - start))
  found = opened.loss_mask(i, start, length)
  assert found.dtype == bool and found.tolist() == list(docs[i][1])[start : start + length]
  assert opened.tokens(i, start, length).tolist() == list(docs[i][0])[start : start + length]
  assert opened.manifest["num_targets"] == sum(sum(mask) for _, mask in docs)
  for wrong in (i, start, len(docs[i][0]) - start + 1), (len(docs), 0, 0), (i, -1, 1):
    with pytest.raises(IndexError):
      opened.loss_mask(*wrong)


def test_a_store_without_masks_counts_everything(tmp_path):
  opened = token_store.open_store(write(tmp_path / "s"))
  assert not opened.has_loss_mask and opened.loss_mask(2, 1, 3).tolist() == [True] * 3
  assert opened.manifest["num_targets"] == opened.num_tokens
  assert not list((tmp_path / "s").glob("*.loss"))
  with pytest.raises(IndexError):
    opened.loss_mask(2, 1, 4)


def test_mask_enters_the_fingerprint(tmp_path):
  changed = [*MASKED[:-1], ([0], [0])]
  found = {
    token_store.open_store(write_masked(tmp_path / name, docs)).fingerprint for name, docs in (("a", MASKED), ("b", changed))
  }
  found |= {token_store.open_store(write(tmp_path / "c", [(ids, "ab") for ids, _ in MASKED])).fingerprint}
  assert len(found) == 3


def test_masks_that_do_not_fit_are_refused(tmp_path):
  for mask in [1, 1], [[1, 1, 1]], []:
    with pytest.raises(ValueError, match="a loss mask of shape"):
      write_masked(tmp_path / str(mask), [([1, 2, 0], mask)])
  for first, second in (None, [True]), ([True], None):
    for max_file_tokens in 1, 100:
      path = tmp_path / f"{first}{max_file_tokens}"
      with (
        pytest.raises(ValueError, match="a store has one kind"),
        StoreWriter(path, vocab_size=300, eos_id=0, max_file_tokens=max_file_tokens) as writer,
      ):
        writer.add([0], text="a", loss_mask=first)
        writer.add([0], text="a", loss_mask=second)


def test_missing_stray_and_changed_masks(tmp_path):
  (write_masked(tmp_path / "a", max_file_tokens=4) / "00001.ds.loss").unlink()
  with pytest.raises(ConfigError, match=r"00001\.ds\.loss: missing"):
    token_store.open_store(tmp_path / "a")
  (write(tmp_path / "b") / "00000.ds.loss").write_bytes(b"\1" * 10)
  with pytest.raises(ConfigError, match=r"00000\.ds\.loss: not listed"):
    token_store.open_store(tmp_path / "b")
  file = write_masked(tmp_path / "c") / "00000.ds.loss"
  file.write_bytes(bytes([1 - file.read_bytes()[0]]) + file.read_bytes()[1:])
  (line,) = token_store.open_store(tmp_path / "c").verify()
  assert "00000.ds.loss: digest" in line


def test_store_of_datatrove_with_masks_opens(tmp_path):
  docs = [ids for ids, _ in MASKED]
  path = write_as_datatrove(tmp_path / "d", docs, files=2)
  plain = token_store.open_store(path).fingerprint
  (path / "00000_unshuffled.ds.loss").write_bytes(bytes([0, 1, 1, 1, 0, 1, 0]))
  with pytest.raises(ConfigError, match=r"00001_unshuffled\.ds\.loss: missing"):
    token_store.open_store(path)
  (path / "00001_unshuffled.ds.loss").write_bytes(bytes([0, 0, 1]))
  opened = token_store.open_store(path)
  assert opened.has_loss_mask and opened.fingerprint != plain
  assert [opened.loss_mask(i, 0, len(opened.document(i))).tolist() for i in range(4)] == [
    [False, True, True],
    [True, False, True, False],
    [False, False],
    [True],
  ]
  (path / "00001_unshuffled.ds.loss").write_bytes(bytes([0, 0]))
  with pytest.raises(ConfigError, match=r"00001_unshuffled\.ds\.loss: 2 bytes, expected 3"):
    token_store.open_store(path)


@pytest.mark.parity
def test_datatrove_writes_the_same_masks(tmp_path, fixtures):
  data = pytest.importorskip("datatrove.data")
  tokens = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
  file = str(fixtures / "tokenizer" / "tokenizer.json")
  step = tokens.DocumentTokenizer(
    str(tmp_path / "theirs"), file, eos_token="</s>", shuffle_documents=False, save_loss_metadata=True
  )
  texts = ["Emma Woodhouse, handsome, clever", "and rich"]
  ranges = [[(0, 5)], [(4, 6)]]
  step.run(iter([data.Document(text=t, id=t, metadata={"no_loss_ranges": r}) for t, r in zip(texts, ranges, strict=True)]))
  theirs = token_store.open_store(tmp_path / "theirs")
  assert theirs.has_loss_mask
  masks = [theirs.loss_mask(i, 0, len(theirs.document(i))) for i in range(2)]
  assert all(0 < mask.sum() < mask.size for mask in masks)
  with StoreWriter(tmp_path / "ours", vocab_size=300, eos_id=2) as writer:
    for i in range(2):
      writer.add(theirs.document(i), text=texts[i], loss_mask=masks[i])
  for part in "", ".index", ".loss":
    assert (tmp_path / "ours" / f"00000.ds{part}").read_bytes() == (
      tmp_path / "theirs" / f"00000_unshuffled.ds{part}"
    ).read_bytes()


@pytest.mark.parity
def test_datatrove_writes_and_reads_the_same_files(tmp_path, fixtures):
  data = pytest.importorskip("datatrove.data")
  tokens = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
  dataset = pytest.importorskip("datatrove.utils.dataset")
  file = str(fixtures / "tokenizer" / "tokenizer.json")
  loaded = tokenization.load(file)
  records = [d for d in documents.open_part(Part(str(fixtures / "corpus.jsonl")), Rules()) if isinstance(d, Document)]
  ids = loaded.encode_documents([d.text for d in records]).ids
  step = tokens.DocumentTokenizer(str(tmp_path / "theirs"), file, eos_token="</s>", shuffle_documents=False)
  step.run(iter([data.Document(text=d.text, id=str(i)) for i, d in enumerate(records)]))
  theirs = token_store.open_store(tmp_path / "theirs")
  assert theirs.num_documents == 200
  for i in range(200):  # with eos_token datatrove leaves out what the tokenizer adds itself, here BOS
    assert theirs.document(i).tolist() == ids[i][1:]
  ours = tmp_path / "ours"
  write(ours, [(i[1:], d.text) for i, d in zip(ids, records, strict=True)], tokenizer_name=file)
  for part in "", ".index", ".metadata":
    assert (ours / f"00000.ds{part}").read_bytes() == (tmp_path / "theirs" / f"00000_unshuffled.ds{part}").read_bytes(), part
  reader = dataset.DatatroveFolderDataset(str(ours), seq_len=63, filename_pattern="*.ds", token_size=2)
  flat = np.concatenate([i[1:] for i in ids])
  assert len(reader) == len(flat) // 64
  for i in range(len(reader)):
    np.testing.assert_array_equal(reader[i]["input_ids"].numpy(), flat[64 * i : 64 * (i + 1)])
