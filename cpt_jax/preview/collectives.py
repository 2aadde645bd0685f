"""A compiled program and the mesh -> its transfers between chips: what, how much, how often, between whom.

Invariant: a transfer counts once, in however many instructions the compiler writes it; groups in a form that is not known raise.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from cpt_jax.preview.hlo import Instruction
from cpt_jax.preview.program import Program, collective_op, phase_of


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
      op = collective_op(i)
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
          op, phase_of(_op_name(i, body)), program.runs[owner], _payload(i, op, body), _axes(group, mesh_shape), group,
          overlapped or fused,
        )
      )  # fmt: skip
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


def _payload(i: Instruction, op: str, body: Mapping[str, Instruction]) -> float:
  """Bytes of the whole array: what a gather makes, what a reduction or an exchange is given."""
  given = sum(s.num_bytes for o in i.operands if o in body for s in body[o].shapes)
  if op != "all-gather":
    return given
  return sum(s.num_bytes for s in i.shapes) - (given if i.op.endswith("-start") else 0.0)


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
