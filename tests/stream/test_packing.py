"""Packing: every pair once, nothing cut that fits, rows as a plain reference makes them, layouts on disk that cannot go wrong."""

import collections
import dataclasses
import json
import threading
import warnings

import factory
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cpt_jax.stream import layout_files, packing, policies

lengths_of_documents = st.lists(st.integers(0, 40) | st.integers(0, 2), max_size=40).map(lambda x: np.array(x, np.int64))
policy_names = st.sampled_from(["concat", "best_fit", "pad"])


class Documents:
  """Document i is i*1000 + 0, 1, 2, ..: every token tells where it comes from."""

  def __init__(self, lengths, masks=None):
    self.all = [np.arange(n, dtype=np.uint32) + 1000 * i for i, n in enumerate(lengths)]
    self.masks, self.has_loss_mask = masks, masks is not None

  def tokens(self, i, start, length):
    assert start >= 0 and start + length <= len(self.all[i])
    return self.all[i][start : start + length]

  def loss_mask(self, i, start, length):
    assert self.masks is not None and start >= 0 and start + length <= len(self.all[i])
    return self.masks[i][start : start + length]

  def counts(self, i, t):
    return self.masks is None or bool(self.masks[i][t])


def reference_row(documents: Documents, pieces, row_len: int, crossing: bool, continues: bool) -> list[tuple]:
  """(token, target, weight, segment, position) one by one."""
  out = []
  for number, (doc, start, length) in enumerate(pieces, 1):
    if crossing and out:
      weight = float(start == 0 and documents.counts(doc, 0))
      out.append((out[-1][1], int(documents.all[doc][start]), weight, 1, len(out)))
    for i in range(length):
      pair = int(documents.all[doc][start + i]), int(documents.all[doc][start + i + 1])
      place = len(out) if crossing else start + i if continues else i
      out.append((*pair, float(documents.counts(doc, start + i + 1)), 1 if crossing else number, place))
  assert len(out) <= row_len, f"{pieces} overflow a row of {row_len}"
  return out + [(0, 0, 0.0, 0, 0)] * (row_len - len(out))


def all_pieces(layout: packing.Layout) -> list[tuple[int, int, int]]:
  return [piece for r in range(layout.num_rows) for piece in layout.pieces(r)]


@settings(max_examples=150)
@given(
  lengths_of_documents, st.integers(2, 40), policy_names, st.booleans(), st.booleans(), st.none() | st.integers(0, 9), st.data()
)
def test_every_pair_is_in_exactly_one_row(lengths, row_len, policy, crossing, continues, mask_seed, data):
  rng = np.random.default_rng(mask_seed)
  documents = Documents(lengths, None if mask_seed is None else [rng.random(n) < 0.5 for n in lengths])
  wanted_documents = data.draw(st.none() | st.lists(st.integers(0, max(len(lengths) - 1, 0)), max_size=2 * len(lengths)))
  layout = factory.rows(
    lengths,
    row_len=row_len,
    policy=policy,
    cross_documents=crossing,
    documents=None if wanted_documents is None else np.array(wanted_documents, np.int64),
    count_targets=packing.target_counter(documents),
  )
  named = range(len(lengths)) if wanted_documents is None else wanted_documents
  wanted = sorted((1000 * i + j, 1000 * i + j + 1) for i in named for j in range(lengths[i] - 1))
  batch, seen = packing.empty_batch(layout.num_rows, row_len), []
  for r in range(layout.num_rows)[::-1]:
    pieces = layout.pieces(r)
    assert pieces and all(length > 0 for _, _, length in pieces)
    positions = "continue" if continues else "restart"
    packing.pack_row(batch, r, documents, pieces, source=r + 3, cross_documents=crossing, split_positions=positions)
  assert [a.dtype.name for a in batch] == ["int32", "int32", "float32", "int32", "int32", "int32"]
  np.testing.assert_array_equal(batch.source_B, np.arange(layout.num_rows) + 3)
  for r in range(layout.num_rows):  # a row wrote into no other
    expected = reference_row(documents, layout.pieces(r), row_len, crossing, continues)
    for array, values in zip(batch[:5], zip(*expected, strict=True), strict=True):
      np.testing.assert_array_equal(array[r], values)
    seen += [(t, u) for t, u, _, segment, _ in expected if segment and t // 1000 == u // 1000 and u == t + 1]
    # Not padding: all but what no weight could be given to, the joints before the rest of a document.
    begins = sum(start == 0 for _, start, _ in layout.pieces(r))
    joints = sum(start == 0 for _, start, _ in layout.pieces(r)[1:]) if crossing else 0
    assert layout.row_tokens[r] == sum(length for _, _, length in layout.pieces(r)) + joints
    assert layout.row_docs[r] == begins
  assert sorted(seen) == wanted
  np.testing.assert_array_equal(layout.row_targets, (batch.weights_BT > 0).sum(1))
  assert (layout.num_tokens, layout.num_targets) == (layout.row_tokens.sum(), layout.row_targets.sum())
  assert mask_seed is not None or layout.num_targets == layout.num_tokens
  assert layout.efficiency == layout.num_tokens / max(layout.num_rows * row_len, 1)
  assert layout.num_documents == layout.row_docs.sum() == sum(lengths[i] > 1 for i in named)
  assert layout.num_pieces == len(all_pieces(layout))
  times = collections.Counter(doc for doc, _, _ in all_pieces(layout))
  assert wanted_documents is not None or layout.num_split == sum(n > 1 for n in times.values())
  assert layout.max_documents == max(1, batch.segments_BT.max(initial=0))


@settings(max_examples=300)
@given(st.lists(st.integers(0, 90), max_size=60).map(lambda x: np.array(x, np.int64)), st.integers(2, 70), st.booleans())
def test_best_fit_cuts_only_what_is_longer_than_a_row_and_only_to_save_rows(lengths, row_len, crossing):
  layout = factory.rows(lengths, row_len=row_len, policy="best_fit", cross_documents=crossing)
  pieces = all_pieces(layout)
  assert all((start, length) == (0, lengths[doc] - 1) for doc, start, length in pieces if lengths[doc] - 1 <= row_len)
  for r in range(layout.num_rows):
    assert sum(length + crossing for _, _, length in layout.pieces(r)) <= row_len + crossing
  fewest_pieces = [min(row_len, n - 1 - s) for n in lengths for s in range(0, n - 1, row_len)]
  sizes = np.array(fewest_pieces, np.int64) + crossing
  rows_uncut = policies._fit(sizes, row_len + crossing).max(initial=-1) + 1
  assert layout.num_rows <= rows_uncut
  if layout.num_rows == rows_uncut:
    assert sorted(length for _, _, length in pieces) == sorted(fewest_pieces)


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize(
  ("row_len", "least_filled", "draw"),
  [
    (256, 0.99, lambda rng: np.full(2000, 366)),  # ends of 109 pairs: two to a row, and room for less than a half
    (2048, 0.99, lambda rng: rng.integers(3300, 3700, 1500)),  # ends that never pair
    (2048, 0.99, lambda rng: np.concatenate([rng.integers(1100, 1500, 900), rng.integers(2500, 9000, 300)])),
    (32768, 0.999, lambda rng: np.concatenate([rng.integers(900, 8000, 9000), rng.integers(40_000, 900_000, 60)])),
  ],
)
def test_ends_of_long_documents_fill_the_rows(row_len, least_filled, draw, crossing):
  lengths = draw(np.random.default_rng(0))
  layout = factory.rows(lengths, row_len=row_len, policy="best_fit", cross_documents=crossing)
  assert layout.efficiency > least_filled
  rooms = row_len - layout.row_tokens
  least = min(row_len // 32, 128)
  crumbs = [
    (doc, start, n)
    for doc, start, n in all_pieces(layout)
    if n < least and lengths[doc] - 1 > row_len and (lengths[doc] - 1) % row_len != n
  ]
  assert len(crumbs) <= 0.002 * layout.num_pieces
  uncounted = np.diff(layout.row_ends, prepend=0) if crossing else 0  # joints before the rest of a document
  assert (np.sort(rooms - uncounted)[:-1] < least).all()  # one more piece would have been a crumb


def test_rows_of_long_documents_are_cut_where_their_ends_are_too_few():
  lengths = np.array([61] * 10 + [1001])  # ten rows with room for 40 of 100 pairs, one document of ten full rows
  layout = factory.rows(lengths, row_len=100, policy="best_fit")
  assert layout.num_rows == 16 and layout.efficiency == 1.0 and layout.num_split == 1
  assert [length for doc, _, length in all_pieces(layout) if doc == 10].count(100) == 6


def test_copies_of_a_document_do_not_stay_together():
  layout = factory.rows(np.full(300, 9), row_len=32, policy="concat", documents=np.repeat(np.arange(300), 3))
  rows = [{doc for doc, _, _ in layout.pieces(r)} for r in range(layout.num_rows)]
  assert layout.num_documents == 900 and sum(len(row) for row in rows) > 0.97 * layout.num_pieces
  once = factory.rows(np.full(300, 9), row_len=32, policy="concat")
  assert [doc for doc, _, _ in all_pieces(once)] == [
    doc for doc, _, _ in all_pieces(factory.rows(np.full(300, 9), row_len=32, policy="concat", documents=np.arange(300)))
  ]


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_best_fit_is_best_fit_decreasing(sizes, capacity):
  rooms: list[int] = []
  for size in sorted(sizes, reverse=True):  # the plain algorithm: the bin with the least room that suffices
    best = min((room for room in rooms if room >= size), default=None)
    if best is not None:
      rooms.remove(best)
    rooms.append((capacity if best is None else best) - size)
  found = policies._fit(np.array(sizes, np.int64), capacity)
  # Which of several bins of equal room is taken is free, so bins are compared by what is left in them.
  assert sorted(capacity - np.bincount(found, sizes)) == sorted(rooms)


def test_concat_fills_every_row_but_the_last():
  lengths = np.random.default_rng(0).integers(2, 300, 200)
  layout = factory.rows(lengths, row_len=64, policy="concat")
  assert (layout.row_tokens[:-1] == 64).all() and layout.num_rows == -(-(lengths - 1).sum() // 64)


def test_documents_of_a_row_are_not_neighbours_in_the_store():
  layout = factory.rows(np.full(1000, 9), row_len=32, policy="best_fit")
  docs = np.array([[doc for doc, _, _ in layout.pieces(r)] for r in range(layout.num_rows)])
  assert docs.shape == (250, 4)
  assert (np.abs(np.diff(docs, axis=1)) < 10).mean() < 0.1


def test_only_the_named_documents_in_their_order():
  layout = factory.rows(np.array([5, 5, 1, 5]), row_len=4, policy="pad", documents=np.array([3, 2, 0]), shuffle=False)
  assert [layout.pieces(r) for r in range(layout.num_rows)] == [[(3, 0, 4)], [(0, 0, 4)]]


def golden_layout():
  return factory.rows(np.array([9, 2, 4, 30, 5, 1, 3]), row_len=8, policy="best_fit")


def test_golden_layout():
  """The order of rows of every run hangs on this: if it changes, packing.FORMAT must change too."""
  layout = golden_layout()
  assert [layout.pieces(r) for r in range(layout.num_rows)] == [
    [(3, 0, 8)],
    [(3, 8, 8)],
    [(3, 16, 8)],
    [(0, 0, 8)],
    [(3, 24, 5), (2, 0, 3)],
    [(4, 0, 4), (1, 0, 1), (6, 0, 2)],
  ]
  layout = factory.rows(np.array([14, 14, 14, 6]), row_len=8, policy="best_fit")  # ends of 5, and a document of 5
  assert [layout.pieces(r) for r in range(layout.num_rows)] == [
    [(1, 0, 8)],
    [(2, 0, 8)],
    [(0, 0, 8)],
    [(3, 0, 5), (1, 8, 3)],
    [(1, 11, 2), (2, 8, 5), (0, 8, 1)],
    [(0, 9, 4)],
  ]


def same(a: packing.Layout, b: packing.Layout) -> bool:
  names = [field.name for field in dataclasses.fields(packing.Layout)]
  return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def test_a_layout_is_made_once_and_mapped_after(tmp_path):
  made = []

  def make():
    made.append(1)
    return golden_layout()

  first = layout_files.load_or_make(tmp_path, key={"store": "a", "row_len": 8}, make=make)
  again = layout_files.load_or_make(tmp_path, key={"row_len": 8, "store": "a"}, make=make)
  assert len(made) == 1 and same(first, golden_layout()) and same(again, golden_layout())
  layout_files.load_or_make(tmp_path, key={"store": "b", "row_len": 8}, make=make)
  assert len(made) == 2
  assert sorted(p.name[0] == "." for p in (tmp_path / "layouts").iterdir()) == [False, False]  # nothing unfinished is left


def test_an_empty_layout_is_kept_too(tmp_path):
  empty = factory.rows(np.zeros(0, np.int64), row_len=8, policy="concat")
  for _ in range(2):
    assert layout_files.load_or_make(tmp_path, key={}, make=lambda: empty).num_rows == 0


@pytest.mark.parametrize(
  "damage",
  [
    lambda d: (d / "layout.json").unlink(),
    lambda d: (d / "layout.json").write_text(json.dumps({**json.loads((d / "layout.json").read_text()), "key": {"format": 0}})),
    lambda d: (d / "doc.npy").unlink(),
    lambda d: (d / "doc.npy").write_bytes((d / "doc.npy").read_bytes()[:-3]),
    lambda d: (d / "layout.json").write_text((d / "layout.json").read_text().replace("num_split", "num_spilt")),
    lambda d: (d / "row_ends.npy").write_bytes((d / "row_tokens.npy").read_bytes()),
    lambda d: np.save(d / "length.npy", np.load(d / "length.npy")[:-1]),
    lambda d: np.save(d / "row_ends.npy", np.load(d / "row_ends.npy") - 1),
  ],
)
def test_a_damaged_layout_is_made_again(tmp_path, damage):
  layout_files.load_or_make(tmp_path, key={"k": 1}, make=golden_layout)
  (directory,) = (tmp_path / "layouts").iterdir()
  damage(directory)
  with pytest.warns(UserWarning, match=f"{directory.name}.*made again"):
    assert same(layout_files.load_or_make(tmp_path, key={"k": 1}, make=golden_layout), golden_layout())
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert same(layout_files.load_or_make(tmp_path, key={"k": 1}, make=golden_layout), golden_layout())


def test_where_nothing_can_be_written_the_layout_stays_in_memory(tmp_path):
  (tmp_path / "layouts").write_text("a file, so no directory can be made here")
  with pytest.warns(UserWarning, match="cannot write the layout of rows"):
    assert same(layout_files.load_or_make(tmp_path, key={}, make=golden_layout), golden_layout())


def test_many_writers_at_once(tmp_path):
  start, layouts = threading.Barrier(8), []

  def work():
    start.wait()
    layouts.append(layout_files.load_or_make(tmp_path, key={"k": 1}, make=golden_layout))

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(layouts) == 8 and all(same(layout, golden_layout()) for layout in layouts)
  assert len(list((tmp_path / "layouts").iterdir())) == 1
