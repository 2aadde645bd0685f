"""The ids of texts before and after growth -> which tokens are no longer there.

Invariant: counted by the places that tokens take in the text, so a change is seen whatever made it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Changes(NamedTuple):
  """Between two tokenisations of the same texts."""

  documents: int
  changed_documents: int
  tokens: int  # before
  changed_tokens: int  # of those: no longer there
  tokens_after: int
  bytes: int

  @property
  def saved_frac(self) -> float:
    """Of the tokens before."""
    return 1.0 - self.tokens_after / max(self.tokens, 1)

  def __add__(self, other: "Changes") -> "Changes":  # type: ignore[override]
    return Changes(*(a + b for a, b in zip(self, other, strict=True)))


NO_CHANGES = Changes(0, 0, 0, 0, 0, 0)


def compare(texts: list[str], old: Iterable[list[int]], new: Iterable[list[int]], *, lengths_W: np.ndarray) -> Changes:
  """Texts' ids before and after; `lengths_W` has the bytes that each id of the grown vocabulary spells, 0 where that varies."""
  total = NO_CHANGES
  for text, before, after in zip(texts, old, new, strict=True):
    lost = 0 if before == after else max(num_lost(np.array(before), np.array(after), lengths_W=lengths_W), 1)
    total += Changes(1, int(before != after), len(before), lost, len(after), len(text.encode()))
  return total


def num_lost(old: np.ndarray, new: np.ndarray, *, lengths_W: np.ndarray) -> int:
  """Tokens of `old`, ids of a text as one model cuts it, that stand at no place of `new` with the same id.

  Where an id has no length of its own (the unknown token), places cannot be told: the old ids that are fewer in `new` count.
  """
  if (lengths_W[np.concatenate([old, new])] == 0).any():
    counts = [np.bincount(ids, minlength=len(lengths_W)) for ids in (old, new)]
    return int(np.maximum(counts[0] - counts[1], 0).sum())
  keys = []
  for ids in (old, new):
    ends = np.cumsum(lengths_W[ids])
    keys.append((ends - lengths_W[ids]) * len(lengths_W) + ids)  # where each begins, and which it is
  return len(old) - int(np.isin(keys[0], keys[1]).sum())
