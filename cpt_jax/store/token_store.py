"""A token store on disk -> its documents as numpy arrays that are mapped into memory.

Invariant: a directory opens only whole; a truncated, changed or unfinished store is refused by file name.
"""

import bisect
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.store.documents import DataError
from cpt_jax.store.token_files import IN_PROGRESS, MANIFEST, part_path, read_manifest, text_hash

_MAX_MAPS = 400  # each map holds a file descriptor, of which a process commonly has 1024


class _TokenFile(NamedTuple):
  """One token file of an open store."""

  path: Path
  dtype: np.dtype
  num_documents: int
  num_tokens: int
  is_ours: bool
  has_loss_mask: bool

  def map(self, part: str) -> np.ndarray:
    dtypes = {"index": np.dtype("<u8"), "bytes": np.dtype("<u4"), "hash": np.dtype("<u8"), "loss": np.dtype("u1")}
    dtype = dtypes.get(part, self.dtype)
    if (self.num_tokens if part in ("ds", "loss") else self.num_documents) == 0:
      return np.zeros(0, dtype)  # an empty file cannot be mapped
    # A plain array over the map: slices of the subclass np.memmap are slow.
    return np.asarray(np.memmap(part_path(self.path, part), dtype=dtype, mode="r"))


class TokenStore:
  """An open store. Documents are numbered through its files in order; arrays are read-only views of the maps."""

  def __init__(self, path: Path, *, files: list[_TokenFile], dtype: np.dtype, manifest: dict[str, Any] | None, fingerprint: str):
    self.path = path
    self.dtype = dtype
    self.fingerprint = fingerprint  # identifies the content: equal stores have equal ones
    self.manifest = manifest  # store.json, None for a store made by datatrove alone
    self.num_documents = sum(f.num_documents for f in files)
    self.num_tokens = sum(f.num_tokens for f in files)
    self.num_bytes: int | None = manifest["num_bytes"] if manifest else None
    self.tokenizer_fingerprint: str | None = (manifest["tokenizer_fingerprint"] or None) if manifest else None
    self.vocab_size: int | None = manifest["vocab_size"] if manifest else None
    self.eos_id: int | None = manifest["eos_id"] if manifest else None
    self.max_token_id: int | None = manifest["max_token_id"] if manifest else None
    self.has_loss_mask = any(f.has_loss_mask for f in files)
    self._files = files
    self._starts = [0, *itertools.accumulate(f.num_documents for f in files)]
    self._maps: dict[tuple[int, str], np.ndarray] = {}
    self._lengths: np.ndarray | None = None
    self._hashes: np.ndarray | None = None
    self._bytes: np.ndarray | None = None

  def _part(self, number: int, part: str) -> np.ndarray:
    maps = self._maps  # reader threads share it: at worst one of them maps a file twice
    array = maps.get((number, part))
    if array is None:
      if len(maps) >= _MAX_MAPS:
        self._maps = maps = {}
      array = maps[number, part] = self._files[number].map(part)
    return array

  @property
  def tokenizer_name(self) -> str:
    """What the store's files call the tokenizer that made them, for people; "" where they do not say."""
    metadata = part_path(self._files[0].path, "metadata") if self._files else None
    if metadata is None or not metadata.exists():
      return ""
    return metadata.read_text(encoding="utf-8").split("\n")[0].rsplit("|", 1)[0]

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each document, int64 [num_documents]; 0 is possible only in a store made by datatrove.
    Raises ConfigError: an index that falls."""
    if self._lengths is None:
      lengths = np.empty(self.num_documents, np.int64)
      for f, start in zip(self._files, self._starts[:-1], strict=True):
        file_lengths = np.diff(f.map("index").astype(np.int64), prepend=0)
        if (file_lengths < 0).any():
          raise ConfigError(f"{f.path}.index: document ends fall, so the file is damaged; make the store again")
        lengths[start : start + f.num_documents] = file_lengths
      lengths.flags.writeable = False
      self._lengths = lengths
    return self._lengths

  def _of_document(self, i: int, part: str) -> np.ndarray:
    """What a part with an entry for each token holds for document `i`."""
    if not 0 <= i < self.num_documents:
      raise IndexError(f"document {i} of a store of {self.num_documents}")
    number = bisect.bisect_right(self._starts, i) - 1
    local = i - self._starts[number]
    index = self._part(number, "index")
    return self._part(number, part)[(int(index[local - 1]) if local else 0) : int(index[local])]

  def document(self, i: int) -> np.ndarray:
    """All tokens of document `i`, without a copy."""
    return self._of_document(i, "ds")

  def tokens(self, i: int, start: int, length: int) -> np.ndarray:
    """Tokens [start, start + length) of document `i`; IndexError where it does not have them."""
    return _cut(self.document(i), i, start, length)

  def loss_mask(self, i: int, start: int, length: int) -> np.ndarray:
    """Whether tokens [start, start + length) of document `i` count in the loss, bool [length]; all do in an unmasked store.
    Raises IndexError: the document does not have them."""
    if not self.has_loss_mask:
      return np.ones(self.tokens(i, start, length).size, bool)
    return _cut(self._of_document(i, "loss"), i, start, length) != 0

  def doc_hashes(self) -> np.ndarray:
    """A hash of each document, uint64 [num_documents]: of its text, or of its token ids in a store made by datatrove."""
    if self._hashes is None:
      hashes = [f.map("hash") if f.is_ours else _token_hashes(f) for f in self._files]
      self._hashes = np.concatenate([np.zeros(0, np.uint64), *hashes]).astype(np.uint64)
      self._hashes.flags.writeable = False
    return self._hashes

  def doc_bytes(self) -> np.ndarray | None:
    """UTF-8 bytes of each document's text that counts in the loss, uint32 [num_documents]; None in a store of datatrove's."""
    if self.manifest is not None and self._bytes is None:
      self._bytes = np.concatenate([np.zeros(0, np.uint32), *(f.map("bytes").astype(np.uint32) for f in self._files)])
      self._bytes.flags.writeable = False
    return self._bytes

  def read_max_token_id(self) -> int:
    """The largest id, by reading every token; for stores whose `max_token_id` is None."""
    return max((int(f.map("ds").max()) for f in self._files if f.num_tokens), default=-1)

  def verify(self) -> list[str]:
    """Reads everything and returns a line for each file whose bytes are not those that were written."""
    if self.manifest is None:
      raise ConfigError(f"{self.path}: made by datatrove alone, which records no digests; there is nothing to verify against")
    damaged = []
    for entry in self.manifest["files"]:
      for part, digest in entry["digests"].items():
        file = part_path(self.path / entry["name"], part)
        with open(file, "rb") as f:
          found = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if found != digest:
          damaged.append(f"{file}: digest {found}, written with {digest}")
    return damaged


def _cut(document: np.ndarray, i: int, start: int, length: int) -> np.ndarray:
  if start < 0 or length < 0 or start + length > document.size:
    raise IndexError(f"tokens [{start}, {start + length}) of document {i}, which has {document.size}")
  return document[start : start + length]


def _token_hashes(file: _TokenFile) -> np.ndarray:
  """Hashes of the ids as little-endian uint32, so that the dtype of the store does not matter."""
  tokens, ends = file.map("ds"), file.map("index").astype(np.int64)
  hashes, start = np.empty(file.num_documents, np.uint64), 0
  for i, end in enumerate(ends.tolist()):
    hashes[i] = text_hash(tokens[start:end].astype("<u4").tobytes())
    start = end
  return hashes


def open_store(path: str | os.PathLike) -> TokenStore:
  """Opens a store of ours or of datatrove's; reads no tokens.
  Raises ConfigError: there is no store, it is unfinished, or a file is missing, truncated or inconsistent."""
  path = Path(path)
  if not path.is_dir():
    raise ConfigError(f"{path}: there is no such token store; make it with cpt prepare --output {path}")
  manifest = read_manifest(path)
  if manifest is None and (path / IN_PROGRESS).exists():
    raise ConfigError(f"{path}: the store is not finished; run the command that makes it again, it goes on where it stopped")
  names = [entry["name"] for entry in manifest["files"]] if manifest else sorted(p.name for p in path.glob("*.ds"))
  if not names and manifest is None:
    raise ConfigError(f"{path}: holds no token file (*.ds); make the store with cpt prepare --output {path}")
  dtype = np.dtype(manifest["dtype"]).newbyteorder("<") if manifest else _datatrove_dtype(path, names)
  masked = ["loss" in entry["digests"] for entry in manifest["files"]] if manifest else _datatrove_masked(path, names)
  files = [
    _open_file(path / name, dtype=dtype, is_ours=manifest is not None, has_loss_mask=has_mask)
    for name, has_mask in zip(names, masked, strict=True)
  ]
  if manifest:
    _check_against(manifest, path, files)
    content = [sorted(e["digests"].items()) for e in manifest["files"]]
  else:
    content = [
      [f.num_tokens, hashlib.blake2b(f.map("index").tobytes(), digest_size=16).hexdigest(), *(["loss"] * f.has_loss_mask)]
      for f in files
    ]
  fingerprint = hashlib.blake2b(json.dumps([dtype.name, content]).encode(), digest_size=16).hexdigest()
  return TokenStore(path, files=files, dtype=dtype, manifest=manifest, fingerprint=fingerprint)


def verify(path: str) -> str:
  """Reads a whole store: a line for people, that every file of it is as it was written.
  Raises ConfigError: no whole store there, or one without digests; DataError: files that are not what was written, a line each.
  """
  opened = open_store(path)
  damaged = opened.verify()
  if damaged:
    raise DataError("\n".join([f"{path}: damaged; copy it again or make it again:", *damaged]))
  return f"{path}: whole; {opened.num_documents:,} documents, {opened.num_tokens:,} tokens"


def _size(file: str | os.PathLike) -> int:
  try:
    return os.path.getsize(file)
  except FileNotFoundError:
    raise ConfigError(f"{file}: missing from the store; copy it again or make the store again") from None


def _last_end(index: str) -> int:
  """The last document's end in tokens, 0 for an empty index."""
  if _size(index) < 8:
    return 0
  with open(index, "rb") as f:
    f.seek(-8, os.SEEK_END)
    return int.from_bytes(f.read(8), "little")


def _open_file(path: Path, *, dtype: np.dtype, is_ours: bool, has_loss_mask: bool) -> _TokenFile:
  index_bytes, token_bytes = _size(f"{path}.index"), _size(path)
  num_documents, num_tokens = index_bytes // 8, token_bytes // dtype.itemsize
  if index_bytes % 8:
    raise ConfigError(f"{path}.index: {index_bytes} bytes is no whole number of uint64; the file is cut off")
  last_end = _last_end(f"{path}.index")
  if last_end * dtype.itemsize != token_bytes:
    raise ConfigError(
      f"{path}: {token_bytes} bytes, but its index ends at {last_end} tokens = {last_end * dtype.itemsize} bytes; "
      "one of the two is cut off or of another store"
    )
  mask = part_path(path, "loss")
  if has_loss_mask and _size(mask) != num_tokens:
    raise ConfigError(f"{mask}: {_size(mask)} bytes, expected {num_tokens}, one for each token; it is cut off")
  if not has_loss_mask and mask.exists():
    raise ConfigError(f"{mask}: not listed in {MANIFEST}, which knows of no loss mask; remove it or make the store again")
  for part, width in ("bytes", 4), ("hash", 8):
    file, expected = part_path(path, part), num_documents * width
    if is_ours and _size(file) != expected:
      raise ConfigError(f"{file}: {_size(file)} bytes, expected {expected} for {num_documents} documents")
  return _TokenFile(path, dtype, num_documents, num_tokens, is_ours, has_loss_mask)


def _check_against(manifest: dict[str, Any], path: Path, files: list[_TokenFile]) -> None:
  for entry, f in zip(manifest["files"], files, strict=True):
    if (entry["num_documents"], entry["num_tokens"]) != (f.num_documents, f.num_tokens):
      raise ConfigError(
        f"{f.path}: holds {f.num_documents} documents and {f.num_tokens} tokens, {MANIFEST} says "
        f"{entry['num_documents']} and {entry['num_tokens']}; the file is of another store or cut off"
      )
  unlisted = {p.name for p in path.glob("*.ds")} - {f.path.name for f in files}
  if unlisted:
    raise ConfigError(f"{path}: {', '.join(sorted(unlisted))} not listed in {MANIFEST}; remove what does not belong to the store")


def _datatrove_masked(path: Path, names: list[str]) -> list[bool]:
  """Which token files have a loss mask: all or none."""
  masked = [part_path(path / name, "loss").exists() for name in names]
  if any(masked) and not all(masked):
    missing = part_path(path / names[masked.index(False)], "loss")
    raise ConfigError(f"{missing}: missing from the store, other token files have one; copy it again or remove them all")
  return masked


def _datatrove_dtype(path: Path, names: list[str]) -> np.dtype:
  """From the metadata files ("name|2"), else from the sizes of the token files and what their indices say."""
  widths = set()
  for name in names:
    metadata = path / f"{name}.metadata"
    if metadata.exists():
      first = metadata.read_text(encoding="utf-8").split("\n")[0]
      widths.add(first.rsplit("|", 1)[-1])
      if not widths <= {"2", "4"}:
        raise ConfigError(f"{metadata}: first line {first!r}, expected 'tokenizer|2' or 'tokenizer|4'")
    elif _size(path / name):
      num_tokens = _last_end(f"{path / name}.index")
      widths |= {width for width in ("2", "4") if num_tokens * int(width) == _size(path / name)}
  if len(widths) > 1:
    raise ConfigError(f"{path}: token files of {' and '.join(sorted(widths))} bytes a token; a store has one width")
  return np.dtype(f"<u{widths.pop() if widths else 2}")
