"""The mixture: one row of error at most, contiguous rows of each source, evenly interleaved, whatever the length of the run."""

import math
import tracemalloc
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings, strategies as st

from cpt_jax.config import ConfigError
from cpt_jax.stream.mixture import End, Mixture
from cpt_jax.stream.quotas import Curves, Cycle


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


def test_deadlines_behind_the_last_block_count_as_they_will_be():
  for seed in range(5):  # the run ends with a block of steps, and the shares go on to move
    shares = [[(1000, a), (1020, b), (1040, c)] for a, b, c in (np.random.default_rng(seed).uniform(0, 1, (6, 3)) ** 4).tolist()]
    short, long = (Mixture(shares, num_steps=num_steps, batch_rows=1) for num_steps in (1024, 1100))
    assert all_rows(short) == [long[i] for i in range(1024)]


def test_rows_of_a_batch_are_spread_evenly():
  mixture = Mixture([[(0, 3.0)], [(0, 1.0)]], num_steps=2, batch_rows=8)
  assert [mixture[i] for i in range(8)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


@pytest.mark.parametrize(
  "shares,message",
  [
    ([[(0, 0.0), (10, 1.0)], [(0, 0.0)], [(20, 0.0), (30, 0.5)]], None),
    ([[(0, 1.0), (10, 0.0)], [(20, 0.0), (30, 0.5)]], "every share is 0 at step 10"),
    ([[(0, -0.5)]], "not negative"),
    ([[(0, float("nan"))]], "finite"),
    ([[(3, 0.5), (1, 0.5)]], "rise"),
    ([[(0, 0.5), (9, 0.0, "log")]], "from share 0.5 to 0 has no logarithm"),
    ([[(0, 0.5), (9, 0.1, "cubic")]], "'cubic' is none of linear, log, hold"),
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


def all_rows(mixture: Mixture) -> list[tuple[int, int]]:
  return [mixture[row] for row in range(mixture.start_step * mixture.batch_rows, len(mixture))]


@st.composite
def cases(draw):
  """Arguments of a mixture: ramps of all curves, jumps, sources off for a while, limits, a start inside the run."""
  num_sources = draw(st.integers(1, 6))
  batch_rows = draw(st.sampled_from([1, 2, 3, 7, 16]))
  start_step = draw(st.sampled_from([0, 0, 37]))
  times = st.one_of(st.integers(0, 120).map(float), st.floats(0, 120))
  levels = st.one_of(st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.floats(0.01, 1))
  shares = [[(0.0, draw(levels))]]
  for _ in range(num_sources - 1):
    curves = st.sampled_from(["linear", "log", "hold"]) if draw(st.booleans()) else st.just("linear")
    source = sorted(draw(st.lists(st.tuples(times, levels, curves), min_size=1, max_size=4)), key=lambda knot: knot[0])
    off = draw(st.sampled_from([0, len(source) - 1, None]))
    if all(knot[2] != "log" for knot in source) and off is not None:
      source[off] = (source[off][0], 0.0, "linear")
    shares.append(source)
  limits, actions = None, None
  if draw(st.booleans()):
    limits = draw(st.lists(st.one_of(st.none(), st.integers(0, 40 * batch_rows)), min_size=num_sources, max_size=num_sources))
    action = st.sampled_from(["renormalise", "renormalise", "renormalise", "stop", "error"])
    actions = draw(st.lists(action, min_size=num_sources, max_size=num_sources))
  num_steps = start_step + draw(st.integers(0, 70))
  options: dict[str, Any] = {
    "batch_rows": batch_rows,
    "start_step": start_step,
    "limits_M": limits,
    "at_end_M": actions,
    "num_steps": num_steps,
  }
  return shares, options


@settings(max_examples=100)
@given(cases())
def test_every_row_is_the_oracle_s(case):
  shares, options = case
  assert all_rows(Mixture(shares, **options)) == [row for batch in oracle.rows(shares, **options) for row in batch]


@pytest.mark.parametrize("shares", [[0.7, 0.2, 0.1], [0.35, 0.0, 0.3, 0.35], [3.0, 4.0]])
def test_constant_shares_are_the_oracle_s_over_many_cycles(shares):
  shares_M = [[(0, share)] for share in shares]
  for limits in (None, [200, *[None] * (len(shares) - 1)]):  # ends in the middle of a cycle
    options: dict[str, Any] = {"num_steps": 90, "batch_rows": 4, "start_step": 3, "limits_M": limits}
    assert all_rows(Mixture(shares_M, **options)) == [row for batch in oracle.rows(shares_M, **options) for row in batch]


@given(cases())
def test_limits_hold_and_ends_are_told(case):
  shares, options = case
  mixture = Mixture(shares, **options)
  limits = options["limits_M"] or [None] * len(shares)
  actions = options["at_end_M"] or ["renormalise"] * len(shares)
  counts = np.stack([mixture.counts(step) for step in range(mixture.start_step, mixture.end_step + 1)])
  steps = np.arange(len(counts))
  np.testing.assert_array_equal(counts.sum(1), steps * mixture.batch_rows)
  assert (np.diff(counts, axis=0) >= 0).all()
  assert list(mixture.ends) == sorted(mixture.ends, key=lambda end: (end.step, end.source))
  for m, limit in enumerate(limits):
    assert limit is None or counts[-1, m] <= limit
  for end in mixture.ends:
    assert limits[end.source] is not None
    assert end.action in ("stop", actions[end.source])
    if end.action == "renormalise":
      assert (counts[end.step + 1 - mixture.start_step :, end.source] == limits[end.source]).all()
    else:
      assert end.step == mixture.end_step < mixture.num_steps
  assert mixture.end_step == mixture.num_steps or mixture.ends[-1].action != "renormalise"


@given(cases(), st.integers(0, 1200))
def test_a_longer_run_begins_with_the_rows_of_the_shorter_with_limits_too(case, more_steps):
  shares, options = case
  short = Mixture(shares, **options)
  long = Mixture(shares, **(options | {"num_steps": options["num_steps"] + more_steps}))
  rows = all_rows(short)
  first_row = short.start_step * short.batch_rows
  assert rows == [long[row] for row in range(first_row, first_row + len(rows))]
  assert short.ends == tuple(end for end in long.ends if end.step < short.num_steps)


def test_what_happens_at_the_end_of_sources():
  shares = [[(0, 0.5)], [(0, 0.25)], [(0, 0.25)]]
  options: dict[str, Any] = {"num_steps": 20, "batch_rows": 8, "start_step": 10, "limits_M": [13, None, 9]}
  mixture = Mixture(shares, **options)
  # Step 13: one row is left of 0, and 3 of 2 where 3.5 would be its part; 1 gives the rest, and all that follow.
  assert mixture.ends == (End(0, 13, "renormalise"), End(2, 13, "renormalise"))
  np.testing.assert_array_equal(mixture.counts(13), [12, 6, 6])
  np.testing.assert_array_equal(mixture.counts(14), [13, 10, 9])
  np.testing.assert_array_equal(mixture.counts(20), [13, 58, 9])
  np.testing.assert_allclose(mixture.shares(13), [0.5, 0.25, 0.25])
  np.testing.assert_allclose(mixture.shares(14), [0, 1, 0])
  for action in ("stop", "error"):
    stopped = Mixture(shares, **options, at_end_M=["renormalise", "renormalise", action])
    assert stopped.ends == (End(2, 13, action),)
    assert stopped.end_step == 13
    assert len(stopped) == 13 * 8
  exhausted = Mixture(shares, **(options | {"limits_M": [13, 30, 9]}))
  assert exhausted.ends[-1] == End(1, 16, "stop")
  assert exhausted.end_step == 16
  nothing = Mixture(shares, **(options | {"limits_M": [0, 0, 0]}))
  assert len(nothing) == 80
  assert {end.action for end in nothing.ends} == {"stop"}


def test_a_ramp_down_to_0_is_never_rounded_below():
  curves = Curves([[(38.36819269552376, 0.9828543762795893), (777.5000000000001, 0.0)]], batch_rows=1)
  assert curves.shares(0, 1000).min() == 0  # -1e-16 at step 777 if it were not held at 0


def test_a_long_log_ramp_keeps_its_integral():
  # The whole weight of the other source moves along, so that the shares are those given: sum = (b - a) / log(b / a).
  steps = 200_000
  ramp = Curves([[(0, 1e-6), (steps, 0.5, "log")]], batch_rows=1)
  shares = np.concatenate([ramp.shares(start, min(start + 1024, steps))[0] for start in range(0, steps, 1024)])
  rate = math.log(0.5 / 1e-6) / steps
  middles = 1e-6 * (math.exp(rate * steps) - 1) / (2 * math.sinh(rate / 2))  # geometric series of the values at mid-step
  assert abs(math.fsum(shares) / middles - 1) < 1e-14


def test_a_million_draws_of_64_sources_with_shares_down_to_1e_6():
  rng = np.random.default_rng(5)
  first, last = 10.0 ** rng.uniform(-6, 0, (2, 64))
  first[::9], last[::7] = 0, 0
  shares = [[(1000.0, float(a)), (14_000.0, float(b))] for a, b in zip(first, last, strict=True)]
  assert_exact(Mixture(shares, num_steps=15_625, batch_rows=64), shares)


def test_constant_shares_repeat_however_long_the_run_is():
  shares = [[(0, 0.7)], [(0, 0.2)], [(0, 0.1)]]
  tracemalloc.start()
  long, short = (Mixture(shares, num_steps=num_steps, batch_rows=8) for num_steps in (10**11, 100))
  assert tracemalloc.get_traced_memory()[1] < 10e6
  tracemalloc.stop()
  assert [long[row] for row in range(800)] == all_rows(short)
  np.testing.assert_array_equal(long.counts(10**11), [56 * 10**10, 16 * 10**10, 8 * 10**10])
  source, number = long[8 * 10**11 - 1]
  assert number == long.counts(10**11)[source] - 1


def test_a_short_run_of_a_long_cycle_begins_as_a_whole_cycle():
  rng = np.random.default_rng(3)
  weights = np.concatenate([rng.integers(1, 40, 6), rng.integers(1000, 3000, 3)])
  weights[-1] += 2**15 - weights.sum()
  shares = [[(0, float(weight))] for weight in weights]
  short, long = (Mixture(shares, num_steps=num_steps, batch_rows=1) for num_steps in (1500, 2**15))
  assert all_rows(short) == [long[row] for row in range(1500)]
  np.testing.assert_array_equal(long.counts(2**15), weights)
  assert len(short._cycle._sums) == 2  # no more than the run is worked out


def test_quotas_of_a_cycle_are_whole_at_its_end():
  for shares in ([1 / 3, 0.1], [0.1, 0.2, 0.7], [1.0, 1048574.0, 1.0]):
    cycle = Cycle.of(shares, batch_rows=3)
    if cycle is None:  # 1 / 3 as it is written has no small denominator
      assert shares[0] == 1 / 3
      continue
    total = np.zeros(len(shares), object)
    for start in range(0, cycle.num_steps, 1 << 16):
      quotas = cycle.quotas(start, start + (1 << 16), np.ones(len(shares), bool))
      assert (quotas >= 0).all()
      np.testing.assert_array_equal(quotas.sum(0), 3 << 40)
      total += quotas.sum(1).astype(object)
    np.testing.assert_array_equal(total, cycle.counts_M.astype(object) << 40)


def test_a_large_batch_is_laid_out_in_parts():
  shares = [[(0, 0.61)], [(0, 0.3), (9, 0.5)], [(0, 1e-4)], [(0, 0.09)]]
  mixture = Mixture(shares, num_steps=3, batch_rows=10_000)
  rows = np.array([mixture[row] for row in range(10_000, 20_000)])
  num_M = mixture.counts(2) - mixture.counts(1)
  order = sorted(((2 * n + 1) / (2 * num), m, n) for m, num in enumerate(num_M.tolist()) for n in range(num))
  np.testing.assert_array_equal(rows, [(m, mixture.counts(1)[m] + n) for _, m, n in order])


def test_rows_at_the_border_of_two_parts_of_a_batch():
  mixture = Mixture([[(0, 8132.0)], *[[(0, 1.0)] for _ in range(40)]], num_steps=1, batch_rows=8172)
  # The 40 rows at the middle take the places 4066 to 4105, across the border at 4096.
  assert all_rows(mixture) == [(0, n) for n in range(4066)] + [(m, 0) for m in range(1, 41)] + [(0, n) for n in range(4066, 8132)]


def test_a_run_of_10_to_the_12_rows_is_reached_anywhere():
  shares = [[(0, 0.5)], [(0, 0.25), (500_000, 0.1)], [(0, 1e-6), (2_000_000, 0.3, "log")]]
  mixture = Mixture(shares, num_steps=4000, batch_rows=1_000_000)
  near = Mixture(shares, num_steps=4000, batch_rows=1_000_000)
  for row in (0, 2_123_456_789, 3_999_999_999):
    assert mixture[row] == near[row]
    source, number = mixture[row]
    step = row // 1_000_000
    assert mixture.counts(step)[source] <= number < mixture.counts(step + 1)[source]


def test_more_sources_than_bits_of_a_word():
  shares = [[(0, 1.0 + m % 7), (300, 2.0)] for m in range(130)]
  assert_exact(Mixture(shares, num_steps=200, batch_rows=5), shares)
