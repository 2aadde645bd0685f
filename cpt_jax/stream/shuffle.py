"""A source's n-th row -> which row of its layout that is: a fresh permutation in each epoch.

Invariant: a pure function of (rows, name, seed, n), the same in every version and on every machine; one row costs O(1), and
nothing is kept that grows with the source.

grain's own shuffle is not used: it walks through about 2**16 indices to permute a handful (10 ms for a row of a source of 10
rows, 0.2 ms for one of 1000), gives one row at a time, stops at 2**32 rows, and may permute otherwise in another version.
"""

import functools
import hashlib
import json

import numpy as np

from cpt_jax.stream.sources import mix64

_TABLE_ROWS = 1 << 16  # up to here the permutation is a table: small domains make a poor cipher
_ROUNDS = 4  # of a Feistel network; enough to look random (Luby and Rackoff, doi 10.1137/0217022)
_WORD = (1 << 64) - 1


class Shuffle:
  """`shuffle[n]`: the layout's row for the source's n-th; rows [e * num_rows, (e + 1) * num_rows) are epoch e."""

  def __init__(self, num_rows: int, *, name: str, seed: int):
    assert num_rows > 0
    self.num_rows = num_rows
    self._half_bits = (num_rows - 1).bit_length() + 1 >> 1
    self._half_mask = (1 << self._half_bits) - 1
    self._label = [name, seed]
    self._keys = functools.lru_cache(8)(self._epoch_keys)
    self._table = functools.lru_cache(2)(self._epoch_table)

  def __getitem__(self, n: int) -> int:
    epoch, index = divmod(n, self.num_rows)
    if self.num_rows <= _TABLE_ROWS:
      return int(self._table(epoch)[index])
    index = self._permute(index, self._keys(epoch))
    while index >= self.num_rows:  # walking on stays a permutation of the rows; below 4 turns on average
      index = self._permute(index, self._keys(epoch))
    return index

  def rows(self, start: int, stop: int) -> np.ndarray:
    """int64 [stop - start]: `shuffle[n]` for n in [start, stop), within one epoch."""
    epoch, first = divmod(start, self.num_rows)
    assert 0 <= stop - start <= self.num_rows - first, f"[{start}, {stop}) is in several epochs of {self.num_rows}"
    if self.num_rows <= _TABLE_ROWS:
      return self._table(epoch)[first : first + stop - start]
    index = self._permute(np.arange(first, first + stop - start, dtype=np.uint64), self._keys(epoch))
    while (out := index >= self.num_rows).any():
      index[out] = self._permute(index[out], self._keys(epoch))
    return index.astype(np.int64)

  def _epoch_keys(self, epoch: int) -> list[int]:
    digest = hashlib.blake2b(json.dumps([*self._label, epoch]).encode(), digest_size=8 * _ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

  def _epoch_table(self, epoch: int) -> np.ndarray:
    keys = np.arange(self.num_rows, dtype=np.uint64) ^ np.uint64(self._keys(epoch)[0])
    return np.argsort(mix64(keys), kind="stable")

  def _permute(self, index, keys: list[int]):
    """A permutation of [0, 4**half_bits); for one int, or elementwise for an array of uint64."""
    left, right = index >> self._half_bits, index & self._half_mask
    for key in keys:
      mixed = ((right ^ key) * 0xBF58476D1CE4E5B9) & _WORD
      mixed = ((mixed ^ (mixed >> 29)) * 0x94D049BB133111EB) & _WORD
      left, right = right, left ^ ((mixed >> 32) & self._half_mask)
    return (left << self._half_bits) | right
