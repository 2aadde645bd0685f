"""Shares over time -> which source, and which of its rows, row `i` of the run is.

Pure: no state, no I/O. After every step each source's row count is its quota, the sum of share * batch_rows over the steps,
less than a row off. Called by data.pipeline; has the interface of grain.transforms.DatasetSelectionMap.
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

_FRAC_BITS = 40  # quotas are exact integers in 2**-40 rows, so that every host draws the same rows
_ONE = 1 << _FRAC_BITS
_MASK = _ONE - 1
_BLOCK_STEPS = 1024  # steps that are worked out at once; the state is kept at the borders of blocks only
_CHUNK_ROWS = 4096  # rows of a batch that are laid out at once
_MAX_DENOMINATOR = 1 << 20  # of constant shares with a period: what a period's rounding leaves out is less than its last step
_NEVER = 1 << 62  # a step, or a number of rows, beyond every run
_DECIMAL = decimal.Context(prec=50)  # of which a float keeps 17 digits, so all machines round alike


class Knot(NamedTuple):
  """A source's share at a time.

  `curve` is the way from the knot before to this one: "linear"; "log", straight in the logarithm, both shares above 0; "hold",
  the share of the knot before up to this one's time.
  """

  step: float
  share: float
  curve: str = "linear"


class End(NamedTuple):
  """`step` is the first in which `source` has fewer rows left than its quota asks for.

  With "renormalise" it gives its last rows up to and in this step, and the others the rest; with "stop" and "error" the run
  ends before it.
  """

  source: int
  step: int
  action: str


class Mixture:
  """Sources interleaved by shares that move over time; source m's rows are numbered 0, 1, 2, .. without a gap.

  `shares_M` gives each source's knots, (step, share) or (step, share, curve), in steps of the run; the share is constant
  before the first and after the last, and two knots at one time are a jump. The share of step t is read at its middle, t + 0.5
  (so a ramp's sum is its integral), and normalised over the sources.

  Quotas. A source's quota is the sum of share * batch_rows from `start_step` on; a step's quotas sum to batch_rows exactly. A
  source with a limit of `limits_M[m]` rows (None = no limit) ends in the first step in which its quota would pass the limit:
  with `at_end_M[m]` = "renormalise" the quota stays at the limit, and the others share what is left of this step and all of
  the later ones; with "stop" or "error", or when no source with a share is left, the run's rows end before this step.
  `end_step` is where they end, `ends` says what happened on the way, in order of time.

  Rows. Those that a source gives in each step are chosen by earliest deadline, with a margin e = 1 / (2 M + 1). Unit j of a
  source (its row number j) may be drawn from the first step whose closing quota exceeds j + e on, and must be drawn by the
  first step whose closing quota reaches j + 1 - e. Units of one source whose window lies inside some steps number at most 2 e
  more than its quota of those steps; summed over the sources this is less than 1 more than the steps' rows, so, being whole,
  no more than their rows. By Hall's theorem all the windows can be met, and earliest deadline first meets them, as it does for
  unit jobs, whatever the order among equal deadlines (here that of the sources). Nor does a row lack a unit: those that may be
  drawn by the end of a step number at least the quotas less M e < 1/2, so, being whole, the rows. This needs of the quotas
  only that they never fall and that a step's sum to its rows, so it holds for limits too.
  So after every step a source is less than 1 - e rows off its quota (compare Tijdeman's bound 1 - 1 / (2 M - 2) for one row
  a step, doi 10.1016/0012-365X(80)90269-1), and never above its limit L: unit L would need a quota above L + e. When it ends, it has
  given exactly L: its last unit is due as soon as the quota is L. A unit that had begun when its source fell to share 0 may be
  drawn later.

  Constant shares whose normalised values are fractions of a common denominator up to 2**20 have a period of T steps, after
  which all quotas are whole. Then every unit that had begun is due, so all counts are the quotas and the rows go on as from the
  start: T steps are worked out however long the run is, up to the last whole period before a source ends.

  Rows do not depend on `num_steps`: a longer run begins with the rows of the shorter one, if the knots in steps are the same.

  Raises:
    ConfigError: a share that is negative or not finite, knots out of order, a log ramp from or to 0, a step of the run at which
      every share is 0.
  """

  def __init__(
    self,
    shares_M: Sequence[Sequence[tuple]],
    *,
    num_steps: int,
    batch_rows: int,
    start_step: int = 0,
    limits_M: Sequence[int | None] | None = None,
    at_end_M: Sequence[str] | None = None,
  ):
    assert 0 <= start_step <= num_steps and 0 < batch_rows < 1 << 22, f"{start_step=} {num_steps=} {batch_rows=}"
    self.num_steps, self.batch_rows, self.start_step, self.num_sources = num_steps, batch_rows, start_step, len(shares_M)
    limits = [_NEVER if limit is None else limit for limit in limits_M or [None] * self.num_sources]
    actions = list(at_end_M or ["renormalise"] * self.num_sources)
    assert len(limits) == len(actions) == self.num_sources and set(actions) <= set(AT_END), f"{limits_M=} {at_end_M=}"
    self._curves = _Curves([_check_knots(m, knots) for m, knots in enumerate(shares_M)], batch_rows)
    rest_step, rest_M, self._period = start_step, np.zeros(self.num_sources, np.int64), None
    constant_M = self._curves.constant_from(start_step)
    period = constant_M and _Period.of(constant_M, batch_rows)
    if period and period.num_whole(limits):
      rest_step = min(start_step + period.num_whole(limits) * period.num_steps, num_steps)
      num_period_steps = min(period.num_steps, rest_step - start_step)
      unlimited = [_NEVER] * self.num_sources
      self._period, self._repeated = period, _Draws(period, unlimited, actions, batch_rows, 0, num_period_steps, rest_M)
      rest_M = (rest_step - start_step) // period.num_steps * period.counts_M
    self._rest_step, self._rest = rest_step, _Draws(self._curves, limits, actions, batch_rows, rest_step, num_steps, rest_M)
    self.end_step, self.ends = self._rest.end_step, self._rest.ends
    self._chunk = functools.lru_cache(64)(self._chunk_rows)

  def __len__(self) -> int:
    return self.end_step * self.batch_rows

  def __getitem__(self, row: int) -> tuple[int, int]:
    return self.locate(row)

  def locate(self, row: int) -> tuple[int, int]:
    """(source, number of the row within that source, from `start_step` on) of row `row` of the run."""
    if not self.start_step * self.batch_rows <= row < len(self):
      raise IndexError(f"row {row} of a run of the rows {self.start_step * self.batch_rows} to {len(self)}")
    step, at = divmod(row, self.batch_rows)
    source_B, local_B = self._chunk(step, at // _CHUNK_ROWS)
    return int(source_B[at % _CHUNK_ROWS]), int(local_B[at % _CHUNK_ROWS])

  def counts(self, step: int) -> np.ndarray:
    """int64 [M]: rows that each source gave in the steps from `start_step` on and before `step`."""
    assert self.start_step <= step <= self.end_step, f"step {step} of the steps {self.start_step} to {self.end_step}"
    if step > self._rest_step or self._period is None:
      return self._rest.counts(step)
    num_periods, at = divmod(step - self.start_step, self._period.num_steps)
    return num_periods * self._period.counts_M + self._repeated.counts(at)

  def shares(self, step: int) -> np.ndarray:
    """float64 [M]: normalised shares of the batch of `step`, of the sources that have not ended before it."""
    open_M = self._rest.ended_M >= step
    shares = np.where(open_M, self._curves.shares(step, step + 1)[:, 0], 0.0)
    total = math.fsum(shares.tolist())
    return shares / total if total > 0 else shares

  def _chunk_rows(self, step: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and number of each row of a part of a batch, every source's rows spread evenly over the batch.

    Row n of the N that a source gives lies at (n + 0.5) / N of the batch. As many rows lie before x as x * batch_rows, give or
    take 1/2 for each source, so only rows near the chunk need to be sorted.
    """
    before_M = self.counts(step)
    num_M = self.counts(step + 1) - before_M
    low, high = chunk * _CHUNK_ROWS, min((chunk + 1) * _CHUNK_ROWS, self.batch_rows)
    first_M = np.maximum(num_M * (2 * low - self.num_sources) // (2 * self.batch_rows), 0)
    last_M = np.minimum(num_M * (2 * high + self.num_sources) // (2 * self.batch_rows) + 1, num_M)
    near_M = last_M - first_M
    source = np.repeat(np.arange(self.num_sources), near_M)
    nth = np.arange(len(source)) + np.repeat(first_M - (np.cumsum(near_M) - near_M), near_M)
    order = np.lexsort((source, (nth + 0.5) / num_M[source]))[low - first_M.sum() : high - first_M.sum()]
    return source[order], (before_M[source] + nth)[order]


class _Schedule(Protocol):
  """What each source is owed in each step."""

  settled: int  # the quotas of this step are those of every later one

  def shares(self, start: int, stop: int) -> np.ndarray:
    """float64 [M, steps], not normalised; 0 for every source where there are no rows."""
    ...

  def quotas(self, start: int, stop: int, open_M: np.ndarray) -> np.ndarray:
    """int64 [M, steps]: in 2**-40 rows, of the sources in `open_M`; ends early before a step in which none has a share."""
    ...


class _Curves:
  """The schedule that knots describe."""

  def __init__(self, knots_M: list[list[Knot]], batch_rows: int):
    self._batch_rows, self.knots_M = batch_rows, knots_M
    self._times_M = [[knot.step for knot in knots] for knots in knots_M]
    # As step t is read at t + 0.5, the steps at which some source's share goes on to another line.
    self._borders = sorted({math.ceil(time - 0.5) for times in self._times_M for time in times})
    self.settled = self._borders[-1]
    self._lines = functools.lru_cache(8)(self._lines_after)

  def between(self, m: int, step: int) -> tuple[Knot, Knot]:
    """The knots before and after the middle of `step`; the same one twice before the first and after the last."""
    after = bisect.bisect_right(self._times_M[m], step + 0.5)
    return self.knots_M[m][max(after - 1, 0)], self.knots_M[m][min(after, len(self.knots_M[m]) - 1)]

  def constant_from(self, step: int) -> list[float] | None:
    """The shares, if they are those of `step` for ever."""
    shares_M = [self.between(m, step)[0].share for m in range(len(self.knots_M))]
    moved = (k.step > step + 0.5 and k.share != share for knots, share in zip(self.knots_M, shares_M, strict=True) for k in knots)
    return None if any(moved) else shares_M

  def shares(self, start: int, stop: int) -> np.ndarray:
    shares = np.empty((len(self.knots_M), stop - start))
    step = start
    while step < stop:
      border = bisect.bisect_right(self._borders, step)
      end = min([stop, *self._borders[border : border + 1]])
      span = shares[:, step - start : end - start]
      time_M, value_M, slope_M, logs = self._lines(border, step if border == 0 else self._borders[border - 1])
      # One operation on each array at a time: no fused multiply-add, the same bits on every machine.
      np.multiply(slope_M[:, None], np.arange(end - step), out=span)
      span += (value_M + slope_M * (step + 0.5 - time_M))[:, None]
      np.maximum(span, 0.0, out=span)
      for m, line in logs:
        span[m] = line.shares(step, end)
      step = end
    return shares

  def _lines_after(self, border: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    pairs = [self.between(m, step) for m in range(len(self.knots_M))]
    slopes = [(b.share - a.share) / (b.step - a.step) if a != b and b.curve == "linear" else 0.0 for a, b in pairs]
    logs = [(m, _LogRamp(a, b, step)) for m, (a, b) in enumerate(pairs) if a != b and b.curve == "log"]
    time_M, value_M = np.array([a.step for a, _ in pairs]), np.array([a.share for a, _ in pairs])
    return time_M, value_M, np.array(slopes), logs

  def quotas(self, start: int, stop: int, open_M: np.ndarray) -> np.ndarray:
    shares = self.shares(start, stop)
    shares[~open_M] = 0.0
    for before, share in itertools.pairwise(shares):
      share += before  # from here on running sums over the sources, the last is the total
    total = shares[-1].copy()
    if not total.min() > 0:
      num_steps = int(np.argmin(total > 0))
      shares, total = shares[:, :num_steps], total[:num_steps]
    shares /= total
    shares *= float(self._batch_rows << _FRAC_BITS)
    # Differences of rounded running sums: never negative, 0 for a share of 0, and together the step's rows exactly.
    return np.diff(shares.astype(np.int64), axis=0, prepend=0)


class _LogRamp:
  """A share that rises by one factor in each step: correctly rounded anchors and ratios, so that long ramps keep their sum."""

  def __init__(self, left: Knot, right: Knot, first_step: int):
    time, value, last_time, last_value = map(decimal.Decimal, (left.step, left.share, right.step, right.share))
    rate = _DECIMAL.divide(_DECIMAL.ln(_DECIMAL.divide(last_value, value)), last_time - time)
    self._first_step, self._growth = first_step, _DECIMAL.exp(rate)
    offset = _DECIMAL.multiply(rate, decimal.Decimal(first_step + 0.5) - time)
    self._first_share = _DECIMAL.multiply(value, _DECIMAL.exp(offset))
    num_ratios = min(_BLOCK_STEPS, math.ceil(right.step) - first_step + 1)
    ratios = itertools.accumulate([self._growth] * num_ratios, _DECIMAL.multiply, initial=decimal.Decimal(1))
    self._ratios = np.array([float(ratio) for ratio in ratios])

  def shares(self, start: int, stop: int) -> np.ndarray:
    """float64 [steps]; at most a block of them."""
    anchor = _DECIMAL.multiply(self._first_share, _DECIMAL.power(self._growth, start - self._first_step))
    return float(anchor) * self._ratios[: stop - start]


class _Period:
  """Constant shares that are exact fractions: after `num_steps` steps every quota is a whole number of rows."""

  def __init__(self, parts: list[fractions.Fraction], batch_rows: int):
    self.num_steps = self.settled = math.lcm(*((batch_rows * part).denominator for part in parts))
    self.counts_M = np.array([int(batch_rows * self.num_steps * part) for part in parts])
    edges = [0, *((batch_rows << _FRAC_BITS) * part // 1 for part in itertools.accumulate(parts))]
    self._quotas = np.diff(np.array(edges, np.int64))
    # What rounding left out, less than num_steps * 2**-40 rows of each source, is made good in the last step.
    lasts = [(int(n) << _FRAC_BITS) - (self.num_steps - 1) * int(q) for n, q in zip(self.counts_M, self._quotas, strict=True)]
    self._last = np.array(lasts)

  @classmethod
  def of(cls, shares_M: list[float], batch_rows: int) -> "_Period | None":
    """None if the shares, as they are written, are no fractions of a small common denominator."""
    exact = [fractions.Fraction(str(share)) for share in shares_M]
    total = sum(exact)
    if total == 0 or math.lcm(*((share / total).denominator for share in exact)) > _MAX_DENOMINATOR:
      return None
    return cls([share / total for share in exact], batch_rows)

  def num_whole(self, limits: list[int]) -> int:
    """How many periods fit in before a source ends."""
    return min([limit // rows for limit, rows in zip(limits, self.counts_M.tolist(), strict=True) if rows])

  def shares(self, start: int, stop: int) -> np.ndarray:
    return np.zeros((len(self.counts_M), stop - start))  # asked for after the period only

  def quotas(self, start: int, stop: int, open_M: np.ndarray) -> np.ndarray:
    num_steps = max(min(stop, self.num_steps) - start, 0)
    quotas = np.repeat(self._quotas[:, None], num_steps, 1)
    if num_steps and start + num_steps == self.num_steps:
      quotas[:, -1] = self._last
    return quotas


class _Draws:
  """Who gives the rows of the steps [start, stop) of a schedule, from `counts_M` rows and whole quotas on.

  Only the state at the borders of blocks is kept: quotas + margin as whole rows (those that must have been drawn) and 2**-40
  parts; the sources that are "up", one row ahead of that; and the order in which sources must draw their next row from the
  block's end on. A source may be up where its part is above two margins.
  """

  def __init__(
    self,
    schedule: _Schedule,
    limits: list[int],
    actions: list[str],
    batch_rows: int,
    start: int,
    stop: int,
    counts_M: np.ndarray,
  ):
    self._schedule, self._limits_M, self._actions, self._batch_rows = schedule, np.array(limits), actions, batch_rows
    self._start, self._stop, self.end_step, self._num_sources = start, stop, stop, len(limits)
    self._margin = _ONE // (2 * self._num_sources + 1)
    self.ended_M = np.full(self._num_sources, _NEVER)  # the step in which a source gives its last rows
    self._all_ends: set[End] = set()
    self._quotas_at: list[tuple[np.ndarray, np.ndarray]] = []
    self._ups_at, self._later = [], []
    self._counts_M = counts_M
    self._counts_of_block = functools.lru_cache(4)(self._block_counts)
    if start < stop:
      self._run(counts_M)
    self.ends = tuple(sorted((end for end in self._all_ends if end.step < stop), key=lambda end: (end.step, end.source)))

  def counts(self, step: int) -> np.ndarray:
    """int64 [M]: rows that each source gave before `step`."""
    if not self._quotas_at:
      return self._counts_M.copy()
    block, at = divmod(step - self._start, _BLOCK_STEPS)
    if block == len(self._quotas_at):
      block, at = block - 1, _BLOCK_STEPS  # the last block ends here
    return self._counts_of_block(block)[at].copy()

  def _run(self, whole_M: np.ndarray) -> None:
    """Scans the quotas forward, until each source's next deadline after the last block is known; then draws."""
    frac_M = np.full(self._num_sources, self._margin)
    sets, reach = [], []  # reach: the first step of each block in which another unit of a source is due
    step, awaited_M = self._start, np.ones(self._num_sources, bool)
    while step < self._stop or (step < self._schedule.settled and awaited_M.any()):
      rises, fracs = self._block(step, whole_M, frac_M)
      due = rises > 0
      due_M = due.any(1)
      if step < self._stop and due.shape[1]:
        self._quotas_at.append((whole_M, frac_M))
        sets.append(self._sets(due, fracs))
      else:
        awaited_M &= ~due_M
      reach.append(np.where(due_M, step + (due.argmax(1) if due.shape[1] else 0), _NEVER))
      if due.shape[1] < _BLOCK_STEPS:
        self.end_step = min(step + due.shape[1], self._stop)
        reach.append(np.full(self._num_sources, _NEVER))
        break
      whole_M, frac_M, step = whole_M + rises.sum(1), fracs[:, -1], step + _BLOCK_STEPS
    else:
      reach.append(self._settled_reach(step, whole_M, frac_M))
    reach = np.minimum.accumulate(reach[::-1])[::-1][1 : len(sets) + 1]
    self._later = np.argsort(reach, axis=1, kind="stable")
    up = 0
    for block, block_sets in enumerate(sets):
      self._ups_at.append(up)
      up = _draw(up, *block_sets, self._later[block])[-1]

  def _block(self, step: int, whole_M: np.ndarray, frac_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how many rows quotas + margin rise in each step of a block, and their parts after it: int64 [M, steps] each.

    Fewer than a block's steps if the run ends.
    """
    stop = step + _BLOCK_STEPS
    rises, fracs = [np.zeros((self._num_sources, 0), np.int64)], [np.zeros((self._num_sources, 0), np.int64)]
    while step < stop:
      rise, frac = _accumulate(self._schedule.quotas(step, stop, self.ended_M >= step), frac_M)
      num_steps = self._num_fitting(whole_M, rise, frac)
      if num_steps == 0:
        last = self._last_rows(step, _join(whole_M, frac_M))
        if last is None:
          break
        rise, frac = _accumulate(np.array(last)[:, None], frac_M)
        num_steps = 1
      rises.append(rise[:, :num_steps])
      fracs.append(frac[:, :num_steps])
      whole_M, frac_M, step = whole_M + rises[-1].sum(1), fracs[-1][:, -1], step + num_steps
    return np.concatenate(rises, 1), np.concatenate(fracs, 1)

  def _num_fitting(self, whole_M: np.ndarray, rises: np.ndarray, fracs: np.ndarray) -> int:
    """The leading steps in which no quota passes its source's limit."""
    num_steps = rises.shape[1]
    near = np.flatnonzero(self._limits_M - whole_M <= self._batch_rows * num_steps)
    limits = self._limits_M[near, None]
    wholes = whole_M[near, None] + np.cumsum(rises[near], 1)
    passed = ((wholes > limits) | (wholes == limits) & (fracs[near] > self._margin)).any(0)
    return int(passed.argmax()) if passed.any() else num_steps

  def _last_rows(self, step: int, sums: list[int]) -> list[int] | None:
    """Quotas of a step in which sources end, exactly; None if the run ends before it. `sums`: quotas + margin before it."""
    shares = [fractions.Fraction(share) for share in self._schedule.shares(step, step + 1)[:, 0].tolist()]
    if not any(shares) and step < self._stop:
      raise ConfigError(f"data.sources: every share is 0 at step {step}; give a source a share above 0 there")
    asked = [m for m, share in enumerate(shares) if share]
    room = [(limit << _FRAC_BITS) + self._margin - total for limit, total in zip(self._limits_M.tolist(), sums, strict=True)]
    given, left, ending = [0] * self._num_sources, self._batch_rows << _FRAC_BITS, []
    for m in np.flatnonzero(self.ended_M < step):
      shares[m] = fractions.Fraction(0)
    while total := sum(shares):
      edges = [left * share // total for share in itertools.accumulate(shares, initial=fractions.Fraction(0))]
      owed = [high - low for low, high in itertools.pairwise(edges)]
      over = [m for m in range(self._num_sources) if owed[m] > room[m]]
      stopping = [m for m in over if self._actions[m] != "renormalise"]
      if stopping:
        self._all_ends.update(End(m, step, self._actions[m]) for m in stopping)
        return None
      if not over:
        self._all_ends.update(End(m, step, "renormalise") for m in ending)
        self.ended_M[ending] = step
        return [a + b for a, b in zip(given, owed, strict=True)]
      ending += over
      for m in over:
        given[m], left, shares[m] = room[m], left - room[m], fractions.Fraction(0)
    self._all_ends.update(End(m, step, "stop") for m in ending or asked)
    return None

  def _settled_reach(self, step: int, whole_M: np.ndarray, frac_M: np.ndarray) -> np.ndarray:
    """int64 [M]: the step from `step` on by which each source's next unit must be drawn, with the shares that hold for ever."""
    reach, sums = [_NEVER] * self._num_sources, _join(whole_M, frac_M)
    while True:
      quotas = self._schedule.quotas(step, step + 1, self.ended_M >= step).sum(1).tolist()  # zeros if no source has a share
      rooms = [(limit << _FRAC_BITS) + self._margin - total for limit, total in zip(self._limits_M.tolist(), sums, strict=True)]
      num_steps = min([room // quota for room, quota in zip(rooms, quotas, strict=True) if quota], default=0)
      for m, quota in enumerate(quotas):
        steps_left = -((sums[m] % _ONE - _ONE) // quota) if quota else _NEVER
        if steps_left <= num_steps:
          reach[m] = min(reach[m], step + steps_left - 1)
        sums[m] += num_steps * quota
      step += num_steps
      last = self._last_rows(step, sums) if step < _NEVER and max(reach) == _NEVER else None
      if last is None:
        return np.array(reach)
      reach = [min(r, step) if (a + b) >> _FRAC_BITS > a >> _FRAC_BITS else r for r, a, b in zip(reach, sums, last, strict=True)]
      sums, step = [a + b for a, b in zip(sums, last, strict=True)], step + 1

  def _sets(self, due: np.ndarray, fracs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each step: the sources of which a unit is due, those that may be up after it, and how many are."""
    num_up = (fracs.sum(0) - self._num_sources * self._margin) >> _FRAC_BITS
    return _pack(due), _pack(fracs > 2 * self._margin), num_up.astype(np.int32)

  def _block_counts(self, block: int) -> np.ndarray:
    """int64 [steps + 1, M]: `counts` at the borders of a block's steps."""
    whole_M, frac_M = self._quotas_at[block]
    rises, fracs = self._block(self._start + block * _BLOCK_STEPS, whole_M, frac_M)
    ups = [self._ups_at[block]]
    ups += _draw(ups[0], *self._sets(rises > 0, fracs), self._later[block])
    num_bytes = -(-self._num_sources // 8)
    bits = np.frombuffer(b"".join(up.to_bytes(num_bytes, "little") for up in ups), np.uint8).reshape(-1, num_bytes)
    counts = np.unpackbits(bits, axis=1, count=self._num_sources, bitorder="little") + whole_M
    counts[1:] += np.cumsum(rises, 1).T
    return counts


def _draw(up: int, due: np.ndarray, may: np.ndarray, num_up: np.ndarray, later: np.ndarray) -> list[int]:
  """The sources that are one row ahead after each step of a block, by earliest deadline first. Sets of sources are bits.

  `up`: those before the block; for the others see `_Draws`.
  """
  due_sets = _unpack(due)
  # Deadlines as sets in order of time: sources due at each step, then each by itself as they will be due after the block.
  deadlines = due_sets + [1 << m for m in later.tolist()]
  ups = []
  for step, (due_now, may_up, wanted) in enumerate(zip(due_sets, _unpack(may), num_up.tolist(), strict=True), 1):
    up &= ~due_now
    missing = wanted - up.bit_count()
    if missing:
      free = may_up & ~up
      while (nearest := free & deadlines[step]).bit_count() < missing:
        up |= nearest
        free ^= nearest
        missing -= nearest.bit_count()
        step += 1
      rest = nearest
      for _ in range(missing):
        rest &= rest - 1  # without its lowest bit
      up |= nearest ^ rest
    ups.append(up)
  return ups


def _accumulate(quotas: np.ndarray, frac_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rises in whole rows and parts of the running sums of quotas, int64 [M, steps]. The sums overflow, their low bits are right."""
  fracs = np.concatenate([frac_M[:, None], quotas], 1)
  np.cumsum(fracs, 1, out=fracs)
  fracs &= _MASK
  return (quotas + fracs[:, :-1]) >> _FRAC_BITS, fracs[:, 1:]


def _join(whole_M: np.ndarray, frac_M: np.ndarray) -> list[int]:
  return [whole << _FRAC_BITS | frac for whole, frac in zip(whole_M.tolist(), frac_M.tolist(), strict=True)]


def _pack(flags: np.ndarray) -> np.ndarray:
  """bool [M, steps] -> uint64 [steps, words], source m's bit in word m // 64."""
  packed = np.packbits(flags.T, axis=1, bitorder="little")
  words = np.zeros((len(packed), -(-len(flags) // 64) * 8), np.uint8)
  words[:, : packed.shape[1]] = packed
  return words.view("<u8")


def _unpack(words: np.ndarray) -> list[int]:
  sets = words[:, 0].tolist()
  for w in range(1, words.shape[1]):
    sets = [low | high << 64 * w for low, high in zip(sets, words[:, w].tolist(), strict=True)]
  return sets


def _check_knots(source: int, knots: Sequence[tuple]) -> list[Knot]:
  knots = [Knot(float(knot[0]), float(knot[1]), *knot[2:]) for knot in knots]
  times, shares = [knot.step for knot in knots], [knot.share for knot in knots]
  if not (all(map(math.isfinite, times)) and times == sorted(times)):
    raise ConfigError(f"data.sources, source {source}: the times of its share's knots {times} must be finite and rise")
  if not all(0 <= share <= 1e100 for share in shares):
    raise ConfigError(f"data.sources, source {source}: its shares {shares} must be finite and not negative")
  for left, right in itertools.pairwise(knots):
    if right.curve not in CURVES:
      raise ConfigError(f"data.sources, source {source}: a knot's curve {right.curve!r} is none of {', '.join(CURVES)}")
    if right.curve == "log" and left.step < right.step and not (left.share and right.share):
      raise ConfigError(
        f"data.sources, source {source}: a log ramp from share {left.share:g} to {right.share:g} has no logarithm at 0; "
        "give it a small share instead, or take a linear one"
      )
  return knots
