"""A config -> a Python file that makes it, for `--config=FILE`.

Invariant: the file says every value that is not a default, names no other file, and loads as exactly this config.
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from cpt_jax import config as config_lib
from cpt_jax.store.store import write_atomically


def as_python(config: Any, *, about: str) -> str:
  """The text of the file; `about` becomes its docstring."""
  lines = []
  for key in config_lib.KEYS.values():
    value = _plain(config_lib.get(config, key.name))
    if value != _plain(key.default):
      lines.append(f"  c.{key.name} = {value!r}")
  for name, entry in config.data.sources.items():
    ordinary = {field.name: _plain(field.default) for field in config_lib.FIELDS.values()}
    changed = [f"    {field}={_plain(entry[field])!r}," for field, value in ordinary.items() if _plain(entry[field]) != value]
    lines += [f"  c.data.sources.{name} = config.source(", *changed, "  )"]
  about = about.replace("\\", "\\\\").replace('"""', "'''").strip()
  return "\n".join(
    [f'"""{about}\n"""' if "\n" in about else f'"""{about}"""', "", "from cpt_jax import config", "", ""]
    + ["def get_config():", "  c = config.default()", *lines, "  return c", ""]
  )


def write(config: Any, path: pathlib.Path, *, about: str) -> None:
  """Writes the file; there is never half of one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, as_python(config, about=about).encode())


def _plain(value: Any) -> Any:
  """Tuples for lists, dicts for ConfigDicts, and a share that stands still as its number: what a person would write."""
  if isinstance(value, config_lib.Share) and len(value) == 1 and value[0][0].amount == 0:
    return value[0][1]
  if isinstance(value, (list, tuple)):
    return tuple(_plain(x) for x in value)
  if isinstance(value, (dict, ConfigDict)):
    return {key: _plain(x) for key, x in value.items()}
  return value
