"""A token store and a number of tokens -> a sample of it: excerpts of documents, chosen by hash, as documents of their own.

Invariant: the same store gives the same sample, the held-out documents first; no document gives more than its part, so that one
book does not stand for a shelf.
"""

import numpy as np

from cpt_jax.store.token_store import TokenStore
from cpt_jax.stream.packing import Documents
from cpt_jax.stream.sources import mix64

MIN_DOCUMENTS = 64  # of a sample, where the store has so many (chosen by hand)


class Excerpts(Documents):
  """Tokens [begin, begin + length) of documents of a store, numbered from 0."""

  def __init__(self, store: TokenStore, documents: np.ndarray, begins: np.ndarray, lengths: np.ndarray):
    self.store, self.documents, self.begins, self.lengths = store, documents, begins, lengths
    self.num_tokens = int(lengths.sum())

  def __len__(self) -> int:
    return len(self.documents)

  @property
  def num_cut(self) -> int:
    """Excerpts that are not the whole document."""
    return int((self.lengths < self.store.lengths[self.documents]).sum())

  @property
  def has_loss_mask(self) -> bool:
    """Has the store one."""
    return self.store.has_loss_mask

  def tokens(self, i: int, start: int, length: int) -> np.ndarray:
    """Tokens [start, start + length) of excerpt `i`."""
    return self.store.tokens(int(self.documents[i]), int(self.begins[i]) + start, length)

  def loss_mask(self, i: int, start: int, length: int) -> np.ndarray:
    """Whether those tokens count in the loss."""
    return self.store.loss_mask(int(self.documents[i]), int(self.begins[i]) + start, length)

  def excerpt(self, i: int) -> np.ndarray:
    """All tokens of excerpt `i`, without a copy."""
    return self.tokens(i, 0, int(self.lengths[i]))


def draw(store: TokenStore, *, max_tokens: int, part_tokens: int = 0) -> Excerpts:
  """Documents in the order of their hashes until there are `max_tokens`; of a long one a part, from a place drawn by its hash.

  A document gives at most a 64th of `max_tokens`, or its equal share where the store has fewer documents than 64, but
  `part_tokens` in any case.
  """
  hashes = mix64(store.doc_hashes())  # the order of sources.Source.heldout_documents
  lengths = store.lengths
  order = np.argsort(hashes, kind="stable")
  order = order[lengths[order] > 1]
  largest = max(-(-max_tokens // max(min(len(order), MIN_DOCUMENTS), 1)), part_tokens, 2)
  parts = np.minimum(lengths[order], largest)
  before = np.cumsum(parts) - parts
  taken = before < max_tokens
  order, parts, before = order[taken], parts[taken], before[taken]
  if len(parts):
    parts[-1] = max(min(parts[-1], max_tokens - before[-1]), 2)
  room = (lengths[order] - parts + 1).astype(np.uint64)
  begins = (mix64(hashes[order]) % room).astype(np.int64)
  return Excerpts(store, order, begins, parts)
