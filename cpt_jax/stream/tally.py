"""A source's rows, by number -> what they hold: targets, documents and bytes of text.

Invariant: exact, and the same in whatever order it is asked; the pieces of a document add up to its bytes.
"""

import functools
import threading

import numpy as np

from cpt_jax.store.token_store import TokenStore
from cpt_jax.stream.packing import Layout
from cpt_jax.stream.shuffle import Shuffle

_ROWS = 1 << 16  # counted at once, for their pieces take memory


class Tally:
  """What a source's first rows hold, in the order in which they are read; counts on from where it was asked.

  A count is int64 [3]: targets, documents that begin in the rows, and bytes of text, which mean nothing if the store has no say.
  """

  def __init__(self, layout: Layout, shuffle: Shuffle, store: TokenStore):
    self._layout, self._shuffle, self._store = layout, shuffle, store
    self._rows, self._counted = 0, np.zeros(3, np.int64)  # the last answer
    self._lock = threading.Lock()

  def count(self, num_rows: int) -> np.ndarray:
    """Of the first `num_rows` rows."""
    with self._lock:
      epochs = num_rows // self._layout.num_rows
      if not epochs * self._layout.num_rows <= self._rows <= num_rows:  # whole epochs need no counting
        self._rows, self._counted = epochs * self._layout.num_rows, epochs * self._of_epoch if epochs else np.zeros(3, np.int64)
      self._counted = self._counted + self._of(self._shuffle.rows(self._rows, num_rows))
      self._rows = num_rows
      return self._counted

  def between(self, first: int, stop: int) -> np.ndarray:
    """Of the rows [first, stop)."""
    counted = np.zeros(3, np.int64)
    while first < stop:  # an epoch at a time
      end = min(stop, (first // self._layout.num_rows + 1) * self._layout.num_rows)
      counted += self._of(self._shuffle.rows(first, end))
      first = end
    return counted

  @functools.cached_property
  def _of_epoch(self) -> np.ndarray:
    return self._of(np.arange(self._layout.num_rows))

  def _of(self, rows: np.ndarray) -> np.ndarray:
    layout, lengths, doc_bytes = self._layout, self._store.lengths, self._store.doc_bytes()
    counted = np.array([layout.row_targets[rows].sum(dtype=np.int64), layout.row_docs[rows].sum(dtype=np.int64), 0])
    if doc_bytes is None:
      return counted
    for part in range(0, len(rows), _ROWS):
      at = layout.piece_numbers(rows[part : part + _ROWS])
      doc, start = layout.doc[at], layout.start[at].astype(np.int64)
      # Differences of whole numbers of bytes, so that the pieces of a document add up to it.
      edges = np.stack([start, start + layout.length[at]]) * doc_bytes[doc].astype(np.int64) // (lengths[doc] - 1)
      counted[2] += int((edges[1] - edges[0]).sum())
    return counted
