"""A path -> the base's tokenizer as one that can grow, or why it cannot.

Invariant: what is returned gives the ids that store.tokenization gives.
"""

import os

from cpt_jax.store import tokenization
from cpt_jax.vocab.bases import Base
from cpt_jax.vocab.fast import FastBase
from cpt_jax.vocab.sentencepiece import SentencePieceBase


def load(path: str | os.PathLike) -> Base:
  """The tokenizer of a Hugging Face directory, a tokenizer.json or a SentencePiece model.

  Raises ConfigError: as store.tokenization.load; a kind that cannot grow.
  """
  tokenizer = tokenization.load(path)
  return (FastBase if tokenizer.path.suffix == ".json" else SentencePieceBase)(tokenizer)
