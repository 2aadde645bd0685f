"""A SentencePiece model (BPE or unigram) as a base that can grow.

Invariant: the old file's bytes come first, unchanged; new pieces follow as the format's own repeated field. In BPE their scores
lie below the base's, so that its merges are done first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from cpt_jax.config import ConfigError
from cpt_jax.store.spelling import SPACE
from cpt_jax.store.tokenization import Tokenizer
from cpt_jax.vocab.bases import Base, Piece, Words, check_pieces
from cpt_jax.vocab.scores import unigram_scores

_Proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009 - made when the module is loaded, so no checker sees it
_NORMAL, _CONTROL, _BYTE = 1, 3, 6  # SentencePiece.Type
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}


class SentencePieceBase(Base):
  """A *.model file."""

  file_name = "tokenizer.model"
  is_byte_level = False

  def __init__(self, tokenizer: Tokenizer):
    super().__init__(tokenizer)
    self._raw = tokenizer.path.read_bytes()
    proto = _Proto.FromString(self._raw)
    kind = _KINDS[proto.trainer_spec.model_type]
    self.kind = f"SentencePiece {kind}"
    if kind not in ("unigram", "BPE"):
      raise ConfigError(f"{self.path}: a SentencePiece {kind} model cannot grow; take a base with a BPE or unigram tokenizer")
    if proto.trainer_spec.treat_whitespace_as_suffix:
      raise ConfigError(f"{self.path}: a model that marks spaces behind words cannot grow; take another base")
    self.is_unigram = kind == "unigram"
    self.num_pieces = len(proto.pieces)
    self.texts = {i: piece.piece for i, piece in enumerate(proto.pieces) if piece.type in (_NORMAL, _BYTE)}
    self._scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    self._model = sentencepiece.SentencePieceProcessor(model_proto=self._raw)

  def words(self, texts: list[str]) -> list[Words]:
    """Cut by spelling."""
    return [self._words(text, ids) for text, ids in zip(texts, self._model.encode(texts, out_type=int), strict=True)]

  def _words(self, text: str, found: list[int]) -> Words:
    ids = np.array(found, np.int32)
    symbols, unknown = self.with_characters(ids), self.tokenizer.unk_id
    if unknown in found and len(symbols) == len(ids):
      surfaces = self._model.encode(text, out_type=str)
      symbols = self.with_unknown(symbols, {place: surfaces[place] for place in np.flatnonzero(ids == unknown).tolist()})
    return Words(symbols, self.starts_by_spelling(symbols), len(ids))

  def grown(self, pieces: Sequence[Piece]) -> bytes:
    """The file with more pieces; ids that belong to added tokens are kept free by control pieces, which no text gives."""
    check_pieces(self, pieces)
    added = _Proto()
    names = {number: text for text, number in self.tokenizer.added_ids.items()}  # by the directory's side files
    for number in range(self.num_pieces, self.vocab_size):
      added.pieces.add(piece=names.get(number, f"<kept_{number}>"), score=0.0, type=_CONTROL)
    if self.is_unigram:
      scores = unigram_scores(self._scores, pieces)
    else:
      lowest = min(self._scores.values())
      scores = [lowest - 1 - i for i in range(len(pieces))]
    for piece, score in zip(pieces, scores, strict=True):
      added.pieces.add(piece=piece.text, score=score, type=_NORMAL)
    return self._raw + added.SerializeToString()

  def unreachable(self, grown: bytes, pieces: Sequence[Piece]) -> list[int]:
    """By the grown model without its normaliser, which would put a space before each text."""
    proto = _Proto.FromString(grown)
    proto.normalizer_spec.Clear()
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    found = model.encode([piece.text.replace(SPACE, " ") for piece in pieces], out_type=int)
    return [i for i, ids in enumerate(found) if ids != [self.vocab_size + i]]
