"""A SentencePiece model -> the model, its special tokens, and what decides its ids.

Invariant: tokens that were added behind the model's pieces are never made from a document's text.
"""

import hashlib
from pathlib import Path
from typing import Any

import sentencepiece

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenizer_files
from cpt_jax.store.spelling import Located
from cpt_jax.store.tokenizer_files import SideFiles, SpecialTokens


class SentencePieceModel:
  """A model of the sentencepiece library."""

  can_locate = False
  is_byte_level = False

  def __init__(self, model: sentencepiece.SentencePieceProcessor, *, vocab_size: int, prefix: list[int]):
    self.vocab_size, self.prefix, self.suffix = vocab_size, prefix, []
    self.unk_id = model.unk_id() if model.unk_id() >= 0 else None
    self._model, self._size = model, model.get_piece_size()

  def pieces(self) -> dict[int, str]:
    """The ids that spell text, in the model's own spelling."""
    model = self._model
    return {i: model.id_to_piece(i) for i in range(self._size) if not (model.is_control(i) or model.is_unknown(i))}

  def encode(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added."""
    return self._model.encode(texts, out_type=int)

  def decode(self, ids: list[int]) -> str:
    """The text of ids, without special tokens."""
    return self._model.decode([n for n in ids if n < self._size and not self._model.is_control(n)])

  def locate(self, texts: list[str], *, has_control: bool, has_begins: bool) -> list[Located]:
    """A SentencePiece model does not say what begins where."""
    raise AssertionError("can_locate is False")


def load(file: Path, raw: bytes, side: SideFiles, *, eos_token: str) -> tuple[SentencePieceModel, SpecialTokens, list[Any]]:
  """The model, its special tokens, and what a fingerprint is made of."""
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
  except (RuntimeError, OSError, ValueError) as error:
    raise ConfigError(f"{file}: sentencepiece cannot read it: {error}") from None
  added = _added_tokens(side)
  size = model.get_piece_size()

  def token_to_id(token: str) -> int | None:
    if token in added:
      return added[token]
    number = model.piece_to_id(token)
    return number if number != model.unk_id() or model.id_to_piece(number) == token else None

  ids = {}
  for kind, own in ("eos", model.eos_id()), ("bos", model.bos_id()):
    found = side.special_id(kind, token_to_id)
    ids[kind] = found if found is not None else (own if own >= 0 else None)
  special = [model.id_to_piece(i) for i in range(size) if model.is_control(i) or model.is_unknown(i)] + list(added)
  eos_id, eos_problem = tokenizer_files.chosen_eos(file, eos_token, ids["eos"], token_to_id, special)
  vocab_size = max([size - 1, *added.values()]) + 1
  tokenizer_files.check_ids(file, vocab_size=vocab_size, eos=eos_id, bos=ids["bos"])
  adds_bos = side.tokenizer_config.get("add_bos_token", True)  # as Llama's tokenizer; models without BOS (T5) have no id for it
  prefix = [ids["bos"]] if adds_bos and ids["bos"] is not None else []
  beside = {"added_tokens": [], "added_ids": added, "named_tokens": side.named_tokens()}
  tokens = SpecialTokens(ids["bos"], eos_id, eos_problem, special_tokens=special, special_ids=frozenset(), **beside)
  content = [hashlib.sha256(raw).hexdigest(), sorted(added.items()), ids["eos"], ids["bos"], prefix]
  return SentencePieceModel(model, vocab_size=vocab_size, prefix=prefix), tokens, content


def _added_tokens(side: SideFiles) -> dict[str, int]:
  """Tokens that were added behind the SentencePiece pieces, by text; they are never made from a document's text."""
  added, directory = {}, side.directory
  for number, token in (side.tokenizer_config.get("added_tokens_decoder") or {}).items():
    content = token.get("content") if isinstance(token, dict) else None
    if not str(number).isdigit() or not isinstance(content, str):
      raise ConfigError(
        f"{directory / 'tokenizer_config.json'}: added_tokens_decoder[{number!r}] is {token!r}, expected a token object"
      )
    added[content] = int(number)
  for content, number in tokenizer_files.read_json(directory / "added_tokens.json").items():
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
      raise ConfigError(f"{directory / 'added_tokens.json'}: {content!r} has id {number!r}, expected an id from 0 up")
    added[content] = number
  return added
