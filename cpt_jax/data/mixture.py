"""Shares over time -> which source, and which of its rows, row `i` of the run is.

Pure: no state, no I/O. After every step each source's row count is its quota, the sum of share * batch_rows over the steps,
less than a row off. Called by data.pipeline; has the interface of grain.transforms.DatasetSelectionMap.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from cpt_jax.config import ConfigError

_FRAC_BITS = 40  # quotas are exact integers in 2**-40 rows, so that every host draws the same rows
_ONE = np.int64(1) << _FRAC_BITS
_MASK = _ONE - 1
_BLOCK_STEPS = 1024  # steps whose counts are worked out at once when one of them is asked for
_NEVER = np.int64(1) << 42  # a step beyond every run


class Mixture:
  """Sources interleaved by shares that move over time; source m's rows are numbered 0, 1, 2, .. without a gap.

  `shares_M` gives each source's knots (step, share): linear between them, constant before the first and after the last; two
  knots at one time are a jump. The share of step t is read at its middle, t + 0.5 (so a ramp's sum is its integral), and
  normalised over the sources.

  The rows that a source gives in each step are chosen by earliest deadline, with a margin e = 1 / (2 M + 1). Unit j of a source
  (its row number j) may be drawn from the first step whose closing quota exceeds j + e on, and must be drawn by the first
  step whose closing quota reaches j + 1 - e. Units of one source that must lie inside some steps number at most 2 e more than its
  quota of those steps; summed over the sources this is less than 1 more than the steps' rows, so, being whole, no more than
  their rows. By Hall's theorem all the windows can be met, and earliest deadline first meets them, as it does for unit jobs.
  So after every step a source is less than 1 - e rows off its quota (compare Tijdeman's bound 1 - 1 / (2 M - 2) for one row
  a step, doi 10.1016/0012-365X(80)90269-1). A unit that had begun when its source fell to share 0 may be drawn later.

  Rows do not depend on `num_steps`: a longer run begins with the rows of the shorter one, if the knots in steps are the same.

  Raises:
    ConfigError: a share that is negative or not finite, knots out of order, a step at which every share is 0.
  """

  def __init__(self, shares_M: Sequence[Sequence[tuple[float, float]]], *, num_steps: int, batch_rows: int):
    assert num_steps >= 0 and 0 < batch_rows < 1 << 22, f"{num_steps=} {batch_rows=}"  # quotas of a step fit 62 bits
    self.num_steps, self.batch_rows, self.num_sources = num_steps, batch_rows, len(shares_M)
    self._knots = [_check_knots(m, knots) for m, knots in enumerate(shares_M)]
    last_knot = max(float(times[-1]) for times, _ in self._knots)
    self._margin = _ONE // (2 * self.num_sources + 1)
    self._horizon = max(num_steps, math.ceil(last_knot) + 1, 1)  # from here on shares are constant
    self._whole_border, self._frac_border, next_reach = self._scan_quotas()
    self._ups = self._draw(next_reach)
    self._counts_of_block = functools.lru_cache(4)(self._block_counts)
    self._rows_of_step = functools.lru_cache(64)(self._step_rows)

  def __len__(self) -> int:
    return self.num_steps * self.batch_rows

  def __getitem__(self, row: int) -> tuple[int, int]:
    return self.locate(row)

  def locate(self, row: int) -> tuple[int, int]:
    """(source, number of the row within that source) of row `row` of the run."""
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of a run of {len(self)} rows")
    source_B, local_B = self._rows_of_step(row // self.batch_rows)
    at = row % self.batch_rows
    return int(source_B[at]), int(local_B[at])

  def counts(self, step: int) -> np.ndarray:
    """int64 [M]: rows that each source gave in the steps before `step`."""
    assert 0 <= step <= self.num_steps, f"step {step} of a run of {self.num_steps}"
    block, at = divmod(step, _BLOCK_STEPS)
    if at == 0 and block > 0:
      block, at = block - 1, _BLOCK_STEPS  # the run's last block may end here
    return self._counts_of_block(block)[at].copy()

  def shares(self, step: int) -> np.ndarray:
    """float64 [M]: normalised shares of the batch of `step`."""
    return self._shares(step, step + 1)[0]

  def _shares(self, start: int, stop: int) -> np.ndarray:
    """float64 [steps, M]. One operation on each array at a time, in a fixed order: the same bits on every machine."""
    times = np.arange(start, stop) + 0.5
    shares = np.stack([_interpolate(times, *knots) for knots in self._knots], 1)
    total = np.zeros(len(times))
    for m in range(self.num_sources):
      total = total + shares[:, m]
    if not total.min(initial=1.0) > 0:
      step = start + int(np.argmin(total))
      raise ConfigError(f"data.sources: every share is 0 at step {step}; give a source a share above 0 there")
    return shares / total[:, None]

  def _step_quotas(self, start: int, stop: int) -> np.ndarray:
    """int64 [steps, M] in 2**-40 rows; each step sums to batch_rows exactly."""
    whole = self.batch_rows * int(_ONE)
    quotas = np.floor(self._shares(start, stop) * float(whole)).astype(np.int64)
    quotas[np.arange(len(quotas)), quotas.argmax(1)] += whole - quotas.sum(1)
    return quotas

  def _cumulative(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Quotas + margin at the borders of a block's steps: whole rows and 2**-40 parts, int64 [steps + 1, M].

    The whole rows are those that must have been drawn; one more may have been where the part is above two margins.
    """
    start = block * _BLOCK_STEPS
    quotas = self._step_quotas(start, min(start + _BLOCK_STEPS, self._horizon))
    return _accumulate(quotas, self._whole_border[block], self._frac_border[block])

  def _scan_quotas(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quotas + margin at block borders, and the first step from each border on by which another unit must be drawn."""
    num_blocks = -(-self._horizon // _BLOCK_STEPS)
    whole_border = np.zeros((num_blocks, self.num_sources), np.int64)
    frac_border = np.zeros_like(whole_border)
    next_reach = np.full((num_blocks + 1, self.num_sources), _NEVER)
    whole, frac = np.zeros(self.num_sources, np.int64), np.full(self.num_sources, self._margin)
    quotas = np.zeros((1, self.num_sources), np.int64)
    for block in range(num_blocks):
      start = block * _BLOCK_STEPS
      whole_border[block], frac_border[block] = whole, frac
      quotas = self._step_quotas(start, min(start + _BLOCK_STEPS, self._horizon))
      wholes, fracs = _accumulate(quotas, whole, frac)
      reached = wholes[1:] > wholes[:-1]
      next_reach[block] = np.where(reached.any(0), start + reached.argmax(0), _NEVER)
      whole, frac = wholes[-1], fracs[-1]
    steps_left = -((frac - _ONE) // np.maximum(quotas[-1], 1))  # rounded up; the last step's shares go on for ever
    next_reach[-1] = np.where(quotas[-1] > 0, np.minimum(self._horizon - 1 + steps_left, _NEVER), _NEVER)
    return whole_border, frac_border, np.minimum.accumulate(next_reach[::-1])[::-1]

  def _draw(self, next_reach: np.ndarray) -> np.ndarray:
    """uint8 [num_steps, bytes]: a bit for each source, 1 where it has given one row more after the step than it must."""
    num_bytes = -(-self.num_sources // 8)
    drawn = bytearray()
    bits = [1 << m for m in range(self.num_sources)]
    up = 0
    for block in range(-(-self.num_steps // _BLOCK_STEPS)):
      start = block * _BLOCK_STEPS
      size = min(_BLOCK_STEPS, self.num_steps - start)
      wholes, fracs = self._cumulative(block)
      held, wanted, queue = self._deadlines(start, wholes, fracs, next_reach[block + 1])
      for hold, num_up, sources in zip(held[:size], wanted[:size], queue[:size], strict=True):
        up &= hold
        missing = num_up - up.bit_count()
        for m in sources if missing else ():
          if not up & bits[m]:
            up |= bits[m]
            missing -= 1
            if not missing:
              break
        assert missing == 0, "earliest deadline first met an infeasible step"
        drawn += up.to_bytes(num_bytes, "little")
    return np.frombuffer(drawn, np.uint8).reshape(self.num_steps, num_bytes)

  def _deadlines(
    self, start: int, wholes: np.ndarray, fracs: np.ndarray, reach_after: np.ndarray
  ) -> tuple[list[int], list[int], list[list[int]]]:
    """For each step of a block: sources that stay one ahead if they were, how many are one ahead, and who is first in line."""
    reached = wholes[1:] > wholes[:-1]
    steps = start + np.arange(len(reached))[:, None]
    # The step by which a source's next unit must be drawn.
    reach = np.concatenate([np.where(reached, steps, _NEVER)[1:], reach_after[None]])
    reach = np.minimum.accumulate(reach[::-1])[::-1]
    # Among equal deadlines, the source furthest behind. 42 bits of steps, 20 of the part.
    urgency = ((reach - steps) << 20) | ((_MASK - fracs[1:]) >> 20)
    urgency[fracs[1:] <= 2 * self._margin] = np.iinfo(np.int64).max  # may not be drawn yet
    queue = np.argsort(urgency, axis=1, kind="stable").tolist()
    first_row = self.batch_rows * (start + 1)
    wanted = first_row + self.batch_rows * np.arange(len(reached)) - wholes[1:].sum(1)
    held = [int.from_bytes(row.tobytes(), "little") for row in np.packbits(~reached, axis=1, bitorder="little")]
    return held, wanted.tolist(), queue

  def _block_counts(self, block: int) -> np.ndarray:
    """int64 [steps + 1, M]: `counts` at the borders of a block's steps; the first border counts only in block 0."""
    start = block * _BLOCK_STEPS
    counts = self._cumulative(block)[0][: self.num_steps - start + 1].copy()
    ups = self._ups[start : start + len(counts) - 1]
    counts[1:] += np.unpackbits(ups, axis=1, count=self.num_sources, bitorder="little")
    return counts

  def _step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and local number of each row of a batch, every source's rows spread evenly over it."""
    before = self.counts(step)
    num_M = self.counts(step + 1) - before
    source_B = np.repeat(np.arange(self.num_sources), num_M)
    nth_B = np.arange(self.batch_rows) - np.repeat(np.cumsum(num_M) - num_M, num_M)
    order_B = np.lexsort((source_B, (nth_B + 0.5) / num_M[source_B]))
    return source_B[order_B], (before[source_B] + nth_B)[order_B]


def _check_knots(source: int, knots: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
  times, shares = (np.array(column, np.float64) for column in zip(*knots, strict=True))
  if not (np.isfinite(times).all() and (np.diff(times) >= 0).all()):
    raise ConfigError(f"data.sources, source {source}: the times of its share's knots {times.tolist()} must be finite and rise")
  if not (np.isfinite(shares).all() and (shares >= 0).all()):
    raise ConfigError(f"data.sources, source {source}: its shares {shares.tolist()} must be finite and not negative")
  return times, shares


def _interpolate(at: np.ndarray, times: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """Piecewise linear, constant beyond the ends. np.interp may fuse its operations on some machines; this does not."""
  knot = np.searchsorted(times, at, side="right") - 1  # the last one that is not later
  if len(times) == 1:
    return np.full(len(at), shares[0])
  left = np.clip(knot, 0, len(times) - 2)
  width = times[left + 1] - times[left]
  part = (np.clip(at, times[left], times[left + 1]) - times[left]) / np.where(width > 0, width, 1.0)
  rise = (shares[left + 1] - shares[left]) * part
  return np.where(knot == len(times) - 1, shares[-1], np.maximum(shares[left] + rise, 0.0))


def _accumulate(quotas: np.ndarray, whole: np.ndarray, frac: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Running sums of step quotas from (whole, frac) on, int64 [steps + 1, M] each; 64 bits cannot hold them in one number."""
  fracs = np.concatenate([frac[None], frac + np.cumsum(quotas & _MASK, 0)])
  wholes = np.concatenate([whole[None], whole + np.cumsum(quotas >> _FRAC_BITS, 0)])
  return wholes + (fracs >> _FRAC_BITS), fracs & _MASK
