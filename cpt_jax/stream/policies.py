"""Pairs of each document -> pieces of rows, by one of three policies.

Invariant: every pair is in exactly one piece, and no piece crosses a row's end.

Each gives arrays with an entry for each piece: row, index into the documents, first pair and pairs; the pieces of a row stand in
the order in which they stand in it.
"""

import collections
import itertools
from collections.abc import Iterable

import numpy as np

# Of best_fit, chosen by hand for 99.9% filled at 32,768 with the fewest cuts.
_FULL_ROW = 1024  # a row with at most this part of it empty is left as it is
_LEAST_PIECE = 128  # pairs, at most a 32nd of a row: no cut leaves less, where it can be helped
_LOOK_AHEAD = 8  # stretches of text tried for one that a row's room cuts well

Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _concat(pairs: np.ndarray, row_len: int, cross_documents: bool) -> tuple[np.ndarray, ...]:
  joint = int(cross_documents)  # a document's last place in the stream is the joint to the next one
  ends = np.cumsum(pairs + joint)
  begins = ends - pairs - joint
  num_pieces = (ends - 1) // row_len - begins // row_len + 1
  which = np.repeat(np.arange(len(pairs)), num_pieces)
  nth = np.arange(len(which)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
  rows = begins[which] // row_len + nth
  start = np.maximum(rows * row_len - begins[which], 0)
  length = np.minimum((rows + 1) * row_len - begins[which], pairs[which]) - start  # without the joint
  kept = length > 0
  return rows[kept], which[kept], start[kept], length[kept]  # no row is empty: two joints never stand side by side


def _cut_long(pairs: np.ndarray, row_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Documents in pieces of at most a row: index, first pair, pairs."""
  num_pieces = -(-pairs // row_len)
  which = np.repeat(np.arange(len(pairs)), num_pieces)
  start = (np.arange(len(which)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)) * row_len
  return which, start, np.minimum(pairs[which] - start, row_len)


def _pad(pairs: np.ndarray, row_len: int, cross_documents: bool) -> tuple[np.ndarray, ...]:
  which, start, length = _cut_long(pairs, row_len)
  return np.arange(len(which)), which, start, length


def _best_fit(pairs: np.ndarray, row_len: int, cross_documents: bool) -> tuple[np.ndarray, ...]:
  which, start, length = _cut_long(pairs, row_len)
  joint = int(cross_documents)  # each piece but a row's last is followed by a joint
  fitted = _fit(length + joint, row_len + joint), which, start, length
  refilled = _refill(*fitted, is_long=pairs > row_len, row_len=row_len, joint=joint)
  return refilled if refilled[0].max(initial=-1) < fitted[0].max(initial=-1) else fitted  # no cut that saves no row


def _refill(
  row: np.ndarray, which: np.ndarray, start: np.ndarray, length: np.ndarray, *, is_long: np.ndarray, row_len: int, joint: int
) -> tuple[np.ndarray, ...]:
  """Takes pieces of long documents out of rows with room left, and cuts them to fit the rooms; the rest makes new rows.

  Where those pieces are too few for the rooms, whole rows of long documents are cut too, those at the documents' ends first.
  """
  capacity, least = row_len + joint, max(min(row_len // 32, _LEAST_PIECE), 1)
  room = capacity - np.bincount(row, length + joint).astype(np.int64)
  movable = is_long[which]
  taken = movable & (room > row_len // _FULL_ROW + joint)[row]
  room += np.bincount(row[taken], length[taken] + joint, len(room)).astype(np.int64)
  slots = np.flatnonzero((room >= least + joint) & (room < capacity))
  missing = int((room[slots] - joint).sum() - length[taken].sum())
  if missing > 0:
    whole = np.flatnonzero(movable & (length == row_len))
    from_end = np.bincount(which)[which[whole]] - start[whole] // row_len
    taken[whole[np.argsort(from_end, kind="stable")[: -(-missing // row_len)]]] = True
  slots = slots[np.argsort(-room[slots], kind="stable")]
  at = np.flatnonzero(taken)
  first = np.flatnonzero(np.diff(which[at], prepend=-1))  # rows are taken from the end on: one stretch a document
  lengths = np.add.reduceat(length[at], first) if len(at) else length[at]
  stretches = zip(which[at[first]].tolist(), start[at[first]].tolist(), lengths.tolist(), strict=True)
  slot_rooms = zip(slots.tolist(), (room[slots] - joint).tolist(), strict=True)
  placed = _pour(collections.deque(stretches), slot_rooms, new_row=len(room), row_len=row_len, joint=joint, least=least)
  kept = ~taken
  row, which, start, length = (
    np.concatenate([old[kept], new]) for old, new in zip((row, which, start, length), placed.T, strict=True)
  )
  return np.unique(row, return_inverse=True)[1], which, start, length


def _pour(
  stretches: collections.deque[tuple[int, int, int]],
  slots: Iterable[tuple[int, int]],
  *,
  new_row: int,
  row_len: int,
  joint: int,
  least: int,
) -> np.ndarray:
  """Stretches of documents cut to fit the rooms of rows, then new rows: int64 [pieces, 4], row, document, first pair, pairs.

  A cut leaves no piece and no room below `least` where one of the next few stretches allows it.
  """
  placed: list[tuple[int, int, int, int]] = []
  for row, room in itertools.chain(slots, ((r, row_len) for r in itertools.count(new_row))):
    while room >= least and stretches:
      for _ in range(_LOOK_AHEAD):
        doc, start, left = stretches[0]
        if left == room or left <= room - joint - least or left >= room + least:
          break
        stretches.rotate(-1)
      stretches.popleft()
      if left <= room:
        size = left
      elif left >= room + least or left < 2 * least:
        size = room
      else:
        size = left - least
      placed.append((row, doc, start, size))
      if size < left:
        stretches.appendleft((doc, start + size, left - size))
        break
      room -= size + joint
    if not stretches:
      break
  return np.array(placed, np.int64).reshape(-1, 4)


def _fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
  """Best-fit-decreasing: the bin of each item. All items of a size, and all bins of equal room, are handled together.

  The bin with the least sufficient room r takes items of size s until its room is below s, since it stays the best fit: so
  each such bin takes r // s of them.
  """
  order = np.argsort(-sizes, kind="stable")
  distinct, first = np.unique(-sizes[order], return_index=True)
  ends = np.append(first, len(order))[1:].tolist()
  bins: dict[int, list[np.ndarray]] = {}  # room -> bins
  rooms = 0  # bit r is set where bins of room r exist
  num_bins = 0
  result = np.empty(len(sizes), np.int64)
  for size, begin, end in zip((-distinct).tolist(), first.tolist(), ends, strict=True):
    while begin < end:
      above = rooms >> size
      room = size + (above & -above).bit_length() - 1 if above else capacity
      per_bin = room // size
      wanted = -(-(end - begin) // per_bin)
      if above:
        open_bins, bins[room] = _take(bins[room], wanted)
        if not bins[room]:
          rooms ^= 1 << room
      else:
        open_bins = np.arange(num_bins, num_bins + wanted)
        num_bins += wanted
      count = min(end - begin, len(open_bins) * per_bin)
      result[order[begin : begin + count]] = np.repeat(open_bins, per_bin)[:count]
      begin += count
      full, rest = divmod(count, per_bin)
      for left, these in ((room - per_bin * size, open_bins[:full]), (room - rest * size, open_bins[full : full + 1])):
        if left and len(these):
          bins.setdefault(left, []).append(these)
          rooms |= 1 << left
  return result


def _take(stack: list[np.ndarray], wanted: int) -> tuple[np.ndarray, list[np.ndarray]]:
  """At most `wanted` bins off the end of a stack of arrays, and what is left."""
  taken: list[np.ndarray] = []
  while stack and wanted:
    last = stack.pop()
    taken.append(last[-wanted:])
    if len(last) > wanted:
      stack.append(last[:-wanted])
    wanted -= len(taken[-1])
  return np.concatenate(taken), stack


POLICIES = {"concat": _concat, "best_fit": _best_fit, "pad": _pad}
