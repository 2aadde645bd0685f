"""A config and a topology -> its training step, compiled for chips that are not there, and the memory that it needs.

Invariant: the program is the one that a run compiles (training.step, the real optimizer, shardings and mesh); nothing is
computed, no weight and no text is read.

The compilers are extras: [tpu-aot] brings libtpu, [gpu-aot] XLA's CUDA plugin. Neither needs its chip, driver or libraries.
"""

import importlib.util
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.devices.chips import Chip, Topology
from cpt_jax.model.spec import ModelSpec
from cpt_jax.preview import hlo, memory
from cpt_jax.preview.roofline import Place
from cpt_jax.training import inputs as inputs_lib, optimizer, start, state

# platform -> (module of the compiler, extra that installs it)
_COMPILERS = {"tpu": ("libtpu", "tpu-aot"), "cuda": ("jax_plugins.xla_cuda13", "gpu-aot")}


class Compiled(NamedTuple):
  """A step that was compiled."""

  memory: memory.Memory
  program_bytes: int  # of the chip, for the program itself
  text: str  # optimized HLO
  program: hlo.Module  # the same, read
  compile_secs: float


class Refused(NamedTuple):
  """A step that the compiler finds too large."""

  needed_bytes: int
  limit_bytes: int
  message: str  # the compiler's, whole


class Target(NamedTuple):
  """What a step is compiled for."""

  topology: Topology
  mesh: jax.sharding.Mesh
  places: tuple[Place, ...]  # of each device of the mesh
  config: Any
  spec: ModelSpec


def open_target(config: Any, topology: Topology) -> Target:
  """The mesh and the model of a config, whose sources and weights need not exist.

  Raises ConfigError: what a run would refuse, or a compiler that is not installed.
  """
  config = config_lib.resolve(config, needs_data=False)
  spec, _ = start.load_spec(start.choose_base(config))
  problems = Problems()
  start.check_row_len(config, spec, problems)
  problems.raise_if_any()
  devices = topology_devices(topology)
  mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
  inputs_lib.check_mesh(mesh.shape, spec, config)
  return Target(topology, mesh, tuple(_place(device, topology) for device in mesh.devices.flat), config, spec)


def _place(device: Any, topology: Topology) -> Place:
  if topology.chip.platform == "cuda":
    (per_host,) = topology.shape
    return Place(device.id // per_host, ())
  return Place(getattr(device, "slice_index", None) or 0, tuple(device.coords))


def topology_devices(topology: Topology) -> Sequence[Any]:
  """Descriptions of the devices, in jax's order. Raises ConfigError: the compiler is not installed, or knows no such topology."""
  from jax.experimental import topologies

  platform = topology.chip.platform
  module, extra = _COMPILERS[platform]
  if not _is_installed(module):
    raise ConfigError(f"{topology}: the compiler for it is not installed; pip install 'cpt_jax[{extra}]'")
  try:
    if platform == "cuda":
      shape = f"1x{topology.domains}x{topology.shape[0]}"  # partitions x hosts x GPUs
      described = topologies.get_topology_desc(platform="cuda", target_config=gpu_target(topology.chip), topology=shape)
    else:
      slices = {"num_slices": topology.domains} if topology.domains > 1 else {}
      name = str(topology._replace(domains=1))
      described = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
    raise ConfigError(f"--topology={topology}: the compiler knows no such topology: {error}") from None
  return described.devices


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of a parent package
    return False


def held(target: Target) -> dict[str, int]:
  """Bytes of each chip that a run takes all the time: the state, and the copy of the base from which drift is measured.

  The copy is in bfloat16, as bases are stored; of one that is stored in float32 it takes twice that.
  """
  with jax.set_mesh(target.mesh):
    abstract = state.abstract(target.spec, optimizer.from_config(target.config, target.spec))
  params, moments = (sum(map(memory.shard_bytes, jax.tree.leaves(tree))) for tree in (abstract.params, abstract.opt_state))
  return {"state": params + moments, "base for drift": params // 2}


def compile_step(target: Target) -> Compiled | Refused:
  """Compiles the training step of a run with this config on this topology."""
  config = target.config
  with jax.set_mesh(target.mesh):
    weights = [entry.loss_weight for entry in config.data.sources.values()] or [1.0]
    traced, train_state = memory.trace_step(config, target.spec, source_weights=weights)
    lowered = traced.lower(lowering_platforms=(target.topology.chip.platform,))
    start_secs = time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      refused = read_refusal(str(error))
      if refused is None:
        raise
      return refused
  compile_secs = time.monotonic() - start_secs
  analysis, text = compiled.memory_analysis(), compiled.as_text()
  assert analysis is not None and text is not None, "compilers of TPUs and GPUs have both"
  program = hlo.parse(text)
  found = memory.of_compiled(analysis, program, train_state, is_scanned=config.model.scan)
  if target.topology.chip.platform == "tpu":
    # By its temporaries a TPU's program would be too large where its compiler, which knows, lets it pass: they hold buffers that
    # do not live at one time. What counts there is the peak.
    found = found._replace(packing=found.packing + analysis.peak_memory_in_bytes - found.total)
  return Compiled(found, analysis.generated_code_size_in_bytes, text, program, compile_secs)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_refusal(message: str) -> Refused | None:
  """What a compiler says when the chip's main memory is not enough; None for any other error, a kernel's own memory among them.

  >>> read_refusal("RESOURCE_EXHAUSTED: ... required for HLO temporaries (36.08G) exceeds available HBM (15.75G).").limit_bytes
  16911433728
  """
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  amount = r"([\d.]+)([KMGT]?)"
  for pattern in (rf"\({amount}\) exceeds available HBM \({amount}\)", rf"Used {amount} of {amount} hbm"):
    if match := re.search(pattern, message):
      needed, limit = (int(float(match.group(i)) * _UNITS[match.group(i + 1)]) for i in (1, 3))
      return Refused(needed, limit, message)
  return None


# What the CUDA C++ programming guide (table of technical specifications by compute capability) says of every such chip.
_CAPABILITIES = {
  "a100": {"major": 8, "minor": 0, "cores": 108, "fpus": 64, "opt_in": 166_912, "shared": 167_936, "l2_mib": 40, "ghz": 1.41},
  "h100": {"major": 9, "minor": 0, "cores": 132, "fpus": 128, "opt_in": 232_448, "shared": 233_472, "l2_mib": 50, "ghz": 1.98},
}
_CAPABILITIES["h200"] = _CAPABILITIES["h100"]


def gpu_target(chip: Chip) -> str:
  """The chip as XLA's GPU compiler wants it described where there is none: a GpuTargetConfigProto as text."""
  c = _CAPABILITIES[chip.name]
  device = [
    "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048",
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535",
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152",
    f"shared_memory_per_core: {c['shared']} shared_memory_per_block_optin: {c['opt_in']}",
    f"core_count: {c['cores']} fpus_per_core: {c['fpus']} clock_rate_ghz: {c['ghz']} l2_cache_size: {c['l2_mib'] << 20}",
    f"memory_bandwidth: {int(chip.hbm_bytes_per_sec)} device_memory_size: {chip.hbm_bytes}",
    f"cuda_compute_capability {{ major: {c['major']} minor: {c['minor']} }}",
    f'name: "{chip.kinds[0]}" runtime_version: "13.0.0"',
  ]
  versions = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
  return f'gpu_device_info {{ {" ".join(device)} }} platform_name: "CUDA" {versions} device_description_str: "{chip.kinds[0]}"'
