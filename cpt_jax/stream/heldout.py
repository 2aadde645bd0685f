"""Held-out documents of a source -> evaluation batches.

Invariant: whole documents, every (input, target) pair once; which documents they are depends on the store alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store.token_store import TokenStore
from cpt_jax.store.tokenization import Tokenizer
from cpt_jax.stream import packing
from cpt_jax.stream.batch import Batch
from cpt_jax.stream.sources import Source


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Whole held-out documents of a source as evaluation batches: every pair once, the last batch filled up by weight 0."""

  batches: Sequence[Batch]  # made when asked for
  num_tokens: int  # targets, i.e. the sum of all weights
  num_bytes: int  # UTF-8 bytes of the documents' whole texts
  num_target_bytes: int  # those that targets spell: all but what the documents' first tokens do, which nothing predicts
  num_documents: int
  max_documents: int  # the most of them in a row


def rows_of_source(
  source: Source, number: int, *, max_tokens: int, max_bytes: int, tokenizer: Tokenizer | None, **options
) -> HeldOut:
  """Held-out documents of source `number`, in the order of their hashes, with at most `max_tokens` pairs together.

  With `max_bytes` it is so many bytes of text instead: the same documents whatever the tokenizer. Whole documents only: one that
  does not fit in what is left is passed over; if none fits at all, the smallest is taken. `options` are of `evaluation_rows`.
  Raises ConfigError: nothing says how many bytes the documents have, or their first tokens.
  """
  store = source.store
  key, sizes = f"data.sources.{source.name}.store={str(store.path)!r}", store.doc_bytes() if max_bytes else None
  if max_bytes and sizes is None:
    raise ConfigError(
      f"{key}: a store made by datatrove does not say how many bytes its documents have, by which eval.bytes chooses; "
      "set eval.bytes=0, and eval.tokens instead"
    )
  if tokenizer is None:
    raise ConfigError(
      f"{key}: bits per byte need the tokenizer, which says how many bytes the first tokens of documents spell, and in a store "
      "made by datatrove the documents; set data.tokenizer"
    )
  documents = whole_documents(
    source.heldout_documents, store.lengths, max_tokens=max_tokens, max_bytes=max_bytes, doc_bytes=sizes
  )
  doc_bytes = document_bytes(store, documents, tokenizer)
  tokens = {"lengths": store.lengths, "doc_bytes": doc_bytes, "opening_bytes_V": tokenizer.opening_bytes_V}
  return evaluation_rows(store, documents, source=number, **tokens, **options)


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
  what = {"documents": documents, "shuffle": False, "count_targets": packing.target_counter(store)}
  layout = packing.lay_out(lengths, row_len=row_len, policy="best_fit", cross_documents=False, **what)

  def make(number: int) -> Batch:
    part = range(number * batch_rows, (number + 1) * batch_rows)[rows or slice(None)]
    batch = packing.empty_batch(len(part), row_len)
    for b, row in enumerate(part):
      # Past the last row of the layout there is padding, which is a row without pieces.
      pieces = layout.pieces(row) if row < layout.num_rows else []
      packing.pack_row(batch, b, store, pieces, source=source, cross_documents=False, split_positions="restart")
    check(batch)
    return batch

  batches = _Batches(-(-layout.num_rows // batch_rows), make)
  num_target_bytes = int(np.maximum(doc_bytes - np.array(unpredicted, np.int64), 0).sum())
  return HeldOut(batches, layout.num_targets, int(doc_bytes.sum()), num_target_bytes, len(documents), layout.max_documents)


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


def document_bytes(store: TokenStore, documents: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """UTF-8 bytes of each of these documents' texts, as far as they count in the loss, int64; by decoding if need be."""
  known = store.doc_bytes()
  if known is not None:
    return known[documents].astype(np.int64)
  return np.array([len(tokenizer.decode(store.document(i).tolist()).encode()) for i in documents.tolist()], np.int64)


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
