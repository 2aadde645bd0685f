"""A Hugging Face directory and a grown tokenizer's record -> the directory of a model with more rows.

Invariant: old rows and all other tensors are written byte for byte as they were; memory holds a block of rows, never a table.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.model import hf_files
from cpt_jax.vocab import initialise
from cpt_jax.vocab.initialise import Block, OldRows

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TRUE_SIZE = "true_vocab_size"  # in config.json, beside vocab_size, which counts rows: ids from here on are padding
BASE_SIZE = "base_vocab_size"  # ids from here on belong to the pieces that were added
_COPY_BYTES = 8 << 20  # of a tensor that are in memory at once; by hand

# A new table's rows: of the old rows, seen as they lie on disk, to what stands behind them.
MakeRows = Callable[[np.ndarray], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Model:
  """A base whose tables can grow."""

  directory: pathlib.Path
  hf_config: dict[str, Any]
  files: hf_files.TensorFiles
  tables: tuple[str, ...]  # names of the tensors that have a row for each id

  @property
  def rows(self) -> int:
    """Rows of the tables, padding counted."""
    return self.files.entries[self.tables[0]].shape[0]

  @property
  def is_tied(self) -> bool:
    """Is the embedding the head as well."""
    return bool(self.hf_config.get("tie_word_embeddings", False))


def open_model(directory: str | os.PathLike, *, vocab_size: int) -> Model:
  """The model of a Hugging Face directory, checked against its tokenizer's `vocab_size`.
  Raises ConfigError: no embedding, tables of different sizes, or a tokenizer with ids that the model has no row for."""
  path = pathlib.Path(directory)
  hf_config, files = hf_files.load_json(path / "config.json"), hf_files.TensorFiles(path)
  tables = tuple(name for name in (EMBEDDING, HEAD) if name in files.entries)
  if EMBEDDING not in tables and not (hf_config.get("tie_word_embeddings") and HEAD in tables):
    raise ConfigError(f"{path}: no tensor {EMBEDDING}; expected a model of the llama, mistral, qwen2 or qwen3 families")
  if not hf_config.get("tie_word_embeddings") and HEAD not in tables:
    raise ConfigError(f"{path}: no tensor {HEAD}, though config.json does not tie it to the embedding; download the model again")
  sizes = {name: files.entries[name].shape for name in tables}
  rows = hf_config.get("vocab_size", 0)
  wrong = [f"{name} {list(shape)}" for name, shape in sizes.items() if len(shape) != 2 or shape[0] != rows]
  if wrong:
    raise ConfigError(f"{path}: config.json has vocab_size={rows}, found {', '.join(wrong)}; download the model again")
  unread = [f"{name} is {entry.dtype}" for name, entry in files.entries.items() if entry.dtype not in hf_files.DTYPES]
  if unread:
    raise ConfigError(f"{path}: {', '.join(unread[:3])}; expected F32, BF16 or F16 (take the model's unquantised files)")
  if vocab_size > rows:
    raise ConfigError(
      f"{path}: the tokenizer has ids up to {vocab_size - 1}, the model has {rows} rows: a grown tokenizer with a model that was "
      "not grown; take the directory that cpt vocab grow wrote, with both"
    )
  return Model(path, hf_config, files, tables)


def make_rows(initialiser: Block, old: Callable[[np.ndarray], OldRows], *, num_padding: int) -> MakeRows:
  """New rows by an initialiser, then padding."""

  def made(old_VD: np.ndarray) -> Iterator[np.ndarray]:
    found = old(old_VD)
    yield from initialise.blocks(initialiser, found)
    if num_padding:
      yield initialise.padding(found, num_rows=num_padding)

  return made


def write(
  model: Model, output: pathlib.Path, *, num_old: int, vocab_size: int, rows: int, new: Mapping[str, MakeRows],
  on_bytes: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
  """Writes config.json and the weights into `output`: the first `num_old` rows of each table, then those that `new` makes.

  Files without a table are linked where the file system allows, else copied.
  """
  assert rows >= vocab_size >= num_old, (rows, vocab_size, num_old)
  by_file: dict[pathlib.Path, list[str]] = {}
  for name, entry in model.files.entries.items():
    by_file.setdefault(entry.file, []).append(name)
  for file, names in by_file.items():
    if not set(names) & set(model.tables):
      _link(file, output / file.name)
      on_bytes(file.stat().st_size)
      continue
    # Wider items first, so that each tensor lies aligned.
    names.sort(key=lambda name: -_itemsize(model, name))
    entries = {name: _entry(model, name, rows) for name in names}
    hf_files.write_safetensors(output / file.name, entries, _chunks(model, names, num_old, rows, new, on_bytes))
  if (model.directory / hf_files.INDEX).exists() and not (model.directory / hf_files.SINGLE).exists():
    index = hf_files.load_json(model.directory / hf_files.INDEX)
    more = sum((rows - model.rows) * _row_bytes(model, name) for name in model.tables)
    metadata = index.get("metadata") or {}
    if isinstance(metadata.get("total_size"), int):
      metadata = metadata | {"total_size": metadata["total_size"] + more}
    content = index | {"metadata": metadata}
    hf_files.write_file(output / hf_files.INDEX, json.dumps(content, indent=2, sort_keys=True).encode())
  config = {key: value for key, value in model.hf_config.items() if key != "auto_map"} | {
    "vocab_size": rows,
    TRUE_SIZE: vocab_size,
    BASE_SIZE: num_old,
  }
  hf_files.write_file(output / "config.json", json.dumps(config, indent=2).encode() + b"\n")


def num_bytes(model: Model, *, rows: int) -> int:
  """Bytes of the grown model's tensors."""
  return sum(entry.num_bytes for entry in model.files.entries.values()) + sum(
    (rows - model.rows) * _row_bytes(model, name) for name in model.tables
  )


def _itemsize(model: Model, name: str) -> int:
  entry = model.files.entries[name]
  return entry.num_bytes // max(int(np.prod(entry.shape)), 1)


def _row_bytes(model: Model, name: str) -> int:
  return model.files.entries[name].shape[1] * _itemsize(model, name)


def _entry(model: Model, name: str, rows: int) -> tuple[str, tuple[int, ...]]:
  entry = model.files.entries[name]
  return entry.dtype, ((rows, entry.shape[1]) if name in model.tables else entry.shape)


def _chunks(
  model: Model, names: list[str], num_old: int, rows: int, new: Mapping[str, MakeRows], on_bytes: Callable[[int], None]
) -> Iterator[np.ndarray]:
  for name in names:
    view = model.files.view(name)
    if name in model.tables:
      old_VD = view[:num_old]
      step = max(1, _COPY_BYTES // _row_bytes(model, name))
      written = 0
      for start in range(0, num_old, step):
        chunk = old_VD[start : start + step]
        written += len(chunk)
        yield chunk
        on_bytes(chunk.nbytes)
      for block in new[name](old_VD):
        written += len(block)
        chunk = block.astype(view.dtype)
        if not np.isfinite(chunk).all():
          raise ConfigError(f"{name}: a new row is not finite as {view.dtype}; nothing was written")
        yield chunk
        on_bytes(chunk.nbytes)
      assert written == rows, (name, written, rows)
    else:
      flat = view.reshape(-1)
      for start in range(0, len(flat), _COPY_BYTES):
        yield flat[start : start + _COPY_BYTES]
      on_bytes(view.nbytes)
    model.files.release(name)


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  try:
    os.link(source.resolve(), target)
  except OSError:  # another file system, or one without links
    hf_files.copy_file(source, target)
