"""Documents of a store -> rows of `row_len` (input, target) pairs: their layout, and the arrays of one row.

Invariant: every pair of every document that is laid out is in exactly one row; a layout depends on the store, the split, the row
length and the policy, never on a run's seed.

A document of n tokens has n-1 pairs: input d[i], target d[i+1]. A piece is (document, first pair, number of pairs).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from cpt_jax.stream.batch import Batch
from cpt_jax.stream.policies import POLICIES
from cpt_jax.stream.sources import mix64

FORMAT = 2  # of what a layout of given inputs holds, and of the files that keep it

# (document, first pair, pairs) of pieces, int arrays of one length -> how many targets of each piece count. A piece
# (document, -1, 1) is the joint before a document.
CountTargets = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Documents(Protocol):
  """What packing needs of a store."""

  @property
  def has_loss_mask(self) -> bool:
    """Is there a loss mask; without one every token counts."""
    ...

  def tokens(self, i: int, start: int, length: int) -> np.ndarray:
    """Tokens [start, start + length) of document `i`."""
    ...

  def loss_mask(self, i: int, start: int, length: int) -> np.ndarray:
    """bool [length]: for each of those tokens, does predicting it count."""
    ...


@dataclasses.dataclass(frozen=True)
class Layout:
  """Rows as pieces; row r has pieces row_ends[r-1] .. row_ends[r]-1. The arrays may be maps of files."""

  row_len: int
  policy: str
  cross_documents: bool
  row_ends: np.ndarray  # int64 [rows]
  row_tokens: np.ndarray  # int32 [rows], positions that are no padding
  row_targets: np.ndarray  # int32 [rows], positions of weight above 0; row_tokens where the store has no loss mask
  row_docs: np.ndarray  # int32 [rows], documents that begin in the row
  doc: np.ndarray  # [pieces] document of the store
  start: np.ndarray  # [pieces] first pair
  length: np.ndarray  # int32 [pieces] pairs
  num_tokens: int  # sum of row_tokens
  num_targets: int  # sum of row_targets
  num_documents: int  # packed, each copy of a document by itself
  num_split: int  # of these, in more than one piece

  @property
  def num_rows(self) -> int:
    """Rows of an epoch."""
    return len(self.row_ends)

  @property
  def num_pieces(self) -> int:
    """Pieces of an epoch: num_pieces - num_documents is the number of cuts."""
    return len(self.doc)

  @property
  def efficiency(self) -> float:
    """Share of positions that are not padding."""
    return self.num_tokens / max(self.num_rows * self.row_len, 1)

  @property
  def max_documents(self) -> int:
    """The most segments in a row, beside its padding."""
    return 1 if self.cross_documents else int(np.diff(self.row_ends, prepend=0).max(initial=1))

  def piece_numbers(self, rows: np.ndarray) -> np.ndarray:
    """Numbers of the pieces of these rows, a row after the other."""
    ends = self.row_ends[rows]
    counts = ends - np.where(rows > 0, self.row_ends[rows - 1], 0)
    return np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)

  def pieces(self, row: int) -> list[tuple[int, int, int]]:
    """(document, first pair, pairs) of each piece of a row, in order."""
    first, end = int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row])
    at = slice(first, end)
    return list(zip(self.doc[at].tolist(), self.start[at].tolist(), self.length[at].tolist(), strict=True))


def lay_out(
  lengths: np.ndarray,  # int [documents of the store], in tokens
  *,
  row_len: int,  # pairs in a row
  policy: str,
  cross_documents: bool,  # rows are one stream, see below
  documents: np.ndarray | None = None,  # int [..], those to pack, one as often as it is named; None = all
  shuffle: bool = True,
  count_targets: CountTargets | None = None,  # as `target_counter` makes it; None = all count
) -> Layout:
  """Packs documents of `lengths` tokens into rows.

  Policies: "concat" joins the documents and cuts at row ends; "pad" gives each document rows of its own; "best_fit" never cuts
  a document that fits in a row. It cuts whole rows off longer documents and places all else, longest first, where it leaves
  the least room (Ding et al. 2404.10830). Where that leaves rows unfilled, pieces of the documents longer than a row, which are
  cut anyway, are cut again to fill them, if this saves rows; not into less than a 32nd of a row or 128 pairs, where it can be
  helped. Rows stay unfilled where the documents that fit leave more room than there is text of longer ones.

  With `cross_documents` the pair (last token of a piece, first token of the next piece of the row) takes a position too.
  `shuffle` packs in a fixed pseudo-random order, so that neighbours in the store share rows no more than others do; False keeps
  the order given. Documents of less than two tokens have no pair and are left out.
  """
  documents = np.arange(len(lengths)) if documents is None else np.asarray(documents)
  documents = documents[lengths[documents] > 1]
  if shuffle:
    copy = _nth_copy(documents).astype(np.uint64)  # copies of a document do not stay together
    documents = documents[np.argsort(mix64(documents.astype(np.uint64) ^ (copy << np.uint64(40))), kind="stable")]
  pairs = lengths[documents].astype(np.int64) - 1
  row, which, start, length = POLICIES[policy](pairs, row_len, cross_documents)
  order = np.argsort(row, kind="stable")
  row, which, start, length = row[order], which[order], start[order], length[order]
  num_rows = int(row[-1]) + 1 if len(row) else 0
  doc, begins = documents[which], start == 0
  # With cross_documents a joint counts where the next piece begins its document.
  joints = (np.diff(row, prepend=-1) == 0) & begins if cross_documents else np.zeros(len(row), bool)
  row_tokens = np.bincount(row, length + joints, num_rows).astype(np.int32)
  row_targets = row_tokens
  if count_targets and len(row):
    targets = np.asarray(count_targets(doc, start, length), np.int64)
    targets[joints] += count_targets(doc[joints], start[joints] - 1, np.ones_like(length[joints]))
    row_targets = np.bincount(row, targets, num_rows).astype(np.int32)
  return Layout(
    row_len=row_len,
    policy=policy,
    cross_documents=cross_documents,
    row_ends=np.cumsum(np.bincount(row, minlength=num_rows)),
    row_tokens=row_tokens,
    row_targets=row_targets,
    row_docs=np.bincount(row[begins], minlength=num_rows).astype(np.int32),
    doc=_narrow(doc),
    start=_narrow(start),
    length=length.astype(np.int32),
    num_tokens=int(row_tokens.sum(dtype=np.int64)),
    num_targets=int(row_targets.sum(dtype=np.int64)),
    num_documents=len(documents),
    num_split=int(np.count_nonzero(np.bincount(which, minlength=len(documents)) > 1)),
  )


def _nth_copy(documents: np.ndarray) -> np.ndarray:
  """How often each entry stood before it: [7, 4, 7, 7] -> [0, 0, 1, 2]."""
  order = np.argsort(documents, kind="stable")
  at = np.arange(len(order))
  is_first = np.diff(documents[order], prepend=-1) != 0
  result = np.empty_like(at)
  result[order] = at - np.maximum.accumulate(np.where(is_first, at, 0))
  return result


def target_counter(store: Documents) -> CountTargets | None:
  """`count_targets` of `lay_out` by a store's loss mask; None where it has none. Reads the whole mask."""
  if not store.has_loss_mask:
    return None

  def count(doc: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    pieces = zip(doc.tolist(), start.tolist(), length.tolist(), strict=True)
    return np.fromiter((np.count_nonzero(store.loss_mask(d, s + 1, n)) for d, s, n in pieces), np.int64, len(doc))

  return count


def empty_batch(num_rows: int, row_len: int) -> Batch:
  """A batch of padding, to be filled by `pack_row`."""
  shape = num_rows, row_len
  ids = [np.zeros(shape, np.int32) for _ in range(4)]
  tokens, targets, segments, positions = ids
  return Batch(tokens, targets, np.zeros(shape, np.float32), segments, positions, np.zeros(num_rows, np.int32))


def pack_row(
  batch: Batch,
  row: int,
  store: Documents,
  pieces: Sequence[tuple[int, int, int]],
  *,
  source: int,
  cross_documents: bool,
  split_positions: str,
) -> None:
  """Writes a row into row `row` of a batch, which is padding yet.

  Each piece is a segment of its own; its positions count from 0, or with `split_positions` "continue" from its first pair's place
  in the document. With `cross_documents` the row is one segment with positions from 0, and the last token of a piece
  predicts the first of the next, with weight 1 where that begins its document. A target that the store's loss mask leaves
  out has weight 0.
  Pieces [3,5,2] and [7,2] at T=4 -> tokens 3 5 7 0, targets 5 2 2 0, segments 1 1 2 0, positions 0 1 0 0.
  """
  tokens, targets, weights = batch.tokens_BT[row], batch.targets_BT[row], batch.weights_BT[row]
  segments, positions = batch.segments_BT[row], batch.positions_BT[row]
  ramp = _ramp(len(tokens))
  is_masked, continues = store.has_loss_mask, split_positions == "continue"
  at = 0
  for segment, (doc, start, length) in enumerate(pieces, 1):
    ids = store.tokens(doc, start, length + 1)
    if cross_documents and at:
      tokens[at], targets[at] = targets[at - 1], ids[0]
      weights[at] = start == 0 and (not is_masked or store.loss_mask(doc, 0, 1)[0])
      at += 1
    end = at + length
    tokens[at:end] = ids[:-1]
    targets[at:end] = ids[1:]
    weights[at:end] = store.loss_mask(doc, start + 1, length) if is_masked else 1
    if not cross_documents:
      segments[at:end] = segment
      positions[at:end] = ramp[:length]
      if continues and start:
        positions[at:end] += start
    at = end
  if cross_documents:
    segments[:at] = 1
    positions[:at] = ramp[:at]
  batch.source_B[row] = source


@functools.lru_cache(8)
def _ramp(length: int) -> np.ndarray:
  ramp = np.arange(length, dtype=np.int32)
  ramp.flags.writeable = False
  return ramp


def _narrow(values: np.ndarray) -> np.ndarray:
  """uint32 where the values fit: half the disk and memory."""
  return values.astype(np.uint32 if values.max(initial=0) < 1 << 32 else np.int64)
