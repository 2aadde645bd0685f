"""Tokenizer files of a base model (tokenizer.json or a SentencePiece model) -> token ids of documents.

Invariant: a document's ids are the tokenizer's own, with what it adds itself (BOS), and end in EOS exactly once; text
that spells a special token, such as "<|endoftext|>", stays text.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store import sentencepiece_model, tokenizer_files, tokenizer_json
from cpt_jax.store.spelling import SPACE, Located, Spellings, byte_characters, is_byte_piece
from cpt_jax.store.tokenizer_files import SpecialTokens


class Model(Protocol):
  """What a library makes of a vocabulary's file."""

  vocab_size: int  # largest id + 1
  unk_id: int | None  # what stands for text that the vocabulary cannot spell; None where it spells everything
  is_byte_level: bool  # pieces are written as GPT-2 does
  can_locate: bool
  prefix: list[int]  # what the tokenizer itself puts before a text
  suffix: list[int]

  def pieces(self) -> dict[int, str]:
    """The ids that spell text, in the model's own spelling."""
    ...

  def encode(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added; special tokens spelt in it stay text."""
    ...

  def decode(self, ids: list[int]) -> str:
    """The text of ids, without special tokens."""
    ...

  def locate(self, texts: list[str], *, has_control: bool, has_begins: bool) -> list[Located]:
    """See Tokenizer.locate."""
    ...


class Encoded(NamedTuple):
  """Documents as ids, and what was noticed about them."""

  ids: list[list[int]]
  num_special_text: int  # documents whose text spells a special token; it was encoded as plain text
  num_control_ids: int  # documents whose own text gave the id of EOS or BOS


class Tokenizer:
  """A loaded tokenizer; make one with `load`."""

  def __init__(self, path: Path, model: Model, tokens: SpecialTokens, *, fingerprint: str, chat_template: str):
    self.path = path
    self.fingerprint = fingerprint  # of all that decides the ids, and of EOS and BOS as the files give them
    self.chat_template = chat_template  # jinja source; "" where there is none
    self.vocab_size, self.unk_id, self.can_locate = model.vocab_size, model.unk_id, model.can_locate  # see Model
    self.bos_id, self.eos_id, self._eos_problem = tokens.bos_id, tokens.eos_id, tokens.eos_problem  # see SpecialTokens
    self.special_tokens, self.special_ids = tokens.special_tokens, tokens.special_ids
    self.added_tokens, self.added_ids, self.named_tokens = tokens.added_tokens, tokens.added_ids, tokens.named_tokens
    self._model = model
    self._special_search = Spellings(tokens.special_tokens)

  @property
  def name(self) -> str:
    """The directory's name (or the file's), for people."""
    named = self.path.parent if self.path.name in ("tokenizer.json", "tokenizer.model") else self.path
    return named.resolve().name

  @functools.cached_property
  def byte_ids(self) -> frozenset[int]:
    """Ids of single bytes of characters that have several: what spells a character for which there is no token."""
    vocab = {piece: number for number, piece in self._pieces.items()}
    spelt = byte_characters() if self._model.is_byte_level else [f"<0x{byte:02X}>" for byte in range(0x100)]
    return frozenset(vocab[piece] for piece in spelt[0x80:] if piece in vocab)

  @functools.cached_property
  def _pieces(self) -> dict[int, str]:
    """The ids that spell text, in the model's own spelling."""
    return self._model.pieces()

  @functools.cached_property
  def opening_bytes_V(self) -> np.ndarray:
    """UTF-8 bytes that each id spells where a text begins with it, int64 [V]; special tokens and the unknown one have 0.

    A space that the tokenizer itself puts before a text, as SentencePiece does, is no part of it. Of a text that begins with a
    space this is one byte too few where the tokenizer then adds none.
    """
    space = byte_characters()[ord(" ")] if self._model.is_byte_level else SPACE
    (probe,) = self._model.encode(["a"])
    added = int("".join(self._pieces.get(number, "") for number in probe).startswith(space))
    bytes_V = np.zeros(self.vocab_size, np.int64)
    for number, piece in self._pieces.items():
      bytes_V[number] = self._num_bytes(piece) - (added if piece.startswith(space) else 0)
    for piece, number in self.added_ids.items():
      bytes_V[number] = 0 if piece in self.special_tokens else len(piece.encode())  # found in a text as it is
    bytes_V[[number for number in (self.unk_id, self.bos_id, self.eos_id) if number is not None]] = 0
    return bytes_V

  def _num_bytes(self, piece: str) -> int:
    if self._model.is_byte_level:
      return len(piece)
    return 1 if is_byte_piece(piece) else len(piece.replace(SPACE, " ").encode())

  def require_eos(self) -> int:
    """The id of EOS. Raises ConfigError: none is known; the message says where it was looked for."""
    if self.eos_id is None:
      raise ConfigError(self._eos_problem)
    return self.eos_id

  def encode_documents(self, texts: list[str]) -> Encoded:
    """Ids of each document: what the tokenizer adds, and EOS once, at the end; texts are valid Unicode (no lone surrogates)."""
    prefix, suffix = self.surroundings()
    control = {self.require_eos(), self.bos_id} - {None}
    contents = self.encode_contents(texts)
    return Encoded(
      ids=[prefix + ids + suffix for ids in contents],
      num_special_text=sum(self.has_special_text(text) for text in texts),
      num_control_ids=sum(any(c in ids for c in control) for ids in contents),
    )

  def encode_contents(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added; special tokens spelt in it stay text."""
    return self._model.encode(texts)

  def surroundings(self) -> tuple[list[int], list[int]]:
    """The ids that stand before and behind those of a document's text, EOS the last of them."""
    eos_id = self.require_eos()
    return self._model.prefix, self._model.suffix if self._model.suffix[-1:] == [eos_id] else [*self._model.suffix, eos_id]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return self._model.decode([int(i) for i in ids])

  def has_special_text(self, text: str) -> bool:
    """Does the text spell a special token?"""
    return self._special_search.first_in(text) != ""

  def locate(self, texts: list[str], *, has_control: bool, has_begins: bool = True) -> list[Located]:
    """Ids of each text and where they begin; nothing is added. `has_control`: special tokens spelt in it become their ids.

    Only where `can_locate`: a tokenizer.json says what begins where, a SentencePiece model alone does not. Without
    `has_begins` it is a quarter faster.
    """
    return self._model.locate(texts, has_control=has_control, has_begins=has_begins)


def load(path: str | os.PathLike, *, eos_token: str = "") -> Tokenizer:
  """Loads a tokenizer from a Hugging Face directory, or from a tokenizer.json or SentencePiece .model file.

  EOS is looked for in tokenizer_config.json, special_tokens_map.json, config.json and generation_config.json (the first
  of a list), then in the SentencePiece model; `eos_token` overrides them all and does not enter the fingerprint.
  Raises ConfigError: no tokenizer file, a broken one, or special tokens that do not exist.
  """
  file = tokenizer_files.find(Path(path))
  size, most = file.stat().st_size, tokenizer_files.MAX_FILE_BYTES
  if size > most:
    raise ConfigError(f"{file}: {size} bytes; a tokenizer file has at most {most}, so this is something else")
  raw = file.read_bytes()
  side = tokenizer_files.SideFiles(file.parent)
  library = tokenizer_json if file.suffix == ".json" else sentencepiece_model
  model, tokens, content = library.load(file, raw, side, eos_token=eos_token)
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  fingerprint = hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
  return Tokenizer(file, model, tokens, fingerprint=fingerprint, chat_template=side.chat_template())
