"""Layouts of rows <-> files beside a store, so that they are computed once.

Invariant: a layout appears whole or not at all, and is taken only by the key that it was made for.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cpt_jax.stream.packing import FORMAT, Layout

_META = "layout.json"
_ARRAYS = ("row_ends", "row_tokens", "row_targets", "row_docs", "doc", "start", "length")
_NUMBERS = ("row_len", "policy", "cross_documents", "num_tokens", "num_targets", "num_documents", "num_split")


def load_or_make(store_path: str | os.PathLike, *, key: dict, make: Callable[[], Layout], keep: bool = True) -> Layout:
  """The layout of `key` from `layouts/` beside the store, memory-mapped; made and written there when it is not.

  `key` holds all that the layout depends on (JSON-able). Writers in other processes do no harm: a layout appears whole or not
  at all. A layout on disk that is damaged is made again. Where nothing can be written the layout stays in memory, with a warning;
  without `keep` nothing is written.
  """
  key = {"format": FORMAT, **key}
  name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
  directory = Path(store_path) / "layouts" / name
  found = _load(directory, key)
  if isinstance(found, Layout):
    return found
  if found:
    warnings.warn(f"{directory}: {found}; the layout of its rows is made again", stacklevel=2)
  fresh = make()
  if not keep:
    return fresh
  try:
    _write(directory, key, fresh)
  except OSError as error:
    warnings.warn(f"{directory}: cannot write the layout of rows ({error}); every start makes it again", stacklevel=2)
    return fresh
  written = _load(directory, key)
  return written if isinstance(written, Layout) else fresh


def _load(directory: Path, key: dict) -> Layout | str:
  """The layout, or what is wrong with it; "" where there is none."""
  try:
    meta = json.loads((directory / _META).read_text())
  except (FileNotFoundError, NotADirectoryError):
    return f"has no {_META}" if directory.exists() else ""
  except ValueError as error:
    return f"{_META} is not JSON ({error})"
  if not isinstance(meta, dict) or meta.get("key") != key:
    return f"{_META} is of another layout than {key}"
  arrays = {}
  try:
    for array_name in _ARRAYS:
      arrays[array_name] = _map(directory / f"{array_name}.npy")
      found = [str(arrays[array_name].dtype), len(arrays[array_name])]
      if found != meta["arrays"][array_name]:
        return f"{array_name}.npy holds {found}, expected {meta['arrays'][array_name]}"
    result = Layout(**meta["layout"], **arrays)
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f"is damaged ({error})"
  if result.num_rows and int(result.row_ends[-1]) != len(result.doc):
    return f"row_ends.npy ends at piece {int(result.row_ends[-1])} of {len(result.doc)}"
  return result


def _map(path: Path) -> np.ndarray:
  # A plain array over the map: slices of the subclass np.memmap are slow. An empty array cannot be mapped.
  return np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None, allow_pickle=False))


def _write(directory: Path, key: dict, fresh: Layout) -> None:
  directory.parent.mkdir(exist_ok=True)
  unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
  unfinished.mkdir()
  try:
    for array_name in _ARRAYS:
      np.save(unfinished / f"{array_name}.npy", getattr(fresh, array_name))
    meta = {
      "key": key,
      "arrays": {n: [str(getattr(fresh, n).dtype), len(getattr(fresh, n))] for n in _ARRAYS},
      "layout": {n: getattr(fresh, n) for n in _NUMBERS},
    }
    (unfinished / _META).write_text(json.dumps(meta, indent=1) + "\n")
    for file in unfinished.iterdir():
      with open(file, "rb") as f:
        os.fsync(f.fileno())
    if directory.exists() and not isinstance(_load(directory, key), Layout):
      shutil.rmtree(directory)
    unfinished.rename(directory)
  except OSError:
    if not isinstance(_load(directory, key), Layout):  # otherwise another process was first, with the same layout
      raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
