"""Documents of a store -> rows of `row_len` (input, target) pairs: the plan, and the arrays of one row.

Invariant: every pair of every planned document is in exactly one row; a plan depends on the store, the split, the row length
and the policy, never on a run's seed.

A document of n tokens has n-1 pairs: input d[i], target d[i+1]. A piece is (document, first pair, number of pairs).
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cpt_jax.stream.batch import Batch
from cpt_jax.stream.sources import mix64

FORMAT = 2  # of plan directories, and of what a plan of given inputs holds
_ARRAYS = ("row_ends", "row_tokens", "row_targets", "row_docs", "doc", "start", "length")
_NUMBERS = ("row_len", "policy", "cross_documents", "num_tokens", "num_targets", "num_documents", "num_split")

# Of best_fit, chosen by hand for 99.9% filled at 32,768 with the fewest cuts.
_FULL_ROW = 1024  # a row with at most this part of it empty is left as it is
_LEAST_PIECE = 128  # pairs, at most a 32nd of a row: no cut leaves less, where it can be helped
_LOOK_AHEAD = 8  # stretches of text tried for one that a row's room cuts well

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
class Plan:
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


def plan(
  lengths: np.ndarray,
  *,
  row_len: int,
  policy: str,
  cross_documents: bool,
  documents: np.ndarray | None = None,
  shuffle: bool = True,
  count_targets: CountTargets | None = None,
) -> Plan:
  """Packs documents of `lengths` tokens into rows.

  Policies: "concat" joins the documents and cuts at row ends; "pad" gives each document rows of its own; "best_fit" never cuts
  a document that fits in a row. It cuts whole rows off longer documents and places all else, longest first, where it leaves
  the least room (Ding et al. 2404.10830). Where that leaves rows unfilled, pieces of the documents longer than a row, which are
  cut anyway, are cut again to fill them, if this saves rows; not into less than a 32nd of a row or 128 pairs, where it can be
  helped. Rows stay unfilled where the documents that fit leave more room than there is text of longer ones.

  With `cross_documents` the pair (last token of a piece, first token of the next piece of the row) takes a position too.

  Args:
    lengths: int [documents of the store], in tokens.
    row_len: pairs in a row.
    policy: concat, best_fit or pad.
    cross_documents: rows are one stream, see above.
    documents: int [..], those to pack, one as often as it is named; None = all. Documents of less than two tokens have no pair
      and are left out.
    shuffle: packs them in a fixed pseudo-random order, so that neighbours in the store share rows no more than others do; False
      keeps the order given.
    count_targets: (document, first pair, pairs) of pieces, int arrays of one length -> how many targets of each piece count, as
      `target_counter` makes it. A piece (document, -1, 1) is the joint before a document. None = all count.
  """
  documents = np.arange(len(lengths)) if documents is None else np.asarray(documents)
  documents = documents[lengths[documents] > 1]
  if shuffle:
    copy = _nth_copy(documents).astype(np.uint64)  # copies of a document do not stay together
    documents = documents[np.argsort(mix64(documents.astype(np.uint64) ^ (copy << np.uint64(40))), kind="stable")]
  pairs = lengths[documents].astype(np.int64) - 1
  pack = {"concat": _concat, "best_fit": _best_fit, "pad": _pad}[policy]
  row, which, start, length = pack(pairs, row_len, cross_documents)
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
  return Plan(
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
  """`count_targets` of `plan` by a store's loss mask; None where it has none. Reads the whole mask."""
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


def load_or_make(store_path: str | os.PathLike, *, key: dict, make: Callable[[], Plan], keep: bool = True) -> Plan:
  """The plan of `key` from `plans/` beside the store, memory-mapped; made and written there when it is not.

  `key` holds all that the plan depends on (JSON-able). Writers in other processes do no harm: a plan appears whole or not at
  all. A plan on disk that is damaged is made again. Where nothing can be written the plan stays in memory, with a warning;
  without `keep` nothing is written.
  """
  key = {"format": FORMAT, **key}
  name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
  directory = Path(store_path) / "plans" / name
  found = _load(directory, key)
  if isinstance(found, Plan):
    return found
  if found:
    warnings.warn(f"{directory}: {found}; the packing plan is made again", stacklevel=2)
  fresh = make()
  if not keep:
    return fresh
  try:
    _write(directory, key, fresh)
  except OSError as error:
    warnings.warn(f"{directory}: cannot write the packing plan ({error}); every start makes it again", stacklevel=2)
    return fresh
  written = _load(directory, key)
  return written if isinstance(written, Plan) else fresh


def _load(directory: Path, key: dict) -> Plan | str:
  """The plan, or what is wrong with it; "" where there is none."""
  try:
    meta = json.loads((directory / "plan.json").read_text())
  except (FileNotFoundError, NotADirectoryError):
    return "has no plan.json" if directory.exists() else ""
  except ValueError as error:
    return f"plan.json is not JSON ({error})"
  if not isinstance(meta, dict) or meta.get("key") != key:
    return f"plan.json is of another plan than {key}"
  arrays = {}
  try:
    for array_name in _ARRAYS:
      arrays[array_name] = _map(directory / f"{array_name}.npy")
      found = [str(arrays[array_name].dtype), len(arrays[array_name])]
      if found != meta["arrays"][array_name]:
        return f"{array_name}.npy holds {found}, expected {meta['arrays'][array_name]}"
    result = Plan(**meta["plan"], **arrays)
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f"is damaged ({error})"
  if result.num_rows and int(result.row_ends[-1]) != len(result.doc):
    return f"row_ends.npy ends at piece {int(result.row_ends[-1])} of {len(result.doc)}"
  return result


def _map(path: Path) -> np.ndarray:
  # A plain array over the map: slices of the subclass np.memmap are slow. An empty array cannot be mapped.
  return np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None, allow_pickle=False))


def _write(directory: Path, key: dict, fresh: Plan) -> None:
  directory.parent.mkdir(exist_ok=True)
  unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
  unfinished.mkdir()
  try:
    for array_name in _ARRAYS:
      np.save(unfinished / f"{array_name}.npy", getattr(fresh, array_name))
    meta = {
      "key": key,
      "arrays": {n: [str(getattr(fresh, n).dtype), len(getattr(fresh, n))] for n in _ARRAYS},
      "plan": {n: getattr(fresh, n) for n in _NUMBERS},
    }
    (unfinished / "plan.json").write_text(json.dumps(meta, indent=1) + "\n")
    for file in unfinished.iterdir():
      with open(file, "rb") as f:
        os.fsync(f.fileno())
    if directory.exists() and not isinstance(_load(directory, key), Plan):
      shutil.rmtree(directory)
    unfinished.rename(directory)
  except OSError:
    if not isinstance(_load(directory, key), Plan):  # otherwise another process was first, with the same plan
      raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _narrow(values: np.ndarray) -> np.ndarray:
  """uint32 where the values fit: half the disk and memory."""
  return values.astype(np.uint32 if values.max(initial=0) < 1 << 32 else np.int64)


# The policies: pairs of each document -> row, index into the documents, first pair and pairs of each piece; the pieces of a
# row in the order in which they stand in it.


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
