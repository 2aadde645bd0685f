"""Sources, layouts and periods -> the rows of a run in batches, and the ledger of what was read.

Invariant: `row(i)` is a pure function of (fingerprint, i), so one integer is the whole state, whatever the processes, threads
and restarts.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.store import tokenization
from cpt_jax.store.token_store import open_store
from cpt_jax.stream import heldout, layout_files, order, packing, selection
from cpt_jax.stream.batch import Batch
from cpt_jax.stream.heldout import HeldOut
from cpt_jax.stream.order import Order, Period, Read
from cpt_jax.stream.packing import Layout
from cpt_jax.stream.selection import Selection
from cpt_jax.stream.shuffle import Shuffle
from cpt_jax.stream.sources import Source
from cpt_jax.stream.tally import Tally

FORMAT = 3  # of `state`, and of the order of rows that a fingerprint stands for
_FORMATS = [FORMAT, packing.FORMAT]


class Settings(NamedTuple):
  """What decides the rows besides the sources and how long they are read; `to_json` keeps it under the keys of the config."""

  seed: int
  batch_rows: int
  row_len: int
  packing: str
  cross_documents: bool
  split_positions: str

  def to_json(self) -> dict[str, Any]:
    """For a checkpoint and for people."""
    return dict(zip(_KEYS, self, strict=True))


_KEYS = ("seed", "train.batch_rows", "data.row_len", "data.packing", "data.cross_documents", "data.split_positions")


class Begin(NamedTuple):
  """Where a run goes on: at `step`, from the `state` of a checkpoint; or at its beginning."""

  step: int = 0
  past: Mapping[str, Any] | None = None  # sources go on from the rows where they were, under new shares if these changed
  skip: Mapping[str, int] | None = None  # how many of its next rows a source passes over


class Loader:
  """The rows of a run.

  By the order, row i of the run is the n-th row of a source. A source's rows are those of its layout in a fresh permutation for
  each epoch, seeded by the source's name and `seed` alone: another source, or another order of the sources, changes no
  source's own order.

  With `keep_layouts` layouts that had to be made are written beside the stores, for the next start.

  With `vocab_size` no batch holds an id that the model has no row for: an error names the store. Held-out rows need the
  tokenizer.
  Raises ConfigError: the past cannot be continued with these sources and settings; names each that differs.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    *,
    num_steps: int,
    settings: Settings,
    eval_batch_rows: int,
    num_threads: int,
    tokenizer: tokenization.Tokenizer | None = None,
    vocab_size: int | None = None,
    begin: Begin = Begin(),  # noqa: B008 (never changed)
    keep_layouts: bool = True,
  ):
    self.sources = tuple(sources)
    self.names = tuple(source.name for source in sources)
    self.num_steps, self.start_step, self.settings = num_steps, begin.step, settings
    self.batch_rows, self.row_len, self.eval_batch_rows = settings.batch_rows, settings.row_len, eval_batch_rows
    self.num_threads, self._tokenizer, self._vocab_size = num_threads, tokenizer, vocab_size
    if begin.past:
      _check_past(begin.past, settings)
    self.selections = [_select(source) for source in sources]
    self.layouts = [
      _lay_out(source, chosen, settings, keep=keep_layouts) for source, chosen in zip(sources, self.selections, strict=True)
    ]
    self._shuffles = [
      Shuffle(max(layout.num_rows, 1), name=source.name, seed=settings.seed)
      for source, layout in zip(sources, self.layouts, strict=True)
    ]
    stores = (source.store for source in sources)
    self._tallies = [Tally(*parts) for parts in zip(self.layouts, self._shuffles, stores, strict=True)]
    known = [order.from_json(period) for period in begin.past["periods"]] if begin.past else []
    before = {name: terms["fingerprint"] for period in known for name, terms in period.sources.items()}
    # Sources that had another store before; nothing was read of it, or this is refused below.
    self.replaced = {s.name for s in sources if before.get(s.name, s.store.fingerprint) != s.store.fingerprint}
    periods = order.continued(
      known,
      {s.name: order.terms(s, epoch_rows=layout.num_rows) for s, layout in zip(sources, self.layouts, strict=True)},
      step=begin.step,
      read=order.reads_from_json(begin.past["read"]) if begin.past else {},
      skip=begin.skip,
    )
    self.order = Order(periods, num_steps=num_steps, batch_rows=settings.batch_rows)
    self.end_step = self.order.end_step  # where the run ends: num_steps, or before that where a source's end stops it
    self.fingerprint = _digest([*_FORMATS, settings.to_json(), [_content(period) for period in periods]])

  @property
  def is_changed(self) -> bool:
    """Does a new period begin where this start goes on."""
    return len(self.order.periods) > 1 and self.order.periods[-1].start_step == self.start_step

  @property
  def max_documents(self) -> int:
    """The most segments in a row of the run, beside its padding."""
    return max(layout.max_documents for layout in self.layouts)

  @property
  def loss_weights(self) -> tuple[float, ...]:
    """Of each source's tokens in the objective."""
    return tuple(source.loss_weight for source in self.sources)

  def row(self, index: int) -> Batch:
    """Row `index` of the run, as a batch of one."""
    return self._batch(index, 1)

  def locate(self, index: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Of row `index` of the run: its source, which of the source's rows it is, and its pieces as in packing.Layout."""
    name, nth = self.order.locate(index)
    m = self.names.index(name)
    return m, nth, self.layouts[m].pieces(self._shuffles[m][nth])

  def _batch(self, first: int, num_rows: int) -> Batch:
    """Rows [first, first + num_rows) of the run."""
    batch = packing.empty_batch(num_rows, self.row_len)
    policy = {"cross_documents": self.settings.cross_documents, "split_positions": self.settings.split_positions}
    for b in range(num_rows):
      m, _, pieces = self.locate(first + b)
      packing.pack_row(batch, b, self.sources[m].store, pieces, source=m, **policy)
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

  def periods(self) -> dict:
    """What the rows of the run are, JSON-able: settings and periods; `from_periods` reads it."""
    return {
      "formats": _FORMATS,
      "fingerprint": self.fingerprint,
      "num_steps": self.num_steps,
      "settings": self.settings.to_json(),
      "periods": [period.to_json() for period in self.order.periods],
    }

  def state(self, step: int) -> dict:
    """What a checkpoint keeps, JSON-able: `step` steps are finished. The position is one integer, the rest are the periods."""
    read = {name: read._asdict() for name, read in self.read(step).items()}
    return {**self.periods(), "next_row": step * self.batch_rows, "read": read}

  def read(self, step: int) -> dict[str, Read]:
    """What was read of each source before `step`, sources that the run has given up too; counted exactly."""
    last = self.order.periods[-1]
    found, rows = dict(last.read), self.order.rows(step)
    for source, layout, tally in zip(self.sources, self.layouts, self._tallies, strict=True):
      n = rows[source.name]
      counted = tally.count(n + last.num_skipped(source.name))
      for first, stop in last.skipped.get(source.name, ()):
        counted = counted - tally.between(first, stop)
      tokens, documents, num_bytes = counted.tolist()
      known = num_bytes if source.store.num_bytes is not None else None
      found[source.name] = Read(n, tokens, documents, n / layout.num_rows, known) if n else Read()
    return found

  def ledger(self, step: int) -> list[dict]:
    """`read` as entries of ledger.jsonl, the run's sources first."""
    read, roles = self.read(step), {source.name: source.role for source in self.sources}
    for period in self.order.periods:
      roles = {name: terms["role"] for name, terms in period.sources.items()} | roles
    names = [*self.names, *(name for name in read if name not in self.names)]
    return [{"source": name, "role": roles.get(name, ""), **read[name]._asdict()} for name in names]

  def heldout_rows(
    self, source_name: str, *, max_tokens: int, max_bytes: int, batch_rows: int | None = None, rows: slice | None = None
  ) -> HeldOut:
    """Held-out documents of a source, as heldout.rows_of_source chooses them.

    `rows` is this process's part of each batch, as in `batches`; the counts are those of all rows. They are packed best_fit, each
    a segment of its own (also where training crosses documents), so a document no longer than a row is never cut and its loss
    depends on nothing else. A document's first token is never a target.
    """
    m, limits = self.names.index(source_name), {"max_tokens": max_tokens, "max_bytes": max_bytes}
    shape = {"row_len": self.row_len, "batch_rows": batch_rows or self.eval_batch_rows, "rows": rows}
    return heldout.rows_of_source(self.sources[m], m, **limits, tokenizer=self._tokenizer, **shape, check=self._check_ids)

  def check_ends(self, problems: Problems) -> None:
    """Adds a problem for each source that runs out where its `at_end` forbids it."""
    begin = self.order.periods[-1].start_step  # the shares before are history
    for name, step, action in self.order.ends:
      if action != "error":
        continue
      m = self.names.index(name)
      source, layout = self.sources[m], self.layouts[m]
      key = f"max_epochs={source.max_epochs:g}" if source.at_end == "repeat" else f"at_end={source.at_end!r}"
      problems.add(
        f"data.sources.{name}.{key}: it runs out in step {step} of {self.num_steps} (an epoch has {layout.num_rows} rows); set "
        f"train.length to {step} steps or fewer, lower its share to about {(step - begin) / (self.num_steps - begin):.2g} of "
        f"what it is, raise max_epochs, or choose another at_end"
      )


def from_config(
  config,
  sources: Sequence[Source],
  *,
  vocab_size: int | None = None,
  past: dict | None = None,
  start_step: int = 0,
  skip: Mapping[str, int] | None = None,
  keep_layouts: bool = True,
) -> Loader:
  """The loader of a resolved config; `vocab_size` of the model (None = not checked), `past` to `skip` as in Begin,
  `keep_layouts` as for Loader.
  Raises ConfigError: a source that runs out where it must not, shares that are all 0 at some step, or a past that cannot go on.
  """
  path = config.data.tokenizer or config.start.hf
  loader = Loader(
    sources,
    num_steps=config_lib.num_steps(config),
    settings=Settings(*(config_lib.get(config, key) for key in _KEYS)),
    eval_batch_rows=config.eval.batch_rows or config.train.batch_rows // config.train.microbatches,
    num_threads=config.data.prefetch,
    tokenizer=tokenization.load(path) if path else None,
    vocab_size=vocab_size,
    begin=Begin(start_step, past, skip),
    keep_layouts=keep_layouts,
  )
  problems = Problems()
  loader.check_ends(problems)
  problems.raise_if_any()
  return loader


def changed_settings(config, past: dict) -> list[str]:
  """Settings of the config under which the rows of `past` cannot go on, a line each."""
  now = {key: config_lib.get(config, key) for key in past["settings"]}
  return [f"{key} was {old!r}, now it is {now[key]!r}" for key, old in past["settings"].items() if now[key] != old]


def from_periods(kept: dict, step: int, *, tokenizer: tokenization.Tokenizer | None = None) -> Loader:
  """The loader that read the rows of `step` of a run, from its `Loader.periods` alone; with `tokenizer` it has held-out rows too.
  Raises ConfigError: a store is not there any more, or holds something else now."""
  check_formats(kept)
  periods = [order.from_json(period) for period in kept["periods"]]
  known = [period for period in periods if period.start_step <= step]
  if not known or step >= kept["num_steps"]:
    raise ConfigError(f"step {step}: the run has the steps {periods[0].start_step} to {kept['num_steps'] - 1}")
  begin, settings = known[-1], Settings(*(kept["settings"][key] for key in _KEYS))
  past = {**kept, "periods": kept["periods"][: len(known)], "read": {n: r._asdict() for n, r in begin.read.items()}}
  return Loader(
    [_reopened(name, terms) for name, terms in begin.sources.items()],
    num_steps=periods[len(known)].start_step if len(known) < len(periods) else kept["num_steps"],
    settings=settings,
    eval_batch_rows=settings.batch_rows,
    num_threads=config_lib.KEYS["data.prefetch"].default,
    tokenizer=tokenizer,
    begin=Begin(begin.start_step, past),
  )


def _reopened(name: str, terms: dict[str, Any]) -> Source:
  """A source as a period keeps it."""
  store = open_store(terms["store"])
  if store.fingerprint != terms["fingerprint"]:
    raise ConfigError(f"{terms['store']}: holds {store.fingerprint}, the run read {terms['fingerprint']} as {name}")
  brackets = tuple((from_tokens, share) for from_tokens, share in terms["length_shares"])
  same = ("role", "heldout_frac", "at_end", "max_epochs", "loss_weight", "min_tokens", "max_tokens")
  kept = {key: terms[key] for key in same}
  return Source(name, store, share=tuple(map(tuple, terms["share"])), length_shares=brackets, **kept)


class _Part:
  """Rows [first, first + num_rows) of each batch from `start_step` on, as a data source for grain."""

  def __init__(self, loader: Loader, *, start_step: int, first: int, num_rows: int):
    self._loader, self._start_step, self._first, self._num_rows = loader, start_step, first, num_rows

  def __len__(self) -> int:
    return self._loader.end_step - self._start_step

  def __getitem__(self, index: int) -> Batch:
    return self._loader._batch((self._start_step + index) * self._loader.batch_rows + self._first, self._num_rows)


def check_formats(kept: Mapping[str, Any]) -> None:
  """Raises ConfigError where a run's rows, or what a checkpoint keeps of them, are of another version."""
  if kept["formats"] != _FORMATS:
    raise ConfigError(
      f"the run's rows are of format {kept['formats']}, this version's of {_FORMATS}: finish the run with the version that began "
      "it, or start a new one with start.weights"
    )


def _check_past(past: Mapping[str, Any], settings: Settings) -> None:
  """Raises ConfigError where rows of the past would not be what they were."""
  check_formats(past)
  now = settings.to_json()
  wrong = [f"{key} was {old!r}, now it is {now[key]!r}" for key, old in past["settings"].items() if now[key] != old]
  if wrong:
    raise ConfigError("\n".join(wrong) + "\nThis would change which rows were read; put it back, or start with start.weights")


def _select(source: Source) -> Selection:
  store, rules = source.store, {key: getattr(source, key) for key in ("min_tokens", "max_tokens", "length_shares")}
  hashes = store.doc_hashes() if source.length_shares else None
  try:
    return selection.select(store.lengths, source.train_documents, **rules, hashes=hashes)
  except ConfigError as error:
    raise ConfigError(f"data.sources.{source.name}.{error}") from None


def _lay_out(source: Source, chosen: Selection, settings: Settings, *, keep: bool) -> Layout:
  policy = {"row_len": settings.row_len, "policy": settings.packing, "cross_documents": settings.cross_documents}
  key = {
    "store": source.store.fingerprint,
    **{name: getattr(source, name) for name in ("heldout_frac", "min_tokens", "max_tokens")},
    "length_shares": [list(bracket) for bracket in source.length_shares],
    **policy,
  }
  what = {"documents": chosen.documents, "count_targets": packing.target_counter(source.store)}
  make = functools.partial(packing.lay_out, source.store.lengths, **policy, **what)
  return layout_files.load_or_make(source.store.path, key=key, make=make, keep=keep)


def _content(period: Period) -> dict:
  """What of a period decides its rows: not where its stores lie, nor what their tokens weigh."""
  free = {"store": "", "role": "", "loss_weight": 0}
  content = period.to_json()
  return content | {"sources": [[name, {**terms, **free}] for name, terms in period.sources.items()]}


def _digest(content: list) -> str:
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
