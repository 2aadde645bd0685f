"""Files of a run with one JSON record a line -> the records.

Invariant: a line that a kill cut short is left out, and nothing after it is there.
"""

import json
import pathlib


def read(path: pathlib.Path) -> list[dict]:
  """All whole records; none where there is no such file."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records
