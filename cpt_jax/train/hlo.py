"""Text of a compiled program -> the buffers that are alive when it needs most memory, and what they were made for.

Invariant: the text is in the order in which the device runs it (XLA prints `is_scheduled=true`); a loop's state is one buffer for
all its turns, and an output that takes a donated argument's place needs none. Called by train.memory.

XLA gives its own buffer assignment on a CPU only, so the lives are read from the schedule, which every compiler prints. What is
not modelled: gaps between buffers, and results written over operands in ways other than of equal size.
"""

import math
import re
from typing import Any, NamedTuple

_ITEM_BYTES = {"pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_ITEM_BYTES |= {f"{kind}{bits}": bits // 8 for kind in "su" for bits in (8, 16, 32, 64)}
_ALIASES = ("bitcast", "optimization-barrier", "while", "add-dependency")  # their result is their first operand's memory
_NOTHING = ("constant", "after-all", "partition-id", "replica-id")  # no memory that the program could save
_OVERWRITES = ("fusion", "fusion-start", "dynamic-update-slice", "scatter", "custom-call")
_OVERWRITES += ("copy", "convert", "add", "multiply", "subtract", "divide", "select", "negate")

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_LEAF = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SEPARATOR = re.compile(r"(?:, )?(?:/\*index=\d+\*/)?")
_OPCODE = re.compile(r" ([\w\-]+)\(")
_CALLED = re.compile(
  r"(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TILE = re.compile(r"([\d,]+):T\((\d+),(\d+)\)")


class Buffer:
  """Memory of one array, or of all that in turn lie in its place."""

  def __init__(self, shape: "_Shape", op_name: str, now: int):
    self.dtype, self.dims, self.num_bytes = shape.dtype, shape.dims, shape.num_bytes
    self.op_name = op_name  # its place in the Python program, "jit(train_step)/jvp(loss)/..."; of its user if it has none
    self.first = self.last = now  # its life, by the order of its computation
    self.is_elsewhere = False  # it lies in a loop's state or a donated argument

  def __repr__(self) -> str:
    return f"{self.num_bytes:,} B  {self.dtype}{list(self.dims)}  {self.op_name}"


class _Shape(NamedTuple):
  dtype: str
  dims: tuple[int, ...]
  num_bytes: int


class _Instruction(NamedTuple):
  name: str
  opcode: str
  shape: Any  # a _Shape, or a list of shapes
  arguments: str
  operands: list[str]
  called: list[str]
  index: int  # of get-tuple-element
  op_name: str
  is_root: bool


def at_peak(text: str) -> list[Buffer]:
  """The buffers that a program has at the moment when they are largest, beside its arguments and constants."""
  header = text.split("\n", 1)[0]
  assert "is_scheduled=true" in header, "not the text of a compiled program"
  donated = {int(output) for output in re.findall(r"\{(\d+)\}: \(\d+,", header)}
  computations, entry = _parse(text)
  arguments = {int(i.arguments): _without_memory(i.shape) for i in computations[entry] if i.opcode == "parameter"}
  return _peak_of(computations, entry, arguments, donated)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry, current = "", []
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif name := _NAME.match(line):
      current.append(_instruction(line, name))
  return computations, entry


def _instruction(line: str, name: re.Match) -> _Instruction:
  shape, position = _shape(line, name.end())
  opcode = _OPCODE.match(line, position)
  assert opcode is not None, line
  end, depth = opcode.end(), 1
  while depth:
    depth += {"(": 1, ")": -1}.get(line[end], 0)
    end += 1
  arguments, rest = line[opcode.end() : end - 1], line[end:]
  called = [found for one, several in _CALLED.findall(rest) for found in (one, *re.findall(r"[\w.\-]+", several)) if found]
  index, op_name = re.search(r"\bindex=(\d+)", rest), re.search(r'op_name="([^"]*)"', rest)
  operands = re.findall(r"%([\w.\-]+)", arguments)
  return _Instruction(
    *(name[2], opcode[1], shape, arguments, operands, called),
    index=int(index[1]) if index else 0,
    op_name=op_name[1] if op_name and "/" in op_name[1] else "",  # without one it is XLA's own name
    is_root=bool(name[1]),
  )


def _shape(line: str, position: int) -> tuple[Any, int]:
  """The shape that begins at `position` and where it ends; of a tuple a list."""
  if line[position] == "(":
    parts, position = [], position + 1
    while line[position] != ")":
      position = _SEPARATOR.match(line, position).end()  # pyright: ignore[reportOptionalMemberAccess] (it matches "" too)
      part, position = _shape(line, position)
      parts.append(part)
    return parts, position + 1
  leaf = _LEAF.match(line, position)
  assert leaf is not None, line[position:]
  dims = tuple(int(size) for size in re.findall(r"\d+", leaf[2]))
  return _Shape(leaf[1], dims, _num_bytes(leaf[1], dims, leaf[3] or "")), leaf.end()


def _num_bytes(dtype: str, dims: tuple[int, ...], layout: str) -> int:
  """Bytes in the device's main memory; a TPU rounds the two innermost dimensions up to whole tiles."""
  # Memory spaces: 5 is the host's; 1 is a TPU's vector memory, but a GPU's own, for collectives; TPU layouts are tiled.
  if "S(5)" in layout or ("T(" in layout and "S(1)" in layout):
    return 0
  sizes = list(dims)
  if len(dims) > 1 and (tile := _TILE.match(layout)):
    inner, next_inner = (int(dim) for dim in tile[1].split(",")[:2])
    for dim, size in ((inner, int(tile[3])), (next_inner, int(tile[2]))):
      sizes[dim] = -(-dims[dim] // size) * size
  return math.prod(sizes) * _ITEM_BYTES.get(dtype, 0)


def _peak_of(computations: dict, name: str, parameters: dict[int, Any], elsewhere: set[int] | None) -> list[Buffer]:
  """The buffers at the peak of one computation and of what it calls, without those of its parameters.

  A value is a Buffer, None where it has no memory of this program, or a list of values. `elsewhere`: which parts of the result
  lie in memory that is there already; None = all.
  """
  instructions: list[_Instruction] = computations[name]
  values: dict[str, Any] = {}
  made: list[Buffer] = []
  for now, i in enumerate(instructions):
    operands = [values[operand] for operand in i.operands]
    if i.opcode not in ("tuple", "get-tuple-element", "bitcast"):
      for buffer in _buffers(operands):
        buffer.last = max(buffer.last, now)
        buffer.op_name = buffer.op_name or i.op_name
    values[i.name] = _value(i, operands, parameters, made, now)
    if i.is_root:
      for number, buffer in enumerate(_flat(values[i.name])):
        if buffer in made:
          buffer.last, buffer.is_elsewhere = len(instructions), elsewhere is None or number in elsewhere
  own = set(map(id, made))
  for now, i in enumerate(instructions):
    if i.opcode in _OVERWRITES:
      operands = [b for b in _buffers([values[operand] for operand in i.operands]) if id(b) in own]
      _overwrite(operands, [b for b in _buffers([values[i.name]]) if b.first == now and id(b) in own], now)
  return _at_peak(computations, instructions, values, [b for b in made if not b.is_elsewhere])


def _value(i: _Instruction, operands: list, parameters: dict[int, Any], made: list[Buffer], now: int) -> Any:
  """What an instruction gives; buffers that it needs are added to `made`."""

  def new(shape):
    if isinstance(shape, list):
      return [new(part) for part in shape]
    made.append(Buffer(shape, i.op_name, now))
    return made[-1]

  if i.opcode == "parameter":
    return parameters[int(i.arguments)]
  if i.opcode in _NOTHING:
    return _without_memory(i.shape)
  if i.opcode == "tuple":
    return operands
  if i.opcode == "get-tuple-element":
    return operands[0][i.index]
  if i.opcode in _ALIASES or i.opcode.endswith("-done"):
    return operands[0]
  if i.opcode.endswith("-start") and isinstance(i.shape, list):
    # (result, operand, context) of a copy, (operands, result, ...) of the others; the operands have their memory already.
    return new(i.shape[0] if i.opcode == "copy-start" else i.shape[1])
  return new(i.shape)


def _overwrite(operands: list[Buffer], results: list[Buffer], now: int) -> None:
  """Results take the place of operands of the same size that nobody reads afterwards."""
  for result in results:
    for operand in operands:
      if operand.last == now and operand.first < now and operand.num_bytes == result.num_bytes and not operand.is_elsewhere:
        operand.last = now - 1
        break


def _at_peak(computations: dict, instructions: list[_Instruction], values: dict, buffers: list[Buffer]) -> list[Buffer]:
  changes = [0] * (len(instructions) + 2)
  for buffer in buffers:
    changes[buffer.first] += buffer.num_bytes
    changes[buffer.last + 1] -= buffer.num_bytes
  alive, most, peak, inside = 0, -1, 0, []
  for now, i in enumerate(instructions):
    alive += changes[now]
    below: list[Buffer] = []
    if i.opcode in ("while", "call", "conditional"):
      operands = [values[operand] for operand in i.operands]
      for number, called in enumerate(i.called):
        # A branch of a conditional has the operand behind the choice as its only parameter.
        given = operands[1 + number : 2 + number] if i.opcode == "conditional" else operands
        below = max(below, _peak_of(computations, called, dict(enumerate(given)), None), key=num_bytes)
    if alive + num_bytes(below) > most:
      most, peak, inside = alive + num_bytes(below), now, below
  return [buffer for buffer in buffers if buffer.first <= peak <= buffer.last] + inside


def num_bytes(buffers: list[Buffer]) -> int:
  """Of all together."""
  return sum(buffer.num_bytes for buffer in buffers)


def _flat(value: Any) -> list[Any]:
  return [part for each in value for part in _flat(each)] if isinstance(value, list) else [value]


def _buffers(values: list) -> list[Buffer]:
  return [value for value in _flat(values) if value is not None]


def _without_memory(shape: Any) -> Any:
  return [_without_memory(part) for part in shape] if isinstance(shape, list) else None
