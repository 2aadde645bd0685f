"""The text of a compiled program (optimized HLO) -> its computations, with the arrays and the attributes of every instruction.

Invariant: one reader for all compilers; it knows the grammar alone and judges nothing.

The order of the text is kept. In a program that is scheduled it is the order in which the device runs a computation, and a
computation stands before those that call it.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_START = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")
_NEW_LINE = re.compile(r"\s*(ROOT )?%?[\w.-]+ = |\}\s*$|(ENTRY )?%?[\w.-]+ \(|HloModule|$")
_OP = re.compile(r"\s*([\w-]+)\(")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
  r"(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)="
  r"(?:%([\w.-]+)|\{([^}]*)\})"
)
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SEPARATOR = re.compile(r"(?:, )?(?:/\*index=\d+\*/)?")
_BITS = re.compile(r"(?:bf|[csuf])(\d+)")


class Shape(NamedTuple):
  """One array of a program."""

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...]  # its dimensions, the innermost first; () = not said
  tile: tuple[int, ...]  # what a TPU keeps together, of the innermost dimensions, the innermost last; () = nothing
  space: int  # 0 = the chip's main memory, 5 = the host's; others are nearer to the chip's units, or for transfers

  @property
  def num_bytes(self) -> int:
    """Without padding."""
    return _num_bytes(self.dtype, self.dims)

  @property
  def padded_bytes(self) -> int:
    """With the two innermost dimensions rounded up to whole tiles."""
    sizes = list(self.dims)
    if len(sizes) > 1 and len(self.tile) == 2:
      for dim, size in zip(self.order, reversed(self.tile), strict=False):
        sizes[dim] = -(-sizes[dim] // size) * size
    return _num_bytes(self.dtype, sizes)


class Instruction(NamedTuple):
  """One instruction of a program."""

  name: str
  shape: Any  # of its result: a Shape, or a tuple of such, nested
  op: str
  operands: tuple[str, ...]
  literal: str  # what stands between the parentheses
  attributes: str  # and what after them
  is_root: bool

  @property
  def shapes(self) -> tuple[Shape, ...]:
    """The arrays of its result, one after the other."""
    return tuple(_flat(self.shape))

  def attribute(self, name: str) -> str:
    """The text of a `name=...` up to the next comma outside of brackets; '' without one."""
    match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
    if not match:
      return ""
    start, depth = match.end(), 0
    for i in range(start, len(self.attributes)):
      depth += (self.attributes[i] in "{[(") - (self.attributes[i] in "}])")
      if self.attributes[i] == "," and depth == 0:
        return self.attributes[start:i]
    return self.attributes[start:]

  def called(self, *kinds: str) -> Iterator[str]:
    """Names of the computations that it calls."""
    for kind, one, several in _CALLED.findall(self.attributes):
      if not kinds or kind in kinds:
        yield from [one] if one else _NAME.findall(several)

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from."""
    return self._quoted("op_name")

  @property
  def kernel(self) -> str:
    """What a custom call runs."""
    return self._quoted("custom_call_target")

  def _quoted(self, name: str) -> str:
    match = re.search(rf'{name}="([^"]*)"', self.attributes)
    return match.group(1) if match else ""


class Module(NamedTuple):
  """A parsed program."""

  computations: dict[str, dict[str, Instruction]]
  entry: str
  is_scheduled: bool  # its order is the one in which it runs
  aliased: frozenset[int]  # numbers of the results that take the place of a donated argument


def parse(text: str) -> Module:
  """Reads a whole program; parts of one, without its first line, are read too."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", None
  for line in _lines(text):
    if current is None:
      if head := _HEAD.match(line):
        current = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif line.rstrip() == "}":
      current = None
    elif _START.match(line):
      instruction = parse_instruction(line)
      current[instruction.name] = instruction
  header = text.split("\n", 1)[0]
  aliased = frozenset(int(number) for number in re.findall(r"\{(\d+)\}: \(\d+,", header))
  return Module(computations, entry, "is_scheduled=true" in header, aliased)


def parse_instruction(line: str) -> Instruction:
  """Reads one instruction. Raises ValueError: it is none."""
  start = _START.match(line)
  shape, end = _shape(line, start.end()) if start else (None, 0)
  op = _OP.match(line, end)
  if start is None or op is None:
    raise ValueError(f"not an instruction: {line[:80]!r}")
  closed = _closing(line, op.end() - 1)
  literal = line[op.end() : closed]
  attributes = line[closed + 1 :].removeprefix(", ")
  return Instruction(start[2], shape, op[1], tuple(_NAME.findall(literal)), literal, attributes, bool(start[1]))


def _lines(text: str) -> Iterator[str]:
  """Lines of a program, those joined that one instruction takes: the attributes of a kernel may hold line breaks."""
  whole = ""
  for line in text.splitlines():
    if _NEW_LINE.match(line):
      yield whole
      whole = line
    else:
      whole += line
  yield whole


def _shape(line: str, position: int) -> tuple[Any, int]:
  """The shape that begins at `position` and where it ends."""
  if line[position] == "(":
    parts, position = [], position + 1
    while line[position] != ")":
      position = _SEPARATOR.match(line, position).end()  # pyright: ignore[reportOptionalMemberAccess] (it matches "" too)
      part, position = _shape(line, position)
      parts.append(part)
    return tuple(parts), position + 1
  array = _ARRAY.match(line, position)
  if array is None:
    raise ValueError(f"not a shape: {line[position : position + 80]!r}")
  layout = array[3] or ""
  tile, space = re.search(r":T\(([\d,]+)\)", layout), re.search(r"S\((\d+)\)", layout)
  order = _numbers(layout.split(":")[0])
  return Shape(array[1], _numbers(array[2]), order, _numbers(tile[1]) if tile else (), int(space[1]) if space else 0), array.end()


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"an instruction without its closing bracket: {text[:80]!r}")


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, re.findall(r"\d+", text)))


def _num_bytes(dtype: str, dims: tuple[int, ...] | list[int]) -> int:
  bits = _BITS.match(dtype)  # f8e4m3fn, s4, c64, ...; a token has no bytes
  return -(-math.prod(dims) * (int(bits[1]) if bits else 8 * (dtype == "pred")) // 8)


def _flat(shape: Any) -> Iterator[Shape]:
  if isinstance(shape, Shape):
    yield shape
  else:
    for part in shape:
      yield from _flat(part)
