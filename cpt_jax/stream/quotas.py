"""Shares that move over time, and limits -> the rows, in exact integers, that each source is owed in each step.

Invariant: a step's quotas sum to its rows exactly, none is negative, no sum passes its limit; the same bits on every machine.
"""

import bisect
import decimal
import fractions
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cpt_jax.config import ConfigError

CURVES = ("linear", "log", "hold")
AT_END = ("renormalise", "stop", "error")

NEVER = 1 << 62  # a step, or a number of rows, beyond every run
BLOCK_STEPS = 1024  # steps that are worked out at once
FRAC_BITS = 40  # quotas are whole numbers of 2**-40 rows
_ONE = 1 << FRAC_BITS
_MASK = _ONE - 1
_MAX_DENOMINATOR = 1 << 20  # see Cycle
_DECIMAL = decimal.Context(prec=50)  # a float keeps 17 digits, so all that is rounded from these is rounded correctly


class Knot(NamedTuple):
  """A source's share at a time, in steps of the run.

  `curve` is the way from the knot before to this one: "linear"; "log", straight in the logarithm, both shares above 0; "hold",
  the share of the knot before up to this one's time.
  """

  step: float
  share: float
  curve: str = "linear"


class End(NamedTuple):
  """`step` is the first for which `source` has fewer rows left than its quota asks for.

  With "renormalise" it gives its last rows up to and in this step, and the others give the rest; with "stop" and "error" the
  run ends before it.
  """

  source: int
  step: int
  action: str


class Schedule(Protocol):
  """What each source is owed in each step."""

  settled: int  # a source whose next row is due in a later step is due as if the quotas of this step went on for ever

  def shares(self, start: int, stop: int) -> np.ndarray:
    """float64 [M, steps], not normalised."""
    ...

  def quotas(self, start: int, stop: int, open_M: np.ndarray) -> np.ndarray:
    """int64 [M, steps]: in 2**-40 rows, of the sources in `open_M`; ends early before a step in which none has a share."""
    ...


class Curves:
  """The schedule that knots describe: constant before a source's first and after its last, two at one time are a jump.

  The share of step t is read at its middle, t + 0.5, so that the sum of a linear ramp is its integral.
  Raises ConfigError: a share that is negative or not finite, knots out of order, a log ramp from or to 0.
  """

  def __init__(self, knots_M: Sequence[Sequence[tuple]], *, batch_rows: int):
    self._knots_M = [_check_knots(m, knots) for m, knots in enumerate(knots_M)]
    self._times_M = [[knot.step for knot in knots] for knots in self._knots_M]
    self._batch_rows = batch_rows
    # Between two of these steps every share keeps to one line.
    self._borders = sorted({_first_behind(time) for times in self._times_M for time in times})
    self.settled = self._borders[-1]
    self._lines = functools.lru_cache(8)(self._lines_behind)
    self._log_ramp = functools.lru_cache(256)(_LogRamp)

  def constant_from(self, step: int) -> list[float] | None:
    """The shares, if they are those of `step` for ever."""
    shares_M = [self._between(m, step)[0].share for m in range(len(self._knots_M))]
    pairs = zip(self._knots_M, shares_M, strict=True)
    return shares_M if all(k.share == share for knots, share in pairs for k in knots if k.step > step + 0.5) else None

  def shares(self, start: int, stop: int) -> np.ndarray:
    """See Schedule."""
    shares = np.empty((len(self._knots_M), stop - start))
    while start < stop:
      border = bisect.bisect_right(self._borders, start)
      end = min([stop, *self._borders[border : border + 1]])
      line = shares[:, shares.shape[1] - (stop - start) :][:, : end - start]
      time_M, share_M, slope_M, logs = self._lines(border, start if border == 0 else self._borders[border - 1])
      # An array at a time, one operation each: nothing is fused, so the bits are those of share + slope * (t + 0.5 - time).
      np.subtract(np.arange(start, end) + 0.5, time_M[:, None], out=line)
      line *= slope_M[:, None]
      line += share_M[:, None]
      np.maximum(line, 0.0, out=line)
      for m, ramp in logs:
        line[m] = ramp.shares(start, end)
      start = end
    return shares

  def quotas(self, start: int, stop: int, open_M: np.ndarray) -> np.ndarray:
    """See Schedule."""
    edges = self.shares(start, stop)
    edges[~open_M] = 0.0
    for before, edge in itertools.pairwise(edges):
      edge += before
    total = edges[-1].copy()
    if not total.min() > 0:
      num_steps = int(np.argmin(total > 0))
      edges, total = edges[:, :num_steps], total[:num_steps]
    edges /= total
    edges *= float(self._batch_rows << FRAC_BITS)
    # Differences of rounded running sums over the sources: never negative, 0 for a share of 0, and together all rows exactly.
    return np.diff(edges.astype(np.int64), axis=0, prepend=0)

  def _between(self, m: int, step: int) -> tuple[Knot, Knot]:
    """The knots before and after the middle of `step`; twice the same before the first and after the last."""
    knots, after = self._knots_M[m], bisect.bisect_right(self._times_M[m], step + 0.5)
    return knots[max(after - 1, 0)], knots[min(after, len(knots) - 1)]

  def _lines_behind(self, border: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, "_LogRamp"]]]:
    """Time, share and slope of each source's line from `step` on, behind the border of this number; and who is in a log ramp."""
    pairs = [self._between(m, step) for m in range(len(self._knots_M))]
    slopes = [(b.share - a.share) / (b.step - a.step) if a.step < b.step and b.curve == "linear" else 0.0 for a, b in pairs]
    logs = [(m, self._log_ramp(a, b)) for m, (a, b) in enumerate(pairs) if a.step < b.step and b.curve == "log"]
    return np.array([a.step for a, _ in pairs]), np.array([a.share for a, _ in pairs]), np.array(slopes), logs


class _LogRamp:
  """A share that grows by one factor a step: correctly rounded anchors and ratios, so that a long ramp keeps its sum."""

  def __init__(self, left: Knot, right: Knot):
    time, share, last_time, last_share = map(decimal.Decimal, (left.step, left.share, right.step, right.share))
    rate = _DECIMAL.divide(_DECIMAL.ln(_DECIMAL.divide(last_share, share)), last_time - time)
    self._first_step, self._growth = _first_behind(left.step), _DECIMAL.exp(rate)
    offset = _DECIMAL.multiply(rate, decimal.Decimal(self._first_step + 0.5) - time)
    self._first_share = _DECIMAL.multiply(share, _DECIMAL.exp(offset))
    num_ratios = min(BLOCK_STEPS, _first_behind(right.step) - self._first_step)
    powers = itertools.accumulate(itertools.repeat(self._growth, num_ratios), _DECIMAL.multiply, initial=decimal.Decimal(1))
    self._ratios = np.array([float(power) for power in powers])

  def shares(self, start: int, stop: int) -> np.ndarray:
    """float64 [steps], at most a block of them."""
    anchor = _DECIMAL.multiply(self._first_share, _DECIMAL.power(self._growth, start - self._first_step))
    return float(anchor) * self._ratios[: stop - start]


class Cycle:
  """The schedule of constant shares that are exact fractions: after `num_steps` steps every quota is whole, and it ends there.

  Each step rounds a source's quota, n / P of the batch's rows, off by less than 2**-40 rows; the last step makes that good, less
  than num_steps * 2**-40 <= P * 2**-40 rows. For P <= 2**20 this is no more than the quota itself, so no quota is negative.
  """

  def __init__(self, parts: list[fractions.Fraction], *, batch_rows: int):
    self.num_steps = math.lcm(*((batch_rows * part).denominator for part in parts))
    self.settled = 0  # what rounding leaves to the last step is less than the margin, so it makes no row due
    counts = [int(batch_rows * self.num_steps * part) for part in parts]
    edges = [(batch_rows << FRAC_BITS) * part // 1 for part in itertools.accumulate(parts, initial=fractions.Fraction(0))]
    quotas = [high - low for low, high in itertools.pairwise(edges)]
    last = [(n << FRAC_BITS) - (self.num_steps - 1) * quota for n, quota in zip(counts, quotas, strict=True)]
    self.counts_M, self._quota_M, self._last_M = np.array(counts), np.array(quotas), np.array(last)

  @classmethod
  def of(cls, shares_M: Sequence[float], *, batch_rows: int) -> "Cycle | None":
    """None if the shares, as they are written, have no common denominator up to 2**20."""
    exact = [fractions.Fraction(str(share)) for share in shares_M]
    total = sum(exact)
    if total == 0 or math.lcm(*((share / total).denominator for share in exact)) > _MAX_DENOMINATOR:
      return None
    return cls([share / total for share in exact], batch_rows=batch_rows)

  def num_before(self, limits: Sequence[int]) -> int:
    """How many cycles are over before any source's quota passes its limit."""
    return min(limit // rows for limit, rows in zip(limits, self.counts_M.tolist(), strict=True) if rows)

  def shares(self, start: int, stop: int) -> np.ndarray:
    """Asked for behind the end alone."""
    return np.zeros((len(self.counts_M), stop - start))

  def quotas(self, start: int, stop: int, open_M: np.ndarray) -> np.ndarray:
    """See Schedule."""
    assert open_M.all(), "a cycle ends before a source does"
    num_steps = max(min(stop, self.num_steps) - start, 0)
    quotas = np.repeat(self._quota_M[:, None], num_steps, 1)
    if num_steps and start + num_steps == self.num_steps:
      quotas[:, -1] = self._last_M
    return quotas


class Quotas:
  """Running sums of a schedule's quotas, each held at its source's limit, plus a margin.

  A sum is kept as whole rows and 2**-40 parts, int64 [M] each, before or after a step.

  `ended_M` is the step in which a source gives its last rows (NEVER: not known to end), `ends` all that is known to happen,
  perhaps behind `num_steps`. Both grow as blocks are asked for in order; asking for one again changes nothing.
  """

  def __init__(self, schedule: Schedule, *, limits: Sequence[int], actions: Sequence[str], batch_rows: int, num_steps: int):
    self.num_sources, self.num_steps, self.settled = len(limits), num_steps, schedule.settled
    self.margin = _ONE // (2 * self.num_sources + 1)
    self.ended_M = np.full(self.num_sources, NEVER)
    self.ends: set[End] = set()
    self._schedule, self._limits, self._actions, self._batch_rows = schedule, list(limits), list(actions), batch_rows

  def block(self, step: int, whole_M: np.ndarray, frac_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the sums before `step` on: by how many whole rows they rise in each step of a block, and their parts after it.

    int64 [M, steps] each; fewer steps than a block's if the run ends.
    Raises ConfigError: a step of the run at which every share is 0.
    """
    stop, empty = step + BLOCK_STEPS, np.zeros((self.num_sources, 0), np.int64)
    rises, fracs = [empty], [empty]
    while step < stop:
      rise, frac = _accumulate(self._schedule.quotas(step, stop, self.ended_M >= step), frac_M)
      num_steps = self._num_within(whole_M, rise, frac)
      if num_steps == 0:
        last = self._last_rows(step, _join(whole_M, frac_M))
        if last is None:
          break
        num_steps, (rise, frac) = 1, _accumulate(np.array(last)[:, None], frac_M)
      rises.append(rise[:, :num_steps])
      fracs.append(frac[:, :num_steps])
      whole_M, frac_M, step = whole_M + rises[-1].sum(1), fracs[-1][:, -1], step + num_steps
    return np.concatenate(rises, 1), np.concatenate(fracs, 1)

  def num_up(self, fracs: np.ndarray) -> np.ndarray:
    """int32 [steps]: how many rows the whole parts of the sums fall short of the run's rows."""
    return ((fracs.sum(0) - self.num_sources * self.margin) >> FRAC_BITS).astype(np.int32)

  def next_rises(self, step: int, whole_M: np.ndarray, frac_M: np.ndarray) -> np.ndarray:
    """int64 [M]: the first step, `step` or later, in which each sum rises by a whole row; the shares move no more."""
    rises, sums = [NEVER] * self.num_sources, _join(whole_M, frac_M)
    while True:
      quotas = self._schedule.quotas(step, step + 1, self.ended_M >= step).sum(1).tolist()  # zeros if no source has a share
      num_steps = min((room // q for room, q in zip(self._rooms(sums), quotas, strict=True) if q), default=0)
      for m, quota in enumerate(quotas):
        steps_left = -((sums[m] % _ONE - _ONE) // quota) if quota else NEVER
        if steps_left <= num_steps:
          rises[m] = min(rises[m], step + steps_left - 1)
        sums[m] += num_steps * quota
      step += num_steps
      last = self._last_rows(step, sums) if step < NEVER and max(rises) == NEVER else None
      if last is None:
        return np.array(rises)
      for m, quota in enumerate(last):
        if sums[m] % _ONE + quota >= _ONE:
          rises[m] = min(rises[m], step)
        sums[m] += quota
      step += 1

  def _rooms(self, sums: list[int]) -> list[int]:
    return [(limit << FRAC_BITS) + self.margin - total for limit, total in zip(self._limits, sums, strict=True)]

  def _num_within(self, whole_M: np.ndarray, rises: np.ndarray, fracs: np.ndarray) -> int:
    """The leading steps after which no sum is past its limit."""
    num_steps, limits = rises.shape[1], np.array(self._limits)
    near = np.flatnonzero(limits - whole_M <= self._batch_rows * num_steps)
    above = whole_M[near, None] + np.cumsum(rises[near], 1) - limits[near, None]
    past = ((above > 0) | ((above == 0) & (fracs[near] > self.margin))).any(0)
    return int(past.argmax()) if past.any() else num_steps

  def _last_rows(self, step: int, sums: list[int]) -> list[int] | None:
    """The quotas of a step in which sources end, exact from the shares' floats on; None if the run ends before it."""
    shares = [fractions.Fraction(share) for share in self._schedule.shares(step, step + 1)[:, 0].tolist()]
    if not any(shares) and step < self.num_steps:
      raise ConfigError(f"data.sources: every share is 0 at step {step}; give a source a share above 0 there")
    wanted = [m for m, share in enumerate(shares) if share]
    shares = [share if ended >= step else fractions.Fraction(0) for share, ended in zip(shares, self.ended_M, strict=True)]
    rooms, quotas, left, ending = self._rooms(sums), [0] * self.num_sources, self._batch_rows << FRAC_BITS, []
    while total := sum(shares):
      edges = [left * share // total for share in itertools.accumulate(shares, initial=fractions.Fraction(0))]
      parts = [high - low for low, high in itertools.pairwise(edges)]
      over = [m for m, part in enumerate(parts) if part > rooms[m]]
      refused = [End(m, step, self._actions[m]) for m in over if self._actions[m] != "renormalise"]
      if refused:
        self.ends.update(refused)
        return None
      if not over:
        self.ended_M[ending] = step
        self.ends.update(End(m, step, "renormalise") for m in ending)
        return [quota + part for quota, part in zip(quotas, parts, strict=True)]
      ending += over
      for m in over:  # its last rows; the others share what is left
        quotas[m], left, shares[m] = rooms[m], left - rooms[m], fractions.Fraction(0)
    self.ends.update(End(m, step, "stop") for m in ending or wanted)
    return None


def _first_behind(time: float) -> int:
  """The first step whose middle is not before `time`."""
  return math.ceil(time - 0.5)


def _accumulate(quotas: np.ndarray, frac_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rises and parts of sums that had the parts `frac_M`. The sums overflow, yet their low bits are right."""
  sums = np.concatenate([frac_M[:, None], quotas], 1)
  np.cumsum(sums, 1, out=sums)
  sums &= _MASK
  return (quotas + sums[:, :-1]) >> FRAC_BITS, sums[:, 1:]


def _join(whole_M: np.ndarray, frac_M: np.ndarray) -> list[int]:
  return [whole << FRAC_BITS | frac for whole, frac in zip(whole_M.tolist(), frac_M.tolist(), strict=True)]


def _check_knots(source: int, knots: Sequence[tuple]) -> list[Knot]:
  checked = [Knot(float(step), float(share), *curve) for step, share, *curve in knots]
  times, shares = [knot.step for knot in checked], [knot.share for knot in checked]
  if not (all(map(math.isfinite, times)) and times == sorted(times)):
    raise ConfigError(f"data.sources, source {source}: the times of its share's knots {times} must be finite and rise")
  if not all(0 <= share <= 1e100 for share in shares):
    raise ConfigError(f"data.sources, source {source}: its shares {shares} must be finite and not negative, at most 1e100")
  for left, right in itertools.pairwise(checked):
    if right.curve not in CURVES:
      raise ConfigError(f"data.sources, source {source}: a knot's curve {right.curve!r} is none of {', '.join(CURVES)}")
    if right.curve == "log" and left.step < right.step and not (left.share and right.share):
      raise ConfigError(
        f"data.sources, source {source}: a log ramp from share {left.share:g} to {right.share:g} has no logarithm at 0; "
        "put a small share there, or make the ramp linear"
      )
  return checked
