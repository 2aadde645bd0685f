"""Token store: documents as token ids on disk <-> numpy arrays mapped into memory.

Invariant: a directory opens only whole; a truncated, changed or unfinished store is refused by file name.
Written by store.prepare (datatrove writes the same files), read by data.sources and data.packing.

Files of a store, for each NNNNN: `NNNNN.ds` tokens (little-endian uint16 or uint32), `NNNNN.ds.index` uint64 document
ends in tokens, `NNNNN.ds.metadata` text, as datatrove's DocumentTokenizer writes them (0.10.1); and, by us only,
`NNNNN.ds.bytes` uint32 UTF-8 bytes of each document, `NNNNN.ds.hash` uint64 hash of each document's text, and one
`store.json`. While a store is being made it holds a directory `in_progress` and no `store.json`.

A masked store has `NNNNN.ds.loss` too, datatrove's: a byte for each token, 1 where the token counts in the loss (as a
target), 0 where it is only read. Its `.bytes` are those of the text that counts, so that bits per byte, the sum of the loss
over the bytes, stays a measure of the text that the loss is about. The `.hash` of a conversation is of its messages.
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

FORMAT = 1
MANIFEST = "store.json"
IN_PROGRESS = "in_progress"
_PARTS = {"ds": "", "index": ".index", "bytes": ".bytes", "hash": ".hash", "metadata": ".metadata"}
_LOSS = ".loss"
_FLUSH_BYTES = 1 << 20
_MAX_MAPS = 400  # each map holds a file descriptor, of which a process commonly has 1024


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


def sync_directory(path: str | os.PathLike) -> None:
  """Makes renames in a directory durable."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """The file holds either what it held or all of `data`, even after a power cut."""
  path = Path(path)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  with open(temporary, "wb") as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
  sync_directory(path.parent)


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
      for part, suffix in _PARTS.items():
        self._parts[part] = _Part(Path(f"{self._path}{suffix}"))
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
    """Appends a document.

    Args:
      tokens: ids.
      num_bytes: of the text, as far as it counts in the loss.
      text_hash: of the text, or of the conversation.
      loss_mask: for each id, whether it counts in the loss; all documents of a store have one, or none has.

    Raises:
      ValueError: for ids that the dtype cannot hold, a document with no token, or a mask that does not fit.
    """
    ids = np.asarray(tokens)
    if ids.size == 0:
      raise ValueError("a document has no token; every document ends in EOS")
    largest = int(ids.max())
    if int(ids.min()) < 0 or largest > np.iinfo(self._dtype).max:
      raise ValueError(f"token ids {int(ids.min())}..{largest} do not fit in {self._dtype.name}")
    if self.num_documents == 0 and loss_mask is not None:
      self._parts["loss"] = _Part(Path(f"{self._path}{_LOSS}"))
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


def part_names(name: str, *, has_loss_mask: bool = False) -> list[str]:
  """The files that belong to token file `name`, itself included."""
  return [name + suffix for suffix in _PARTS.values()] + [name + _LOSS] * has_loss_mask


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

  Args:
    path: the store's directory.
    files: in the order of the documents.
    vocab_size: largest id of the tokenizer + 1.
    tokenizer_fingerprint: of the tokenizer.
    eos_id: the id that ends every document.
    extra: more entries, e.g. "inputs" and "bad_records".
  """
  manifest = {
    "format": FORMAT,
    "dtype": token_dtype(vocab_size).name,
    "vocab_size": vocab_size,
    "tokenizer_fingerprint": tokenizer_fingerprint,
    "eos_id": eos_id,
    "max_token_id": max((f.max_token_id for f in files), default=-1),
    "num_documents": sum(f.num_documents for f in files),
    "num_tokens": sum(f.num_tokens for f in files),
    "num_bytes": sum(f.num_bytes for f in files),
    "num_targets": sum(f.num_targets for f in files),
    **extra,
    "files": [f._asdict() for f in files],
  }
  manifest["digest"] = _manifest_digest(manifest)
  sync_directory(path)
  write_atomically(Path(path) / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def _manifest_digest(manifest: dict[str, Any]) -> str:
  content = {k: v for k, v in manifest.items() if k != "digest"}
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
  """The checked `store.json` of a store, None where there is none.

  Raises:
    ConfigError: it is broken, or of another format.
  """
  file = Path(path) / MANIFEST
  try:
    manifest = json.loads(file.read_bytes())
  except FileNotFoundError:
    return None
  except ValueError as error:  # broken JSON or UTF-8
    raise ConfigError(f"{file}: not readable as JSON ({error}); make the store again") from None
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    raise ConfigError(f"{file}: format {found!r}, expected {FORMAT}; make the store again with this version")
  if manifest.get("digest") != _manifest_digest(manifest):
    raise ConfigError(f"{file}: its digest does not fit its content, so the file was changed or damaged; make the store again")
  return manifest


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
    self._files: list[FileInfo] = []
    self._writer: TokenFileWriter | None = None
    if (self._path / MANIFEST).exists():
      raise ConfigError(f"{path}: holds a finished store already; choose another directory or remove it")
    (self._path / IN_PROGRESS).mkdir(parents=True)

  def add(self, tokens: np.ndarray | list[int], *, text: str, loss_mask: np.ndarray | list[bool] | None = None) -> None:
    """Appends a document: its ids, EOS included, the text that they are of (that counts, with a mask), and the loss mask."""
    if self._writer is not None and self._writer.num_tokens >= self._max_file_tokens:
      self._close_file()
    if self._writer is None:
      name = f"{len(self._files):05d}.ds"
      self._writer = TokenFileWriter(self._path / name, dtype=token_dtype(self._vocab_size), tokenizer_name=self._name)
    if self._files and ("loss" in self._files[0].digests) != (loss_mask is not None):
      raise ValueError("documents with a loss mask and documents without one; a store has one kind")
    data = text.encode("utf-8")
    self._writer.add(tokens, num_bytes=len(data), text_hash=text_hash(data), loss_mask=loss_mask)

  def _close_file(self) -> None:
    if self._writer is not None:
      self._files.append(self._writer.close())
      self._writer = None

  def close(self) -> None:
    """Completes the store."""
    self._close_file()
    write_manifest(
      self._path,
      files=self._files,
      vocab_size=self._vocab_size,
      tokenizer_fingerprint=self._fingerprint,
      eos_id=self._eos_id,
      extra={"inputs": [], "bad_records": {"num": 0}},
    )
    (self._path / IN_PROGRESS).rmdir()

  def __enter__(self) -> "StoreWriter":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if kind is None:
      self.close()
    elif self._writer is not None:
      self._writer.abandon()


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
    suffix = _LOSS if part == "loss" else _PARTS[part]
    # A plain array over the map: slices of the subclass np.memmap are slow.
    return np.asarray(np.memmap(f"{self.path}{suffix}", dtype=dtype, mode="r"))


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
    metadata = Path(f"{self._files[0].path}{_PARTS['metadata']}") if self._files else None
    if metadata is None or not metadata.exists():
      return ""
    return metadata.read_text(encoding="utf-8").split("\n")[0].rsplit("|", 1)[0]

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each document, int64 [num_documents]; 0 is possible only in a store made by datatrove.

    Raises:
      ConfigError: an index that falls.
    """
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

    Raises:
      IndexError: the document does not have them.
    """
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
        file = self.path / (entry["name"] + (_LOSS if part == "loss" else _PARTS[part]))
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

  Raises:
    ConfigError: there is no store, it is unfinished, or a file is missing, truncated or inconsistent.
  """
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
  if manifest:
    masked = ["loss" in entry["digests"] for entry in manifest["files"]]
  else:
    masked = [os.path.exists(path / f"{name}{_LOSS}") for name in names]
    if any(masked) and not all(masked):
      missing = path / f"{names[masked.index(False)]}{_LOSS}"
      raise ConfigError(f"{missing}: missing from the store, other token files have one; copy it again or remove them all")
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


def _size(file: str) -> int:
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
  index_bytes, token_bytes = _size(f"{path}.index"), _size(str(path))
  num_documents, num_tokens = index_bytes // 8, token_bytes // dtype.itemsize
  if index_bytes % 8:
    raise ConfigError(f"{path}.index: {index_bytes} bytes is no whole number of uint64; the file is cut off")
  last_end = _last_end(f"{path}.index")
  if last_end * dtype.itemsize != token_bytes:
    raise ConfigError(
      f"{path}: {token_bytes} bytes, but its index ends at {last_end} tokens = {last_end * dtype.itemsize} bytes; "
      "one of the two is cut off or of another store"
    )
  if has_loss_mask and _size(f"{path}{_LOSS}") != num_tokens:
    raise ConfigError(f"{path}{_LOSS}: {_size(f'{path}{_LOSS}')} bytes, expected {num_tokens}, one for each token; it is cut off")
  if not has_loss_mask and os.path.exists(f"{path}{_LOSS}"):
    raise ConfigError(f"{path}{_LOSS}: not listed in {MANIFEST}, which knows of no loss mask; remove it or make the store again")
  for suffix, width in (".bytes", 4), (".hash", 8):
    expected = num_documents * width
    if is_ours and _size(f"{path}{suffix}") != expected:
      raise ConfigError(f"{path}{suffix}: {_size(f'{path}{suffix}')} bytes, expected {expected} for {num_documents} documents")
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
    elif _size(str(path / name)):
      num_tokens = _last_end(f"{path / name}.index")
      widths |= {width for width in ("2", "4") if num_tokens * int(width) == _size(str(path / name))}
  if len(widths) > 1:
    raise ConfigError(f"{path}: token files of {' and '.join(sorted(widths))} bytes a token; a store has one width")
  return np.dtype(f"<u{widths.pop() if widths else 2}")
