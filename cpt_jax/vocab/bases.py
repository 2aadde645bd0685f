"""A base's tokenizer -> its texts as words of symbols, between which new pieces may grow; and what a new piece is.

Invariant: symbols below `vocab_size` are the base's own ids; a character that the base can only spell by bytes, or not at all, is
one symbol of its own, numbered from `vocab_size` on.
"""

import abc
import functools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenization
from cpt_jax.store.corpus import script_of
from cpt_jax.store.spelling import SPACE, is_byte_piece

_ONE_SCRIPT = {"Hiragana": "Han", "Katakana": "Han", "Katakana-hiragana": "Han", "Bopomofo": "Han"}  # as SentencePiece's trainer


class Words(NamedTuple):
  """A text as symbols, and where pieces may not reach across."""

  symbols: np.ndarray  # int32 [n]; -1 for what no piece may hold: special tokens, single bytes, the unknown token
  is_start: np.ndarray  # bool [n]: no piece reaches across the place before this symbol
  num_tokens: int  # of the base


class Piece(NamedTuple):
  """A piece to be added."""

  text: str  # in the model's own spelling, as the vocabulary holds it
  rules: tuple[tuple[str, str], ...]  # the pairs of pieces that it is merged from; none for a single character
  old: tuple[int, ...]  # the base's ids that it replaces
  count: int  # how often it was made in the text that it was chosen from
  saved: int  # tokens by which it shortened that text, what it is made of being there
  use: int  # how often the most used of `old` was used in general text


class Base(abc.ABC):
  """A tokenizer that may grow."""

  kind: str  # for people, e.g. "byte-level BPE"
  is_unigram: bool
  is_byte_level: bool
  file_name: str  # of the tokenizer's file in a Hugging Face directory
  texts: dict[int, str]  # id -> piece, in the model's own spelling, without special and added tokens

  def __init__(self, tokenizer: tokenization.Tokenizer):
    self.tokenizer = tokenizer
    self.vocab_size = tokenizer.vocab_size
    self.extra: list[str] = []  # the characters of the symbols from vocab_size on
    self._extra_number: dict[str, int] = {}
    self._class_of_symbol = np.zeros((2, 0), np.int64)

  @abc.abstractmethod
  def words(self, texts: list[str]) -> list[Words]:
    """Each text as symbols."""

  @abc.abstractmethod
  def grown(self, pieces: Sequence[Piece]) -> bytes:
    """The tokenizer's file with `pieces` as ids vocab_size, vocab_size + 1, ...; all older ids keep their meaning."""

  @abc.abstractmethod
  def unreachable(self, grown: bytes, pieces: Sequence[Piece]) -> list[int]:
    """Numbers of the pieces whose own text is not tokenised to them alone by the grown file."""

  @property
  def path(self) -> Path:
    """The tokenizer's file."""
    return self.tokenizer.path

  @property
  def num_symbols(self) -> int:
    """Ids and the characters found so far."""
    return self.vocab_size + len(self.extra)

  def text_of(self, symbol: int) -> str:
    """A symbol's piece or character."""
    return self.extra[symbol - self.vocab_size] if symbol >= self.vocab_size else self.texts[symbol]

  def old_ids(self, symbol: int) -> tuple[int, ...]:
    """The base's ids that spell a symbol."""
    if symbol < self.vocab_size:
      return (symbol,)
    spelt = [self._byte_pieces.get(byte) for byte in self.extra[symbol - self.vocab_size].encode()]
    known = tuple(number for number in spelt if number is not None)
    if len(known) == len(spelt):
      return known
    return () if self.tokenizer.unk_id is None else (self.tokenizer.unk_id,)

  @functools.cached_property
  def _byte_pieces(self) -> Mapping[int, int]:
    """Byte -> the id of its piece `<0xE4>`."""
    return {int(text[3:5], 16): number for number, text in self.texts.items() if is_byte_piece(text)}

  def extra_symbol(self, character: str) -> int:
    """The number of a character that is not among the pieces."""
    if character not in self._extra_number:
      self._extra_number[character] = self.num_symbols
      self.extra.append(character)
    return self._extra_number[character]

  @functools.cached_property
  def closed_V(self) -> np.ndarray:
    """Ids that no new piece may hold, bool [V]."""
    closed_V = np.ones(self.vocab_size, bool)
    closed_V[[number for number, text in self.texts.items() if not is_byte_piece(text)]] = False
    control = {*self.tokenizer.special_ids, self.tokenizer.unk_id, self.tokenizer.bos_id, self.tokenizer.eos_id} - {None}
    closed_V[sorted(control)] = True
    return closed_V

  @functools.cached_property
  def lengths_V(self) -> np.ndarray:
    """Bytes that each id spells; 0 where that depends on the text (the unknown token), int64 [V]."""
    lengths_V = np.zeros(self.vocab_size, np.int64)
    for number, text in self.texts.items():
      lengths_V[number] = self.num_bytes(text)
    if self.tokenizer.unk_id is not None:
      lengths_V[self.tokenizer.unk_id] = 0
    return lengths_V

  def num_bytes(self, text: str) -> int:
    """Bytes that a piece spells."""
    if self.is_byte_level:
      return len(text)
    return 1 if is_byte_piece(text) else len(text.encode())

  def with_characters(self, ids: np.ndarray) -> np.ndarray:
    """Ids of a text [n] as symbols, at most as many.

    Runs of byte pieces become characters, as far as they spell whole ones; the rest is closed.
    """
    symbols = np.where(self.closed_V[ids], -1, ids).astype(np.int32)
    if not self._byte_pieces:
      return symbols
    byte_of = {number: byte for byte, number in self._byte_pieces.items()}
    places = np.flatnonzero(np.isin(ids, list(byte_of)))
    if not len(places):
      return symbols
    keep = np.ones(len(ids), bool)
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
      data, at = bytes(byte_of[int(i)] for i in ids[run]), 0
      while at < len(data):
        size = 1 if data[at] < 0x80 else 2 if data[at] < 0xE0 else 3 if data[at] < 0xF0 else 4
        try:
          character = data[at : at + size].decode()
        except UnicodeDecodeError:
          at += 1
          continue
        if size > 1:
          symbols[run[at]] = self.extra_symbol(character)
          keep[run[at + 1 : at + size]] = False
        at += size
    return symbols[keep]

  def with_unknown(self, symbols: np.ndarray, surfaces: Mapping[int, str]) -> np.ndarray:
    """Unknown tokens among symbols [n], which may stand for several characters, as symbols of these.

    `surfaces` is place among the symbols -> text.
    """
    parts, done = [], 0
    for place, surface in surfaces.items():
      characters = [self.extra_symbol(character) for character in surface if not character.isspace() and character != SPACE]
      parts += [symbols[done:place], np.array(characters or [-1], np.int32)]
      done = place + 1
    return np.concatenate([*parts, symbols[done:]])

  def starts_by_spelling(self, symbols: np.ndarray) -> np.ndarray:
    """Word starts among symbols [n] of models without splitting rules, bool [n].

    They are before the mark of a space, and where letters, digits and the rest meet.
    So SentencePiece's own trainer splits its text; scripts that are mixed within words in Japanese count as one.
    """
    head, tail = self._classes()[:, symbols]
    is_start = head == _SPACE
    is_start[1:] |= (head[1:] != tail[:-1]) & (head[1:] != _ANY) & (tail[:-1] != _ANY)
    is_start[1:] |= (head[1:] == _DIGIT) | (tail[:-1] == _DIGIT)
    is_start[:1] = True
    return is_start

  def _classes(self) -> np.ndarray:
    """Classes of every symbol's first and last character; in the last column, of symbol -1, none. int64 [2, symbols + 1]."""
    if self._class_of_symbol.shape[1] != self.num_symbols + 1:
      spelt = [self.texts.get(number, "") for number in range(self.vocab_size)] + self.extra
      head = [_class_of(text[:1]) for text in spelt]
      tail = [_ANY if text == SPACE else _class_of(text[-1:]) for text in spelt]
      self._class_of_symbol = np.array([[*head, _NONE], [*tail, _NONE]])
    return self._class_of_symbol


# Classes of characters; letters have their script's number.
_NONE, _SPACE, _ANY, _DIGIT, _OTHER = range(5)
_SCRIPT_CLASSES: dict[str, int] = {}


@functools.cache
def _class_of(character: str) -> int:
  if character in ("", SPACE):
    return _SPACE if character else _NONE
  category = unicodedata.category(character)
  if category.startswith("M"):
    return _ANY  # goes with its neighbours
  if category.startswith("N"):
    return _DIGIT
  script = script_of(character)
  if script is None:
    return _OTHER
  return _SCRIPT_CLASSES.setdefault(_ONE_SCRIPT.get(script, script), _OTHER + 1 + len(_SCRIPT_CLASSES))


def check_pieces(base: Base, pieces: Sequence[Piece]) -> None:
  """Raises ConfigError for pieces that the vocabulary holds already, that spell a special token, or that come twice."""
  known, special = set(base.texts.values()), {*base.tokenizer.special_tokens, *base.tokenizer.added_tokens}
  seen: set[str] = set()
  for piece in pieces:
    if piece.text in special:
      raise ConfigError(
        f"{base.path}: the new piece {piece.text!r} is a special token of the base; take it out of the text "
        "that pieces are chosen from"
      )
    if piece.text in known or piece.text in seen:
      raise ConfigError(f"{base.path}: the new piece {piece.text!r} is in the vocabulary already")
    seen.add(piece.text)
