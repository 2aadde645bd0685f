"""README.md and docs/**.md -> the commands that a reader is told to give, and what stands in `code`.

A block of commands is fenced as sh or console. Above it may stand a comment: <!-- not run: why -->, <!-- slow -->; behind `slow:`
`exit N` says how it ends, `short` that a test ends its runs after two steps.
"""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Block(NamedTuple):
  """Commands under each other."""

  page: str  # relative to the repository
  line: int
  commands: tuple[str, ...]
  marker: str  # what stands in the comment above it

  @property
  def is_run(self) -> bool:
    """Does a test give these commands."""
    return not self.marker.startswith("not run")

  @property
  def is_slow(self) -> bool:
    """Only by `pytest -m slow`."""
    return self.marker.startswith("slow")

  @property
  def exit_code(self) -> int:
    """How the last command ends."""
    found = re.search(r"exit (\d+)", self.marker)
    return int(found.group(1)) if found else 0

  @property
  def name(self) -> str:
    """Of a test."""
    return f"{self.page}:{self.line}"


def pages() -> list[pathlib.Path]:
  """README first, then as a reader goes."""
  made = ROOT / "docs" / "reference" / "_generated"
  guide = [path for path in sorted((ROOT / "docs").rglob("*.md")) if made not in path.parents]
  first = ROOT / "docs" / "guide" / "quickstart.md"
  return [ROOT / "README.md", first, *(path for path in guide if path != first), ROOT / "examples" / "README.md"]


def blocks() -> list[Block]:
  """All of all pages."""
  return [block for path in pages() for block in blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]


def blocks_of(text: str, page: str = "") -> list[Block]:
  """Those of one page."""
  found = []
  lines = text.split("\n")
  for i, line in enumerate(lines):
    if line not in ("```sh", "```console"):
      continue
    end = next(j for j in range(i + 1, len(lines)) if lines[j] == "```")
    above = re.fullmatch(r"<!-- (.*) -->", lines[i - 1]) if i else None
    inside = commands("\n".join(lines[i + 1 : end]), is_console=line == "```console")
    found.append(Block(page, i + 1, inside, above.group(1) if above else ""))
  return found


def commands(text: str, *, is_console: bool) -> tuple[str, ...]:
  r"""Each in one line, without comments: "a \\\n  b  # c" -> ("a   b",). In a console they stand behind "$ "."""
  joined = re.sub(r"\\\n", " ", text).split("\n")
  if is_console:
    joined = [line[2:] for line in joined if line.startswith("$ ")]
  words = [re.sub(r"(^|\s)#\s.*", "", line).strip() for line in joined]
  return tuple(word for line in words for word in line.split(" && ") if word)


def argv_of(command: str) -> list[str] | None:
  """The words of a command of cpt, behind `cpt`; None for another program."""
  words = shlex.split(command)
  if words[0] == "cpt":
    return words[1:]
  if words[:3] == ["python", "-m", "cpt_jax.main"]:
    return ["train", *words[3:]]
  return None


def codes(text: str) -> list[str]:
  """What stands in `code` in the prose of a page."""
  prose = re.sub(r"(?ms)^```.*?^```$", "", text)
  return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
