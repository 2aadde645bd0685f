"""Config files, the command line's changes to them, and the config.json of runs -> ConfigDicts.

Invariant: a mistake in a file is named with its line, a key that does not exist with what was probably meant.
"""

import difflib
import json
import pathlib
import re
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from cpt_jax import shipped
from cpt_jax.config import keys
from cpt_jax.config.check import leaf_keys, parse_times, unknown_key
from cpt_jax.config.durations import get
from cpt_jax.config.errors import ConfigError, Problems, did_you_mean

_RENAMED = {"stages": "shares"}  # of `data`, in the config.json of older versions


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The config of FILE or FILE:ARGUMENT, here or shipped with the package, with the changes `--config.key=value` of `overrides`.

  It is not yet resolved.
  Raises ConfigError: no such file, a mistake in it, or changes of keys that do not exist or to values that are of another type.
  """
  file, colon, argument = path.partition(":")
  config = load_file(file, *([argument] if colon else []))
  check_overrides(config, overrides)
  values, argv = flags.FlagValues(), ["cpt", *overrides]  # of this call alone
  config_flags.DEFINE_config_dict("config", config, "", flag_values=values, sys_argv=argv)
  problems = Problems()
  for one in overrides:  # each by itself, so that all that cannot be read is said
    try:
      values(["cpt", one])
    except flags.Error as error:
      problems.add(str(error))
  problems.raise_if_any()
  return shipped.complete(values["config"].value)


def check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
  """Raises ConfigError where a `--config.key` of `argv` does not exist: all of them, with what was probably meant."""
  problems, known = Problems(), leaf_keys(config)
  for key in [m.group(1) for arg in argv if (m := re.match(r"--?(?:no)?config\.([\w.]+)", arg))]:
    if key not in known:
      problems.add(unknown_key(key, known))
  problems.raise_if_any()


def load_file(path: str, *argument: str) -> ConfigDict:
  """Runs a config file's get_config, with its `argument` if there is one; a mistake becomes a ConfigError that names the line."""
  form = "a config file is Python: it defines get_config(), which returns cpt_jax.config.default() with changes"
  path = shipped.find(path)
  if not pathlib.Path(path).is_file():
    here = sorted(str(p) for p in pathlib.Path(path).parent.glob("*.py"))
    raise ConfigError(
      f"--config={path}: no such file.{did_you_mean(path, here)}" + (f" There are {', '.join(here)}." if here else "")
    )
  if pathlib.Path(path).suffix != ".py":
    raise ConfigError(f"--config={path}: {form}, as configs/quickstart.py does")
  try:
    config = runpy.run_path(path)["get_config"](*argument)
  except KeyError as error:
    if error.args == ("get_config",):
      raise ConfigError(f"{path}: {form}") from None
    raise _at_line(path, error) from error
  except (AttributeError, TypeError, ValueError, NameError, SyntaxError, ImportError) as error:
    raise _at_line(path, error) from error
  if not isinstance(config, ConfigDict):
    raise ConfigError(f"{path}: get_config() returned {type(config).__name__}; return the ConfigDict of cpt_jax.config.default()")
  return config


def _at_line(path: str, error: Exception) -> ConfigError:
  """What went wrong in a config file, with its line; ConfigDict's own list of all fields is cut off."""
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  text = f"{type(error).__name__}: {error}"
  if match := re.search(r'Key "(\w+)" does not exist', str(error)):
    text = f"{match.group(1)}: there is no such key here.{_meant(match.group(1))}"
  elif match := re.search(r"override field '(\w+)'.*?\. (.*) is of original type <class '(?:int|float)'>.*'str'", str(error)):
    name, value = match.groups()
    if any(key.duration for key in keys.KEYS.values() if key.name.endswith(f".{name}")):
      text = f"{name}={value}: steps or tokens? Write '{value} steps' or '{value} tokens'"
  return ConfigError(f"{path}:{frames[-1].lineno if frames else '?'}: {text}")


def _meant(name: str) -> str:
  last = {key.rsplit(".", 1)[-1]: key for key in keys.KEYS}
  close = difflib.get_close_matches(name, last, n=1)
  return f" Did you mean {last[close[0]]}?" if close else ""


def completed(values: dict[str, Any]) -> ConfigDict:
  """A config that a run of this version or an older one recorded, resolved; a key that it does not have stands for its default.

  Older versions wrote steps without a unit.
  """

  def fill(values: dict[str, Any], defaults: Any) -> dict[str, Any]:
    known = {name: fill(values.get(name, {}), value) for name, value in defaults.items() if isinstance(value, ConfigDict)}
    return {name: value for name, value in defaults.items() if name not in known} | values | known

  data = {_RENAMED.get(name, name): value for name, value in values.get("data", {}).items()}
  filled = fill({**values, "data": data}, keys.default())
  filled["data"]["sources"] = {name: fill(entry, keys.source()) for name, entry in data.get("sources", {}).items()}
  config, problems = ConfigDict(filled), Problems()
  parse_times(config, problems, bare="steps")
  problems.raise_if_any()
  return config


def changes(before: dict[str, Any], after: dict[str, Any], *, allowed: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
  """Keys in which two config.json differ -> (before, after), as JSON has them; not those whose change alters no more than
  what `allowed` names ("nothing", "ahead"; see keys.Key)."""
  old, new = (_flat(values) for values in (before, after))
  return {
    name: (old.get(name), new.get(name))
    for name in sorted(old | new)
    if old.get(name) != new.get(name) and not ((key := keys.of(name)) and key.alters in allowed)
  }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
  config = ConfigDict(json.loads(completed(values).to_json()))
  return {key: get(config, key) for key in leaf_keys(config)}
