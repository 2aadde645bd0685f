"""A compiled program -> the buffers that are alive when it needs most memory, and what they were made for.

Invariant: instructions stand in the order in which the device runs them (XLA prints `is_scheduled=true`); a loop's state is one
buffer for all its turns, and an output that takes a donated argument's place needs none.

XLA gives its own buffer assignment on a CPU only, so the lives are read from the schedule, which every compiler prints. What is
not modelled: gaps between buffers, and results written over operands in ways other than of equal size.
"""

from typing import Any

from cpt_jax.preview import hlo
from cpt_jax.preview.hlo import Instruction, Shape

_ALIASES = ("bitcast", "opt-barrier", "while", "add-dependency")  # their result is their first operand's memory
_NOTHING = ("constant", "after-all", "partition-id", "replica-id")  # no memory that the program could save
_OVERWRITES = ("fusion", "fusion-start", "dynamic-update-slice", "scatter", "custom-call")
_OVERWRITES += ("copy", "convert", "add", "multiply", "subtract", "divide", "select", "negate")


class Buffer:
  """Memory of one array, or of all that in turn lie in its place."""

  def __init__(self, shape: Shape, op_name: str, now: int):
    self.dtype, self.dims = shape.dtype, shape.dims
    # In the device's main memory: space 1 is a TPU's vector memory, but a GPU's own, for collectives; TPU layouts are tiled.
    self.num_bytes = 0 if shape.space == 5 or (shape.space == 1 and shape.tile) else shape.padded_bytes
    self.op_name = op_name  # its place in the Python program, "jit(train_step)/jvp(loss)/..."; of its user if it has none
    self.last_read_by = ""  # the place of its last reader
    self.first = self.last = now  # its life, by the order of its computation
    self.is_elsewhere = False  # it lies in a loop's state or a donated argument

  def __repr__(self) -> str:
    return f"{self.num_bytes:,} B  {self.dtype}{list(self.dims)}  {self.op_name}"


def at_peak(program: hlo.Module) -> list[Buffer]:
  """The buffers that a program has at the moment when they are largest, beside its arguments and constants."""
  assert program.is_scheduled, "not a compiled program"
  entry = program.computations[program.entry]
  arguments = {int(i.literal): _without_memory(i.shape) for i in entry.values() if i.op == "parameter"}
  return _peak_of(program.computations, program.entry, arguments, program.aliased)


def _peak_of(computations: dict, name: str, parameters: dict[int, Any], elsewhere: frozenset[int] | None) -> list[Buffer]:
  """The buffers at the peak of one computation and of what it calls, without those of its parameters.

  A value is a Buffer, None where it has no memory of this program, or a list of values. `elsewhere`: which parts of the result
  lie in memory that is there already; None = all.
  """
  instructions: list[Instruction] = list(computations[name].values())
  values: dict[str, Any] = {}
  made: list[Buffer] = []
  for now, i in enumerate(instructions):
    operands = [values[operand] for operand in i.operands]
    if i.op not in ("tuple", "get-tuple-element", "bitcast"):
      for buffer in _buffers(operands):
        buffer.last, buffer.last_read_by = max(buffer.last, now), _op_name(i) or buffer.last_read_by
        buffer.op_name = buffer.op_name or _op_name(i)
    values[i.name] = _value(i, operands, parameters, made, now)
    if i.is_root:
      for number, buffer in enumerate(_flat(values[i.name])):
        if buffer in made:
          buffer.last, buffer.is_elsewhere = len(instructions), elsewhere is None or number in elsewhere
  own = set(map(id, made))
  for now, i in enumerate(instructions):
    if i.op in _OVERWRITES:
      operands = [b for b in _buffers([values[operand] for operand in i.operands]) if id(b) in own]
      _overwrite(operands, [b for b in _buffers([values[i.name]]) if b.first == now and id(b) in own], now)
  return _at_peak(computations, instructions, values, [b for b in made if not b.is_elsewhere])


def _value(i: Instruction, operands: list, parameters: dict[int, Any], made: list[Buffer], now: int) -> Any:
  """What an instruction gives; buffers that it needs are added to `made`."""

  def new(shape):
    if not isinstance(shape, Shape):
      return [new(part) for part in shape]
    made.append(Buffer(shape, _op_name(i), now))
    return made[-1]

  if i.op == "parameter":
    return parameters[int(i.literal)]
  if i.op in _NOTHING:
    return _without_memory(i.shape)
  if i.op == "tuple":
    return operands
  if i.op == "get-tuple-element":
    return operands[0][int(i.attribute("index"))]
  if i.op in _ALIASES or i.op.endswith("-done"):
    return operands[0]
  if i.op.endswith("-start") and not isinstance(i.shape, Shape):
    # (result, operand, context) of a copy, (operands, result, ...) of the others; the operands have their memory already.
    return new(i.shape[0] if i.op == "copy-start" else i.shape[1])
  return new(i.shape)


def _overwrite(operands: list[Buffer], results: list[Buffer], now: int) -> None:
  """Results take the place of operands of the same size that nobody reads afterwards."""
  for result in results:
    for operand in operands:
      if operand.last == now and operand.first < now and operand.num_bytes == result.num_bytes and not operand.is_elsewhere:
        operand.last = now - 1
        break


def _at_peak(computations: dict, instructions: list[Instruction], values: dict, buffers: list[Buffer]) -> list[Buffer]:
  changes = [0] * (len(instructions) + 2)
  for buffer in buffers:
    changes[buffer.first] += buffer.num_bytes
    changes[buffer.last + 1] -= buffer.num_bytes
  alive, most, peak, inside = 0, -1, 0, []
  for now, i in enumerate(instructions):
    alive += changes[now]
    below: list[Buffer] = []
    if i.op in ("while", "call", "conditional"):
      operands = [values[operand] for operand in i.operands]
      for number, called in enumerate(i.called()):
        # A branch of a conditional has the operand behind the choice as its only parameter.
        given = operands[1 + number : 2 + number] if i.op == "conditional" else operands
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
  return None if isinstance(shape, Shape) else [_without_memory(part) for part in shape]


def _op_name(i: Instruction) -> str:
  """Its place in the Python program; a name without one is XLA's own."""
  return i.op_name if "/" in i.op_name else ""
