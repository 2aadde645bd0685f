"""Periods of a run, each with its own mixture -> which source, and which of its rows, row `i` of the run is.

Invariant: what was read stays as it was. A change of shares, sources or length begins a period at the step where the run goes
on, and every source goes on in it from the row where it was, or behind rows that were given up.
"""

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpt_jax.config import ConfigError
from cpt_jax.stream.mixture import Mixture

# What says which row a number stands for; for a source that was read before it must not change.
_CONTENT = {
  "fingerprint": "store (its content)",
  "heldout_frac": "heldout_frac (of data)",
  "min_tokens": "min_tokens",
  "max_tokens": "max_tokens",
  "length_shares": "length_shares",
}


class Read(NamedTuple):
  """What was read of a source from the run's first step on."""

  rows: int = 0
  tokens: int = 0  # targets that count in the loss
  documents: int = 0  # that were begun, once for each time
  epochs: float = 0.0  # 1.5 = one and a half
  # Of text: a document that is cut over rows has its bytes shared out by pairs. None where the store does not say.
  bytes: int | None = 0


class Period(NamedTuple):
  """The steps from `start_step` to the next period's, in which sources are mixed in one way."""

  start_step: int
  read: dict[str, Read]  # before it, of each source so far
  sources: dict[str, dict[str, Any]]  # what it says of each source, as `terms` gives it
  skipped: dict[str, list[list[int]]] = {}  # noqa: RUF012 (never changed): source -> its rows [first, stop) that were passed over

  def num_skipped(self, name: str) -> int:
    """Rows of a source that were passed over before this period."""
    return sum(stop - first for first, stop in self.skipped.get(name, ()))

  def to_json(self) -> dict:
    """For a checkpoint and for people."""
    found = {"start_step": self.start_step, "read": {n: r._asdict() for n, r in self.read.items()}, "sources": self.sources}
    return found | ({"skipped": self.skipped} if self.skipped else {})


def from_json(period: Mapping[str, Any]) -> Period:
  """What `Period.to_json` was."""
  return Period(period["start_step"], reads_from_json(period["read"]), period["sources"], period.get("skipped", {}))


def reads_from_json(reads: Mapping[str, Any]) -> dict[str, Read]:
  """What was read of each source, as periods and checkpoints keep it."""
  return {name: Read(**read) for name, read in reads.items()}


def terms(source: Any, *, epoch_rows: int) -> dict[str, Any]:
  """What a period keeps of a stream.sources.Source whose epoch has so many rows; JSON-able."""
  epochs = source.max_epochs or (0.0 if source.at_end == "repeat" else 1.0)
  return {
    "store": str(source.store.path),
    "fingerprint": source.store.fingerprint,
    "role": source.role,
    "share": [list(knot) for knot in source.share],
    "at_end": source.at_end,
    "max_epochs": source.max_epochs,
    "max_rows": int(epochs * epoch_rows) if epochs else None,
    "epoch_rows": epoch_rows,
    "heldout_frac": source.heldout_frac,
    "loss_weight": source.loss_weight,
    "min_tokens": source.min_tokens,
    "max_tokens": source.max_tokens,
    "length_shares": [list(bracket) for bracket in source.length_shares],
  }


def continued(
  past: Sequence[Period],
  sources: dict[str, dict[str, Any]],
  *,
  step: int,
  read: dict[str, Read],
  skip: Mapping[str, int] | None = None,
) -> tuple[Period, ...]:
  """The periods of a run that goes on at `step` with these sources: those of its past, and one more where something changed.

  `read`: what was read of each source before `step`. `skip`: how many of its next rows each source passes over at `step`.
  Raises ConfigError: a line for each source whose rows would not be what they were.
  """
  wrong, known = [], {}
  for period in past:
    known |= period.sources
  for name, now in sources.items():
    for key, words in _CONTENT.items() if read.get(name, Read()).rows else ():
      if known[name][key] != now[key]:
        wrong.append(f"data.sources.{name}: {words} was {known[name][key]!r} in the steps before {step}, now it is {now[key]!r}")
  if wrong:
    raise ConfigError(
      "\n".join(wrong)
      + "\nThis would change which rows were read. Put it back, or give the changed text another name: a new source begins at "
      "its first row."
    )
  past = [_found_again(period, sources) for period in past]
  kept = [period for period in past if period.start_step < step]  # of one that begins here nothing was read
  if skip:
    skipped = dict(past[-1].skipped)
    for name, num_rows in skip.items():
      first = read[name].rows + past[-1].num_skipped(name)
      *before, last = skipped.get(name) or [[first, first]]
      joined = [[last[0], first + num_rows]] if last[1] == first else [last, [first, first + num_rows]]
      skipped[name] = [*before, *joined]
    return (*kept, Period(step, read, sources, skipped))
  for periods in (past, kept):  # the latter: a change is taken back before a step was made with it
    if periods and list(periods[-1].sources.items()) == list(sources.items()):
      return tuple(periods)
  return (*kept, Period(step, read, sources, past[-1].skipped if past else {}))


def _found_again(period: Period, sources: dict[str, dict[str, Any]]) -> Period:
  """The period with its stores where they lie now: they may have moved."""
  found = {
    name: {**terms, "store": sources[name]["store"]}
    if name in sources and sources[name]["fingerprint"] == terms["fingerprint"]
    else terms
    for name, terms in period.sources.items()
  }
  return period._replace(sources=found)


class Order:
  """The rows of a run of `num_steps`, or less where a source's end stops it: see `end_step`."""

  def __init__(self, periods: Sequence[Period], *, num_steps: int, batch_rows: int):
    self.periods, self.batch_rows = tuple(periods), batch_rows
    self._starts = [period.start_step for period in periods]
    self._stops = [*self._starts[1:], num_steps]
    self._mixture = functools.cache(self._make_mixture)
    last = self._mixture(len(periods) - 1)
    self.end_step = last.end_step
    names = list(self.periods[-1].sources)
    self.ends = tuple((names[end.source], end.step, end.action) for end in last.ends)  # of sources, in the last period

  def locate(self, row: int) -> tuple[str, int]:
    """Source of row `row` of the run, and which of the source's rows it is, from 0 over the whole run."""
    k = self._period(row // self.batch_rows)
    m, nth = self._mixture(k).locate(row)
    name = self._names(k)[m]
    return name, self._position(k, name) + nth

  def rows(self, step: int) -> dict[str, int]:
    """Rows that each source gave before `step`, sources of the past too."""
    k = self._period(step)
    rows = {name: read.rows for name, read in self.periods[k].read.items()}
    for name, count in zip(self._names(k), self._mixture(k).counts(step).tolist(), strict=True):
      rows[name] = self._begin(k, name) + count
    return rows

  def positions(self, step: int) -> dict[str, int]:
    """The row at which each source stands before `step`: those that it gave, and those that it passed over."""
    period = self.periods[self._period(step)]
    return {name: rows + period.num_skipped(name) for name, rows in self.rows(step).items()}

  def shares(self, step: int) -> dict[str, float]:
    """Normalised shares of the batch of `step`."""
    k = self._period(step)
    return dict(zip(self._names(k), self._mixture(k).shares(step).tolist(), strict=True))

  def _period(self, step: int) -> int:
    k = bisect.bisect_right(self._starts, step) - 1
    if k < 0:
      raise IndexError(f"step {step} is before this run's first, {self._starts[0]}")
    return k

  def _names(self, k: int) -> list[str]:
    return list(self.periods[k].sources)

  def _begin(self, k: int, name: str) -> int:
    return self.periods[k].read.get(name, Read()).rows

  def _position(self, k: int, name: str) -> int:
    """The source's row at which the period finds it."""
    return self._begin(k, name) + self.periods[k].num_skipped(name)

  def _make_mixture(self, k: int) -> Mixture:
    found = self.periods[k].sources
    return Mixture(
      [terms["share"] for terms in found.values()],
      num_steps=self._stops[k],
      batch_rows=self.batch_rows,
      start_step=self._starts[k],
      limits_M=[None if t["max_rows"] is None else max(t["max_rows"] - self._position(k, name), 0) for name, t in found.items()],
      # Past its cap a repeated source has no rule, so the run is refused.
      at_end_M=["error" if terms["at_end"] == "repeat" else terms["at_end"] for terms in found.values()],
    )
