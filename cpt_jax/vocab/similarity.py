"""Domain text in new tokens -> how alike old and new tokens are used, as weights of old rows (as FOCUS, 2305.14481).

Invariant: weights of a piece are not negative and sum to 1, or there are none; only old tokens carry weight.

FOCUS trains fastText on the domain text. Here the auxiliary embedding is the truncated SVD of positive pointwise mutual
information between neighbouring tokens (Levy and Goldberg, NIPS 2014, show skip-gram to factorise a shifted form of that matrix):
no dependency, no chance in it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

WIDTH = 100  # of the auxiliary embedding
WINDOW = 5  # tokens to either side, as fastText's default
MIN_COUNT = 10  # of a token, below which its neighbours say nothing (as FOCUS)
MAX_TOKENS = 3_000_000  # of text; more changes little and costs memory
_BLOCK = 512  # new pieces whose cosines with all old ones are in memory at once; by hand


class Neighbours(NamedTuple):
  """Old tokens that are used like each new piece, ragged."""

  ids: np.ndarray  # int64, of the base
  weights: np.ndarray  # float32
  starts: np.ndarray  # int64 [pieces + 1]

  def of(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) of a piece; empty where the text has too little of it."""
    part = slice(self.starts[piece], self.starts[piece + 1])
    return self.ids[part], self.weights[part]


def sparsemax(scores_NK: np.ndarray) -> np.ndarray:
  """The point of the simplex nearest to each row (Martins and Astudillo, 1602.02068): most weights are exactly 0.

  `[1.0, 0.5, 0.0]` -> `[0.75, 0.25, 0.0]`.
  """
  sorted_NK = -np.sort(-scores_NK, axis=1)
  sums_NK = np.cumsum(sorted_NK, axis=1) - 1
  ranks_K = np.arange(1, scores_NK.shape[1] + 1)
  support_N = (sorted_NK * ranks_K[None] > sums_NK).sum(axis=1)
  thresholds_N = sums_NK[np.arange(len(scores_NK)), support_N - 1] / support_N
  return np.maximum(scores_NK - thresholds_N[:, None], 0)


def embed(texts: Iterable[list[int]], *, vocab_size: int, width: int = WIDTH, window: int = WINDOW) -> np.ndarray:
  """Unit vectors of the tokens by their neighbours, float32 [V, width]; zeros for tokens that are too rare."""
  pairs = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float64)
  counts_V, num_tokens = np.zeros(vocab_size, np.int64), 0
  for text in texts:
    ids = np.array(text[: MAX_TOKENS - num_tokens], np.int64)
    num_tokens += len(ids)
    counts_V += np.bincount(ids, minlength=vocab_size)
    for apart in range(1, min(window, len(ids) - 1) + 1):
      ones = np.ones(len(ids) - apart)
      pairs = pairs + scipy.sparse.coo_matrix((ones, (ids[:-apart], ids[apart:])), pairs.shape).tocsr()
    if num_tokens == MAX_TOKENS:
      break
  kept = np.flatnonzero(counts_V >= MIN_COUNT)
  vectors_VW = np.zeros((vocab_size, width), np.float32)
  if len(kept) < 3:
    return vectors_VW
  ppmi = _positive_information((pairs + pairs.T)[kept][:, kept])
  # Fixed beginning: ARPACK would draw one.
  rank = min(width, len(kept) - 1)
  left, values, _ = scipy.sparse.linalg.svds(ppmi, k=rank, v0=np.ones(len(kept)), solver="arpack")
  rows = left * np.sqrt(values)  # the symmetric form, which does best on similarity (Levy et al., TACL 2015, section 3.3)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  vectors_VW[kept, :rank] = np.where(norms > 1e-9, rows / np.maximum(norms, 1e-9), 0)
  return vectors_VW


def _positive_information(pairs: Any) -> Any:
  """max(0, log p(a, b) / p(a) p(b)) where a pair was seen."""
  found = pairs.tocoo()
  sums_V = np.asarray(pairs.sum(axis=1)).ravel()
  values = np.log(found.data * sums_V.sum() / (sums_V[found.row] * sums_V[found.col]))
  return scipy.sparse.coo_matrix((np.maximum(values, 0), (found.row, found.col)), found.shape).tocsr()


def neighbours(vectors_WX: np.ndarray, *, num_old: int) -> Neighbours:
  """Weights of old tokens for each new one (ids from `num_old` on): the sparsemax of their cosines."""
  old = np.flatnonzero(vectors_WX[:num_old].any(axis=1))
  ids, weights, starts = [], [], [0]
  new_NX = vectors_WX[num_old:]
  for start in range(0, len(new_NX), _BLOCK):
    block_NX = new_NX[start : start + _BLOCK]
    shares_NK = sparsemax(block_NX @ vectors_WX[old].T) if len(old) else np.zeros((len(block_NX), 0), np.float32)
    shares_NK[~block_NX.any(axis=1)] = 0
    for share_K in shares_NK:
      found = np.flatnonzero(share_K)
      ids.append(old[found])
      weights.append(share_K[found] / max(share_K[found].sum(), 1e-9))
      starts.append(starts[-1] + len(found))
  empty = [np.zeros(0, np.int64)]
  return Neighbours(np.concatenate(ids or empty), np.concatenate(weights or empty).astype(np.float32), np.array(starts))
