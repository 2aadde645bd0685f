"""Selection: filters count what they leave out, shares by length are met to within a document, hashes decide at the border."""

import factory
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from cpt_jax.config import ConfigError
from cpt_jax.stream.sources import mix64


def hashes_of(lengths, seed=0):
  return np.random.default_rng(seed).integers(0, 1 << 64, len(lengths), np.uint64)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(0, 60), st.integers(0, 60), st.integers(1, 3))
def test_filters_leave_out_by_length_and_count(lengths, low, high, stride):
  lengths = np.array(lengths, np.int64)
  documents = np.arange(len(lengths))[::-stride]
  kept = [i for i in documents if low <= lengths[i] and (lengths[i] <= high or not high)]
  if len(documents) and not kept:
    with pytest.raises(ConfigError, match=f"min_tokens={low}, max_tokens={high}: leave none of {len(documents)} documents"):
      factory.selected(lengths, documents, min_tokens=low, max_tokens=high)
    return
  found = factory.selected(lengths, documents, min_tokens=low, max_tokens=high)
  assert found.documents.tolist() == kept and found.num_tokens == sum(lengths[kept])
  short = [n for n in lengths[documents] if n < low]
  long = [n for n in lengths[documents] if n >= low and n > high > 0]
  assert (found.num_too_short, found.tokens_too_short) == (len(short), sum(short))
  assert (found.num_too_long, found.tokens_too_long) == (len(long), sum(long))
  assert (found.num_copies, found.tokens_copied, found.brackets) == (0, 0, ())


brackets = st.lists(
  st.tuples(st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5])), max_size=3, unique_by=lambda b: b[0]
)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=80), st.sampled_from([0.0, 0.2, 1.0]), brackets, st.integers(0, 9))
def test_shares_by_length_are_met_to_within_a_document_per_bracket(lengths, first_share, more, seed):
  lengths = np.array(lengths, np.int64)
  length_shares = [(0, first_share), *sorted(more)]
  ends = [b for b, _ in length_shares[1:]] + [1 << 30]
  members = [np.flatnonzero((lengths >= b) & (lengths < end)) for (b, _), end in zip(length_shares, ends, strict=True)]
  shares = [share for _, share in length_shares]
  assume(any(shares) and all(len(m) or not share for m, share in zip(members, shares, strict=True)))
  found = factory.selected(lengths, np.arange(len(lengths)), length_shares=length_shares, hashes=hashes_of(lengths, seed))
  times = np.bincount(found.documents, minlength=len(lengths))
  # The oracle: tokens wanted of each bracket, if the one that needs the fewest copies is read once.
  scale = max(lengths[m].sum() / share for m, share in zip(members, shares, strict=True) if share)
  for bracket, m, share in zip(found.brackets, members, shares, strict=True):
    wanted, got = share * scale, int((lengths * times)[m].sum())
    assert abs(got - wanted) <= lengths[m].max(initial=0) / 2 + 1e-6
    assert set(times[m]) <= {int(wanted / max(lengths[m].sum(), 1) + e) + up for up in (0, 1) for e in (-1e-9, 1e-9)}
    assert share == 0 or times[m].min() >= 1
    assert (bracket.num_documents, bracket.num_tokens) == (len(m), lengths[m].sum())
    assert bracket.share_wanted == pytest.approx(share / sum(shares)) and bracket.share == pytest.approx(got / found.num_tokens)
    assert bracket.copies * lengths[m].sum() == pytest.approx(got)
  assert (np.diff(found.documents) >= 0).all() and found.num_tokens == (lengths * times).sum()
  assert found.num_copies == np.maximum(times - 1, 0).sum()
  assert found.tokens_copied == (lengths * np.maximum(times - 1, 0)).sum()


def test_hashes_decide_and_another_document_moves_only_the_border():
  lengths = np.repeat([40, 100], 1000)

  def times(num_documents=2000, seed=0):
    found = factory.selected(lengths, np.arange(num_documents), length_shares=((0, 1), (50, 9)), hashes=hashes_of(lengths, seed))
    return np.bincount(found.documents, minlength=2000)[:1999]

  assert set(times()[1000:]) == {3, 4}  # 40,000 tokens are read once, so 360,000 of the other 100,000
  assert np.array_equal(times(), times())
  assert (times() != times(seed=1)).sum() > 200
  assert (times() != times(num_documents=1999)).sum() <= 4


def test_who_is_read_once_more_does_not_hang_on_who_is_held_out():
  lengths = np.repeat([40, 100], 1000)
  hashes = hashes_of(lengths)
  found = factory.selected(lengths, np.arange(2000), length_shares=((0, 0.2), (50, 0.75)), hashes=hashes)
  is_twice = np.bincount(found.documents)[1000:] == 2
  low = mix64(hashes[1000:]) < np.uint64(1 << 63)  # the first to be held out
  assert 400 < is_twice.sum() < 600 and abs(is_twice[low].mean() - is_twice[~low].mean()) < 0.1


@pytest.mark.parametrize(
  ("length_shares", "message"),
  [
    (((0, 0.5), (500, 0.5)), r"length_shares: 0.5 of the tokens .* documents of 500 or more tokens, but there is none"),
    (((0, 0.5), (5, 0.5), (8, 1.0)), r"length_shares: 0.25 of the tokens .* documents of 5 to 7 tokens, but there is none"),
    (((5, 1.0),), r"length_shares=.*begin at \[5\] tokens; they must begin at 0 and rise"),
    (((0, 1.0), (9, 1.0), (9, 1.0)), r"length_shares=.*must begin at 0 and rise"),
    (((0, -1.0), (9, 2.0)), r"length_shares=.*none negative"),
    (((0, float("nan")),), r"length_shares=.*finite"),
    (((0, 0.0), (9, 0)), r"length_shares=.*one above 0"),
  ],
)
def test_impossible_shares_are_refused(length_shares, message):
  lengths = np.array([3, 3, 20, 40])
  with pytest.raises(ConfigError, match=message):
    factory.selected(lengths, np.arange(4), length_shares=length_shares, hashes=hashes_of(lengths))


def test_filters_come_before_shares():
  lengths = np.array([3, 10, 10, 40])
  shares = ((0, 0.5), (20, 0.5))
  found = factory.selected(lengths, np.arange(4), min_tokens=4, length_shares=shares, hashes=hashes_of(lengths))
  assert found.documents.tolist() == [1, 1, 2, 2, 3] and found.num_too_short == 1
  with pytest.raises(ConfigError, match=r"length_shares: 0.5 .* 20 or more"):
    factory.selected(lengths, np.arange(4), max_tokens=30, length_shares=shares, hashes=hashes_of(lengths))


def test_nothing_to_select_from():
  found = factory.selected(np.zeros(0, np.int64), np.zeros(0, np.int64), length_shares=((0, 1.0),), hashes=np.zeros(0, np.uint64))
  assert len(found.documents) == 0 and found.num_tokens == 0
