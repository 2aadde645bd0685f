"""A chip's name -> its peak, memory and links; a topology's name -> how many there are and how they hang together.

Invariant: every figure of a chip stands here, once, with its source; this module never imports jax.
"""

import math
import re
from typing import NamedTuple

from cpt_jax.config import ConfigError


class Chip(NamedTuple):
  """What one chip can do at most, by its vendor."""

  name: str  # as in a topology
  platform: str  # tpu or cuda
  kinds: tuple[str, ...]  # how jax names such a device: the beginning of its device_kind
  peak_flops: float  # dense bfloat16 FLOP/s
  hbm_bytes: int
  usable_bytes: int  # of those, what one program may have; 0 = no program can be compiled for this chip here
  hbm_bytes_per_sec: float
  # One way, of one link: a TPU has two on each dimension of its torus, a GPU one to all others of its host (the switch).
  link_bytes_per_sec: float
  network_bytes_per_sec: float  # one way, this chip's part of its host's network: between slices of a TPU, hosts of GPUs
  wraps_at: int  # a dimension of the torus is a ring where its length is a multiple of this; 0 = no torus
  source: str


_TPU_BOOK = "links and network: jax-ml.github.io/scaling-book/tpus (one way)"
_DGX = "NVLink one way is half of the data sheet's total; network: one 400 Gb/s port a GPU, as in DGX H100/H200"

# Usable: of a TPU what its compiler (libtpu 0.0.42) names when a program is too large; of a GPU 0.9, the part that the launchers
# give to JAX (XLA_CLIENT_MEM_FRACTION), since the driver, NCCL and the kernels' libraries need the rest.
CHIPS = (
  Chip(
    "v4", "tpu", ("TPU v4",), 275e12, 32 << 30, 0, 1228e9, 4.5e10, 6.25e9, 4,
    f"cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1,228 GB/s; {_TPU_BOOK}",
  ),
  Chip(
    "v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 16 << 30, int(15.75 * 2**30), 819e9, 4.5e10, 3.125e9, 16,
    f"cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 2 x 100 Gb/s for 8 chips; {_TPU_BOOK}",
  ),
  Chip(
    "v5p", "tpu", ("TPU v5p", "TPU v5"), 459e12, 96 << 30, int(95.74 * 2**30), 2765e9, 9e10, 6.25e9, 4,
    f"cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB usable, 2,765 GB/s, 50 Gb/s of network a chip; {_TPU_BOOK}",
  ),
  Chip(
    "v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 32 << 30, int(31.25 * 2**30), 1640e9, 9e10, 12.5e9, 16,
    f"cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,640 GB/s, 4 x 200 Gb/s for 8 chips; {_TPU_BOOK}",
  ),
  Chip(
    "a100", "cuda", ("NVIDIA A100",), 312e12, 80 << 30, int(0.9 * (80 << 30)), 2039e9, 300e9, 25e9, 0,
    "NVIDIA A100 data sheet (SXM, 80 GB): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s; network: DGX A100, 8 x 200 Gb/s",
  ),
  Chip(
    "h100", "cuda", ("NVIDIA H100",), 989e12, 84_942_979_072, int(0.9 * 84_942_979_072), 3352e9, 450e9, 50e9, 0,
    f"NVIDIA H100 data sheet (SXM): 989 TFLOP/s without sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s; {_DGX}",
  ),
  Chip(
    "h200", "cuda", ("NVIDIA H200",), 989e12, 151_397_597_184, int(0.9 * 151_397_597_184), 4800e9, 450e9, 50e9, 0,
    f"NVIDIA H200 data sheet (SXM): 989 TFLOP/s without sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s; {_DGX}",
  ),
)  # fmt: skip


class Topology(NamedTuple):
  """Chips that train together."""

  chip: Chip
  domains: int  # slices of a TPU, hosts of GPUs: inside of one the links are fast
  shape: tuple[int, ...]  # of one domain: the torus of a slice, (GPUs of a host,)

  @property
  def num_chips(self) -> int:
    """Of all domains."""
    return self.domains * math.prod(self.shape)

  def __str__(self) -> str:
    if self.chip.platform == "cuda":
      return f"{self.chip.name}:{self.domains}x{self.shape[0]}"
    slices = f"{self.domains}*" if self.domains > 1 else ""
    return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
  """`v5p:4x4x4` (one slice), `2*v5e:16x16` (two), `h100:32x8` (hosts x GPUs).
  Raises ConfigError: another form, or a chip that is not in the table."""
  match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip().lower())
  known = {chip.name: chip for chip in CHIPS if chip.usable_bytes}
  examples = "e.g. v5p:4x4x4 (a slice), 2*v5e:16x16 (two slices), h100:32x8 (hosts x GPUs)"
  if not match or match.group(2) not in known:
    raise ConfigError(f"--topology={text}: write CHIP:SHAPE, {examples}; the chips are {', '.join(known)}")
  chip, shape = known[match.group(2)], tuple(map(int, match.group(3).split("x")))
  slices = int(match.group(1) or 1)
  if chip.platform == "cuda" and (len(shape) != 2 or match.group(1)):
    raise ConfigError(f"--topology={text}: GPUs are counted as hosts x GPUs of a host, e.g. {chip.name}:2x8")
  if min(*shape, slices) < 1:
    raise ConfigError(f"--topology={text}: every number is 1 or more")
  if chip.platform == "cuda":
    return Topology(chip, shape[0], shape[1:])
  dims = 2 if chip.wraps_at == 16 else 3
  if len(shape) != dims:
    raise ConfigError(f"--topology={text}: a slice of {chip.name} has {dims} dimensions, e.g. {chip.name}:{'x'.join('4' * dims)}")
  return Topology(chip, slices, shape)


def of_device(device_kind: str) -> Chip | None:
  """The chip that jax gives this name to; None where it is not in the table (a CPU)."""
  matches = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
  return max(matches, key=lambda match: match[0])[1] if matches else None
