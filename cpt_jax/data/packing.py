"""Documents of a store -> rows of `row_len` (input, target) pairs: the plan, and the arrays of one row.

Invariant: every pair of every planned document is in exactly one row; a plan depends on the store, the split, the row length
and the policy, never on a run's seed. Called by data.pipeline.

A document of n tokens has n-1 pairs: input d[i], target d[i+1]. A piece is (document, first pair, number of pairs).
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from cpt_jax.data.batch import Batch
from cpt_jax.data.sources import mix64

FORMAT = 1  # of plan directories, and of what a plan of given inputs holds
_ARRAYS = ("row_ends", "row_tokens", "doc", "start", "length")


class Documents(Protocol):
  """What packing needs of a store."""

  def tokens(self, i: int, start: int, length: int) -> np.ndarray:
    """Tokens [start, start + length) of document `i`."""
    ...


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rows as pieces; row r has pieces row_ends[r-1] .. row_ends[r]-1. The arrays may be maps of files."""

  row_len: int
  policy: str
  cross_documents: bool
  row_ends: np.ndarray  # int64 [rows]
  row_tokens: np.ndarray  # int32 [rows], positions of weight 1
  doc: np.ndarray  # [pieces] document of the store
  start: np.ndarray  # [pieces] first pair
  length: np.ndarray  # int32 [pieces] pairs
  num_tokens: int  # sum of row_tokens

  @property
  def num_rows(self) -> int:
    """Rows of an epoch."""
    return len(self.row_ends)

  @property
  def efficiency(self) -> float:
    """Share of positions that are not padding."""
    return self.num_tokens / max(self.num_rows * self.row_len, 1)

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
  cross_documents: bool = False,
  documents: np.ndarray | None = None,
  shuffle: bool = True,
) -> Plan:
  """Packs documents of `lengths` tokens into rows.

  Policies: "concat" joins the documents and cuts at row ends; "best_fit" cuts whole rows off documents longer than a row and
  places what is left, longest first, where it leaves the least room (Ding et al. 2404.10830), so no document that
  fits in a row is cut; "pad" gives each document rows of its own.

  With `cross_documents` the pair (last token of a piece, first token of the next piece of the row) takes a position too.

  Args:
    lengths: int [documents of the store], in tokens.
    row_len: pairs in a row.
    policy: concat, best_fit or pad.
    cross_documents: rows are one stream, see above.
    documents: int [..], those to pack; None = all. Documents of less than two tokens have no pair and are left out.
    shuffle: packs them in a fixed pseudo-random order, so that neighbours in the store share rows no more than others do; False
      keeps the order given.
  """
  documents = np.arange(len(lengths)) if documents is None else np.asarray(documents)
  documents = documents[lengths[documents] > 1]
  if shuffle:
    documents = documents[np.argsort(mix64(documents.astype(np.uint64)), kind="stable")]
  pairs = lengths[documents].astype(np.int64) - 1
  pack = {"concat": _concat, "best_fit": _best_fit, "pad": _pad}[policy]
  row, which, start, length = pack(pairs, row_len, cross_documents)
  order = np.argsort(row, kind="stable")
  row, which, start, length = row[order], which[order], start[order], length[order]
  num_rows = int(row[-1]) + 1 if len(row) else 0
  row_tokens = np.bincount(row, length, num_rows).astype(np.int64)
  if cross_documents:  # a joint counts where the next piece begins its document
    joints = (np.diff(row, prepend=-1) == 0) & (start == 0)
    row_tokens += np.bincount(row[joints], minlength=num_rows)
  doc = documents[which]
  return Plan(
    row_len=row_len,
    policy=policy,
    cross_documents=cross_documents,
    row_ends=np.cumsum(np.bincount(row, minlength=num_rows)),
    row_tokens=row_tokens.astype(np.int32),
    doc=_narrow(doc),
    start=_narrow(start),
    length=length.astype(np.int32),
    num_tokens=int(row_tokens.sum()),
  )


def pack_row(
  store: Documents, pieces: list[tuple[int, int, int]], *, row_len: int, source: int, cross_documents: bool = False
) -> Batch:
  """The arrays of one row, B = 1.

  Each piece is a segment of its own with positions from 0; with `cross_documents` the row is one segment, and the last
  token of a piece predicts the first of the next, with weight 1 where that begins its document.
  Pieces [3,5,2] and [7,2] at T=4 -> tokens 3 5 7 0, targets 5 2 2 0, segments 1 1 2 0, positions 0 1 0 0.
  """
  batch = Batch(
    tokens_BT=np.zeros((1, row_len), np.int32),
    targets_BT=np.zeros((1, row_len), np.int32),
    weights_BT=np.zeros((1, row_len), np.float32),
    segments_BT=np.zeros((1, row_len), np.int32),
    positions_BT=np.zeros((1, row_len), np.int32),
    source_B=np.full(1, source, np.int32),
  )
  tokens, targets, weights, segments, positions = (array[0] for array in batch[:5])
  at = 0
  for segment, (doc, start, length) in enumerate(pieces, 1):
    ids = store.tokens(doc, start, length + 1)
    if cross_documents and at:
      tokens[at], targets[at], weights[at] = targets[at - 1], ids[0], start == 0
      at += 1
    here = slice(at, at + length)
    tokens[here], targets[here], weights[here] = ids[:-1], ids[1:], 1
    if not cross_documents:
      segments[here], positions[here] = segment, np.arange(length)
    at += length
  if cross_documents:
    segments[:at], positions[:at] = 1, np.arange(at)
  return batch


def load_or_make(store_path: str | os.PathLike, *, key: dict, make: Callable[[], Plan]) -> Plan:
  """The plan of `key` from `plans/` beside the store, memory-mapped; made and written there when it is not.

  `key` holds all that the plan depends on (JSON-able). Writers in other processes do no harm: a plan appears whole or not at
  all. A plan on disk that is damaged is made again. Where nothing can be written the plan stays in memory, with a warning.
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
      "plan": {n: getattr(fresh, n) for n in ("row_len", "policy", "cross_documents", "num_tokens")},
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
  return _fit(length + joint, row_len + joint), which, start, length


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
