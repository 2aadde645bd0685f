"""A tokenizer.json of Hugging Face tokenizers (BPE or Unigram) as a base that can grow.

Invariant: BPE grows by merges that come after the base's own, so the base's merges are done first and a text changes only where a
new piece stands in it; what the file says otherwise is kept as it is.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from cpt_jax.config import ConfigError
from cpt_jax.store.tokenization import Tokenizer
from cpt_jax.vocab.bases import Base, Piece, Words, check_pieces
from cpt_jax.vocab.scores import unigram_scores

_CANNOT = {
  "WordPiece": "its pieces are matched longest first, so new ones change the meaning of old text everywhere",
  "WordLevel": "it knows whole words only",
}


class FastBase(Base):
  """A tokenizer.json."""

  file_name = "tokenizer.json"

  def __init__(self, tokenizer: Tokenizer):
    super().__init__(tokenizer)
    self.content: dict[str, Any] = json.loads(tokenizer.path.read_bytes())
    model = self.content["model"]
    self.model_type = model.get("type") or (
      "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "?"
    )
    if self.model_type not in ("BPE", "Unigram"):
      why = _CANNOT.get(self.model_type, "only BPE and Unigram models grow")
      raise ConfigError(f"{self.path}: a {self.model_type} model cannot grow: {why}; take a base with a BPE or Unigram tokenizer")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
      if model.get(key):
        raise ConfigError(f"{self.path}: model.{key}={model[key]!r}: BPE with marks inside words cannot grow; take another base")
    self.is_unigram = self.model_type == "Unigram"
    vocab = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if self.is_unigram else model["vocab"]
    added = {token["content"]: token["id"] for token in self.content.get("added_tokens") or []}
    self.texts = {number: text for text, number in vocab.items() if text not in added}
    self._added = {number: text for text, number in added.items()}
    behind = [number for text, number in added.items() if text not in vocab]
    if self.is_unigram and behind:
      raise ConfigError(
        f"{self.path}: tokens were added behind the {len(vocab)} pieces of a Unigram model (ids {min(behind)} to {max(behind)}), "
        "which get other ids when pieces follow; grow its SentencePiece .model instead"
      )
    self.is_byte_level = "ByteLevel" in json.dumps([self.content.get("decoder")])
    self.kind = f"{'byte-level ' if self.is_byte_level else ''}{self.model_type}"
    self._has_words = self.content.get("pre_tokenizer") is not None
    self._model = _loaded(self.content)

  def words(self, texts: list[str]) -> list[Words]:
    """By the file's own splits; by spelling where it has none."""
    encoded = self._model.encode_batch(texts, add_special_tokens=False)
    return [self._words(text, found) for text, found in zip(texts, encoded, strict=True)]

  def _words(self, text: str, encoded: tokenizers.Encoding) -> Words:
    ids = np.array(encoded.ids, np.int32)
    if self.is_byte_level:
      symbols, is_start = np.where(self.closed_V[ids], np.int32(-1), ids), np.zeros(len(ids), bool)
    else:
      symbols = self.with_characters(ids)
      if self.tokenizer.unk_id in encoded.ids and len(symbols) == len(ids):
        spans = {place: encoded.offsets[place] for place in np.flatnonzero(ids == self.tokenizer.unk_id).tolist()}
        symbols = self.with_unknown(symbols, {place: text[start:end] for place, (start, end) in spans.items()})
      is_start = self.starts_by_spelling(symbols)
    if self._has_words and len(symbols) == len(ids):
      word = np.array([-1 if number is None else number for number in encoded.word_ids], np.int64)
      is_start[1:] |= word[1:] != word[:-1]
    is_start[:1] = True
    return Words(symbols, is_start, len(ids))

  def grown(self, pieces: Sequence[Piece]) -> bytes:
    """The file with more pieces (and merges)."""
    check_pieces(self, pieces)
    model = dict(self.content["model"])
    if self.is_unigram:
      scores = unigram_scores(dict(model["vocab"]), pieces)
      model["vocab"] = [*model["vocab"], *([piece.text, score] for piece, score in zip(pieces, scores, strict=True))]
    else:
      vocab = dict(model["vocab"])
      # Added tokens behind the pieces would be numbered anew by the library, unless the model has them under their ids.
      vocab |= {text: number for number, text in self._added.items() if text not in vocab}
      vocab |= {piece.text: self.vocab_size + i for i, piece in enumerate(pieces)}
      merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
      model |= {"vocab": vocab, "merges": merges + [list(rule) for piece in pieces for rule in piece.rules]}
    content = {**self.content, "model": model}
    raw = json.dumps(content, ensure_ascii=False).encode()
    loaded = tokenizers.Tokenizer.from_buffer(raw)
    expected = {**self.texts, **self._added, **{self.vocab_size + i: piece.text for i, piece in enumerate(pieces)}}
    wrong = [text for number, text in expected.items() if loaded.token_to_id(text) != number]
    assert not wrong, wrong[:5]
    return raw

  def unreachable(self, grown: bytes, pieces: Sequence[Piece]) -> list[int]:
    """By the model alone, which takes pieces that are parts of characters too."""
    model = _loaded(json.loads(grown)).model
    found = ([token.id for token in model.tokenize(piece.text)] for piece in pieces)
    return [i for i, ids in enumerate(found) if ids != [self.vocab_size + i]]


def _loaded(content: dict[str, Any]) -> tokenizers.Tokenizer:
  """What decides the ids, free of chance."""
  model = {**content["model"], "dropout": None} if "dropout" in content["model"] else content["model"]
  bare = {**content, "model": model, "post_processor": None, "truncation": None, "padding": None}
  loaded = tokenizers.Tokenizer.from_str(json.dumps(bare))
  loaded.encode_special_tokens = True
  return loaded
