"""Words of a base's symbols -> the pieces that would shorten them most, in the order in which BPE would learn them.

Invariant: a candidate stands behind all that it is made of, so any beginning of the list can be added, and every candidate comes
from the base's own segmentation continued: adjacent symbols of one word.

The merges are learnt by the tokenizers library's trainer on a text in which every symbol is one character of the upper planes of
Unicode: its alphabet is then the base's vocabulary, so it goes on where the base's own training ended.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from cpt_jax.store.spelling import byte_characters
from cpt_jax.vocab.bases import Base, Piece, Words

_FIRST = 0x10000  # code point of symbol 0; there are 2^20 from here on
MAX_CHARACTERS = 16  # of a piece, as SentencePiece's default (max_sentencepiece_length)


class Candidates(NamedTuple):
  """Pieces that could be added, each made of symbols: base's ids, characters, then the candidates' own numbers."""

  pieces: list[Piece]
  num_dropped: int  # for what they spell: in the vocabulary already, a special token, too long; and what is made of such


class Learnt(NamedTuple):
  """Merges in their order, on words of symbols."""

  merges: list[tuple[str, str]]  # in code points, as `spell` writes symbols
  symbols_U: np.ndarray  # that occur, int64
  counts_U: np.ndarray  # how often
  made: dict[str, int]  # merged string -> how often it was made


def spell(words: Words) -> str:
  """Symbols as characters, words apart; what no piece may hold is left out."""
  is_open = words.symbols >= 0
  is_start = words.is_start.copy()
  is_start[1:] |= ~is_open[:-1]
  codes, starts = words.symbols[is_open].astype(np.int64) + _FIRST, np.flatnonzero(is_start[is_open])
  return np.insert(codes, starts, ord(" ")).astype("<u4").tobytes().decode("utf-32-le")


def symbols_of(text: str) -> np.ndarray:
  """The symbols that a string of `spell` holds."""
  return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64) - _FIRST


def learn(texts: Sequence[str], *, num_merges: int, min_count: int) -> Learnt:
  """Merges of texts as `spell` writes them: at most `num_merges`, each made `min_count` times or more."""
  codes, counts = np.unique(np.concatenate([symbols_of(text) for text in texts]), return_counts=True)
  is_symbol = codes >= 0  # spaces lie below
  symbols_U, counts_U = codes[is_symbol], counts[is_symbol]
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=len(symbols_U) + num_merges, min_frequency=min_count, show_progress=False, special_tokens=[]
  )
  model.train_from_iterator(texts, trainer)
  merges = [(pair[0], pair[1]) for pair in json.loads(model.to_str())["model"]["merges"]]
  return Learnt(merges, symbols_U, counts_U, times_made(model, merges, texts))


def times_made(model: tokenizers.Tokenizer, merges: Sequence[tuple[str, str]], texts: Sequence[str]) -> dict[str, int]:
  """How often each merge's string is made while `texts` are tokenised.

  Merges are never undone: a string is made as often as it is a token in the end, plus as often as what it is a part of is made.
  A string with two rules is taken to be made by the first.
  """
  counts_V = np.zeros(model.get_vocab_size(), np.int64)
  for encoded in model.encode_batch_fast(list(texts), add_special_tokens=False):
    counts_V += np.bincount(encoded.ids, minlength=len(counts_V))
  vocab = model.get_vocab()
  made: dict[str, int] = {}
  rule: dict[str, tuple[str, str]] = {}
  for left, right in merges:
    rule.setdefault(left + right, (left, right))
  for text in reversed(rule):
    made[text] = made.get(text, 0) + int(counts_V[vocab[text]])
    for part in rule[text]:
      made[part] = made.get(part, 0) + made[text]
  return {text: made[text] for text in rule}


def candidates(base: Base, learnt: Learnt, *, general_counts_V: np.ndarray) -> Candidates:
  """Characters and merges as pieces, each behind its parts; the most frequent characters come before merges that are rarer."""
  general = general_counts_V.tolist()
  taken = set(base.texts.values())
  refused = {*base.tokenizer.special_tokens, *base.tokenizer.added_tokens}
  pieces: list[Piece] = []
  place: dict[str, int] = {}  # a piece's text -> its place in `pieces`
  known: dict[str, tuple[str, tuple[int, ...], int]] = {}  # code points -> (text, old ids, use)
  num_dropped = 0

  def use_of(old: Sequence[int]) -> int:
    return max((general[number] for number in old), default=0)

  characters = []
  for symbol, count in zip(learnt.symbols_U.tolist(), learnt.counts_U.tolist(), strict=True):
    old = base.old_ids(symbol)
    code = chr(_FIRST + symbol)
    if symbol < base.vocab_size:
      known[code] = (base.texts[symbol], old, use_of(old))
    else:
      characters.append((count, code, Piece(base.text_of(symbol), (), old, count, count * (len(old) - 1), use_of(old))))
  characters.sort(key=lambda entry: (-entry[0], entry[1]))
  rarest = None
  for left, right in [*learnt.merges, ("", "")]:
    count = learnt.made[left + right] if left else 0
    rarest = count if rarest is None else min(rarest, count)
    while characters and characters[0][0] >= rarest:
      _, code, piece = characters.pop(0)
      if piece.text in refused:
        num_dropped += 1
        continue
      known[code] = (piece.text, piece.old, piece.use)
      place[piece.text] = len(pieces)
      pieces.append(piece)
    if not left:
      break
    if left not in known or right not in known:
      num_dropped += 1
      continue
    (text_l, old_l, use_l), (text_r, old_r, use_r) = known[left], known[right]
    text = text_l + text_r
    rules = () if base.is_unigram else ((text_l, text_r),)
    if text in place:  # the same text by other parts: another rule for it, no piece of its own
      piece = pieces[place[text]]
      if rules and rules[0] not in piece.rules:
        pieces[place[text]] = piece._replace(rules=piece.rules + rules)
    elif text in taken or text in refused or _is_too_long(base, text):
      num_dropped += 1
      continue
    else:
      place[text] = len(pieces)
      pieces.append(Piece(text, rules, old_l + old_r, count, count, max(use_l, use_r)))
    known[left + right] = (text, old_l + old_r, max(use_l, use_r))
  return Candidates(pieces, num_dropped)


def _is_too_long(base: Base, text: str) -> bool:
  # A byte-level piece may hold parts of characters; its bytes that do not continue one are its characters.
  if not base.is_byte_level:
    return len(text) > MAX_CHARACTERS
  return sum(1 for character in text if character not in _CONTINUES) > MAX_CHARACTERS


_CONTINUES = frozenset(byte_characters()[0x80:0xC0])  # bytes that go on with a character
