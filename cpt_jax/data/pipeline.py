"""Sources, plans and shares -> batches of rows, evaluation rows and the ledger.

Invariant: `row(i)` is a pure function of (fingerprint, i), so one integer is the whole state, whatever the processes, threads
and restarts. Called by train.loop, evals and tools.
"""

import dataclasses
import functools
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from cpt_jax import config as configs
from cpt_jax.config import ConfigError, Problems
from cpt_jax.data import packing
from cpt_jax.data import tokenizer as tokenizers
from cpt_jax.data.batch import Batch
from cpt_jax.data.mixture import Mixture
from cpt_jax.data.shuffle import Shuffle
from cpt_jax.data.sources import Source

FORMAT = 1  # of `state`, and of the order of rows that a fingerprint stands for
MANY_EPOCHS = 4.0  # up to here repeats are worth almost as much as new text (Muennighoff et al. 2305.16264, sec. 5)


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Whole held-out documents of a source as evaluation batches: every pair once, the last batch filled up by weight 0."""

  batches: Sequence[Batch]  # made when asked for
  num_tokens: int  # targets, i.e. the sum of all weights
  num_bytes: int  # UTF-8 bytes of the documents' whole texts
  num_documents: int


class SourceSummary(NamedTuple):
  """What a run reads of a source, for people."""

  source: str
  role: str
  store: str  # its directory
  store_tokens: int
  train_documents: int
  train_tokens: int  # an epoch's targets
  train_rows: int  # an epoch's rows
  efficiency: float  # share of the rows' positions that are no padding
  heldout_documents: int
  heldout_tokens: int  # targets of all held-out documents
  share_start: float  # normalised, of the first batch
  share_end: float  # normalised, of the last batch
  rows: int  # that the run reads
  tokens: int  # that the run reads, from the mean row; `Loader.ledger` counts exactly
  epochs: float
  note: str  # what deserves a second look; empty if nothing does


class Loader:
  """The rows of a run.

  By the mixture, row i of the run is the n-th row of a source. A source's rows are those of its packing plan in a fresh
  permutation for each epoch, seeded by the source's name and `seed` alone: another source, or another order of the sources,
  changes no source's own order.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    *,
    num_steps: int,
    batch_rows: int,
    row_len: int,
    packing_policy: str,
    cross_documents: bool = False,
    seed: int = 0,
    num_threads: int = 16,
    eval_batch_rows: int | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
  ):
    self.sources = tuple(sources)
    self.names = tuple(source.name for source in sources)
    self.num_steps, self.batch_rows, self.row_len = num_steps, batch_rows, row_len
    self.cross_documents, self.seed, self.num_threads = cross_documents, seed, num_threads
    self.eval_batch_rows = eval_batch_rows or batch_rows
    self._tokenizer = tokenizer
    self.mixture = Mixture([source.share for source in sources], num_steps=num_steps, batch_rows=batch_rows)
    self.plans = [_plan(source, row_len=row_len, policy=packing_policy, cross_documents=cross_documents) for source in sources]
    self._orders = [
      Shuffle(max(plan.num_rows, 1), name=source.name, seed=seed) for source, plan in zip(sources, self.plans, strict=True)
    ]
    self.fingerprint = self._fingerprint(packing_policy)
    self._tallies = [_Tally(plan.row_tokens, order) for plan, order in zip(self.plans, self._orders, strict=True)]

  def row(self, index: int) -> Batch:
    """Row `index` of the run, as a batch of one."""
    return self._batch(index, 1)

  def _batch(self, first: int, num_rows: int) -> Batch:
    """Rows [first, first + num_rows) of the run."""
    batch = packing.empty_batch(num_rows, self.row_len)
    for b in range(num_rows):
      m, nth = self.mixture.locate(first + b)
      pieces = self.plans[m].pieces(self._orders[m][nth])
      packing.pack_row(batch, b, self.sources[m].store, pieces, source=m, cross_documents=self.cross_documents)
    return batch

  def batches(self, start_step: int, *, rows: slice | None = None) -> Iterator[Batch]:
    """The batches of the steps from `start_step` to the run's end, read ahead by threads.

    `rows` is this process's part of each batch, e.g. slice(0, 4); None = all. No earlier row is read.
    """
    first, last, stride = (rows or slice(None)).indices(self.batch_rows)
    assert stride == 1 and last > first, f"{rows} of {self.batch_rows} rows"
    if start_step >= self.num_steps:
      return
    part = _Part(self, start_step=start_step, first=first, num_rows=last - first)
    dataset = grain.MapDataset.source(part)
    ahead = max(2, -(-self.num_threads // (last - first)))
    options = grain.ReadOptions(num_threads=min(self.num_threads, ahead), prefetch_buffer_size=ahead)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
      yield from iterator
    finally:
      iterator.close()

  def state(self, step: int) -> dict:
    """What a checkpoint keeps, JSON-able: `step` steps are finished."""
    return {"format": FORMAT, "next_row": step * self.batch_rows, "fingerprint": self.fingerprint}

  def check_state(self, state: dict) -> int:
    """The step at which a run with this state goes on.

    Raises:
      ConfigError: the state is of other rows than this loader's.
    """
    if state["format"] != FORMAT or state["fingerprint"] != self.fingerprint:
      raise ConfigError(
        f"the checkpoint has read rows of {state['fingerprint']} (format {state['format']}), the config's are {self.fingerprint} "
        f"(format {FORMAT}): seed, train.batch_rows or something of data.* (stores, shares, packing, row_len, heldout_frac, "
        "cross_documents) differs; put it back, or start a new run in another workdir with start.weights"
      )
    step, rest = divmod(state["next_row"], self.batch_rows)
    assert rest == 0, f"{state} is inside a batch of {self.batch_rows}"
    return step

  def ledger(self, step: int) -> list[dict]:
    """For each source, what was read before `step`: rows, tokens (weight above 0, exact), epochs (1.5 = one and a half)."""
    rows_M = self.mixture.counts(step).tolist()
    return [
      {
        "source": source.name,
        "role": source.role,
        "rows": rows,
        "tokens": tally.tokens(rows) if rows else 0,
        "epochs": rows / plan.num_rows if rows else 0.0,
      }
      for source, plan, tally, rows in zip(self.sources, self.plans, self._tallies, rows_M, strict=True)
    ]

  def heldout_rows(
    self, source_name: str, *, max_tokens: int, batch_rows: int | None = None, rows: slice | None = None
  ) -> HeldOut:
    """Held-out documents of a source, in the order of their hashes, with at most `max_tokens` pairs together.

    `rows` is this process's part of each batch, as in `batches`; the counts are those of all rows.

    Whole documents only: one that does not fit in what is left is passed over; if none fits at all, the smallest is taken.
    They are packed best_fit, each a segment of its own (also where training crosses documents), so a document no longer than
    a row is never cut and its loss depends on nothing else. A document's first token is never a target, yet bits per byte
    divide by all of the document's bytes: low by one token a document, alike for every model with this tokenizer.
    """
    m = self.names.index(source_name)
    source = self.sources[m]
    documents = _whole_documents(source.heldout_documents, source.store.lengths, max_tokens=max_tokens)
    plan = packing.plan(source.store.lengths, row_len=self.row_len, policy="best_fit", documents=documents, shuffle=False)
    make = functools.partial(self._heldout_batch, m, plan, batch_rows or self.eval_batch_rows, rows or slice(None))
    batches = _Batches(-(-plan.num_rows // (batch_rows or self.eval_batch_rows)), make)
    return HeldOut(batches, plan.num_tokens, self._num_bytes(source, documents), len(documents))

  def describe(self) -> list[SourceSummary]:
    """What the run will read, an entry for each source."""
    rows_M = self.mixture.counts(self.num_steps).tolist()
    first_M, last_M = self.mixture.shares(0), self.mixture.shares(max(self.num_steps - 1, 0))
    summaries = []
    for m, (source, plan, rows) in enumerate(zip(self.sources, self.plans, rows_M, strict=True)):
      epochs = rows / plan.num_rows if rows else 0.0
      summary = SourceSummary(
        source=source.name,
        role=source.role,
        store=str(source.store.path),
        store_tokens=source.store.num_tokens,
        train_documents=len(source.train_documents),
        train_tokens=plan.num_tokens,
        train_rows=plan.num_rows,
        efficiency=plan.efficiency,
        heldout_documents=len(source.heldout_documents),
        heldout_tokens=source.num_pairs(source.heldout_documents),
        share_start=float(first_M[m]),
        share_end=float(last_M[m]),
        rows=rows,
        tokens=round(epochs * plan.num_tokens),
        epochs=epochs,
        note=_note(source, rows, epochs),
      )
      summaries.append(summary)
    return summaries

  def check_epochs(self, problems: Problems) -> None:
    """Adds a problem for each source that the run would read more often than its `max_epochs`."""
    for m, (source, plan) in enumerate(zip(self.sources, self.plans, strict=True)):
      rows = int(self.mixture.counts(self.num_steps)[m])
      limit = math.floor(source.max_epochs * plan.num_rows)
      if source.max_epochs and rows > limit:
        fits = _last_step_within(self.mixture, m, limit)
        problems.add(
          f"data.sources.{source.name}.max_epochs={source.max_epochs:g}: the run would read it {rows / plan.num_rows:.3g} times "
          f"({rows} rows, it has {plan.num_rows}); set train.length to {fits} steps or fewer, lower its share to about "
          f"{limit / rows:.2g} of what it is, or raise max_epochs"
        )

  def _fingerprint(self, policy: str) -> str:
    sources = [[s.name, s.store.fingerprint, s.heldout_frac, s.share] for s in self.sources]
    content = [FORMAT, packing.FORMAT, sources, self.batch_rows, self.row_len, policy, self.cross_documents, self.seed]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

  def _heldout_batch(self, m: int, plan: packing.Plan, batch_rows: int, part: slice, number: int) -> Batch:
    rows = range(number * batch_rows, (number + 1) * batch_rows)[part]
    batch = packing.empty_batch(len(rows), self.row_len)
    for b, row in enumerate(rows):
      # Past the last row of the plan there is padding, which is a row without pieces.
      packing.pack_row(batch, b, self.sources[m].store, plan.pieces(row) if row < plan.num_rows else [], source=m)
    return batch

  def _num_bytes(self, source: Source, documents: np.ndarray) -> int:
    num_bytes = source.store.doc_bytes()
    if num_bytes is not None:
      return int(num_bytes[documents].sum())
    if self._tokenizer is None:
      raise ConfigError(
        f"data.sources.{source.name}.store={str(source.store.path)!r}: a store made by datatrove does not say how many bytes its "
        "documents have, which bits per byte need; set data.tokenizer, so that the held-out documents can be decoded"
      )
    return sum(len(self._tokenizer.decode(source.store.document(i).tolist()).encode()) for i in documents.tolist())


def from_config(config, sources: Sequence[Source]) -> Loader:
  """The loader of a resolved config.

  Raises:
    ConfigError: a source that would be read more often than its max_epochs, or shares that are all 0 at some step.
  """
  path = config.data.tokenizer or config.start.hf
  lacks_bytes = any(source.store.num_bytes is None for source in sources)
  loader = Loader(
    sources,
    num_steps=configs.num_steps(config),
    batch_rows=config.train.batch_rows,
    row_len=config.data.row_len,
    packing_policy=config.data.packing,
    cross_documents=config.data.cross_documents,
    seed=config.seed,
    num_threads=config.data.prefetch,
    eval_batch_rows=config.eval.batch_rows or config.train.batch_rows // config.train.microbatches,
    tokenizer=tokenizers.load(path) if lacks_bytes and path else None,
  )
  problems = Problems()
  loader.check_epochs(problems)
  problems.raise_if_any()
  return loader


class _Part:
  """Rows [first, first + num_rows) of each batch from `start_step` on, as a data source for grain."""

  def __init__(self, loader: Loader, *, start_step: int, first: int, num_rows: int):
    self._loader, self._start_step, self._first, self._num_rows = loader, start_step, first, num_rows

  def __len__(self) -> int:
    return self._loader.num_steps - self._start_step

  def __getitem__(self, index: int) -> Batch:
    return self._loader._batch((self._start_step + index) * self._loader.batch_rows + self._first, self._num_rows)


class _Tally:
  """Tokens of a source's first rows, in the order in which they are read; counts on from where it was last asked."""

  def __init__(self, row_tokens: np.ndarray, order: Shuffle):
    self._row_tokens, self._order = row_tokens, order
    self._rows, self._tokens = 0, 0  # the last answer
    self._lock = threading.Lock()

  def tokens(self, num_rows: int) -> int:
    """Of the first `num_rows` rows."""
    with self._lock:
      epochs = num_rows // len(self._row_tokens)
      epoch_begin = epochs * len(self._row_tokens)
      if not epoch_begin <= self._rows <= num_rows:  # whole epochs need no counting
        self._rows, self._tokens = epoch_begin, epochs * int(self._row_tokens.sum(dtype=np.int64))
      read = self._order.rows(self._rows, num_rows)
      self._rows, self._tokens = num_rows, self._tokens + int(self._row_tokens[read].sum(dtype=np.int64))
      return self._tokens


class _Batches(Sequence[Batch]):
  """Batches made when asked for."""

  def __init__(self, length: int, make: Callable[[int], Batch]):
    self._length, self._make = length, make

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, number):
    if isinstance(number, slice):
      return [self[i] for i in range(*number.indices(self._length))]
    if not -self._length <= number < self._length:
      raise IndexError(f"batch {number} of {self._length}")
    return self._make(number % self._length)


def _plan(source: Source, *, row_len: int, policy: str, cross_documents: bool) -> packing.Plan:
  store = source.store
  key = {
    "store": store.fingerprint,
    "heldout_frac": source.heldout_frac,
    "row_len": row_len,
    "policy": policy,
    "cross_documents": cross_documents,
  }
  make = functools.partial(_make_plan, source, row_len=row_len, policy=policy, cross_documents=cross_documents)
  return packing.load_or_make(store.path, key=key, make=make)


def _make_plan(source: Source, **options) -> packing.Plan:
  return packing.plan(source.store.lengths, documents=source.train_documents, **options)


def _whole_documents(documents: np.ndarray, lengths: np.ndarray, *, max_tokens: int) -> np.ndarray:
  """Documents with at most `max_tokens` pairs together, in the order given; the smallest alone if none fits."""
  pairs = lengths[documents] - 1
  documents, pairs = documents[pairs > 0], pairs[pairs > 0]
  smallest, left, taken = int(pairs.min()), max_tokens, []
  for nth, size in enumerate(pairs.tolist()):
    if size <= left:
      taken.append(nth)
      left -= size
    if left < smallest:
      break
  return documents[taken or [int(pairs.argmin())]]


def _note(source: Source, rows: int, epochs: float) -> str:
  if rows == 0:
    return f"{source.name} is evaluated, not trained on"
  if epochs > MANY_EPOCHS:
    return (
      f"{source.name} is read {epochs:.3g} times; up to about {MANY_EPOCHS:g} repeats are worth almost as much as new text, "
      "later ones less and less (Muennighoff et al. 2305.16264)"
    )
  return ""


def _last_step_within(mixture: Mixture, m: int, max_rows: int) -> int:
  """The longest run in steps that reads at most `max_rows` of source m."""
  low, high = 0, mixture.num_steps
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if mixture.counts(middle)[m] <= max_rows else (low, middle - 1)
  return low
