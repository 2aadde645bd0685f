"""Rows of a base's embedding (or head) and what new pieces replace -> rows for the new pieces, a block at a time.

Invariant: old rows are read, never written, and padding rows behind the base's own ids are not looked at; a block is float32 and
depends on the seed and the rows' numbers alone.

Input and output rows have different parts to play (what a token means, when it is to be said), so they are made apart. Choices
and their sources: docs/guide/vocabulary.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cpt_jax.config import ConfigError, did_you_mean
from cpt_jax.store.spelling import SPACE, byte_characters
from cpt_jax.vocab.bases import Piece
from cpt_jax.vocab.similarity import Neighbours

_BLOCK_ROWS = 1024  # of new rows at a time
_SPACES = SPACE + byte_characters()[ord(" ")]  # marks of a space in the spellings of both kinds of vocabulary
_READ_ROWS = 4096  # of old rows at a time, for their statistics


class Replaced(NamedTuple):
  """What new pieces replace, ragged: piece i has ids[starts[i]:starts[i + 1]]."""

  ids: np.ndarray  # int64, of the base
  starts: np.ndarray  # int64 [pieces + 1]

  def __len__(self) -> int:
    return len(self.starts) - 1


def replaced(old: Sequence[Sequence[int]]) -> Replaced:
  """From a list for each piece; each holds an id at least."""
  if not all(old):
    raise ConfigError("a new piece replaces no old one: initialisers need its base tokenisation")
  ids = np.array([number for piece in old for number in piece], np.int64)
  return Replaced(ids, np.cumsum([0, *map(len, old)]))


class Statistics(NamedTuple):
  """Of all rows of a table."""

  mean_D: np.ndarray  # float64
  root_DD: np.ndarray  # a square root of the covariance: root @ root.T, float64
  rms: float  # of the values


@dataclasses.dataclass(frozen=True)
class OldRows:
  """What initialisers start from: a table's old rows, and what new pieces have to do with them."""

  rows_VD: np.ndarray  # the base's true rows; may be a mapped file
  pieces: Replaced
  overlap: np.ndarray | None = None  # the old id nearest in spelling to each piece, int64 (`overlapping`)
  counts_V: np.ndarray | None = None  # how often each old id is used, for "weighted"
  neighbours: Neighbours | None = None  # for "similar"
  seed: int = 0
  scale: float = 1.0  # of the noise of "gaussian" and "random", in standard deviations of the old rows

  @functools.cached_property
  def statistics(self) -> Statistics:
    """Of all old rows."""
    return statistics(self.rows_VD)


Block = Callable[[OldRows, int, int], np.ndarray]


def mean(old: OldRows, start: int, stop: int) -> np.ndarray:
  """The mean of the old pieces' rows, each as often as it stands in the piece."""
  return _weighted(old, start, stop, np.ones(len(old.pieces.ids), np.float64))


def weighted(old: OldRows, start: int, stop: int) -> np.ndarray:
  """The old pieces' rows, weighted by how often each is used: rows that were trained more count more."""
  if old.counts_V is None:
    raise ConfigError("initialiser 'weighted' needs how often the base's ids are used: give --general")
  return _weighted(old, start, stop, old.counts_V[old.pieces.ids] + 1.0)


def _weighted(old: OldRows, start: int, stop: int, weights: np.ndarray) -> np.ndarray:
  """Rows [stop - start, D]: means of old rows with a weight for each of `pieces.ids`."""
  starts = old.pieces.starts[start : stop + 1]
  part = slice(starts[0], starts[-1])
  rows = old.rows_VD[old.pieces.ids[part]].astype(np.float32) * weights[part, None].astype(np.float32)
  totals = np.add.reduceat(weights[part], starts[:-1] - starts[0])
  return np.add.reduceat(rows, starts[:-1] - starts[0], axis=0) / totals[:, None].astype(np.float32)


def first(old: OldRows, start: int, stop: int) -> np.ndarray:
  """The first old piece's row: as an output row, the new piece is said where the old one began (EEVE, 2402.14714)."""
  return old.rows_VD[old.pieces.ids[old.pieces.starts[start:stop]]].astype(np.float32)


def overlap(old: OldRows, start: int, stop: int) -> np.ndarray:
  """A copy of the row of the old piece that is spelt most alike."""
  assert old.overlap is not None
  return old.rows_VD[old.overlap[start:stop]].astype(np.float32)


def zero(old: OldRows, start: int, stop: int) -> np.ndarray:
  """Zeros. As output rows they give every new piece the logit 0, which beats trained, negative ones."""
  return np.zeros((stop - start, old.rows_VD.shape[1]), np.float32)


def random(old: OldRows, start: int, stop: int) -> np.ndarray:
  """Normal, around 0, as wide as the old rows' values are: the naive way."""
  return _normal(old, start, stop) * np.float32(old.scale * old.statistics.rms)


def gaussian(old: OldRows, start: int, stop: int) -> np.ndarray:
  """Normal with the mean and the covariance of all old rows (Hewitt); `scale` shrinks the noise, 0 leaves the mean."""
  found = old.statistics
  noise = _normal(old, start, stop).astype(np.float64) @ found.root_DD.T
  return (found.mean_D + old.scale * noise).astype(np.float32)


def similar(old: OldRows, start: int, stop: int) -> np.ndarray:
  """Old rows weighted by how alike they are used in domain text (as FOCUS, 2305.14481); the parts' mean where that is unknown."""
  if old.neighbours is None:
    raise ConfigError("initialiser 'similar' needs domain text to see how pieces are used: give --domain")
  rows = mean(old, start, stop)
  for at in range(start, stop):
    ids, weights = old.neighbours.of(at)
    if len(ids):
      rows[at - start] = weights @ old.rows_VD[ids].astype(np.float32)
  return rows


INITIALISERS: dict[str, Block] = {f.__name__: f for f in (mean, weighted, first, overlap, gaussian, similar, zero, random)}


def find(name: str, *, flag: str) -> Block:
  """The initialiser of a name. Raises ConfigError: there is none of that name."""
  if name not in INITIALISERS:
    raise ConfigError(
      f"{flag}={name!r}: no such initialiser.{did_you_mean(name, list(INITIALISERS))} There are {', '.join(INITIALISERS)}"
    )
  return INITIALISERS[name]


def blocks(initialiser: Block, old: OldRows) -> Iterator[np.ndarray]:
  """All new rows, some at a time, float32 [<= 1024, D]."""
  for start in range(0, len(old.pieces), _BLOCK_ROWS):
    yield initialiser(old, start, min(start + _BLOCK_ROWS, len(old.pieces)))


def padding(old: OldRows, *, num_rows: int) -> np.ndarray:
  """Rows that no id uses: the mean of all old rows, so that a softmax which forgets to mask them gives them little (Hewitt)."""
  return np.broadcast_to(old.statistics.mean_D.astype(np.float32), (num_rows, old.rows_VD.shape[1]))


def overlapping(texts: Mapping[int, str], pieces: Sequence[Piece]) -> np.ndarray:
  """The old id that each piece overlaps most: spelt alike but for case and a leading space, else the longest that it replaces."""
  alike: dict[str, int] = {}
  for number, text in texts.items():
    alike.setdefault(_plain(text), number)
  longest = (max(piece.old, key=lambda number: len(texts.get(number, ""))) for piece in pieces)
  return np.array([alike.get(_plain(piece.text), number) for piece, number in zip(pieces, longest, strict=True)], np.int64)


def _plain(text: str) -> str:
  return text.lstrip(_SPACES).casefold() or text


def statistics(old_VD: np.ndarray) -> Statistics:
  """Mean and covariance of the rows, read some at a time, in float64."""
  num_rows, width = old_VD.shape
  sum_D, squares_DD = np.zeros(width), np.zeros((width, width))
  for start in range(0, num_rows, _READ_ROWS):
    rows = old_VD[start : start + _READ_ROWS].astype(np.float64)
    sum_D += rows.sum(axis=0)
    squares_DD += rows.T @ rows
  mean_D = sum_D / num_rows
  values_D, vectors_DD = np.linalg.eigh(squares_DD / num_rows - np.outer(mean_D, mean_D))
  root_DD = vectors_DD * np.sqrt(np.maximum(values_D, 0.0))
  return Statistics(mean_D, root_DD, float(np.sqrt(np.trace(squares_DD) / (num_rows * width))))


def _normal(old: OldRows, start: int, stop: int) -> np.ndarray:
  """Standard normal values that depend on seed and row alone."""
  width = old.rows_VD.shape[1]
  rows = [np.random.default_rng([old.seed, row]).standard_normal(width, np.float32) for row in range(start, stop)]
  return np.stack(rows)
