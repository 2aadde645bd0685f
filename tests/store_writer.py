"""Documents, token by token, -> a whole store, as cpt prepare makes it of texts."""

import os
from pathlib import Path

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store import token_files


class StoreWriter:
  """Writes a whole store from a stream of documents; complete only after `close()` (or a `with` block without error).

  Example: `with StoreWriter(path, vocab_size=300, eos_id=0) as w: w.add([5, 7, 0], text="Hi")`.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    vocab_size: int,
    eos_id: int,
    tokenizer_fingerprint: str = "",
    tokenizer_name: str = "",
    max_file_tokens: int = 1 << 30,
  ):
    self._path = Path(path)
    self._vocab_size = vocab_size
    self._eos_id = eos_id
    self._fingerprint = tokenizer_fingerprint
    self._name = tokenizer_name
    self._max_file_tokens = max_file_tokens
    self._files: list[token_files.FileInfo] = []
    self._writer: token_files.TokenFileWriter | None = None
    if (self._path / token_files.MANIFEST).exists():
      raise ConfigError(f"{path}: holds a finished store already; choose another directory or remove it")
    (self._path / token_files.IN_PROGRESS).mkdir(parents=True)

  def add(self, tokens: np.ndarray | list[int], *, text: str, loss_mask: np.ndarray | list[bool] | None = None) -> None:
    """Appends a document: its ids, EOS included, the text that they are of (that counts, with a mask), and the loss mask."""
    if self._writer is not None and self._writer.num_tokens >= self._max_file_tokens:
      self._close_file()
    if self._writer is None:
      name = f"{len(self._files):05d}.ds"
      self._writer = token_files.TokenFileWriter(
        self._path / name, dtype=token_files.token_dtype(self._vocab_size), tokenizer_name=self._name
      )
    if self._files and ("loss" in self._files[0].digests) != (loss_mask is not None):
      raise ValueError("documents with a loss mask and documents without one; a store has one kind")
    data = text.encode("utf-8")
    self._writer.add(tokens, num_bytes=len(data), text_hash=token_files.text_hash(data), loss_mask=loss_mask)

  def _close_file(self) -> None:
    if self._writer is not None:
      self._files.append(self._writer.close())
      self._writer = None

  def close(self) -> None:
    """Completes the store."""
    self._close_file()
    token_files.write_manifest(
      self._path,
      files=self._files,
      vocab_size=self._vocab_size,
      tokenizer_fingerprint=self._fingerprint,
      eos_id=self._eos_id,
      extra={"inputs": [], "bad_records": {"num": 0}},
    )
    (self._path / token_files.IN_PROGRESS).rmdir()

  def __enter__(self) -> "StoreWriter":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if kind is None:
      self.close()
    elif self._writer is not None:
      self._writer.abandon()
