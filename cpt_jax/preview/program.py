"""A compiled program -> how often each instruction runs, and what one run of it computes and reads.

Invariant: an instruction counts as often as the loops around it turn; what the text does not say is reported, not guessed.

XLA's own cost_analysis counts the body of a loop once, whatever its length, and knows nothing of kernels (TPU) or is empty (GPU).
"""

import functools
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cpt_jax.preview import hlo
from cpt_jax.preview.hlo import Instruction, Shape

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no bytes of the chip's main memory by itself.
_FREE = frozenset([
  "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all", "partition-id",
  "replica-id", "iota", "opt-barrier", "add-dependency", "domain",
])  # fmt: skip
# What counters of loops are made of.
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARISONS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}
_RUN_ONCE = ("calls", "branch_computations", "true_computation", "false_computation", "called_computations")
_MOST_TURNS = 1_000_000  # a loop of more is taken for one that depends on data
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone")


class Program:
  """A program, and how often each of its computations runs."""

  def __init__(self, compiled: hlo.Module):
    self.computations, self.entry = compiled.computations, compiled.entry
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
      return int(i.literal) if re.fullmatch(r"-?\d+", i.literal) else None
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
    others = [i for body in self.computations.values() for i in body.values() if i.op != "call"]
    inside = {called for i in others for called in i.called("calls", "to_apply")}
    for name, body in self.computations.items():
      if self.runs[name] and name not in inside:
        for instruction in body.values():
          yield name, instruction, self.runs[name]

  @functools.cache  # noqa: B019
  def flops_of(self, computation: str, name: str) -> float:
    """Floating point operations of the products in one run of an instruction, with what it calls (but for loops)."""
    body = self.computations[computation]
    instruction = body[name]
    if instruction.op == "dot":
      return _product_flops(instruction, body, instruction.attribute("lhs_contracting_dims"))
    if instruction.op == "convolution":
      return _convolution_flops(instruction, body)
    if instruction.op in ("while", "conditional", "call"):
      return 0.0  # their insides are instructions of their own
    if instruction.op == "custom-call" and "gemm" in instruction.kernel:
      contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
      return _product_flops(instruction, body, contracted.group(1) if contracted else "")
    return sum(self.flops_of(called, inner) for called in instruction.called("calls") for inner in self.computations[called])

  def hbm_bytes_of(self, computation: str, name: str) -> float:
    """Bytes of main memory that one run of an instruction reads and writes.

    Each operand once and the result once; where a fusion takes a slice of an operand, or puts one into its result, that alone.
    """
    body = self.computations[computation]
    instruction = body[name]
    if instruction.op in _FREE or instruction.op.endswith("-done") or collective_op(instruction):
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


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
  return sum(shape.num_bytes for shape in shapes if shape.space == 0)


def _product_flops(product: Instruction, body: Mapping[str, Instruction], contracted: str) -> float:
  """`contracted`: the dimensions of the first operand that are summed over, as text."""
  lhs = body[product.operands[0]].shapes[0].dims
  return 2.0 * math.prod(product.shapes[0].dims) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))


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
      lhs[lhs_labels.index(label)], rhs[rhs_labels.index(label)], out[out_labels.index(label)],
      stride=_window(window, "stride", n, 1), lhs_dilate=_window(window, "lhs_dilate", n, 1),
      rhs_dilate=_window(window, "rhs_dilate", n, 1), pad_low=_window(window, "pad", n, 0),
    )  # fmt: skip
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


def phase_of(op_name: str) -> str:
  """Which part of the step an instruction belongs to, by the name that jax gave it."""
  if "rematted_computation" in op_name:
    return "recomputed"
  if "transpose(" in op_name:
    return "backward"
  return "forward" if "jvp(" in op_name else "update"


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


def collective_op(instruction: Instruction) -> str | None:
  """What a transfer between chips, or the start of one, does; None for any other instruction."""
  op = instruction.op.removesuffix("-start")
  return op if op in _COLLECTIVES else None
