"""Trees of arrays -> dotted leaf paths, and decisions made by rules on those paths.

Invariant: a path is the keys joined by dots ("layers.wq"), the same in a dict, a NamedTuple or a list.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from cpt_jax.config import ConfigError


def _dotted(key_path: tuple) -> str:
  return jax.tree_util.keystr(key_path, simple=True, separator=".")


def paths(tree: Any) -> dict[str, Any]:
  """Every leaf by its dotted path, in the tree's own order.

  >>> paths({"layers": {"wq": 1}, "embedding": 2})
  {'embedding': 2, 'layers.wq': 1}
  """
  return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Like `jax.tree.map`, with the dotted path as the first argument."""
  return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_dotted(path), *leaves), tree, *rest)


def match_rules(tree: Any, rules: Sequence[tuple[str, Any]], *, key: str) -> Any:
  """A tree of the same shape that holds, for each leaf, the value of the first rule whose pattern matches its whole path.
  Raises ConfigError: a pattern that is no regular expression, or leaves that no pattern matches; `key` is the config key of the
  rules."""
  compiled = []
  for pattern, value in rules:
    try:
      compiled.append((re.compile(pattern), value))
    except re.error as error:
      raise ConfigError(f"{key}: {pattern!r} is no regular expression: {error}") from None
  found, unmatched = {}, []
  for path in paths(tree):
    values = [value for pattern, value in compiled if pattern.fullmatch(path)]
    if values:
      found[path] = values[0]
    else:
      unmatched.append(path)
  if unmatched:
    raise ConfigError(f"{key}: no pattern matches {', '.join(unmatched)}; end the rules with ('.*', value)")
  return map_with_path(lambda path, _: found[path], tree)


class Diff(NamedTuple):
  """How a tree differs from the expected one; each entry is a line to print."""

  missing: list[str]  # paths that are expected and were not found
  extra: list[str]  # paths that were found and are not expected
  reshaped: list[str]  # "path: found float32[4, 8], expected float32[4, 16]"

  def __bool__(self) -> bool:
    return bool(self.missing or self.extra or self.reshaped)


def diff(found: Any, expected: Any) -> Diff:
  """Compares paths, shapes and dtypes of two trees of arrays or ShapeDtypeStructs; false if there is no difference."""
  found_by_path, expected_by_path = paths(found), paths(expected)
  reshaped = [
    f"{path}: found {_describe(found_by_path[path])}, expected {_describe(leaf)}"
    for path, leaf in expected_by_path.items()
    if path in found_by_path and _describe(found_by_path[path]) != _describe(leaf)
  ]
  return Diff(
    missing=[path for path in expected_by_path if path not in found_by_path],
    extra=[path for path in found_by_path if path not in expected_by_path],
    reshaped=reshaped,
  )


def _describe(leaf: Any) -> str:
  return f"{leaf.dtype}{list(leaf.shape)}"
