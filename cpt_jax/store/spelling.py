"""Pieces of a vocabulary <-> the text that they spell.

Invariant: no vocabulary is needed: how a space, a byte and a special token are written is the same in all of a kind.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

SPACE = "\u2581"  # SentencePiece's mark of a space


class Located(NamedTuple):
  """The ids of a text, and where each begins in it."""

  ids: list[int]
  begin: Callable[[int], int] | None  # number of an id -> the character where it begins; never falls, ids may share one


class Spellings:
  """Finds the first of some tokens that a text spells."""

  def __init__(self, tokens: Sequence[str]):
    # Plain substring search for two letters is far faster than the pattern, and nearly always ends the matter.
    self._starts = sorted({t[:2] for t in tokens if t})
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

  def first_in(self, text: str) -> str:
    """The token, "" where there is none."""
    if not any(start in text for start in self._starts):
      return ""
    found = self._pattern.search(text)
    return found[0] if found else ""


def is_byte_piece(piece: str) -> bool:
  """Is it a piece such as `<0xE4>`, by which SentencePiece and its kin spell a byte."""
  return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def byte_characters() -> list[str]:
  """How byte-level vocabularies write each byte (GPT-2): as Latin-1 where that prints, the others count on from 256."""
  prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  moved = {byte: 256 + n for n, byte in enumerate(byte for byte in range(256) if byte not in prints)}
  return [chr(moved.get(byte, byte)) for byte in range(256)]
