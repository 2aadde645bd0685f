"""Files that outlive a kill: written whole, or line by line with one JSON entry each <-> what they hold.

Invariant: a file holds what it held or all that is new; a line that a kill cut short is left out, and nothing after it is there.
"""

import json
import os
import pathlib


def sync_directory(path: str | os.PathLike) -> None:
  """Makes renames in a directory durable."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """The file holds either what it held or all of `data`, even after a power cut."""
  path = pathlib.Path(path)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  with open(temporary, "wb") as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
  sync_directory(path.parent)


def read(path: pathlib.Path) -> list[dict]:
  """All whole entries; none where there is no such file."""
  if not path.exists():
    return []
  entries = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      entries.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return entries
