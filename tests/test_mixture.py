"""The mixture: one row of error at most, contiguous rows of each source, evenly interleaved, whatever the length of the run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_jax.config import ConfigError
from cpt_jax.data.mixture import Mixture


def all_counts(mixture: Mixture) -> np.ndarray:
  return np.stack([mixture.counts(step) for step in range(mixture.num_steps + 1)])


def integral(shares, num_steps: int, batch_rows: int) -> np.ndarray:
  """Independent of the code: shares at mid-step, normalised, summed in long doubles; [steps + 1, M]."""
  times = np.arange(num_steps) + 0.5
  raw = np.stack([np.interp(times, *zip(*knots, strict=True)) for knots in shares], 1).astype(np.longdouble)
  steps = raw / raw.sum(1, keepdims=True) * batch_rows
  return np.concatenate([np.zeros((1, len(shares)), np.longdouble), steps.cumsum(0)])


def assert_exact(mixture: Mixture, shares) -> None:
  counts = all_counts(mixture)
  wanted = integral(shares, mixture.num_steps, mixture.batch_rows)
  assert np.abs(counts - wanted).max() < 1 - 1 / (2 * len(shares) + 1) + 1e-6
  assert (np.diff(counts, axis=0) >= 0).all()
  np.testing.assert_array_equal(counts.sum(1), np.arange(mixture.num_steps + 1) * mixture.batch_rows)


share = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.sampled_from([1e-6, 1e-3, 0.5, 1.0]))
knots = st.lists(st.tuples(st.floats(0, 150), share), min_size=1, max_size=4, unique_by=lambda knot: knot[0]).map(sorted)


@given(st.lists(knots, min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 120))
def test_error_stays_below_one_row_at_every_step(moving, batch_rows, num_steps):
  shares = [[(0.0, 0.01)], *moving]  # one source is always on
  assert_exact(Mixture(shares, num_steps=num_steps, batch_rows=batch_rows), shares)


@pytest.mark.parametrize("num_sources,batch_rows", [(2, 1), (3, 256), (33, 7), (64, 64)])
def test_a_long_run_of_uneven_sources(num_sources, batch_rows):
  rng = np.random.default_rng(num_sources)
  first, last = 10.0 ** rng.uniform(-6, 0, (2, num_sources))
  first[1::5] = 0  # these start at 0
  last[1::7] = 0  # these stop
  shares = [[(500.0, float(a)), (3000.0, float(b))] for a, b in zip(first, last, strict=True)]
  assert_exact(Mixture(shares, num_steps=4000, batch_rows=batch_rows), shares)


@given(st.lists(knots, min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 30))
def test_rows_of_each_source_are_used_once_in_order_of_steps(moving, batch_rows, num_steps):
  mixture = Mixture([[(0.0, 0.2)], *moving], num_steps=num_steps, batch_rows=batch_rows)
  located = np.array([mixture[row] for row in range(len(mixture))])
  for m in range(mixture.num_sources):
    local = located[located[:, 0] == m, 1]
    np.testing.assert_array_equal(np.sort(local), np.arange(len(local)))
    steps = np.flatnonzero(located[:, 0] == m) // batch_rows
    np.testing.assert_array_equal(np.bincount(steps, minlength=num_steps), np.diff(all_counts(mixture)[:, m]))
    np.testing.assert_array_equal(local, np.arange(len(local)))


@given(st.lists(knots, min_size=1, max_size=4), st.integers(1, 9))
def test_a_longer_run_begins_with_the_rows_of_the_shorter(moving, batch_rows):
  shares = [[(0.0, 0.3)], *moving]
  short = Mixture(shares, num_steps=60, batch_rows=batch_rows)
  long = Mixture(shares, num_steps=1500, batch_rows=batch_rows)
  assert [short[i] for i in range(len(short))] == [long[i] for i in range(len(short))]


def test_shares_after_the_end_of_a_run_count_as_they_will_be():
  for seed in range(30):  # the last rows are chosen by deadlines that lie behind the shorter run's end
    shares = [[(0, a), (58, b), (61, c)] for a, b, c in (np.random.default_rng(seed).uniform(0, 1, (5, 3)) ** 4).tolist()]
    short, long = (Mixture(shares, num_steps=num_steps, batch_rows=1) for num_steps in (57, 100))
    assert [short[i] for i in range(57)] == [long[i] for i in range(57)]


def test_rows_of_a_batch_are_spread_evenly():
  mixture = Mixture([[(0, 3.0)], [(0, 1.0)]], num_steps=2, batch_rows=8)
  assert [mixture[i] for i in range(8)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


def test_shares_are_read_at_mid_step():
  ramp = Mixture([[(0, 0.0), (10, 1.0)], [(0, 1.0), (10, 0.0)]], num_steps=12, batch_rows=100)
  np.testing.assert_array_equal(all_counts(ramp)[:, 0], [0, 5, 20, 45, 80, 125, 180, 245, 320, 405, 500, 600, 700])
  jump = Mixture([[(5, 0.0), (5, 1.0)], [(4, 1.0), (5, 0.0)]], num_steps=7, batch_rows=10)
  np.testing.assert_array_equal(all_counts(jump)[:, 0], [0, 0, 0, 0, 0, 0, 10, 20])
  np.testing.assert_allclose(jump.shares(4), [0, 1])


def test_quotas_of_a_step_sum_to_its_rows_exactly():
  mixture = Mixture([[(0, 0.1)], [(0, 0.7), (50, 0.2)], [(10, 1e-6), (40, 1.0)]], num_steps=60, batch_rows=7)
  np.testing.assert_array_equal(mixture._step_quotas(0, 60).sum(1), 7 << 40)


def test_a_source_that_has_not_begun_gives_no_row():
  mixture = Mixture([[(0, 1.0)], [(99, 0.0), (100, 1.0)]], num_steps=120, batch_rows=3)
  counts = all_counts(mixture)[:, 1]
  assert counts[99] == 0 and counts[-1] > 20


def test_seeking_far_ahead_agrees_with_walking_there():
  shares = [[(0, 0.7), (5000, 0.1)], [(0, 0.3)], [(0, 0.001), (3000, 0.2)]]
  walked, sought = (Mixture(shares, num_steps=5000, batch_rows=6) for _ in range(2))
  rows = [walked[i] for i in range(len(walked))]
  for i in (29_999, 0, 6143, 6144, 12_288, 17_001):
    assert sought[i] == rows[i]


@pytest.mark.parametrize(
  "shares,message",
  [
    ([[(0, 0.0), (10, 1.0)], [(0, 0.0)], [(20, 0.0), (30, 0.5)]], None),
    ([[(0, 1.0), (10, 0.0)], [(20, 0.0), (30, 0.5)]], "every share is 0 at step 10"),
    ([[(0, -0.5)]], "not negative"),
    ([[(0, float("nan"))]], "finite"),
    ([[(3, 0.5), (1, 0.5)]], "rise"),
  ],
)
def test_impossible_shares_are_refused(shares, message):
  if message is None:
    Mixture(shares, num_steps=40, batch_rows=2)
  else:
    with pytest.raises(ConfigError, match=message):
      Mixture(shares, num_steps=40, batch_rows=2)


def test_rows_outside_the_run_are_refused():
  mixture = Mixture([[(0, 1.0)]], num_steps=2, batch_rows=3)
  assert mixture[5] == (0, 5)
  for row in (-1, 6):
    with pytest.raises(IndexError):
      mixture[row]
