"""The table of keys -> a text for the command line, and a page of the reference.

Invariant: every key and every field of a source stands in both.
"""

import textwrap
from collections.abc import Iterable, Iterator

from cpt_jax.config.keys import FIELDS, KEYS, SECTIONS, Key

_FIELDS_OF = "data.sources.NAME"
_DURATIONS = {"length": "a duration in steps or tokens", "share": "a duration", "optional": "a duration, or empty"}
_CHANGES = {"ahead": "may change when a run goes on", "nothing": "may change at any time"}


def describe_keys(only: str = "", *, width: int = 110) -> str:
  """Every key whose name begins with `only`: default, what may be written, meaning."""
  lines, wrapper = [], textwrap.TextWrapper(width, initial_indent="      ", subsequent_indent="      ")
  for title, text, keys in _sections():
    known = [(name, key) for name, key in keys if name.startswith(only)]
    if known:
      lines += ["", *([title] if not text else textwrap.wrap(f"{title}: {text}", width))]
    for name, key in known:
      lines.append(f"  {name} = {_default(key)}")
      for paragraph in (_facts(key), *key.text.split("\n")):
        is_formula = paragraph.startswith("  ")
        lines += [f"      {paragraph}"] if is_formula else wrapper.wrap(paragraph)
  return "\n".join(lines[1:])


def reference() -> str:
  """The page of all keys, as MyST markdown."""
  lines = [
    "# Keys of the configuration",
    "",
    "A config file returns `cpt_jax.config.default()` with changes; `--config.key=value` changes one more. A duration is a "
    'number with its unit: `"200 steps"`, `"2B tokens"`, or a share of the run, `"5%"`.',
  ]
  for title, text, keys in _sections():
    lines += ["", f"## {title}", ""] + ([text, ""] if text else [])
    for name, key in keys:
      first, *rest = key.text.split("\n")
      lines += [f"`{name}` = `{_default(key)}`", f": {first}"]
      if rest:
        formulas = [line for line in rest if line.startswith("  ")]
        lines += ["", "  ```text", *(f"  {line.strip()}" for line in formulas), "  ```", ""]
        lines += [f"  {line}" for line in rest if not line.startswith("  ")]
      facts = _facts(key)
      lines += ["", f"  *{facts}*", ""] if facts else [""]
  return "\n".join(lines).rstrip() + "\n"


def _sections() -> Iterator[tuple[str, str, list[tuple[str, Key]]]]:
  """(title, text, [(name, key)]) in the table's order; the fields of a source follow data's own keys."""
  titles = dict.fromkeys(name.split(".")[0] for name in KEYS)
  for title in titles:
    yield title, SECTIONS.get(title, ""), [(n, key) for n, key in KEYS.items() if n.split(".")[0] == title]
    if title == "data":
      yield _FIELDS_OF, "config.source(...), one for each source.", [(f"{_FIELDS_OF}.{n}", key) for n, key in FIELDS.items()]


def _default(key: Key) -> str:
  return repr(key.default[0][1]) if key.name == "share" else repr(key.default)


def _facts(key: Key) -> str:
  """What may be written, and where it may change."""
  facts: Iterable[str] = (
    _DURATIONS.get(key.duration, ""),
    f"one of {', '.join(key.choices)}" if key.choices else "",
    key.range(),
    key.unit,
    _CHANGES.get(key.alters, ""),
  )
  return "; ".join(filter(None, facts))
