"""What a step computes, reads and sends, and the chips it runs on -> seconds by resource, the bound, the ceiling of the speed.

Invariant: data-sheet figures only, so every time is a lower limit and every speed an upper one; nothing is fitted.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cpt_jax.devices.chips import Topology
from cpt_jax.preview.collectives import Collective
from cpt_jax.preview.hlo import Instruction
from cpt_jax.preview.program import Program, phase_of


class Place(NamedTuple):
  """Where a device of the mesh is."""

  domain: int  # its slice or host
  coords: tuple[int, ...]  # in the torus of its slice; () for a GPU


class Work(NamedTuple):
  """What one chip does in one step."""

  flops: dict[str, float]  # by phase: forward, recomputed, backward, update
  hbm_bytes: float
  # Seconds if one operation follows the other and each takes as long as its FLOPs or its bytes, whichever is more.
  busy_secs: float


class Transfer(NamedTuple):
  """A collective's time on the links inside a domain and on the network between domains, for a whole step."""

  collective: Collective
  link_secs: float
  network_secs: float


class Roofline(NamedTuple):
  """Seconds of a step, each resource by itself, and what follows from them."""

  compute_secs: float
  hbm_secs: float
  link_secs: float
  network_secs: float
  busy_secs: float
  exposed_secs: float  # of transfers that nothing can overlap
  hidden_secs: float  # of transfers that other work may overlap

  @property
  def bound(self) -> str:
    """The resource that takes longest."""
    seconds = {"compute": self.compute_secs, "HBM": self.hbm_secs, "links": self.link_secs, "network": self.network_secs}
    return max(seconds, key=lambda name: seconds[name])

  @property
  def roofline_secs(self) -> float:
    """If all resources worked at once: no step is faster."""
    return max(self.compute_secs, self.hbm_secs, self.link_secs, self.network_secs)

  @property
  def step_secs(self) -> float:
    """If operations follow each other and transfers overlap them where the program lets them."""
    return max(self.busy_secs, self.hidden_secs) + self.exposed_secs


def work(program: Program, topology: Topology, *, kernel_flops: Callable[[Instruction], float]) -> Work:
  """FLOPs and bytes of a step on one chip; `kernel_flops` says what a custom call computes, which no text does."""
  flops: dict[str, float] = {}
  total_bytes = busy_secs = 0.0
  for computation, instruction, runs in program.top_level():
    products = program.flops_of(computation, instruction.name) + kernel_flops(instruction)
    num_bytes = program.hbm_bytes_of(computation, instruction.name)
    if products:
      phase = phase_of(instruction.op_name)
      flops[phase] = flops.get(phase, 0.0) + runs * products
    total_bytes += runs * num_bytes
    busy_secs += runs * max(products / topology.chip.peak_flops, num_bytes / topology.chip.hbm_bytes_per_sec)
  return Work(flops, total_bytes, busy_secs)


def transfer(collective: Collective, places: Sequence[Place], topology: Topology) -> Transfer:
  """The time of a collective, the network's part and the links' part one after the other, each at its full rate.

  A group of g chips in h domains has m = g / h in each. A gather of S bytes brings every chip (h - 1) / h of its S / m over its
  own part of the network and (m - 1) / m of S over the links; a scatter of sums is the same backwards, an all-reduce both.
  """
  members = [places[position] for position in collective.group]
  num_domains = len({place.domain for place in members})
  per_domain = len(members) / num_domains
  passes = 2 if collective.op == "all-reduce" else 1
  num_bytes = collective.turns * passes * collective.num_bytes
  if collective.op == "collective-permute":
    crosses = num_domains > 1
    rate = topology.chip.network_bytes_per_sec if crosses else topology.chip.link_bytes_per_sec
    return Transfer(collective, *((0.0, num_bytes / rate) if crosses else (num_bytes / rate, 0.0)))
  network_bytes = num_bytes / per_domain * (num_domains - 1) / num_domains
  link_bytes = num_bytes * (per_domain - 1) / per_domain
  inside = [place for place in members if place.domain == members[0].domain]
  return Transfer(
    collective,
    link_bytes / link_rate(inside, topology) if link_bytes else 0.0,
    network_bytes / topology.chip.network_bytes_per_sec,
  )


def link_rate(members: Sequence[Place], topology: Topology) -> float:
  """Bytes a second that each of these chips of one domain can take in at once.

  On a torus they come along every dimension in which the chips differ: over two links where it is a closed ring, over one at its
  ends where it is not. Chips that make no box have the links of one dimension. A GPU's links all lead to the switch.
  """
  chip = topology.chip
  if not members[0].coords:
    return chip.link_bytes_per_sec
  extents = [len({place.coords[d] for place in members}) for d in range(len(members[0].coords))]
  rates = [
    chip.link_bytes_per_sec * (2 if extent == length and length % chip.wraps_at == 0 else 1)
    for extent, length in zip(extents, topology.shape + (1,) * (len(extents) - len(topology.shape)), strict=True)
    if extent > 1
  ]
  is_box = math.prod(extents) == len(members)
  return sum(rates) if is_box else max(rates)


def roofline(done: Work, transfers: Sequence[Transfer], topology: Topology) -> Roofline:
  """The seconds of a step by resource."""
  exposed, hidden = (
    sum(t.link_secs + t.network_secs for t in transfers if t.collective.is_async == is_async) for is_async in (False, True)
  )
  return Roofline(
    compute_secs=sum(done.flops.values()) / topology.chip.peak_flops, hbm_secs=done.hbm_bytes / topology.chip.hbm_bytes_per_sec,
    link_secs=sum(t.link_secs for t in transfers), network_secs=sum(t.network_secs for t in transfers),
    busy_secs=done.busy_secs, exposed_secs=exposed, hidden_secs=hidden,
  )  # fmt: skip
