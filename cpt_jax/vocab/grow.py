"""A base's tokenizer and text of a domain -> a tokenizer with more pieces, each of them reachable, and what that changes.

Invariant: old ids keep their meaning, new ones follow the last old id; protected text is tokenised as before, which is checked on
all of it after the last piece was chosen.
"""

import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenization
from cpt_jax.vocab import candidates, texts as texts_lib
from cpt_jax.vocab.bases import Base, Piece, Words
from cpt_jax.vocab.candidates import Candidates
from cpt_jax.vocab.changes import NO_CHANGES, Changes, compare

# Parts of the candidates in the order of use or count, from the rarest.
BANDS = {"all": (0.0, 1.0), "low": (0.0, 0.5), "high": (0.5, 1.0)}
MIN_COUNT = 20  # by hand: a piece that the sample holds less often is learnt by chance, and its row from few examples
# Text from which frequencies are estimated. By hand: a few hundred pieces of each hundred thousand bytes are still found.
MIN_BYTES = 200_000
# Candidates for each piece that is wanted: some are dropped, a band takes a part. By count the rare ones are wanted as well.
_POOL, _POOL_BY_COUNT = 3, 12

Batches = Callable[[], Iterator[list[str]]]


class Band(NamedTuple):
  """Which candidates are wanted: by `Piece.use`, or by `Piece.count`."""

  by: str  # "use" or "count"
  above: int  # -1 for no bound
  to: int  # included

  def has(self, piece: Piece) -> bool:
    """Is the piece in it."""
    return self.above < getattr(piece, self.by) <= self.to


@dataclasses.dataclass(frozen=True)
class Grown:
  """A grown tokenizer."""

  base: Base
  pieces: list[Piece]  # of ids base.vocab_size, ...
  raw: bytes  # the tokenizer's file
  tokenizer: tokenization.Tokenizer
  band: Band
  num_candidates: int
  num_outside: int  # candidates outside the band
  dropped: dict[str, int]  # why -> how many candidates

  @property
  def vocab_size(self) -> int:
    """Ids in use; rows beyond them are padding."""
    return self.base.vocab_size + len(self.pieces)

  def lengths_W(self) -> np.ndarray:
    """Bytes that each id spells."""
    return np.concatenate([self.base.lengths_V, [self.base.num_bytes(piece.text) for piece in self.pieces]]).astype(np.int64)

  def changes(self, batches: Iterator[list[str]]) -> Changes:
    """What growth changes in the tokenisation of texts."""
    lengths_W, total = self.lengths_W(), NO_CHANGES
    for batch in batches:
      old, new = self.base.tokenizer.encode_contents(batch), self.tokenizer.encode_contents(batch)
      total += compare(batch, old, new, lengths_W=lengths_W)
    return total


def num_rows(vocab_size: int, *, multiple: int) -> int:
  """Rows of an embedding that holds `vocab_size` ids and divides by `multiple`: the least such number."""
  return -(-vocab_size // multiple) * multiple


def count_ids(tokenizer: tokenization.Tokenizer, batches: Iterator[list[str]]) -> np.ndarray:
  """How often each id stands in the texts, int64 [V]."""
  counts_V = np.zeros(tokenizer.vocab_size, np.int64)
  for batch in batches:
    for ids in tokenizer.encode_contents(batch):
      counts_V += np.bincount(np.array(ids, np.int64), minlength=len(counts_V))
  return counts_V


def words_of(base: Base, texts: Sequence[str]) -> list[Words]:
  """Texts as symbols."""
  return [words for batch in texts_lib.batches(iter(texts)) for words in base.words(batch)]


def grow(
  base: Base, train: Sequence[str], *, size: int, band: tuple[float, float] = BANDS["all"], band_by: str = "use",
  saving: float = 1.0, general_counts_V: np.ndarray | None = None, protect: Batches | None = None, min_count: int = MIN_COUNT,
) -> Grown:  # fmt: skip
  """The base with up to `size` pieces that shorten `train` most.

  `band`: quantiles of the candidates by `band_by`. "use": how often the most used of the old pieces that a candidate replaces
  stands in the text that `general_counts_V` counts; (0, 0.5) takes pieces all of whose old pieces are used rarely there. "count":
  how often the candidate itself stands in `train`. `saving`: no more pieces once they save this share of `train`'s tokens.
  `protect` gives texts whose tokenisation must not change.
  Raises ConfigError: too little text; a band without general text; no piece is left.
  """
  num_bytes = sum(len(text.encode()) for text in train)
  if num_bytes < MIN_BYTES:
    raise ConfigError(
      f"the domain text to choose pieces from has {num_bytes:,} bytes, expected at least {MIN_BYTES:,}: too few to estimate how "
      "often a piece is used; give more text"
    )
  if band != BANDS["all"] and band_by == "use" and general_counts_V is None:
    raise ConfigError(f"a band of {band[0]:g}:{band[1]:g} asks how often pieces are used in general text; give --general")
  counts_V = np.zeros(base.vocab_size, np.int64) if general_counts_V is None else general_counts_V
  words = words_of(base, train)
  most_saved = saving * sum(found.num_tokens for found in words)
  pool, bounds = _pool(base, words, size=size, band=band, band_by=band_by, counts_V=counts_V, min_count=min_count)
  inside = [bounds.has(piece) for piece in pool.pieces]
  dropped = {"in the vocabulary already, special or too long": pool.num_dropped}
  banned: set[str] = {piece.text for piece, is_in in zip(pool.pieces, inside, strict=True) if not is_in}
  num_outside = len(banned)
  while True:
    # The whole pool first, where a piece must not appear in protected text: few rounds instead of many.
    chosen = select(base, pool.pieces, size=size, banned=banned, most_saved=most_saved)
    if not chosen:
      raise ConfigError(
        f"no piece is left of {len(pool.pieces)} candidates ({num_outside} outside the band; "
        + "; ".join(f"{n} {why}" for why, n in dropped.items())
        + "): give more domain text, a wider band, a lower --min_count or less protected text"
      )
    raw = base.grown(chosen)
    found = {"unreachable": {chosen[i].text for i in base.unreachable(raw, chosen)}}
    if protect is not None and not found["unreachable"]:
      found["protected"] = _offenders(base, raw, chosen, protect)
    if not any(found.values()):
      break
    assert not set.union(*found.values()) & banned  # or this would go on for ever
    for why, texts in found.items():
      dropped[why] = dropped.get(why, 0) + len(texts)
      banned |= texts
  tokenizer = load_grown(base, raw)
  return Grown(base, chosen, raw, tokenizer, bounds, len(pool.pieces), num_outside, dropped)


def _pool(
  base: Base, words: list[Words], *, size: int, band: tuple[float, float], band_by: str, counts_V: np.ndarray, min_count: int
) -> tuple[Candidates, Band]:
  """Candidates, and the band's bounds among them; where uses have an upper bound, words are cut at what is used more."""

  def learn(found: list[Words]) -> Candidates:
    texts = [text for each in found if (text := candidates.spell(each))]
    if not texts:
      raise ConfigError(
        "the domain text holds nothing that pieces could be made of within the band; give more text or a wider band"
      )
    num_merges = (_POOL if band_by == "use" else _POOL_BY_COUNT) * size
    learnt = candidates.learn(texts, num_merges=num_merges, min_count=min_count)
    return candidates.candidates(base, learnt, general_counts_V=counts_V)

  pool = learn(words)
  if not pool.pieces:
    raise ConfigError(
      f"no pair of pieces stands {min_count} times or more in the domain text; give more text or lower --min_count"
    )
  values = sorted(getattr(piece, band_by) for piece in pool.pieces)
  low, high = (int(quantile * len(values)) for quantile in band)
  bounds = Band(band_by, -1 if low == 0 else values[low - 1], values[high - 1])
  if high < len(values) and band_by == "use":
    is_used_more_S = np.array(
      [max((counts_V[i] for i in base.old_ids(s)), default=0) > bounds.to for s in range(base.num_symbols)] + [False]
    )
    pool = learn([each._replace(symbols=np.where(is_used_more_S[each.symbols], -1, each.symbols)) for each in words])
  return pool, bounds


def select(base: Base, pieces: Sequence[Piece], *, size: int, banned: set[str], most_saved: float) -> list[Piece]:
  """The first `size` pieces that are not banned and whose parts are there, with the rules whose parts are there."""
  there: set[str] = set(base.texts.values())
  chosen: list[Piece] = []
  saved = 0
  for piece in pieces:
    if len(chosen) == size or saved >= most_saved:
      break
    is_made = not piece.rules or any(left in there and right in there for left, right in piece.rules)
    if piece.text not in banned and is_made:
      there.add(piece.text)
      chosen.append(piece)
      saved += piece.saved
  return [p._replace(rules=tuple(r for r in p.rules if r[0] in there and r[1] in there)) for p in chosen]


def _offenders(base: Base, raw: bytes, chosen: Sequence[Piece], protect: Batches) -> set[str]:
  """New pieces that stand in the protected texts, and what they are made of, which would take their place."""
  grown = load_grown(base, raw)
  seen: set[int] = set()
  num_changed = 0
  for batch in protect():
    for old, new in zip(base.tokenizer.encode_contents(batch), grown.encode_contents(batch), strict=True):
      if old != new:
        num_changed += 1
        seen |= {number - base.vocab_size for number in new if number >= base.vocab_size}
  assert seen or not num_changed, num_changed  # a change without a new piece: nothing that could be dropped
  by_text = {piece.text: piece for piece in chosen}
  offenders: set[str] = set()
  todo = [chosen[number].text for number in seen]
  while todo:
    text = todo.pop()
    if text in by_text and text not in offenders:
      offenders.add(text)
      todo += [part for rule in by_text[text].rules for part in rule]
  return offenders


def load_grown(base: Base, raw: bytes) -> tokenization.Tokenizer:
  """The grown file as a tokenizer, with the base's side files."""
  with tempfile.TemporaryDirectory() as directory:
    write_tokenizer(base, raw, pathlib.Path(directory))
    return tokenization.load(directory)


def write_tokenizer(base: Base, raw: bytes, directory: pathlib.Path) -> None:
  """The tokenizer's files in a directory: the grown one, and of the base's those that say nothing of the pieces."""
  for path in side_files(base):
    shutil.copyfile(path, directory / path.name)
  (directory / base.file_name).write_bytes(raw)


def side_files(base: Base) -> list[pathlib.Path]:
  """Settings beside the tokenizer that hold for the grown one too."""
  names = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json", "generation_config.json"]
  names += ["added_tokens.json"] if base.file_name == "tokenizer.model" else []
  return [path for name in names if (path := base.path.parent / name).is_file()]


def record(grown: Grown, *, rows: int) -> dict[str, Any]:
  """What a trainer and the initialisers must know: which ids are real, which are new, and what each new one replaces."""
  return {
    "format": 1,
    "base_vocab_size": grown.base.vocab_size,
    "vocab_size": grown.vocab_size,
    "rows": rows,
    "base_fingerprint": grown.base.tokenizer.fingerprint,
    "fingerprint": grown.tokenizer.fingerprint,
    "band": grown.band._asdict(),
    "pieces": [
      {"id": grown.base.vocab_size + i, "text": p.text, "old": list(p.old), "count": p.count, "saved": p.saved, "use": p.use}
      for i, p in enumerate(grown.pieces)
    ],
  }


RECORD = "vocabulary.json"
