"""Packing: every pair once, nothing cut that fits, rows as a plain reference makes them, plans on disk that cannot go wrong."""

import json
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_jax.data import packing

lengths_of_documents = st.lists(st.integers(0, 40) | st.integers(0, 2), max_size=40).map(lambda x: np.array(x, np.int64))
policies = st.sampled_from(["concat", "best_fit", "pad"])


class Documents:
  """Document i is i*1000 + 0, 1, 2, ..: every token tells where it comes from."""

  def __init__(self, lengths):
    self.all = [np.arange(n, dtype=np.uint32) + 1000 * i for i, n in enumerate(lengths)]

  def tokens(self, i, start, length):
    assert start >= 0 and start + length <= len(self.all[i])
    return self.all[i][start : start + length]


def reference_row(documents: Documents, pieces, row_len: int, crossing: bool) -> list[tuple[int, int, float, int, int]]:
  """(token, target, weight, segment, position) one by one."""
  out = []
  for number, (doc, start, length) in enumerate(pieces, 1):
    if crossing and out:
      out.append((out[-1][1], int(documents.all[doc][start]), float(start == 0), 1, len(out)))
    for i in range(length):
      pair = int(documents.all[doc][start + i]), int(documents.all[doc][start + i + 1])
      out.append((*pair, 1.0, 1 if crossing else number, len(out) if crossing else i))
  assert len(out) <= row_len, f"{pieces} overflow a row of {row_len}"
  return out + [(0, 0, 0.0, 0, 0)] * (row_len - len(out))


@settings(max_examples=150)
@given(lengths_of_documents, st.integers(2, 24), policies, st.booleans())
def test_every_pair_is_in_exactly_one_row(lengths, row_len, policy, crossing):
  plan = packing.plan(lengths, row_len=row_len, policy=policy, cross_documents=crossing)
  documents = Documents(lengths)
  wanted = {(1000 * i + j, 1000 * i + j + 1) for i, n in enumerate(lengths) for j in range(n - 1)}
  seen, total = [], 0
  for r in range(plan.num_rows):
    pieces = plan.pieces(r)
    assert pieces and all(length > 0 for _, _, length in pieces)
    row = packing.pack_row(documents, pieces, row_len=row_len, source=3, cross_documents=crossing)
    expected = reference_row(documents, pieces, row_len, crossing)
    for array, values in zip(row[:5], zip(*expected, strict=True), strict=True):
      np.testing.assert_array_equal(array[0], values)
    assert [a.dtype.name for a in row] == ["int32", "int32", "float32", "int32", "int32", "int32"]
    np.testing.assert_array_equal(row.source_B, [3])
    assert plan.row_tokens[r] == row.weights_BT.sum()
    total += int(row.weights_BT.sum())
    seen += [(t, u) for t, u, w, _, _ in expected if w and t // 1000 == u // 1000]
  assert len(seen) == len(set(seen)) and set(seen) == wanted
  assert plan.num_tokens == total
  assert plan.efficiency == total / max(plan.num_rows * row_len, 1)


@given(lengths_of_documents, st.integers(2, 24), st.booleans())
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row_len, crossing):
  plan = packing.plan(lengths, row_len=row_len, policy="best_fit", cross_documents=crossing)
  pieces = [piece for r in range(plan.num_rows) for piece in plan.pieces(r)]
  for i, n in enumerate(lengths):
    mine = sorted(start for doc, start, _ in pieces if doc == i)
    assert mine == list(range(0, max(n - 1, 0), row_len))


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_best_fit_is_best_fit_decreasing(sizes, capacity):
  rooms: list[int] = []
  bins: list[list[int]] = []
  for size in sorted(sizes, reverse=True):  # the plain algorithm: the bin with the least room that suffices
    fitting = [(room, b) for b, room in enumerate(rooms) if room >= size]
    if fitting:
      _, b = min(fitting)
    else:
      b = len(rooms)
      rooms.append(capacity)
      bins.append([])
    rooms[b] -= size
    bins[b].append(size)
  found = packing._fit(np.array(sizes, np.int64), capacity)
  packed = [sorted(np.array(sizes)[found == b].tolist()) for b in range(len(bins))]
  assert found.max(initial=-1) + 1 == len(bins)
  assert sorted(packed) == sorted(sorted(b) for b in bins)


def test_concat_fills_every_row_but_the_last():
  lengths = np.random.default_rng(0).integers(2, 300, 200)
  plan = packing.plan(lengths, row_len=64, policy="concat")
  assert (plan.row_tokens[:-1] == 64).all() and plan.num_rows == -(-(lengths - 1).sum() // 64)


def test_documents_of_a_row_are_not_neighbours_in_the_store():
  plan = packing.plan(np.full(1000, 9), row_len=32, policy="best_fit")
  docs = np.array([[doc for doc, _, _ in plan.pieces(r)] for r in range(plan.num_rows)])
  assert docs.shape == (250, 4)
  assert (np.abs(np.diff(docs, axis=1)) < 10).mean() < 0.1


def test_only_the_named_documents_in_their_order():
  plan = packing.plan(np.array([5, 5, 1, 5]), row_len=4, policy="pad", documents=np.array([3, 2, 0]), shuffle=False)
  assert [plan.pieces(r) for r in range(plan.num_rows)] == [[(3, 0, 4)], [(0, 0, 4)]]


def test_rows_written_out():
  class Two:
    def tokens(self, i, start, length):
      return np.array([[3, 5, 2], [7, 2]][i][start : start + length])

  row = packing.pack_row(Two(), [(0, 0, 2), (1, 0, 1)], row_len=4, source=0)
  assert [a[0].tolist() for a in row[:5]] == [[3, 5, 7, 0], [5, 2, 2, 0], [1, 1, 1, 0], [1, 1, 2, 0], [0, 1, 0, 0]]
  row = packing.pack_row(Two(), [(0, 0, 2), (1, 0, 1)], row_len=5, source=0, cross_documents=True)
  assert [a[0].tolist() for a in row[:5]] == [[3, 5, 2, 7, 0], [5, 2, 7, 2, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 1, 2, 3, 0]]


def golden_plan():
  return packing.plan(np.array([9, 2, 4, 30, 5, 1, 3]), row_len=8, policy="best_fit")


def test_golden_plan():
  """The order of rows of every run hangs on this: if it changes, packing.FORMAT must change too."""
  plan = golden_plan()
  assert [plan.pieces(r) for r in range(plan.num_rows)] == [
    [(3, 0, 8)],
    [(3, 8, 8)],
    [(3, 16, 8)],
    [(0, 0, 8)],
    [(3, 24, 5), (2, 0, 3)],
    [(4, 0, 4), (1, 0, 1), (6, 0, 2)],
  ]


def same(a: packing.Plan, b: packing.Plan) -> bool:
  return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in packing._ARRAYS) and a.num_tokens == b.num_tokens


def test_a_plan_is_made_once_and_mapped_after(tmp_path):
  made = []

  def make():
    made.append(1)
    return golden_plan()

  first = packing.load_or_make(tmp_path, key={"store": "a", "row_len": 8}, make=make)
  again = packing.load_or_make(tmp_path, key={"row_len": 8, "store": "a"}, make=make)
  assert len(made) == 1 and same(first, golden_plan()) and same(again, golden_plan())
  packing.load_or_make(tmp_path, key={"store": "b", "row_len": 8}, make=make)
  assert len(made) == 2
  assert sorted(p.name[0] == "." for p in (tmp_path / "plans").iterdir()) == [False, False]  # nothing unfinished is left


def test_an_empty_plan_is_kept_too(tmp_path):
  empty = packing.plan(np.zeros(0, np.int64), row_len=8, policy="concat")
  for _ in range(2):
    assert packing.load_or_make(tmp_path, key={}, make=lambda: empty).num_rows == 0


@pytest.mark.parametrize(
  "damage",
  [
    lambda d: (d / "plan.json").unlink(),
    lambda d: (d / "plan.json").write_text("{"),
    lambda d: (d / "plan.json").write_text(json.dumps({**json.loads((d / "plan.json").read_text()), "key": {"format": 0}})),
    lambda d: (d / "doc.npy").unlink(),
    lambda d: (d / "doc.npy").write_bytes((d / "doc.npy").read_bytes()[:-3]),
    lambda d: (d / "row_ends.npy").write_bytes((d / "row_tokens.npy").read_bytes()),
    lambda d: np.save(d / "length.npy", np.load(d / "length.npy")[:-1]),
    lambda d: np.save(d / "row_ends.npy", np.load(d / "row_ends.npy") - 1),
  ],
)
def test_a_damaged_plan_is_made_again(tmp_path, damage):
  packing.load_or_make(tmp_path, key={"k": 1}, make=golden_plan)
  (directory,) = (tmp_path / "plans").iterdir()
  damage(directory)
  with pytest.warns(UserWarning, match=f"{directory.name}.*made again"):
    assert same(packing.load_or_make(tmp_path, key={"k": 1}, make=golden_plan), golden_plan())
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert same(packing.load_or_make(tmp_path, key={"k": 1}, make=golden_plan), golden_plan())


def test_where_nothing_can_be_written_the_plan_stays_in_memory(tmp_path):
  (tmp_path / "plans").write_text("a file, so no directory can be made here")
  with pytest.warns(UserWarning, match="cannot write the packing plan"):
    assert same(packing.load_or_make(tmp_path, key={}, make=golden_plan), golden_plan())


def test_many_writers_at_once(tmp_path):
  start, plans = threading.Barrier(8), []

  def work():
    start.wait()
    plans.append(packing.load_or_make(tmp_path, key={"k": 1}, make=golden_plan))

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(plans) == 8 and all(same(plan, golden_plan()) for plan in plans)
  assert len(list((tmp_path / "plans").iterdir())) == 1
