"""A source's training documents -> those that are packed: by length, and more copies of longer ones where asked.

Invariant: a pure function of the documents' lengths and hashes, never of a run's seed; at a bracket's border it is the
documents' hashes that decide who is read once more.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.stream.sources import mix64

_SALT = np.uint64(0x6C656E67746873)  # "lengths": other documents come first here than are held out


@dataclasses.dataclass(frozen=True)
class Bracket:
  """Documents of a source of `from_tokens` tokens up to the next bracket's, for people."""

  from_tokens: int
  share_wanted: float  # of the selection's tokens, normalised
  share: float  # that it got
  num_documents: int  # each once
  num_tokens: int  # of these
  copies: float  # how often its tokens are read in an epoch; 0 = left out


@dataclasses.dataclass(frozen=True)
class Selection:
  """What is packed of a source, and what was left out. All tokens as in the store, with the end-of-text token."""

  documents: np.ndarray  # int64 [..], of the store, in the order given; a document that is read twice stands there twice
  num_tokens: int
  num_too_short: int
  tokens_too_short: int
  num_too_long: int
  tokens_too_long: int
  num_copies: int  # entries of `documents` beyond the first of each document
  tokens_copied: int
  brackets: tuple[Bracket, ...]  # empty without length_shares


def select(
  lengths: np.ndarray,  # int [documents of the store], in tokens
  documents: np.ndarray,  # int [..], those to select from, each once
  *,
  min_tokens: int,  # shorter documents are left out
  max_tokens: int,  # longer documents are left out; 0 = none
  length_shares: Sequence[tuple[int, float]],  # (from_tokens, share) rising from 0 tokens
  hashes: np.ndarray | None = None,  # uint64 [documents of the store], for length_shares
) -> Selection:
  """Leaves out documents by length, then repeats whole brackets of lengths until each has its share of the tokens.

  `length_shares` ((0, 0.3), (4096, 0.7)): 30% of the tokens come from documents of less than 4,096 tokens, 70% from those of at
  least as many. This is the length upsampling of Fu et al. (2402.10171, sec. 3), who keep each source's part of the
  mixture and read one in ten of its documents below 4,096 tokens. Here nothing that has a share is left out: the bracket
  that needs the fewest copies is read once in an epoch, the others as often as their shares ask. What is left after whole copies
  goes to documents in the order of their hashes, so a share is met to within half a document, and a document that is
  added changes nothing but who stands at that border. Shares are normalised; one of 0 leaves its documents out.
  Raises ConfigError: nothing is left, or length_shares is malformed or asks for documents of a length that there is not.
  """
  documents = np.asarray(documents, np.int64)
  sizes = lengths[documents].astype(np.int64)
  too_short = sizes < min_tokens
  too_long = sizes > max_tokens if max_tokens else np.zeros(len(sizes), bool)
  kept = ~too_short & ~too_long
  if len(documents) and not kept.any():
    raise ConfigError(
      f"min_tokens={min_tokens}, max_tokens={max_tokens}: leave none of {len(documents)} documents, which have {sizes.min()} to "
      f"{sizes.max()} tokens; widen them (max_tokens=0 is no limit)"
    )
  left_out = {
    "num_too_short": int(too_short.sum()),
    "tokens_too_short": int(sizes[too_short].sum()),
    "num_too_long": int(too_long.sum()),
    "tokens_too_long": int(sizes[too_long].sum()),
  }
  documents, sizes = documents[kept], sizes[kept]
  copies, brackets = np.ones(len(documents), np.int64), ()
  if length_shares and len(documents):
    assert hashes is not None, "length_shares needs the documents' hashes"
    copies, brackets = _copies(sizes, mix64(mix64(hashes[documents]) ^ _SALT), length_shares)
  again = np.maximum(copies - 1, 0)
  return Selection(
    documents=np.repeat(documents, copies),
    num_tokens=int((sizes * copies).sum()),
    **left_out,
    num_copies=int(again.sum()),
    tokens_copied=int((sizes * again).sum()),
    brackets=brackets,
  )


def _copies(
  sizes: np.ndarray, order: np.ndarray, length_shares: Sequence[tuple[int, float]]
) -> tuple[np.ndarray, tuple[Bracket, ...]]:
  """How often each document is read, int64 [documents]; those with a small `order` come first where some are read once more."""
  borders, shares = _check(length_shares)
  bracket = np.searchsorted(borders, sizes, side="right") - 1
  num_documents = np.bincount(bracket, minlength=len(borders))
  num_tokens = np.zeros(len(borders), np.int64)
  np.add.at(num_tokens, bracket, sizes)
  for b in np.flatnonzero((shares > 0) & (num_tokens == 0)).tolist():
    end = f"to {borders[b + 1] - 1}" if b + 1 < len(borders) else "or more"
    raise ConfigError(
      f"length_shares: {shares[b]:.3g} of the tokens are to come from documents of {borders[b]} {end} tokens, but there is none "
      f"(the documents left have {sizes.min()} to {sizes.max()}); take the bracket out or move its border"
    )
  # Shares of nothing ask for nothing; the bracket that needs the fewest copies is read once.
  times = np.divide(shares, num_tokens, out=np.zeros(len(shares)), where=shares > 0)
  times /= times[times > 0].min()
  copies = np.floor(times).astype(np.int64)[bracket]
  for b in np.flatnonzero(times % 1 > 0).tolist():
    mine = np.flatnonzero(bracket == b)
    mine = mine[np.argsort(order[mine], kind="stable")]
    extra = (times[b] % 1) * num_tokens[b]
    middles = np.cumsum(sizes[mine]) - sizes[mine] / 2
    copies[mine[: np.searchsorted(middles, extra)]] += 1  # as near to the wish as whole documents come
  read = np.zeros(len(borders), np.int64)
  np.add.at(read, bracket, sizes * copies)
  columns = borders, shares, read / read.sum(), num_documents, num_tokens, read / np.maximum(num_tokens, 1)
  return copies, tuple(Bracket(*values) for values in zip(*(c.tolist() for c in columns), strict=True))


def _check(length_shares: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
  """The brackets' borders, and their shares normalised."""
  borders, shares = (np.array(column) for column in zip(*length_shares, strict=True))
  if borders[0] != 0 or (np.diff(borders) <= 0).any():
    raise ConfigError(
      f"length_shares={tuple(length_shares)!r}: brackets begin at {borders.tolist()} tokens; they must begin at 0 and rise "
      "(min_tokens leaves short documents out)"
    )
  if not all(math.isfinite(share) and share >= 0 for share in shares.tolist()) or not shares.sum() > 0:
    raise ConfigError(f"length_shares={tuple(length_shares)!r}: shares must be finite, none negative and one above 0")
  return borders, shares / shares.sum()
