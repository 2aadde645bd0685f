"""Documents as token ids -> the files of a token store, which datatrove writes too.

Invariant: a store is complete only when its `store.json` is there, which is written last; a file appears whole or not at all.

Files of a store, for each NNNNN: `NNNNN.ds` tokens (little-endian uint16 or uint32), `NNNNN.ds.index` uint64 document
ends in tokens, `NNNNN.ds.metadata` text, as datatrove's DocumentTokenizer writes them (0.10.1); and, by us only,
`NNNNN.ds.bytes` uint32 UTF-8 bytes of each document, `NNNNN.ds.hash` uint64 hash of each document's text, and one
`store.json`. While a store is being made it holds a directory `in_progress` and no `store.json`.

A masked store has `NNNNN.ds.loss` too, datatrove's: a byte for each token, 1 where the token counts in the loss (as a
target), 0 where it is only read. Its `.bytes` are those of the text that counts, so that bits per byte, the sum of the loss
over the bytes, stays a measure of the text that the loss is about. The `.hash` of a conversation is of its messages.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.journal import sync_directory, write_atomically

FORMAT = 1
MANIFEST = "store.json"
IN_PROGRESS = "in_progress"
_PARTS = ("ds", "index", "bytes", "hash", "metadata")  # and "loss" in a masked store
_FLUSH_BYTES = 1 << 20


class FileInfo(NamedTuple):
  """One token file of a store, as `store.json` lists it."""

  name: str  # "00000.ds"
  num_documents: int
  num_tokens: int
  num_bytes: int  # UTF-8 bytes of the documents' texts, as far as they count in the loss
  max_token_id: int  # -1 where there is no token
  digests: dict[str, str]  # part ("ds", "index", ...; "loss" in a masked store only) -> BLAKE2b of the file's bytes
  num_targets: int  # tokens that count in the loss: all of them where there is no mask


def token_dtype(vocab_size: int) -> np.dtype:
  """uint16 iff every id below `vocab_size` fits (datatrove's rule)."""
  return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def text_hash(text: str | bytes) -> int:
  """64 bits of BLAKE2b of the UTF-8 text; independent of the tokenizer."""
  data = text.encode("utf-8") if isinstance(text, str) else text
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class _Part:
  """One file being written: buffered, digested on the way, synced at the end."""

  def __init__(self, path: Path):
    self.path = path
    self.digest = hashlib.blake2b(digest_size=16)
    self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close() or abandon()
    self._pending = bytearray()

  def write(self, data: bytes) -> None:
    self._pending += data
    if len(self._pending) >= _FLUSH_BYTES:
      self._flush()

  def _flush(self) -> None:
    self.digest.update(self._pending)
    view = memoryview(self._pending)
    while view.nbytes:  # a raw write may be short
      view = view[self._file.write(view) :]
    view.release()
    self._pending = bytearray()

  def close(self) -> None:
    self._flush()
    os.fsync(self._file.fileno())
    self._file.close()

  def abandon(self) -> None:
    self._file.close()
    self.path.unlink(missing_ok=True)


class TokenFileWriter:
  """Writes one `NNNNN.ds` and its companions in streams; memory does not grow with the file."""

  def __init__(self, path: str | os.PathLike, *, dtype: np.dtype, tokenizer_name: str):
    self._path = Path(path)
    self._dtype = np.dtype(dtype)
    self._tokenizer_name = tokenizer_name.replace("|", "_").replace("\n", " ") or "unknown"  # datatrove splits at |
    self._parts = {}
    try:
      for part in _PARTS:
        self._parts[part] = _Part(part_path(self._path, part))
    except OSError:
      self.abandon()
      raise
    self.num_documents = self.num_tokens = self.num_bytes = self.num_targets = 0
    self.max_token_id = -1

  @property
  def has_loss_mask(self) -> bool:
    """The first document decides."""
    return "loss" in self._parts

  def add(
    self, tokens: np.ndarray | list[int], *, num_bytes: int, text_hash: int, loss_mask: np.ndarray | list[bool] | None = None
  ) -> None:
    """Appends a document: its ids, bytes of its text as far as it counts in the loss, and the hash of the text or conversation.
    `loss_mask`: for each id, whether it counts in the loss; all documents of a store have one, or none has.
    Raises ValueError: ids that the dtype cannot hold, a document with no token, or a mask that does not fit."""
    ids = np.asarray(tokens)
    if ids.size == 0:
      raise ValueError("a document has no token; every document ends in EOS")
    largest = int(ids.max())
    if int(ids.min()) < 0 or largest > np.iinfo(self._dtype).max:
      raise ValueError(f"token ids {int(ids.min())}..{largest} do not fit in {self._dtype.name}")
    if self.num_documents == 0 and loss_mask is not None:
      self._parts["loss"] = _Part(part_path(self._path, "loss"))
    if (loss_mask is not None) != self.has_loss_mask:
      raise ValueError("a document without a loss mask among documents with one, or the other way round; a store has one kind")
    if loss_mask is not None:
      mask = np.asarray(loss_mask, bool)
      if mask.shape != ids.shape:
        raise ValueError(f"a loss mask of shape {mask.shape} for {ids.size} tokens")
      self._parts["loss"].write(mask.tobytes())
      self.num_targets += int(mask.sum())
    else:
      self.num_targets += ids.size
    self._parts["ds"].write(ids.astype(self._dtype).tobytes())
    self.num_tokens += ids.size
    self.num_documents += 1
    self.num_bytes += num_bytes
    self.max_token_id = max(self.max_token_id, largest)
    self._parts["index"].write(self.num_tokens.to_bytes(8, "little"))
    self._parts["bytes"].write(num_bytes.to_bytes(4, "little"))
    self._parts["hash"].write(text_hash.to_bytes(8, "little"))

  def close(self) -> FileInfo:
    """Completes the files (synced to disk) and says what they hold."""
    lines = [f"{self._tokenizer_name}|{self._dtype.itemsize}", str(self.num_tokens), f"{_metric(self.num_tokens)}T"]
    self._parts["metadata"].write("\n".join(lines).encode("utf-8"))
    for part in self._parts.values():
      part.close()
    digests = {name: part.digest.hexdigest() for name, part in self._parts.items()}
    return FileInfo(
      self._path.name, self.num_documents, self.num_tokens, self.num_bytes, self.max_token_id, digests, self.num_targets
    )

  def abandon(self) -> None:
    """Removes what was written."""
    for part in self._parts.values():
      part.abandon()


def part_path(path: str | os.PathLike, part: str) -> Path:
  """The file of a part ("ds", "index", ..., "loss") of token file `path`."""
  return Path(path) if part == "ds" else Path(f"{os.fspath(path)}.{part}")


def part_names(name: str, *, has_loss_mask: bool) -> list[str]:
  """The files that belong to token file `name`, itself included."""
  return [part_path(name, part).name for part in (*_PARTS, *["loss"] * has_loss_mask)]


def _metric(number: int) -> str:
  """1234567 -> '1.23 M': three digits and a prefix, the third line of datatrove's metadata."""
  mantissa, exponent = f"{number:.2e}".split("e")
  power = int(exponent)
  return f"{float(mantissa) * 10 ** (power % 3):.{2 - power % 3}f} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power // 3]}"


def write_manifest(
  path: str | os.PathLike,
  *,
  files: list[FileInfo],
  vocab_size: int,
  tokenizer_fingerprint: str,
  eos_id: int,
  extra: dict[str, Any],
) -> None:
  """Writes `store.json`, which makes the store complete. ORDER: after every other file of the store is in place.

  `files` are in the order of the documents, `vocab_size` is the tokenizer's largest id + 1, `extra` are more entries, such as
  "inputs" and "bad_records".
  """
  manifest = {
    "format": FORMAT,
    "dtype": token_dtype(vocab_size).name,
    "vocab_size": vocab_size,
    "tokenizer_fingerprint": tokenizer_fingerprint,
    "eos_id": eos_id,
    "max_token_id": max((f.max_token_id for f in files), default=-1),
    **{key: sum(getattr(f, key) for f in files) for key in ("num_documents", "num_tokens", "num_bytes", "num_targets")},
    **extra,
    "files": [f._asdict() for f in files],
  }
  manifest["digest"] = _digest(manifest)
  sync_directory(path)
  write_atomically(Path(path) / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def _digest(manifest: dict[str, Any]) -> str:
  content = {k: v for k, v in manifest.items() if k != "digest"}
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
  """The checked `store.json` of a store, None where there is none. Raises ConfigError: it is broken, or of another format."""
  file = Path(path) / MANIFEST
  try:
    manifest = json.loads(file.read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except ValueError as error:  # broken JSON or UTF-8
    raise ConfigError(f"{file}: not readable as JSON ({error}); make the store again") from None
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    raise ConfigError(f"{file}: format {found!r}, expected {FORMAT}; make the store again with this version")
  if manifest.get("digest") != _digest(manifest):
    raise ConfigError(f"{file}: its digest does not fit its content, so the file was changed or damaged; make the store again")
  return manifest
