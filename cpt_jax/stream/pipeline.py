"""Sources, plans and segments -> batches of rows, evaluation rows and the ledger.

Invariant: `row(i)` is a pure function of (fingerprint, i), so one integer is the whole state, whatever the processes, threads
and restarts.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.store.store import TokenStore, open_store
from cpt_jax.stream import order, packing, selection
from cpt_jax.stream.batch import Batch
from cpt_jax.stream.order import Order, Read
from cpt_jax.stream.selection import Selection
from cpt_jax.stream.shuffle import Shuffle
from cpt_jax.stream.sources import Source

FORMAT = 2  # of `state`, and of the order of rows that a fingerprint stands for
_TALLY_ROWS = 1 << 16  # counted at once, for their pieces take memory
MANY_EPOCHS = (
  4.0  # up to here repeats are worth almost as much as new text (Muennighoff et al. 2305.16264; D-CPT law, 2406.01375)
)


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Whole held-out documents of a source as evaluation batches: every pair once, the last batch filled up by weight 0."""

  batches: Sequence[Batch]  # made when asked for
  num_tokens: int  # targets, i.e. the sum of all weights
  num_bytes: int  # UTF-8 bytes of the documents' whole texts
  num_target_bytes: int  # those that targets spell: all but what the documents' first tokens do, which nothing predicts
  num_documents: int
  max_documents: int  # the most of them in a row


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
  num_split: int  # documents of an epoch that are cut
  selection: Selection
  heldout_documents: int
  heldout_tokens: int  # targets of all held-out documents
  share_start: float  # normalised, of the first batch that this start reads
  share_end: float  # normalised, of the last batch
  rows: int  # that the run reads
  tokens: int  # that the run reads, from the mean row; `Loader.ledger` counts exactly
  epochs: float
  end: str  # when it runs out, and what happens then
  notes: tuple[str, ...]  # what deserves a second look


class Loader:
  """The rows of a run.

  By the order, row i of the run is the n-th row of a source. A source's rows are those of its packing plan in a fresh
  permutation for each epoch, seeded by the source's name and `seed` alone: another source, or another order of the sources,
  changes no source's own order.

  With `keep_plans` packing plans that had to be made are written beside the stores, for the next start.

  With `vocab_size` no batch holds an id that the model has no row for: an error names the store.

  `past` is the `state` of a checkpoint from which the run goes on at `start_step`; sources go on from the rows where they were,
  under new shares if these changed. `skip` says how many of its next rows a source passes over there.

  Raises:
    ConfigError: `past` cannot be continued with these sources and settings; names each that differs.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    *,
    num_steps: int,
    batch_rows: int,
    row_len: int,
    packing_policy: str,
    cross_documents: bool,
    split_positions: str,
    seed: int,
    num_threads: int,
    eval_batch_rows: int,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    vocab_size: int | None = None,
    past: dict | None = None,
    start_step: int = 0,
    skip: Mapping[str, int] | None = None,
    keep_plans: bool = True,
  ):
    self.sources = tuple(sources)
    self.names = tuple(source.name for source in sources)
    self.num_steps, self.batch_rows, self.row_len = num_steps, batch_rows, row_len
    self.cross_documents, self.split_positions, self.seed, self.num_threads = cross_documents, split_positions, seed, num_threads
    self.start_step, self.eval_batch_rows = start_step, eval_batch_rows
    self._tokenizer, self._vocab_size = tokenizer, vocab_size
    self.settings = {
      "seed": seed,
      "train.batch_rows": batch_rows,
      "data.row_len": row_len,
      "data.packing": packing_policy,
      "data.cross_documents": cross_documents,
      "data.split_positions": split_positions,
    }
    if past:
      _check_past(past, self.settings)
    self.selections = [_select(source) for source in sources]
    self.plans = [
      _plan(source, chosen, row_len=row_len, policy=packing_policy, cross_documents=cross_documents, keep=keep_plans)
      for source, chosen in zip(sources, self.selections, strict=True)
    ]
    self._shuffles = [
      Shuffle(max(plan.num_rows, 1), name=source.name, seed=seed) for source, plan in zip(sources, self.plans, strict=True)
    ]
    self._tallies = [_Tally(*parts) for parts in zip(self.plans, self._shuffles, (s.store for s in sources), strict=True)]
    known = [order.from_json(segment) for segment in past["segments"]] if past else []
    before = {name: terms["fingerprint"] for segment in known for name, terms in segment.sources.items()}
    # Sources that had another store before; nothing was read of it, or this is refused below.
    self.replaced = {s.name for s in sources if before.get(s.name, s.store.fingerprint) != s.store.fingerprint}
    segments = order.continued(
      known,
      {s.name: order.terms(s, epoch_rows=plan.num_rows) for s, plan in zip(sources, self.plans, strict=True)},
      step=start_step,
      read=order.reads_from_json(past["read"]) if past else {},
      skip=skip,
    )
    self.order = Order(segments, num_steps=num_steps, batch_rows=batch_rows)
    self.end_step = self.order.end_step  # where the run ends: num_steps, or before that where a source's end stops it
    self.fingerprint = _digest([FORMAT, packing.FORMAT, self.settings, [_content(segment) for segment in segments]])

  @property
  def is_changed(self) -> bool:
    """Does a new segment begin where this start goes on."""
    return len(self.order.segments) > 1 and self.order.segments[-1].start_step == self.start_step

  @property
  def max_documents(self) -> int:
    """The most segments in a row of the run, beside its padding."""
    return max(plan.max_documents for plan in self.plans)

  @property
  def loss_weights(self) -> tuple[float, ...]:
    """Of each source's tokens in the objective."""
    return tuple(source.loss_weight for source in self.sources)

  def row(self, index: int) -> Batch:
    """Row `index` of the run, as a batch of one."""
    return self._batch(index, 1)

  def locate(self, index: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Of row `index` of the run: its source, which of the source's rows it is, and its pieces as in packing.Plan."""
    name, nth = self.order.locate(index)
    m = self.names.index(name)
    return m, nth, self.plans[m].pieces(self._shuffles[m][nth])

  def _batch(self, first: int, num_rows: int) -> Batch:
    """Rows [first, first + num_rows) of the run."""
    batch = packing.empty_batch(num_rows, self.row_len)
    for b in range(num_rows):
      m, _, pieces = self.locate(first + b)
      packing.pack_row(
        batch,
        b,
        self.sources[m].store,
        pieces,
        source=m,
        cross_documents=self.cross_documents,
        split_positions=self.split_positions,
      )
    self._check_ids(batch)
    return batch

  def _check_ids(self, batch: Batch) -> None:
    """JAX would clamp an id past the vocabulary without a word, and files may change after they were opened."""
    largest = max(int(batch.tokens_BT.max()), int(batch.targets_BT.max()))
    if self._vocab_size is not None and largest >= self._vocab_size:
      b = int(np.argmax((np.maximum(batch.tokens_BT, batch.targets_BT) == largest).any(1)))
      path = self.sources[int(batch.source_B[b])].store.path
      raise ConfigError(
        f"{path}: holds token id {largest}, the model's vocabulary has {self._vocab_size} rows; its store.json says otherwise, "
        f"so the files were changed or damaged (cpt prepare --verify {path}); make the store again"
      )

  def batches(self, start_step: int, *, rows: slice | None = None) -> Iterator[Batch]:
    """The batches of the steps from `start_step` to the run's end, read ahead by threads.

    `rows` is this process's part of each batch, e.g. slice(0, 4); None = all. No earlier row is read.
    """
    first, last, stride = (rows or slice(None)).indices(self.batch_rows)
    assert stride == 1 and last > first, f"{rows} of {self.batch_rows} rows"
    if start_step >= self.end_step:
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

  def record(self) -> dict:
    """What the rows of the run are, JSON-able: settings and segments; `from_record` reads it."""
    return {
      "formats": [FORMAT, packing.FORMAT],
      "fingerprint": self.fingerprint,
      "num_steps": self.num_steps,
      "settings": self.settings,
      "segments": [segment.to_json() for segment in self.order.segments],
    }

  def state(self, step: int) -> dict:
    """What a checkpoint keeps, JSON-able: `step` steps are finished. The position is one integer, the rest is the record."""
    read = {name: read._asdict() for name, read in self.read(step).items()}
    return {**self.record(), "next_row": step * self.batch_rows, "read": read}

  def read(self, step: int) -> dict[str, Read]:
    """What was read of each source before `step`, sources that the run has given up too; counted exactly."""
    found = dict(self.order.segments[-1].read)
    rows = self.order.rows(step)
    for source, plan, tally in zip(self.sources, self.plans, self._tallies, strict=True):
      n, last = rows[source.name], self.order.segments[-1]
      counted = tally.count(n + last.num_skipped(source.name))
      for first, stop in last.skipped.get(source.name, ()):
        counted = counted - tally.between(first, stop)
      tokens, documents, num_bytes = counted.tolist()
      known = num_bytes if source.store.num_bytes is not None else None
      found[source.name] = Read(n, tokens, documents, n / plan.num_rows, known) if n else Read()
    return found

  def ledger(self, step: int) -> list[dict]:
    """`read` as records, the run's sources first."""
    read, roles = self.read(step), {source.name: source.role for source in self.sources}
    for segment in self.order.segments:
      roles = {name: terms["role"] for name, terms in segment.sources.items()} | roles
    names = [*self.names, *(name for name in read if name not in self.names)]
    return [{"source": name, "role": roles.get(name, ""), **read[name]._asdict()} for name in names]

  def heldout_rows(
    self, source_name: str, *, max_tokens: int, max_bytes: int, batch_rows: int | None = None, rows: slice | None = None
  ) -> HeldOut:
    """Held-out documents of a source, in the order of their hashes, with at most `max_tokens` pairs together.

    With `max_bytes` it is so many bytes of text instead: the same documents whatever the tokenizer. `rows` is this process's part
    of each batch, as in `batches`; the counts are those of all rows.

    Whole documents only: one that does not fit in what is left is passed over; if none fits at all, the smallest is taken.
    They are packed best_fit, each a segment of its own (also where training crosses documents), so a document no longer than
    a row is never cut and its loss depends on nothing else. A document's first token is never a target.

    Raises:
      ConfigError: nothing says how many bytes the documents have, or their first tokens.
    """
    m = self.names.index(source_name)
    source = self.sources[m]
    sizes = source.store.doc_bytes() if max_bytes else None
    if max_bytes and sizes is None:
      raise ConfigError(
        f"data.sources.{source_name}.store={str(source.store.path)!r}: a store made by datatrove does not say how many bytes its "
        "documents have, by which eval.bytes chooses; set eval.bytes=0, and eval.tokens instead"
      )
    documents = whole_documents(
      source.heldout_documents, source.store.lengths, max_tokens=max_tokens, max_bytes=max_bytes, doc_bytes=sizes
    )
    if self._tokenizer is None:
      raise ConfigError(
        f"data.sources.{source_name}.store={str(source.store.path)!r}: bits per byte need the tokenizer, which says how many "
        "bytes the first tokens of documents spell, and in a store made by datatrove the documents; set data.tokenizer"
      )
    return evaluation_rows(
      source.store,
      documents,
      lengths=source.store.lengths,
      doc_bytes=document_bytes(source.store, documents, self._tokenizer),
      opening_bytes_V=self._tokenizer.opening_bytes_V,
      source=m,
      row_len=self.row_len,
      batch_rows=batch_rows or self.eval_batch_rows,
      rows=rows,
      check=self._check_ids,
    )

  def describe(self) -> list[SourceSummary]:
    """What the run will read, an entry for each source."""
    rows, last_step = self.order.rows(self.end_step), max(self.end_step - 1, self.start_step)
    first, last = (self.order.shares(step) if self.end_step > self.start_step else {} for step in (self.start_step, last_step))
    ends = {name: _end_words(step, action) for name, step, action in self.order.ends}
    summaries = []
    for source, plan, chosen in zip(self.sources, self.plans, self.selections, strict=True):
      epochs = rows[source.name] / plan.num_rows if rows[source.name] else 0.0
      summary = SourceSummary(
        source=source.name,
        role=source.role,
        store=str(source.store.path),
        store_tokens=source.store.num_tokens,
        train_documents=len(source.train_documents),
        train_tokens=plan.num_targets,
        train_rows=plan.num_rows,
        efficiency=plan.efficiency,
        num_split=plan.num_split,
        selection=chosen,
        heldout_documents=len(source.heldout_documents),
        heldout_tokens=source.num_pairs(source.heldout_documents),
        share_start=first.get(source.name, 0.0),
        share_end=last.get(source.name, 0.0),
        rows=rows[source.name],
        tokens=round(epochs * plan.num_targets),
        epochs=epochs,
        end=ends.get(source.name, "" if not epochs else self._epoch_words(source.name, plan.num_rows)),
        notes=tuple(_notes(source, chosen, epochs)),
      )
      summaries.append(summary)
    return summaries

  def check_ends(self, problems: Problems) -> None:
    """Adds a problem for each source that runs out where its `at_end` forbids it."""
    begin = self.order.segments[-1].start_step  # the shares before are history
    for name, step, action in self.order.ends:
      if action != "error":
        continue
      m = self.names.index(name)
      source, plan = self.sources[m], self.plans[m]
      key = f"max_epochs={source.max_epochs:g}" if source.at_end == "repeat" else f"at_end={source.at_end!r}"
      problems.add(
        f"data.sources.{name}.{key}: it runs out in step {step} of {self.num_steps} (an epoch has {plan.num_rows} rows); set "
        f"train.length to {step} steps or fewer, lower its share to about {(step - begin) / (self.num_steps - begin):.2g} of "
        f"what it is, raise max_epochs, or choose another at_end"
      )

  def _epoch_words(self, name: str, epoch_rows: int) -> str:
    """When a source that is repeated was read whole, for people."""
    low, high = self.start_step, self.end_step
    if self.order.rows(high)[name] < epoch_rows or self.order.rows(low)[name] >= epoch_rows:
      return ""
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (middle, high) if self.order.rows(middle)[name] < epoch_rows else (low, middle)
    return f"step {high}: it is repeated"


def from_config(
  config,
  sources: Sequence[Source],
  *,
  vocab_size: int | None = None,
  past: dict | None = None,
  start_step: int = 0,
  skip: Mapping[str, int] | None = None,
  keep_plans: bool = True,
) -> Loader:
  """The loader of a resolved config; `vocab_size` (of the model; None = not checked), `past` to `keep_plans` as for `Loader`.

  Raises:
    ConfigError: a source that runs out where it must not, shares that are all 0 at some step, or a past that cannot go on.
  """
  path = config.data.tokenizer or config.start.hf
  loader = Loader(
    sources,
    num_steps=config_lib.num_steps(config),
    batch_rows=config.train.batch_rows,
    row_len=config.data.row_len,
    packing_policy=config.data.packing,
    cross_documents=config.data.cross_documents,
    split_positions=config.data.split_positions,
    seed=config.seed,
    num_threads=config.data.prefetch,
    eval_batch_rows=config.eval.batch_rows or config.train.batch_rows // config.train.microbatches,
    tokenizer=tokenizer_lib.load(path) if path else None,
    vocab_size=vocab_size,
    past=past,
    start_step=start_step,
    skip=skip,
    keep_plans=keep_plans,
  )
  problems = Problems()
  loader.check_ends(problems)
  problems.raise_if_any()
  return loader


def evaluation_rows(
  store: packing.Documents,
  documents: np.ndarray,
  *,
  lengths: np.ndarray,
  doc_bytes: np.ndarray,
  opening_bytes_V: np.ndarray,
  source: int,
  row_len: int,
  batch_rows: int,
  rows: slice | None = None,
  check: Callable[[Batch], None] = lambda batch: None,
) -> HeldOut:
  """Documents as evaluation batches: packed best_fit in the order given, each a segment of its own.

  `lengths` are of all documents of the store, `doc_bytes` of those that are named, `source` is the number that the rows bear.
  `opening_bytes_V` is the tokenizer's. `rows` is this process's part of each batch; `check` sees every batch.
  """
  firsts = [(int(store.tokens(i, 0, 1)[0]), bool(store.loss_mask(i, 0, 1)[0])) for i in documents.tolist()]
  unpredicted = [int(opening_bytes_V[token]) if counts else 0 for token, counts in firsts]
  plan = packing.plan(
    lengths,
    row_len=row_len,
    policy="best_fit",
    cross_documents=False,
    documents=documents,
    shuffle=False,
    count_targets=packing.target_counter(store),
  )

  def make(number: int) -> Batch:
    part = range(number * batch_rows, (number + 1) * batch_rows)[rows or slice(None)]
    batch = packing.empty_batch(len(part), row_len)
    for b, row in enumerate(part):
      # Past the last row of the plan there is padding, which is a row without pieces.
      pieces = plan.pieces(row) if row < plan.num_rows else []
      packing.pack_row(batch, b, store, pieces, source=source, cross_documents=False, split_positions="restart")
    check(batch)
    return batch

  batches = _Batches(-(-plan.num_rows // batch_rows), make)
  num_target_bytes = int(np.maximum(doc_bytes - np.array(unpredicted, np.int64), 0).sum())
  return HeldOut(batches, plan.num_targets, int(doc_bytes.sum()), num_target_bytes, len(documents), plan.max_documents)


def document_bytes(store: TokenStore, documents: np.ndarray, tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
  """UTF-8 bytes of each of these documents' texts, as far as they count in the loss, int64; by decoding if need be."""
  known = store.doc_bytes()
  if known is not None:
    return known[documents].astype(np.int64)
  return np.array([len(tokenizer.decode(store.document(i).tolist()).encode()) for i in documents.tolist()], np.int64)


def changed_settings(config, past: dict) -> list[str]:
  """Settings of the config under which the rows of `past` cannot go on, a line each."""
  now = {key: config_lib.get(config, key) for key in past["settings"]}
  return [f"{key} was {old!r}, now it is {now[key]!r}" for key, old in past["settings"].items() if now[key] != old]


def from_record(record: dict, step: int, *, tokenizer: tokenizer_lib.Tokenizer | None = None) -> Loader:
  """The loader that read the rows of `step` of a run, from its record alone; with `tokenizer` it has held-out rows too.

  Raises:
    ConfigError: a store is not there any more, or holds something else now.
  """
  segments = [order.from_json(segment) for segment in record["segments"]]
  known = [segment for segment in segments if segment.start_step <= step]
  if not known or step >= record["num_steps"]:
    raise ConfigError(f"step {step}: the run has the steps {segments[0].start_step} to {record['num_steps'] - 1}")
  begin, sources = known[-1], []
  for name, terms in begin.sources.items():
    store = open_store(terms["store"])
    if store.fingerprint != terms["fingerprint"]:
      raise ConfigError(f"{terms['store']}: holds {store.fingerprint}, the run read {terms['fingerprint']} as {name}")
    brackets = tuple((from_tokens, share) for from_tokens, share in terms["length_shares"])
    kept = {
      key: terms[key] for key in ("role", "heldout_frac", "at_end", "max_epochs", "loss_weight", "min_tokens", "max_tokens")
    }
    sources.append(Source(name, store, share=tuple(map(tuple, terms["share"])), length_shares=brackets, **kept))
  settings = record["settings"]
  return Loader(
    sources,
    num_steps=segments[len(known)].start_step if len(known) < len(segments) else record["num_steps"],
    batch_rows=settings["train.batch_rows"],
    row_len=settings["data.row_len"],
    packing_policy=settings["data.packing"],
    cross_documents=settings["data.cross_documents"],
    split_positions=settings["data.split_positions"],
    seed=settings["seed"],
    num_threads=config_lib.KEYS["data.prefetch"].default,
    eval_batch_rows=settings["train.batch_rows"],
    tokenizer=tokenizer,
    past={**record, "segments": record["segments"][: len(known)], "read": {n: r._asdict() for n, r in begin.read.items()}},
    start_step=begin.start_step,
  )


class _Part:
  """Rows [first, first + num_rows) of each batch from `start_step` on, as a data source for grain."""

  def __init__(self, loader: Loader, *, start_step: int, first: int, num_rows: int):
    self._loader, self._start_step, self._first, self._num_rows = loader, start_step, first, num_rows

  def __len__(self) -> int:
    return self._loader.end_step - self._start_step

  def __getitem__(self, index: int) -> Batch:
    return self._loader._batch((self._start_step + index) * self._loader.batch_rows + self._first, self._num_rows)


class _Tally:
  """What a source's first rows hold, in the order in which they are read; counts on from where it was asked.

  A count is int64 [3]: targets, documents that begin in the rows, and bytes of text, which mean nothing if the store has no say.
  """

  def __init__(self, plan: packing.Plan, shuffle: Shuffle, store: TokenStore):
    self._plan, self._shuffle, self._store = plan, shuffle, store
    self._rows, self._counted = 0, np.zeros(3, np.int64)  # the last answer
    self._lock = threading.Lock()

  def count(self, num_rows: int) -> np.ndarray:
    """Of the first `num_rows` rows."""
    with self._lock:
      epochs = num_rows // self._plan.num_rows
      if not epochs * self._plan.num_rows <= self._rows <= num_rows:  # whole epochs need no counting
        self._rows, self._counted = epochs * self._plan.num_rows, epochs * self._of_epoch if epochs else np.zeros(3, np.int64)
      self._counted = self._counted + self._of(self._shuffle.rows(self._rows, num_rows))
      self._rows = num_rows
      return self._counted

  def between(self, first: int, stop: int) -> np.ndarray:
    """Of the rows [first, stop)."""
    counted = np.zeros(3, np.int64)
    while first < stop:  # an epoch at a time
      end = min(stop, (first // self._plan.num_rows + 1) * self._plan.num_rows)
      counted += self._of(self._shuffle.rows(first, end))
      first = end
    return counted

  @functools.cached_property
  def _of_epoch(self) -> np.ndarray:
    return self._of(np.arange(self._plan.num_rows))

  def _of(self, rows: np.ndarray) -> np.ndarray:
    plan, lengths, doc_bytes = self._plan, self._store.lengths, self._store.doc_bytes()
    counted = np.array([plan.row_targets[rows].sum(dtype=np.int64), plan.row_docs[rows].sum(dtype=np.int64), 0])
    if doc_bytes is None:
      return counted
    for part in range(0, len(rows), _TALLY_ROWS):
      at = plan.piece_numbers(rows[part : part + _TALLY_ROWS])
      doc, start = plan.doc[at], plan.start[at].astype(np.int64)
      # Differences of whole numbers of bytes, so that the pieces of a document add up to it.
      edges = np.stack([start, start + plan.length[at]]) * doc_bytes[doc].astype(np.int64) // (lengths[doc] - 1)
      counted[2] += int((edges[1] - edges[0]).sum())
    return counted


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


def _check_past(past: dict, settings: dict) -> None:
  """Raises ConfigError where rows of the past would not be what they were."""
  if past["formats"] != [FORMAT, packing.FORMAT]:
    raise ConfigError(
      f"the checkpoint's rows are of format {past['formats']}, this version's of {[FORMAT, packing.FORMAT]}: finish the run with "
      "the version that began it, or start a new one with start.weights"
    )
  wrong = [f"{key} was {old!r}, now it is {settings[key]!r}" for key, old in past["settings"].items() if settings[key] != old]
  if wrong:
    raise ConfigError("\n".join(wrong) + "\nThis would change which rows were read; put it back, or start with start.weights")


def _select(source: Source) -> Selection:
  try:
    return selection.select(
      source.store.lengths,
      source.train_documents,
      min_tokens=source.min_tokens,
      max_tokens=source.max_tokens,
      length_shares=source.length_shares,
      hashes=source.store.doc_hashes() if source.length_shares else None,
    )
  except ConfigError as error:
    raise ConfigError(f"data.sources.{source.name}.{error}") from None


def _plan(source: Source, chosen: Selection, *, row_len: int, policy: str, cross_documents: bool, keep: bool) -> packing.Plan:
  key = {
    "store": source.store.fingerprint,
    "heldout_frac": source.heldout_frac,
    "min_tokens": source.min_tokens,
    "max_tokens": source.max_tokens,
    "length_shares": [list(bracket) for bracket in source.length_shares],
    "row_len": row_len,
    "policy": policy,
    "cross_documents": cross_documents,
  }
  make = functools.partial(
    packing.plan,
    source.store.lengths,
    row_len=row_len,
    policy=policy,
    cross_documents=cross_documents,
    documents=chosen.documents,
    count_targets=packing.target_counter(source.store),
  )
  return packing.load_or_make(source.store.path, key=key, make=make, keep=keep)


def _content(segment: order.Segment) -> dict:
  """What of a segment decides its rows: not where its stores lie, nor what their tokens weigh."""
  free = {"store": "", "role": "", "loss_weight": 0}
  content = segment.to_json()
  return content | {"sources": [[name, {**terms, **free}] for name, terms in segment.sources.items()]}


def _digest(content: list) -> str:
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def whole_documents(
  documents: np.ndarray, lengths: np.ndarray, *, max_tokens: int, max_bytes: int, doc_bytes: np.ndarray | None = None
) -> np.ndarray:
  """Documents with at most `max_tokens` pairs together, in the order given; the smallest alone if none fits.

  With `max_bytes` at most so many of `doc_bytes`, of all documents of the store, instead.
  """
  documents = documents[lengths[documents] > 1]
  sizes, left = lengths[documents] - 1, max_tokens
  if max_bytes:
    assert doc_bytes is not None, "max_bytes without doc_bytes"
    sizes, left = doc_bytes[documents], max_bytes
  smallest, taken = int(sizes.min()), []
  for nth, size in enumerate(sizes.tolist()):
    if size <= left:
      taken.append(nth)
      left -= size
    if left < smallest:
      break
  return documents[taken or [int(sizes.argmin())]]


def _notes(source: Source, chosen: Selection, epochs: float) -> Iterator[str]:
  if not source.is_trained:
    yield f"{source.name} is evaluated, not trained on"
  elif epochs > MANY_EPOCHS:
    yield (
      f"{source.name} is read {epochs:.3g} times; up to about {MANY_EPOCHS:g} repeats are worth almost as much as new text, "
      "later ones less and less (Muennighoff et al. 2305.16264; for continual pretraining the D-CPT law, 2406.01375)"
    )
  if source.is_trained and source.loss_weight == 0:
    yield f"{source.name} is read but nothing is learnt from it (loss_weight=0)"
  if chosen.num_too_short or chosen.num_too_long:
    left_out = chosen.tokens_too_short + chosen.tokens_too_long
    yield (
      f"{source.name}: {chosen.num_too_short:,} documents are too short and {chosen.num_too_long:,} too long; "
      f"{left_out:,} tokens are left out"
    )
  for bracket in chosen.brackets:
    yield (
      f"{source.name}: documents from {bracket.from_tokens:,} tokens are {bracket.share:.1%} of its tokens (asked for "
      f"{bracket.share_wanted:.1%}), each read {bracket.copies:.3g} times an epoch"
    )


def _end_words(step: int, action: str) -> str:
  return f"step {step}: " + {"renormalise": "others share what is left", "stop": "the run stops", "error": "refused"}[action]
