"""A Hugging Face directory on disk <-> tensors by name (numpy views of mapped files), and the files that travel with them.

Invariant: every size, name and dtype is checked before a byte of a tensor is read; nothing outside the directory is opened and
no file that could run code is read; what is written appears whole or not at all.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import glob
import json
import math
import mmap
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cpt_jax import hub
from cpt_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# What an export carries along. Never code (*.py) and never pickles (*.bin, *.pt).
CARRIED = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
  "added_tokens.json", "chat_template.*", "generation_config.json", "LICENSE*",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_NEVER = (*_PICKLES, ".py", ".npy", ".npz", ".so")
MANIFEST = "cpt_jax_export.json"
_JSON_BYTES = 64 << 20  # the index of a 400B model is about 1 MB
_CONVERT = (
  "convert it once, where transformers and torch are installed: python -c 'from transformers import AutoModelForCausalLM as M; "
  'M.from_pretrained("{directory}").save_pretrained("{directory}-safetensors")\''
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where a tensor lies: `offset` and `num_bytes` count bytes in `file`; `dtype` as safetensors spells it, e.g. "BF16"."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int
  num_bytes: int


class TensorFiles:
  """The tensors of a Hugging Face directory (`model.safetensors`, or the shards of `model.safetensors.index.json`).
  Raises ConfigError: no such files, files that are damaged, an index that disagrees with them or points outside the directory."""

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(directory)
    files, weight_map = _weight_files(self.directory)
    self.entries: dict[str, Entry] = {}
    lines = []
    for file in files:
      for name, entry in _read_header(file).items():
        if weight_map is not None and weight_map.get(name) != file.name:
          where = f"the index has it in {weight_map[name]}" if name in weight_map else "the index does not list it"
          lines.append(f"{name}: found in {file.name}, {where}")
        else:
          self.entries[name] = entry
    for name, file_name in (weight_map or {}).items():
      if name not in self.entries and not any(line.startswith(f"{name}: found") for line in lines):
        lines.append(f"{name}: the index has it in {file_name}, which does not hold it")
    if lines:
      raise ConfigError("\n".join([f"{self.directory}: {INDEX} disagrees with the files; download both again:", *indent(lines)]))
    self._maps: dict[pathlib.Path, mmap.mmap] = {}

  def view(self, name: str) -> np.ndarray:
    """The tensor as it lies on disk, mapped: reading from it reads the file, holding it costs no memory."""
    entry = self.entries[name]
    if entry.file not in self._maps:
      with entry.file.open("rb") as file:
        self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(self._maps[entry.file], DTYPES[entry.dtype], math.prod(entry.shape), entry.offset)
    return array.reshape(entry.shape)

  def release(self, name: str) -> None:
    """Takes the tensor's pages out of this process's memory; a later `view` reads them again."""
    entry = self.entries[name]
    if entry.file in self._maps:
      start = entry.offset - entry.offset % mmap.PAGESIZE
      self._maps[entry.file].madvise(mmap.MADV_DONTNEED, start, entry.offset + entry.num_bytes - start)


def indent(lines: Iterable[str]) -> list[str]:
  """The lines of an error under its heading."""
  return [f"  {line}" for line in lines]


def load_json(path: pathlib.Path) -> dict:
  """A JSON object of a Hugging Face directory.
  Raises ConfigError: missing, larger than 64 MB, not JSON, not an object, or a key twice."""
  if not path.is_file():
    raise ConfigError(f"{path}: no such file")
  if path.stat().st_size > _JSON_BYTES:
    raise ConfigError(f"{path}: {path.stat().st_size} bytes, expected at most {_JSON_BYTES}; this is no such file as {path.name}")
  try:
    value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path}: not readable as JSON ({error}); download it again") from None
  if not isinstance(value, dict):
    raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
  return value


def _no_duplicates(pairs: list[tuple]) -> dict:
  value = dict(pairs)
  if len(value) != len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} twice")
  return value


def _weight_files(directory: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str] | None]:
  """The files to read and, for a sharded model, tensor name -> file name. One file goes before shards, as in transformers."""
  if not directory.is_dir():
    raise ConfigError(
      f"{directory}: no such directory; expected one with config.json and {SINGLE} or {INDEX}" + hub.how_to_get(directory)
    )
  if (directory / SINGLE).exists():
    return [_inside(directory, SINGLE)], None
  if (directory / INDEX).exists():
    index = load_json(_inside(directory, INDEX))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
      raise ConfigError(f'{directory / INDEX}: expected "weight_map": {{tensor name: file name, ...}}')
    lines = []
    for name in sorted(set(weight_map.values())):
      try:
        _inside(directory, name)
      except ConfigError as error:
        lines.append(str(error))
    if lines:
      raise ConfigError("\n".join([f"{directory / INDEX}: {len(lines)} file(s) that cannot be read:", *indent(lines)]))
    return [directory / name for name in sorted(set(weight_map.values()))], weight_map
  found = sorted(p.name for p in directory.iterdir() if p.suffix in (*_PICKLES, ".safetensors", ".gguf"))
  if any(name.endswith(_PICKLES) for name in found):
    raise ConfigError(
      f"{directory}: holds its weights as PyTorch pickles only ({', '.join(found[:3])}), which can run code when they are read; "
      + _CONVERT.format(directory=directory)
    )
  raise ConfigError(f"{directory}: neither {SINGLE} nor {INDEX} there; found {', '.join(found) or 'no file of weights'}")


def _inside(directory: pathlib.Path, name: str) -> pathlib.Path:
  """`directory/name`, if that is a file of the directory itself.

  The hub's cache (`models--x--y/snapshots/<revision>/`) links to `models--x--y/blobs/`: there links may go that far.
  """
  if not name.endswith((".safetensors", ".json")):
    raise ConfigError(f"{name!r}: expected a name that ends in .safetensors")
  if "/" in name or "\\" in name or "\0" in name or name in (".", "..") or pathlib.PurePath(name).is_absolute():
    raise ConfigError(f"{name!r}: expected the name of a file in the same directory, found a path")
  path = directory / name
  if not path.exists():
    raise ConfigError(f"{name}: missing; download it again")
  if not path.is_file():
    raise ConfigError(f"{name}: not a file")
  if not _stays(path):
    raise ConfigError(f"{name}: a link to {os.path.realpath(path)}, outside the directory; put the file itself there")
  return path


def _stays(path: pathlib.Path) -> bool:
  directory, target = path.parent.resolve(), path.resolve()
  roots = [directory] + ([directory.parent.parent / "blobs"] if directory.parent.name == "snapshots" else [])
  return any(target.is_relative_to(root) for root in roots)


def _read_header(file: pathlib.Path) -> dict[str, Entry]:
  """Name -> entry. The library's parser goes first: it refuses holes, overlaps, duplicate names, bodies too short or too long."""
  try:
    with safe_open(file, framework="numpy"):
      pass
  except (SafetensorError, OSError) as error:
    raise ConfigError(f"{file}: not a whole safetensors file ({error}); download it again") from None
  with file.open("rb") as stream:
    header_bytes = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(header_bytes))
  entries = {}
  for name, value in header.items():
    if name != "__metadata__":
      start, end = value["data_offsets"]
      entries[name] = Entry(file, value["dtype"], tuple(value["shape"]), 8 + header_bytes + start, end - start)
  return entries


def write_safetensors(path: pathlib.Path, entries: dict[str, tuple[str, tuple[int, ...]]], chunks: Iterator[np.ndarray]) -> None:
  """Writes a safetensors file from pieces, holding one piece at a time.

  `entries` is name -> (dtype, shape) in the order of `chunks`, which give the tensors' values one after another in C order, each
  tensor in as many pieces as its maker likes. Dtypes of larger items must come first, so that every tensor lies aligned.
  """
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, (dtype, shape) in entries.items():
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
    offset += num_bytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for chunk in chunks:
      written += file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)  # bytes, uncopied
    assert written == offset, (path, written, offset)
    file.flush()
    os.fsync(file.fileno())


def carried_files(source: pathlib.Path) -> list[pathlib.Path]:
  """Tokenizer, generation and licence files of a Hugging Face directory, or the one tokenizer file that `source` is."""
  if source.is_file():
    return [source] if any(fnmatch.fnmatch(source.name, pattern) for pattern in CARRIED) else []
  return [
    path
    for path in sorted(source.iterdir())
    if any(fnmatch.fnmatch(path.name, p) for p in CARRIED) and path.suffix not in _NEVER and path.is_file() and _stays(path)
  ]


def write_file(path: pathlib.Path, data: bytes) -> None:
  """Writes a small file through to the disk."""
  with path.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a file's contents (a link's target, not the link) through to the disk."""
  with source.open("rb") as read, target.open("wb") as write:
    shutil.copyfileobj(read, write, 1 << 20)
    write.flush()
    os.fsync(write.fileno())


@contextlib.contextmanager
def atomic_directory(output: pathlib.Path, *, num_bytes: int) -> Iterator[pathlib.Path]:
  """A directory to fill, which becomes `output` when the block ends well and vanishes when it does not.

  An empty directory is replaced, and one that an export made and nobody has added to. `num_bytes` is the space needed.
  Raises ConfigError: `output` holds something else, or the disk has not the space.
  """
  output = output.absolute()
  output.parent.mkdir(parents=True, exist_ok=True)
  old = output.parent / f".{output.name}.old"
  if old.exists() and not output.exists():
    os.replace(old, output)  # a kill between the two renames below
  _check_replaceable(output)
  _remove_stale(output)
  free = shutil.disk_usage(output.parent).free
  if free < num_bytes:
    raise ConfigError(f"{output}: needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; write elsewhere")
  partial = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
  partial.mkdir()
  try:
    with (partial / ".lock").open("wb") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      yield partial
      manifest = {"format": 1, "files": {p.name: p.stat().st_size for p in sorted(partial.iterdir()) if p.name != ".lock"}}
      write_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
      (partial / ".lock").unlink()
      _sync_directory(partial)
      _check_replaceable(output)
      # ORDER: the files are on disk before the name is, or a power cut leaves a directory of empty files.
      if output.exists():
        os.replace(output, old)
      os.replace(partial, output)
      _sync_directory(output.parent)
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(output: pathlib.Path) -> None:
  if not output.exists():
    return
  if not output.is_dir():
    raise ConfigError(f"{output}: a file of that name is there; name a directory that does not exist yet")
  found = {path.name: path.stat().st_size for path in output.iterdir()}
  ours = load_json(output / MANIFEST).get("files") if MANIFEST in found else None
  ours = ours if isinstance(ours, dict) else {}
  # A file whose size is not what the export wrote has been edited since: it is somebody's work.
  foreign = [name for name, size in sorted(found.items()) if name != MANIFEST and ours.get(name) != size]
  if foreign:
    raise ConfigError(f"{output}: not empty, and no export wrote {', '.join(foreign[:3])} as found there; name another directory")


def _remove_stale(output: pathlib.Path) -> None:
  """Removes what killed exports to the same place left; a running one holds its lock."""
  for partial in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
    try:
      with (partial / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial, ignore_errors=True)
    except FileNotFoundError:
      shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError:
      pass  # another process is writing there


def _sync_directory(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
