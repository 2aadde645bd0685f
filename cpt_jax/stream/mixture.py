"""Shares over time -> which source, and which of its rows, row `i` of the run is.

Pure: no state, no I/O. After every step each source's row count is its quota, the sum of share * batch_rows over the steps,
less than a row off.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpt_jax.stream.quotas import AT_END, BLOCK_STEPS, NEVER, Curves, Cycle, End, Knot, Quotas

__all__ = ["End", "Knot", "Mixture"]

_CHUNK_ROWS = 4096  # rows of a batch that are laid out at once


class Mixture:
  """Sources interleaved by shares that move over time; source m's rows are numbered 0, 1, 2, .. without a gap.

  `shares_M` gives each source's knots, (step, share) or (step, share, curve) as in `Knot`, in steps of the run; see
  `quotas.Curves`. Shares are normalised over the sources.

  Quotas. A source's quota is the sum of share * batch_rows from `start_step` on. A source with a limit of `limits_M[m]` rows
  (None = no limit) ends in the first step in which its quota would pass the limit: with `at_end_M[m]` = "renormalise" (as by
  default) the quota stays at the limit, and the others share what is left of this step and all of the later ones; with "stop"
  or "error", or when no source with a share is left ("stop"), the run's rows end before this step. The rows of the run end
  before `end_step` <= num_steps; `ends` says what happened on the way, in order of time.

  Rows. Those that a source gives in each step are chosen by earliest deadline, with a margin e = 1 / (2 M + 1). Unit j of a
  source (its row number j) may be drawn from the first step whose closing quota exceeds j + e on, and must be drawn by the
  first step whose closing quota reaches j + 1 - e. Units of one source whose window lies inside some steps number at most 2 e
  more than its quota of those steps; summed over the sources this is less than 1 more than the steps' rows, so, being whole,
  no more than their rows. By Hall's theorem all the windows can be met, and earliest deadline first meets them, as it does for
  unit jobs, whatever the order among equal deadlines (here that of the sources). Nor does a row lack a unit: those that may be
  drawn by the end of a step number at least the sum of quotas - e, more than its rows less 1/2, so, being whole, its rows.
  This asks of the quotas only that they never fall and that a step's sum to its rows; it holds for limits too.
  So after every step a source is less than 1 - e rows off its quota (compare Tijdeman's bound 1 - 1 / (2 M - 2) for one row
  a step, doi 10.1016/0012-365X(80)90269-1), and never past its limit L, as unit L would need a quota above L + e; when it has
  ended it has given exactly L, as a quota of L makes unit L - 1 due. A unit that had begun when its source fell to share 0 may
  be drawn later.

  Constant shares that are fractions of a common denominator up to 2**20 have a cycle of so many steps that all quotas become
  whole. A unit that may be drawn before that time is due by then, and counts that sum to the quotas' sum then are the quotas;
  so the rows go on as from the start, and one cycle is worked out, however long the run is. It is repeated up to the last
  whole cycle before a source ends.

  Rows do not depend on `num_steps`: a longer run begins with the rows of the shorter one, if the knots in steps are the same.
  Raises ConfigError: see `quotas.Curves`; and a step of the run at which every share is 0.
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
    # Quotas of a step fit 62 bits.
    assert 0 <= start_step <= num_steps and 0 < batch_rows < 1 << 22, f"{start_step=} {num_steps=} {batch_rows=}"
    self.num_steps, self.batch_rows, self.start_step, self.num_sources = num_steps, batch_rows, start_step, len(shares_M)
    limits = [NEVER] * self.num_sources if limits_M is None else [NEVER if limit is None else int(limit) for limit in limits_M]
    actions = ["renormalise"] * self.num_sources if at_end_M is None else list(at_end_M)
    assert len(limits) == len(actions) == self.num_sources, f"{limits_M=} {at_end_M=} of {self.num_sources} sources"
    assert min(limits) >= 0 and set(actions) <= set(AT_END), f"{limits_M=} {at_end_M=}"
    self._curves = Curves(shares_M, batch_rows=batch_rows)
    self._chunk = functools.lru_cache(64)(self._chunk_rows)

    # Whole cycles first, if there is one and no source ends in it; then the rest.
    constant_M = self._curves.constant_from(start_step)
    cycle = Cycle.of(constant_M, batch_rows=batch_rows) if constant_M else None
    num_cycles = cycle.num_before(limits) if cycle else 0
    self._rest_step, count_M = start_step, np.zeros(self.num_sources, np.int64)
    if cycle and num_cycles:
      self._rest_step = min(start_step + num_cycles * cycle.num_steps, num_steps)
      self._cycle_steps, self._cycle_counts_M = cycle.num_steps, cycle.counts_M
      steps, endless = min(cycle.num_steps, self._rest_step - start_step), [NEVER] * self.num_sources
      quotas = Quotas(cycle, limits=endless, actions=actions, batch_rows=batch_rows, num_steps=steps)
      self._cycle = _Draws(quotas, start=0, count_M=count_M)
      count_M = self._repeated_counts(self._rest_step)
    self._quotas = Quotas(self._curves, limits=limits, actions=actions, batch_rows=batch_rows, num_steps=num_steps)
    self._rest = _Draws(self._quotas, start=self._rest_step, count_M=count_M)
    self.end_step = self._rest.end_step
    ends = (end for end in self._quotas.ends if end.step < num_steps)
    self.ends = tuple(sorted(ends, key=lambda end: (end.step, end.source)))

  def __len__(self) -> int:
    return self.end_step * self.batch_rows

  def __getitem__(self, row: int) -> tuple[int, int]:
    return self.locate(row)

  def locate(self, row: int) -> tuple[int, int]:
    """(source, number of the row within that source, from `start_step` on) of row `row` of the run."""
    if not self.start_step * self.batch_rows <= row < len(self):
      raise IndexError(f"row {row} is none of the rows {self.start_step * self.batch_rows} to {len(self) - 1}")
    step, at = divmod(row, self.batch_rows)
    chunk, at = divmod(at, _CHUNK_ROWS)
    source_B, local_B = self._chunk(step, chunk)
    return int(source_B[at]), int(local_B[at])

  def counts(self, step: int) -> np.ndarray:
    """int64 [M]: rows that each source gave in the steps from `start_step` on and before `step`."""
    assert self.start_step <= step <= self.end_step, f"step {step} is none of {self.start_step} to {self.end_step}"
    return self._rest.counts(step) if step >= self._rest_step else self._repeated_counts(step)

  def shares(self, step: int) -> np.ndarray:
    """float64 [M]: normalised shares of the batch of `step`, of the sources that have not ended before it."""
    share_M = np.where(self._quotas.ended_M >= step, self._curves.shares(step, step + 1)[:, 0], 0.0)
    return share_M / (math.fsum(share_M) or 1.0)

  def _repeated_counts(self, step: int) -> np.ndarray:
    num_cycles, at = divmod(step - self.start_step, self._cycle_steps)
    return num_cycles * self._cycle_counts_M + self._cycle.counts(at)

  def _chunk_rows(self, step: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and number of each row of a part of a batch, every source's rows spread evenly over the batch.

    Row n of the N that a source gives stands at (n + 0.5) / N. As many rows stand before x as x * batch_rows, give or take 1/2
    for each source, so that only rows near the chunk need to be sorted.
    """
    before_M = self.counts(step)
    num_M = self.counts(step + 1) - before_M
    low, high = chunk * _CHUNK_ROWS, min((chunk + 1) * _CHUNK_ROWS, self.batch_rows)
    first_M = np.maximum(num_M * (2 * low - self.num_sources) // (2 * self.batch_rows), 0)
    near_M = np.minimum(num_M * (2 * high + self.num_sources) // (2 * self.batch_rows) + 1, num_M) - first_M
    source = np.repeat(np.arange(self.num_sources), near_M)
    nth = np.arange(len(source)) + np.repeat(first_M - (np.cumsum(near_M) - near_M), near_M)
    order = np.lexsort((source, (nth + 0.5) / num_M[source]))[low - first_M.sum() : high - first_M.sum()]
    return source[order], (before_M[source] + nth)[order]


class _Draws:
  """Who gives the rows of the steps from `start` on, where each source has given `count_M` rows and is owed no part of one.

  A source has given the whole rows of its quota + margin, which it must, or is "up": one row more, which it may where the part
  is above two margins. Only the state at the borders of blocks is kept: the sums of the quotas, the sources that are up, and
  the order in which sources must give a further row from the block's end on. A block is worked out again when it is asked for.
  """

  def __init__(self, quotas: Quotas, *, start: int, count_M: np.ndarray):
    self._quotas, self._start, self._count_M = quotas, start, count_M
    self._counts_of_block = functools.lru_cache(4)(self._block_counts)
    self._sums, self._ups, self._later, self.end_step = [], [], [], start
    if start < quotas.num_steps:
      up, all_sets = 0, self._scan()
      for sets, later in zip(all_sets, self._later, strict=True):
        self._ups.append(up)
        up = _draw(up, sets, later)[-1]

  def counts(self, step: int) -> np.ndarray:
    """int64 [M]: rows that each source gave before `step`, those before `start` counted too."""
    if step == self._start:
      return self._count_M.copy()
    block, at = divmod(step - 1 - self._start, BLOCK_STEPS)
    return self._counts_of_block(block)[at].copy()

  def _scan(self) -> list["_Sets"]:
    """Of each block; keeps the sums and deadlines at its border. Goes on until it is known when each source must give its next
    row after the last block, so that a longer run does the same."""
    quotas, sets, dues = self._quotas, [], []
    step, whole_M, frac_M = self._start, self._count_M, np.full(self._quotas.num_sources, self._quotas.margin)
    awaited_M, num_steps = np.ones(quotas.num_sources, bool), BLOCK_STEPS
    while num_steps == BLOCK_STEPS and (step < quotas.num_steps or (step < quotas.settled and awaited_M.any())):
      rises, fracs = quotas.block(step, whole_M, frac_M)
      num_steps = rises.shape[1]
      if num_steps:
        due = rises > 0
        dues.append(np.where(due.any(1), step + due.argmax(1), NEVER))
        if step < quotas.num_steps:
          self._sums.append((whole_M, frac_M))
          sets.append(_Sets.of(quotas, rises, fracs))
        else:
          awaited_M &= ~due.any(1)
        whole_M, frac_M, step = whole_M + rises.sum(1), fracs[:, -1].copy(), step + num_steps
    self.end_step = min(step, quotas.num_steps)
    is_settled = num_steps == BLOCK_STEPS and awaited_M.any()
    dues.append(quotas.next_rises(step, whole_M, frac_M) if is_settled else np.full(quotas.num_sources, NEVER))
    next_dues = np.minimum.accumulate(dues[::-1])[::-1]
    self._later = np.argsort(next_dues[1 : len(sets) + 1], axis=1, kind="stable")
    return sets

  def _block_counts(self, block: int) -> np.ndarray:
    """int64 [steps, M]: `counts` after each step of a block."""
    whole_M, frac_M = self._sums[block]
    rises, fracs = self._quotas.block(self._start + block * BLOCK_STEPS, whole_M, frac_M)
    ups = _draw(self._ups[block], _Sets.of(self._quotas, rises, fracs), self._later[block])
    num_bytes = -(-len(whole_M) // 8)
    bits = np.frombuffer(b"".join(up.to_bytes(num_bytes, "little") for up in ups), np.uint8).reshape(-1, num_bytes)
    return whole_M + np.cumsum(rises, 1).T + np.unpackbits(bits, axis=1, count=len(whole_M), bitorder="little")


class _Sets(NamedTuple):
  """Sources of each step of a block, as uint64 [steps, words], source m's bit in word m // 64."""

  due: np.ndarray  # who must give a row by this step
  may: np.ndarray  # who may be up after it
  num_up: np.ndarray  # int32 [steps]: how many are up after it

  @classmethod
  def of(cls, quotas: Quotas, rises: np.ndarray, fracs: np.ndarray) -> "_Sets":
    """From what `Quotas.block` gives."""
    return cls(_pack(rises > 0), _pack(fracs > 2 * quotas.margin), quotas.num_up(fracs))


def _draw(up: int, sets: _Sets, later: np.ndarray) -> list[int]:
  """The sources that are up after each step of a block, by earliest deadline first.

  `up` are those before it, `later` is the order in which sources must give a further row behind it.
  """
  due_sets = _unpack(sets.due)
  # The deadlines in order of time, each with the sources that have it; among equal ones the first sources come first.
  deadlines = due_sets + [1 << m for m in later.tolist()]
  ups = []
  for ahead, (due, may, num_up) in enumerate(zip(due_sets, _unpack(sets.may), sets.num_up.tolist(), strict=True), 1):
    up &= ~due
    missing = num_up - up.bit_count()
    if missing:
      free = may & ~up
      nearest = free & deadlines[ahead]
      while nearest.bit_count() < missing:
        missing -= nearest.bit_count()
        up |= nearest
        free ^= nearest
        ahead += 1
        nearest = free & deadlines[ahead]
      rest = nearest
      for _ in range(missing):
        rest &= rest - 1  # drops the lowest bit
      up |= nearest ^ rest
    ups.append(up)
  return ups


def _pack(flags: np.ndarray) -> np.ndarray:
  packed = np.packbits(flags.T, axis=1, bitorder="little")
  words = np.zeros((len(packed), -(-len(flags) // 64) * 8), np.uint8)
  words[:, : packed.shape[1]] = packed
  return words.view("<u8")


def _unpack(words: np.ndarray) -> list[int]:
  sets = words[:, 0].tolist()
  for w in range(1, words.shape[1]):
    sets = [low | high << 64 * w for low, high in zip(sets, words[:, w].tolist(), strict=True)]
  return sets
