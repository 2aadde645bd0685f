"""The text of a compiled program (optimized HLO) -> what one run of it computes, reads and sends.

Invariant: an instruction counts as often as the loops around it turn; what the text does not say is reported, not guessed.

XLA's own cost_analysis counts the body of a loop once, whatever its length, and knows nothing of kernels (TPU) or is empty (GPU).
"""

import functools
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cpt_jax.preview import hlo
from cpt_jax.preview.hlo import Instruction, Shape

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no bytes of the chip's main memory by itself.
_FREE = frozenset(
  [
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "add-dependency",
    "domain",
  ]
)
# What counters of loops are made of.
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARISONS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}
_RUN_ONCE = ("calls", "branch_computations", "true_computation", "false_computation", "called_computations")
_MOST_TURNS = 1_000_000  # a loop of more is taken for one that depends on data
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone")


class Program:
  """A parsed program, and how often each of its computations runs."""

  def __init__(self, text: str):
    parsed = hlo.parse(text)
    self.computations, self.entry = parsed.computations, parsed.entry
    # Loops whose length depends on data, with the mean that was taken.
    self.data_dependent: dict[str, float] = {}
    self.runs = self._count_runs()

  def _count_runs(self) -> dict[str, float]:
    runs = dict.fromkeys(self.computations, 0.0)
    runs[self.entry] = 1.0
    for name in reversed(self.computations):  # a computation is printed after those that it calls
      for instruction in self.computations[name].values():
        if instruction.op == "while":
          turns = self.turns(instruction, within=name)
          (body,), (condition,) = instruction.called("body"), instruction.called("condition")
          runs[body] += runs[name] * turns
          runs[condition] += runs[name] * (turns + 1)
        else:
          for called in instruction.called(*(["to_apply"] if instruction.op == "call" else _RUN_ONCE)):
            runs[called] += runs[name]
    return runs

  @functools.cache  # noqa: B019 (one program lives as long as its process)
  def turns(self, loop: Instruction, *, within: str) -> float:
    """How often a while loop of the computation `within` turns.

    The compiler says it, or it follows from the counters that the condition compares. Else it depends on data: in this package
    that is blockwise attention, whose inner loop meets, where rows hold one document, half of the key blocks on average.
    """
    match = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if match:
      return float(match.group(1))
    counted = self._play(loop, within)
    if counted is not None:
      return float(counted)
    outer = [
      self.turns(i, within=name)
      for name, body in self.computations.items()
      for i in body.values()
      if i.op == "while" and within in i.called("body")
    ]
    self.data_dependent[loop.name] = mean = (outer[0] + 1) / 2 if outer else 1.0
    return mean

  def _play(self, loop: Instruction, within: str) -> int | None:
    """Counts the turns of a loop by its counters alone; None where its condition looks at something else."""
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    init = self.computations[within].get(loop.operands[0])
    if init is None or init.op != "tuple":
      return None
    counters = {n: self._number(within, operand, ()) for n, operand in enumerate(init.operands)}
    counters = {n: value for n, value in counters.items() if value is not None}
    test, root = _root(self.computations[condition]), _root(self.computations[body])
    for turn in range(_MOST_TURNS):
      goes_on = self._number(condition, test.name, (counters,))
      if not goes_on:
        return None if goes_on is None else turn
      if root.op != "tuple":
        return None
      following = {n: self._number(body, root.operands[n], (counters,)) for n in counters}
      counters = {n: value for n, value in following.items() if value is not None}
    return None

  def _number(self, computation: str, name: str, arguments: tuple) -> Any:
    """The value of a whole number or a truth that follows from constants and the arguments' known parts; else None."""
    i = self.computations[computation].get(name)
    if i is None:
      return None
    if i.op == "constant":
      return _whole(i.literal)
    if i.op == "parameter":
      return arguments[int(i.literal)] if int(i.literal) < len(arguments) else None
    if i.op not in (*_ARITHMETIC, "get-tuple-element", "compare", "fusion", "copy", "bitcast", "convert"):
      return None
    values = tuple(self._number(computation, operand, arguments) for operand in i.operands)
    if i.op == "get-tuple-element":
      return values[0].get(int(i.attribute("index"))) if isinstance(values[0], dict) else None
    if i.op == "fusion":
      (called,) = i.called("calls")
      return self._number(called, _root(self.computations[called]).name, values)
    if not all(isinstance(value, int) for value in values):
      return None
    if i.op == "compare":
      return _COMPARISONS[i.attribute("direction")](*values)
    return _ARITHMETIC[i.op](*values) if i.op in _ARITHMETIC else values[0]

  def top_level(self) -> Iterator[tuple[str, Instruction, float]]:
    """(computation, instruction, runs in a step) of everything that the chip executes one after the other: no fusion's inside."""
    inside = {c for body in self.computations.values() for i in body.values() if i.op != "call" for c in i.called("calls")}
    inside |= {c for body in self.computations.values() for i in body.values() if i.op != "call" for c in i.called("to_apply")}
    for name, body in self.computations.items():
      if self.runs[name] and name not in inside:
        for instruction in body.values():
          yield name, instruction, self.runs[name]

  @functools.cache  # noqa: B019
  def flops_of(self, computation: str, name: str) -> float:
    """Floating point operations of the products in one run of an instruction, with what it calls (but for loops)."""
    instruction = self.computations[computation][name]
    if instruction.op == "dot":
      return _dot_flops(instruction, self.computations[computation])
    if instruction.op == "convolution":
      return _convolution_flops(instruction, self.computations[computation])
    if instruction.op in ("while", "conditional", "call"):
      return 0.0  # their insides are instructions of their own
    if instruction.op == "custom-call" and "gemm" in instruction.kernel:
      return _gemm_flops(instruction, self.computations[computation])
    return sum(self.flops_of(called, inner) for called in instruction.called("calls") for inner in self.computations[called])

  def hbm_bytes_of(self, computation: str, name: str) -> float:
    """Bytes of main memory that one run of an instruction reads and writes.

    Each operand once and the result once; where a fusion takes a slice of an operand, or puts one into its result, that alone.
    """
    body = self.computations[computation]
    instruction = body[name]
    if instruction.op in _FREE or instruction.op.endswith("-done") or _collective_op(instruction):
      return 0.0
    if instruction.kernel in _FREE_CALLS:
      return 0.0
    operands = [body[o] for o in instruction.operands if o in body]
    if instruction.op == "dynamic-slice":
      return 2 * _in_hbm(instruction.shapes)
    if instruction.op == "dynamic-update-slice":
      return 2 * _in_hbm(operands[1].shapes)
    if instruction.op != "fusion":
      return _in_hbm(instruction.shapes) + sum(_in_hbm(o.shapes) for o in operands)
    (fused,) = instruction.called("calls")
    read = sum(min(self._read_of(fused, n), o.shapes[0].num_bytes) for n, o in enumerate(operands) if o.shapes[0].space == 0)
    written = self._written_by(fused)
    return read + sum(part for shape, part in zip(instruction.shapes, written, strict=True) if shape.space == 0)

  def _read_of(self, computation: str, number: int) -> float:
    """Bytes that a fused computation reads of its parameter: slices alone where it takes no more, none of what it updates."""
    body = self.computations[computation]
    parameter = next((i for i in body.values() if i.op == "parameter" and i.literal == str(number)), None)
    if parameter is None:
      return 0.0
    total, aliases = 0.0, {parameter.name}
    for i in body.values():  # in the order of the text: a bitcast stands before its users
      for place in (n for n, operand in enumerate(i.operands) if operand in aliases):
        if i.op == "bitcast":
          aliases.add(i.name)
        elif i.op in ("dynamic-slice", "slice"):
          total += i.shapes[0].num_bytes
        elif i.op == "fusion":
          total += self._read_of(next(i.called("calls")), place)
        elif i.op != "dynamic-update-slice" or place != 0:
          total += parameter.shapes[0].num_bytes
    return total

  def _written_by(self, computation: str) -> list[float]:
    """Bytes of each result of a fused computation: of one that is updated in place the slice that is new."""
    body = self.computations[computation]
    root = _root(body)
    found = []
    for i in [body[name] for name in root.operands] if root.op == "tuple" else [root]:
      while i.op in ("bitcast", "convert", "copy"):
        i = body[i.operands[0]]
      if i.op == "dynamic-update-slice":
        found.append(body[i.operands[1]].shapes[0].num_bytes)
      elif i.op == "fusion":
        found += self._written_by(next(i.called("calls")))
      else:
        found += [shape.num_bytes for shape in i.shapes]
    return found


def _root(computation: Mapping[str, Instruction]) -> Instruction:
  return next(i for i in computation.values() if i.is_root)


def _whole(literal: str) -> int | None:
  return int(literal) if re.fullmatch(r"-?\d+", literal) else None


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
  return sum(shape.num_bytes for shape in shapes if shape.space == 0)


def _dot_flops(dot: Instruction, body: Mapping[str, Instruction]) -> float:
  lhs = body[dot.operands[0]].shapes[0].dims
  contracted = [int(d) for d in re.findall(r"\d+", dot.attribute("lhs_contracting_dims"))]
  return 2.0 * math.prod(dot.shapes[0].dims) * math.prod(lhs[d] for d in contracted)


def _gemm_flops(call: Instruction, body: Mapping[str, Instruction]) -> float:
  contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
  lhs = body[call.operands[0]].shapes[0].dims
  dims = [int(d) for d in re.findall(r"\d+", contracted.group(1))] if contracted else []
  return 2.0 * math.prod(call.shapes[0].dims) * math.prod(lhs[d] for d in dims)


def _convolution_flops(conv: Instruction, body: Mapping[str, Instruction]) -> float:
  """As a TPU writes its products: spatial dimensions with padding and dilation stand for batch dimensions, so only the pairs of
  an output and a kernel position that meet an input are counted."""
  labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", conv.attribute("dim_labels"))
  assert labels, conv.attributes[:200]
  lhs_labels, rhs_labels, out_labels = labels.groups()
  lhs, rhs = (body[o].shapes[0].dims for o in conv.operands[:2])
  out = conv.shapes[0].dims
  window = dict(re.findall(r"(\w+)=([\dx_-]+)", conv.attribute("window")))
  flops = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
  for n, label in enumerate(sorted(c for c in lhs_labels if c.isdigit())):
    flops *= _meetings(
      lhs[lhs_labels.index(label)],
      rhs[rhs_labels.index(label)],
      out[out_labels.index(label)],
      stride=_window(window, "stride", n, 1),
      lhs_dilate=_window(window, "lhs_dilate", n, 1),
      rhs_dilate=_window(window, "rhs_dilate", n, 1),
      pad_low=_window(window, "pad", n, 0),
    )
  return flops


def _window(window: Mapping[str, str], key: str, n: int, default: int) -> int:
  return int(window[key].split("x")[n].split("_")[0]) if key in window else default


def _meetings(num_in: int, num_kernel: int, num_out: int, *, stride: int, lhs_dilate: int, rhs_dilate: int, pad_low: int) -> int:
  count = 0
  for k in range(num_kernel):
    for o in range(num_out):
      at = o * stride + k * rhs_dilate - pad_low
      count += at % lhs_dilate == 0 and 0 <= at // lhs_dilate < num_in
  return count


# Products of the size rows x heads x queries x keys x head size in a fused attention kernel, by a part of its name: scores and
# values forward; backward also both again, and the gradients of queries and keys (FlashAttention-2, 2307.08691, sec. 2.3).
_KERNEL_PRODUCTS = {
  "flash_forward": 2,
  "flash_key_gradients": 4,  # scores, d_values, d_probs, d_keys
  "flash_query_gradients": 3,  # scores, d_probs, d_queries
  "splash_mha_fwd": 2,
  "splash_mqa_fwd": 2,
  "splash_mha_dkv": 5,  # with the gradient of the queries in the same kernel
  "splash_mqa_dkv": 5,
  "fmhaSoftmaxBackward": 5,
  "fmhaSoftmax": 2,
}  # fmt: skip
# Custom calls that are kernels.
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call", "__cudnn$fmha")


def kernel_products(instruction: Instruction) -> int | None:
  """How many attention products a kernel makes: 0 where the instruction is no kernel, None for a kernel that is not known."""
  if instruction.op != "custom-call" or not instruction.kernel.startswith(_KERNELS):
    return 0
  return next((number for name, number in _KERNEL_PRODUCTS.items() if name in instruction.attributes), None)


class Collective(NamedTuple):
  """Transfers between chips that are alike, over one step."""

  op: str
  phase: str  # forward, recomputed, backward or update
  turns: float  # runs in a step
  num_bytes: float  # of one run: the whole array, gathered or before it is scattered
  axes: tuple[str, ...]  # of the mesh
  group: tuple[int, ...]  # positions in the mesh of those that the first chip exchanges with, itself among them
  is_async: bool  # other work can go on meanwhile


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """Every transfer between chips, in the order of the text; `mesh_shape` is the devices along each axis of the mesh, in order."""
  owners = _owners(program)
  seen, found = set(), []
  for name, body in program.computations.items():
    for i in body.values():
      op = _collective_op(i)
      runs = program.runs[name]
      if op is None or not runs:
        continue
      owner = owners.get(name, name)
      key = (owner, i.attribute("channel_id") or i.name)
      if key in seen:  # a TPU writes the parts of an overlapped transfer as several instructions with one channel
        continue
      seen.add(key)
      group = _first_group(i, math.prod(mesh_shape.values()))
      if len(group) < 2:
        continue
      overlapped = i.op.endswith("-start") and '"is_sync":true' not in i.attributes
      fused = "async_collective_fusion_config" in i.attributes or "async_collective_name" in i.attributes
      found.append(
        Collective(
          op,
          phase_of(_op_name(i, body)),
          program.runs[owner],
          _payload(i, op, body),
          _axes(group, mesh_shape),
          group,
          overlapped or fused,
        )
      )
  return found


def _owners(program: Program) -> dict[str, str]:
  """The loop body or entry that each fused computation runs in."""
  owner = {}
  for name in reversed(program.computations):
    for i in program.computations[name].values():
      if i.op != "while" and program.runs[name]:
        for called in i.called():
          owner.setdefault(called, owner.get(name, name))
  return owner


def _collective_op(instruction: Instruction) -> str | None:
  op = instruction.op.removesuffix("-start")
  return op if op in _COLLECTIVES else None


def _payload(i: Instruction, op: str, body: Mapping[str, Instruction]) -> float:
  """Bytes of the whole array: what a gather makes, what a reduction or an exchange is given."""
  given = sum(s.num_bytes for o in i.operands if o in body for s in body[o].shapes)
  if op != "all-gather":
    return given
  return sum(s.num_bytes for s in i.shapes) - (given if i.op.endswith("-start") else 0.0)


def phase_of(op_name: str) -> str:
  """Which part of the step an instruction belongs to, by the name that jax gave it."""
  if "rematted_computation" in op_name:
    return "recomputed"
  if "transpose(" in op_name:
    return "backward"
  return "forward" if "jvp(" in op_name else "update"


def _op_name(i: Instruction, body: Mapping[str, Instruction]) -> str:
  """Its own, or that of what it works on: the compiler gives some of the transfers that it makes no name."""
  for _ in range(8):
    operand = body.get(i.operands[0]) if i.operands else None
    if i.op_name or operand is None:
      break
    i = operand
  return i.op_name


def _first_group(i: Instruction, num_devices: int) -> tuple[int, ...]:
  """The devices that exchange with the first one named, from any of the ways to write replica groups."""
  text = i.attribute("replica_groups")
  if i.op.startswith("collective-permute"):
    pair = re.match(r"\{\{(\d+),(\d+)\}", i.attribute("source_target_pairs"))
    return (int(pair.group(1)), int(pair.group(2))) if pair else ()
  if text.startswith("{"):
    first = re.match(r"\{\{([\d,]+)\}", text)
    return tuple(map(int, first.group(1).split(","))) if first else tuple(range(num_devices))
  if text.startswith("mesh"):
    return _mesh_group(i.attributes)
  match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if not match:
    raise ValueError(f"replica_groups={text} of {i.name}: a form that is not known here")
  shape, dims = ([int(d) for d in match.group(n).split(",")] for n in (1, 2))
  order = [int(d) for d in match.group(3).split(",")] if match.group(3) else list(range(len(dims)))
  return tuple(_transposed_iota(dims, order, n) for n in range(shape[-1]))


def _transposed_iota(dims: list[int], order: list[int], n: int) -> int:
  """Element n of arange(prod(dims)).reshape(dims).transpose(order).ravel()."""
  strides = [math.prod(dims[d + 1 :]) for d in range(len(dims))]
  at = 0
  for axis in reversed(order):
    n, index = divmod(n, dims[axis])
    at += index * strides[axis]
  return at


def _mesh_group(attributes: str) -> tuple[int, ...]:
  """`mesh['a'=4,'b'=2] {'a'}`: devices 0, 2, 4 and 6; `{'a':(2)2}` is the second factor of a = 2 x 2.

  With `device_ids=([2,4]T(1,0))` behind the mesh, its places hold these devices instead of 0, 1, 2, ...
  """
  match = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
  )
  if not match:
    raise ValueError(f"{attributes[:200]}: replica groups in a form that is not known here")
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
  names = list(sizes)
  group = [0]
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match.group(4)):
    stride = math.prod(sizes[n] for n in names[names.index(name) + 1 :])
    count = sizes[name]
    if before:
      count = int(size)
      stride *= sizes[name] // (int(before) * count)
    group = [g + k * stride for g in group for k in range(count)]
  if match.group(2):
    dims = [int(d) for d in match.group(2).split(",")]
    order = [int(d) for d in match.group(3).split(",")] if match.group(3) else list(range(len(dims)))
    group = [_transposed_iota(dims, order, n) for n in group]
  return tuple(sorted(group))


def _axes(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the members of a group differ."""
  axes, stride = [], math.prod(mesh_shape.values())
  for name, size in mesh_shape.items():
    stride //= size
    if len({device // stride % size for device in group}) > 1:
      axes.append(name)
  return tuple(axes)
