"""Flags with their words -> a parser whose --help is a manual page and whose errors say what was probably meant.

Invariant: a mistake on the command line is a ConfigError, never an exit from here.
"""

import argparse
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cpt_jax import exits
from cpt_jax.config import ConfigError, did_you_mean

_WIDTH = 100


class Parser(argparse.ArgumentParser):
  """The flags of one command; `summary` comes from the table of commands."""

  def __init__(
    self,
    name: str,  # of the command, as typed after `cpt`
    *,
    description: str,  # paragraphs, with an empty line between them
    example: str,  # a command that works, and behind an empty line what it does
    exit_codes: Sequence[int] = (),  # those beside 0, 78 and 74
    rest: str = "",  # what stands behind `--`, for commands that hand it on (`args.rest`)
    overrides: bool = False,  # takes --config.key=value, all of which read() puts into `args.overrides`
    more: Callable[[], dict[str, str]] = dict,  # sections at the end of the page, title -> text as it is
  ):
    super().__init__(prog=f"cpt {name}", add_help=False, allow_abbrev=False)
    self.name, self.summary, self.about, self.example, self.rest = name, "", description, example, rest
    self.overrides, self.more = overrides, more
    self.exit_codes = sorted({exits.DONE, exits.DISK, exits.CONFIG, *exit_codes})
    self.add_argument("--help", "-h", action="store_true", help="Shows this page.")

  def flag(
    self, form: str, help: str, default: Any = "", *, low: int | None = None, high: int | None = None, **more: Any
  ) -> None:
    """A flag in the form --name=VALUE, of the default's type: text, a number, or a list of words; `more` is argparse's own.

    `low` and `high`: it is a whole number, at least and at most.
    """
    name, _, value = form.partition("=")
    kind = {int: int, float: float, list: words}.get(type(default)) if low is None else at_least(low, high)
    self.add_argument(name, metavar=value or None, help=help, default=default, **{"type": kind, **more})

  def repeated(self, form: str, help: str, *, nargs: str | None = None) -> None:
    """A flag that may be given again: the list of its values."""
    self.flag(form, help, [], type=None, action="extend" if nargs else "append", nargs=nargs)

  def switch(self, name: str, *, default: bool, help: str) -> None:
    """A flag without a value: --name, and --noname for the contrary."""
    self.add_argument(f"--{name}", f"--no{name}", action=_Switch, default=default, help=help)

  def read(self, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line. Raises ConfigError: what is wrong with it, and what was probably meant."""
    ours, rest = list(argv), []
    if "--" in ours:
      cut = ours.index("--")
      ours, rest = ours[:cut], ours[cut + 1 :]
    ours = [f"-{arg}" if re.match(r"-[a-z][\w.]+", arg) else arg for arg in ours]  # -workdir=x, as absl's flags
    if any(arg in ("--help", "-h") for arg in ours):
      return argparse.Namespace(help=True)
    changes, ours = _changes(ours) if self.overrides else ([], ours)
    known = [option for action in self._actions for option in action.option_strings]
    # ORDER: before parsing, which would first miss a required flag that is only misspelt.
    self._refuse([word for word in ours if word.startswith("--") and word.partition("=")[0] not in known], known)
    args, unknown = self.parse_known_args(ours)
    self._refuse(unknown or ([] if self.rest else rest), known)
    args.rest, args.overrides = rest, changes
    return args

  def _refuse(self, unknown: Sequence[str], known: Sequence[str]) -> None:
    if not unknown:
      return
    lines = []
    for word in unknown:
      flag = word.partition("=")[0]
      form = " Flags look like --name=value, and a pattern like '*.txt' is quoted."
      lines.append(f"{self.prog}: there is no {flag}.{did_you_mean(flag, known) if flag.startswith('-') else form}")
    if self.rest:
      lines.append(f"{self.rest[0].upper()}{self.rest[1:]} come after --, as in: {self.prog} ... -- --config=configs/domain.py")
    raise ConfigError("\n".join([*lines, f"All flags: {self.prog} --help"]))

  def error(self, message: str) -> NoReturn:
    """Instead of usage and exit code 2."""
    command = self.example.split("\n\n")[0].strip()
    raise ConfigError(f"{self.prog}: {message}\nFor example:\n{textwrap.indent(command, '  ')}\nAll flags: {self.prog} --help")

  def _check_value(self, action: argparse.Action, value: Any) -> None:
    if action.choices is not None and value not in action.choices:
      known = [str(choice) for choice in action.choices]
      text = f"{value!r} is none of {', '.join(filter(None, known))}.{did_you_mean(str(value), known)}"
      raise argparse.ArgumentError(action, text)

  def format_help(self) -> str:
    """The manual page."""
    helps = {", ".join(_invocations(action)): (action.help or "").replace("%%", "%") for action in self._actions}
    options = [f"{name}\n{_wrap(text, 4)}" for name, text in helps.items()]
    command, _, meaning = self.example.strip().partition("\n\n")
    example = textwrap.dedent(command) + (f"\n\n{_paragraphs(meaning)}" if meaning else "")
    codes = [f"{code:<4}{exits.MEANINGS[code]}" for code in self.exit_codes]
    sections = {
      "NAME": f"{self.prog} - {self.summary}",
      "SYNOPSIS": self._synopsis(),
      "DESCRIPTION": _paragraphs(self.about),
      "OPTIONS": "\n".join(options),
      "EXAMPLE": example,
      "EXIT CODES": "\n".join(codes),
    }
    return "\n\n".join(f"{title}\n{textwrap.indent(text, '    ')}" for title, text in (sections | self.more()).items()) + "\n"

  def _synopsis(self) -> str:
    parts = [_invocations(action)[0].replace(" ", "=") for action in self._actions if action.required]
    return " ".join([self.prog, *parts, "[options]", *([f"-- {self.rest}"] if self.rest else [])])


class _Switch(argparse.Action):
  """--name and --noname."""

  def __init__(self, option_strings: Sequence[str], dest: str, **more: Any):
    super().__init__(option_strings, dest, nargs=0, **more)

  def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
    setattr(namespace, self.dest, option_string == self.option_strings[0])


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
  """The type of a whole number from `low` up, at most `high`."""

  def whole(text: str) -> int:
    value = int(text)
    if value < low or (high is not None and value > high):
      raise argparse.ArgumentTypeError(f"{value}: must be {low} or more{f', at most {high}' if high is not None else ''}")
    return value

  whole.__name__ = "whole number"
  return whole


def words(text: str) -> list[str]:
  """The type of a list: 'a,b' -> ['a', 'b']."""
  return [word for word in text.split(",") if word]


def _invocations(action: argparse.Action) -> list[str]:
  if action.nargs == 0:
    return list(action.option_strings)
  name = action.metavar or (
    "{" + ",".join(map(str, filter(None, action.choices))) + "}" if action.choices else action.dest.upper()
  )
  return [f"{option} {name}" for option in action.option_strings]


def _wrap(text: str, indent: int) -> str:
  return textwrap.fill(text, _WIDTH - indent, initial_indent=" " * indent, subsequent_indent=" " * indent, break_long_words=False)


def _paragraphs(text: str) -> str:
  return "\n\n".join(_wrap(" ".join(part.split()), 0) for part in textwrap.dedent(text).strip().split("\n\n"))


def _changes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """The --config.key=value of a command line, each one word, and the rest of it."""
  found, others = [], []
  waiting = ""  # a key whose value may be the next word
  for word in argv:
    if waiting and not word.startswith("--"):
      found[-1], waiting = f"{waiting}={word}", ""
    elif re.match(r"--(no)?config\.", word):
      found.append(word)
      waiting = "" if "=" in word or word.startswith("--no") else word
    else:
      others.append(word)
      waiting = ""
  return found, others
