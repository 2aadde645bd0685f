"""A path such as configs/domain.py or examples/base that is not in the current directory -> the one that came with the package.

Invariant: what is in the current directory wins; a clone and a wheel find the same files.
"""

import glob
import pathlib
import sys
from typing import Any

_KEYS = ("start.hf", "start.weights", "start.resume", "start.moments", "model.scratch", "data.tokenizer")  # that hold paths
_HERE = pathlib.Path(__file__).resolve().parent  # where a wheel has configs/ and examples/; a clone has them at its root
_told: set[str] = set()


def root() -> pathlib.Path:
  """The directory that holds the configs/ and examples/ of this package."""
  return _HERE if (_HERE / "configs").is_dir() else _HERE.parent.parent


def find(path: str) -> str:
  """`path` itself, or where it came with the package; says so, once, on stderr."""
  is_ours = pathlib.PurePath(path).parts[:1] in (("configs",), ("examples",))
  if not is_ours or glob.glob(path) or not glob.glob(str(root() / path)):
    return path
  found = str(root() / path)
  if path not in _told:
    _told.add(path)
    print(f"{path} is not in this directory: taken from {found}", file=sys.stderr)
  return found


def complete(config: Any) -> Any:
  """A config whose paths are looked for as `find` does."""
  with config.unlocked():
    for key in _KEYS:
      section, _, name = key.partition(".")
      config[section][name] = find(config[section][name])
    for source in config.data.sources.values():
      source.text = find(source.text)
  return config
