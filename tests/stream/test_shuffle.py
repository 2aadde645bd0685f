"""Shuffles: permutations, one at a time or many, unlike from epoch to epoch and name to name, and fixed for good."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cpt_jax.stream import shuffle
from cpt_jax.stream.shuffle import Shuffle


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10**6), st.booleans())
def test_each_epoch_is_a_permutation(num_rows, seed, epoch, as_cipher):
  with pytest.MonkeyPatch.context() as patch:
    if as_cipher:
      patch.setattr(shuffle, "_TABLE_ROWS", 0)
    order = Shuffle(num_rows, name="a", seed=seed)
    begin = epoch * num_rows
    many = order.rows(begin, begin + num_rows)
    np.testing.assert_array_equal(np.sort(many), np.arange(num_rows))
    for at in {0, num_rows // 3, num_rows - 1}:
      assert order[begin + at] == many[at]
    part = order.rows(begin + num_rows // 3, begin + num_rows)
    np.testing.assert_array_equal(part, many[num_rows // 3 :])


def test_a_source_of_many_rows_costs_nothing_to_open():
  order = Shuffle(3 * 10**12, name="a", seed=0)
  rows = order.rows(10**12, 10**12 + 10_000)
  assert len(np.unique(rows)) == 10_000 and rows.max() < 3 * 10**12
  assert abs(rows.mean() / 3e12 - 0.5) < 0.02
  assert [order[10**12 + i] for i in range(5)] == rows[:5].tolist()
  assert order[3 * 10**12 * 1000 + 17] < 3 * 10**12


@pytest.mark.parametrize("num_rows", [2000, 70_000])
def test_it_looks_random(num_rows):
  orders = [Shuffle(num_rows, name=name, seed=seed).rows(0, num_rows) for name in "ab" for seed in (0, 1)]
  orders.append(Shuffle(num_rows, name="a", seed=0).rows(num_rows, 2 * num_rows))  # the second epoch
  for i, order in enumerate(orders):
    for other in [np.arange(num_rows), *orders[:i]]:
      assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(num_rows)
      assert (order == other).sum() < 12  # expected: 1
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(num_rows)
    # Each tenth of the epoch reads from each tenth of the rows alike.
    grid, *_ = np.histogram2d(np.arange(num_rows), order, bins=10)
    assert ((grid - num_rows / 100) ** 2 / (num_rows / 100)).sum() < 81 + 6 * np.sqrt(2 * 81)


def test_golden_order():
  """The order of every run's rows: if it changes, pipeline.FORMAT must change too."""
  assert Shuffle(10, name="zh", seed=0).rows(10, 20).tolist() == [3, 9, 6, 8, 0, 7, 5, 2, 1, 4]
  assert [Shuffle(10**6, name="zh", seed=3)[n] for n in (0, 1, 999_999, 10**6)] == [332085, 105388, 454123, 986810]
