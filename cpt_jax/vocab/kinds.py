"""A path -> the base's tokenizer as one that can grow, or why it cannot.

Invariant: what is returned gives the ids that data.tokenizer gives.
"""

import os

from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.vocab.bases import Base
from cpt_jax.vocab.fast import FastBase
from cpt_jax.vocab.sentencepiece import SentencePieceBase


def load(path: str | os.PathLike) -> Base:
  """The tokenizer of a Hugging Face directory, a tokenizer.json or a SentencePiece model.

  Raises:
    ConfigError: as data.tokenizer.load; a kind that cannot grow.
  """
  tokenizer = tokenizer_lib.load(path)
  return (FastBase if tokenizer.path.suffix == ".json" else SentencePieceBase)(tokenizer)
