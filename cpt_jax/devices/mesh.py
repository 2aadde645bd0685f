"""Logical axis names -> places on the device mesh; rows on hosts -> global arrays.

Invariant: model code says what a dimension is (LOGICAL_RULES' left column), this module alone says where it lives; with no
mesh set every function here leaves its argument as it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cpt_jax.config import ConfigError, Problems

AXES = ("data", "fsdp", "context", "tensor")

# What a dimension is -> the mesh axes it is divided over. `embed` is the width of parameters; activations hold whole widths
# (None), because their rows are divided over fsdp already.
LOGICAL_RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "seq": "context",
  "positions": ("data", "fsdp", "context"),  # those of a batch in parts, one for each device that holds different ones
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "all_heads": ("tensor", "context"),  # inside attention, whose rows are whole
  "mlp": "tensor",
  "vocab": "tensor",
  "layers": None,
  "head_dim": None,
}


def axis_sizes(*, data: int, fsdp: int, context: int, tensor: int, num_devices: int) -> dict[str, int]:
  """Devices along each axis, with -1 (one axis at most) replaced by what is left of `num_devices`.
  Raises ConfigError: sizes that do not make up `num_devices`."""
  sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
  given = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
  wrong = [f"mesh.{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
  if wrong:
    raise ConfigError(f"{', '.join(wrong)}: a mesh axis holds 1 or more devices, or -1 for the rest")
  rest = [name for name, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise ConfigError(f"{' and '.join(f'mesh.{name}' for name in rest)} are -1; one axis at most takes the rest")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if rest and num_devices % fixed == 0:
    sizes[rest[0]] = num_devices // fixed
  elif rest or fixed != num_devices:
    makes = f"the fixed axes make {fixed}, which does not divide" if rest else f"they make {fixed}, not"
    raise ConfigError(f"{given}: {makes} the {num_devices} devices; set one axis to -1 or change the sizes")
  return sizes


def make_mesh(*, data: int, fsdp: int, context: int, tensor: int, devices: Any = None) -> Mesh:
  """A mesh of Explicit axes over `devices` (default: all of them), placed by `arrange`; -1 takes the rest.
  Raises ConfigError: as `axis_sizes` and `arrange`."""
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(data=data, fsdp=fsdp, context=context, tensor=tensor, num_devices=len(devices))
  return Mesh(arrange(devices, sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def arrange(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
  """The devices as an array with the dimensions of AXES, so that the axes which talk most have the fastest network.

  Devices of one fast network (a slice of TPUs, a host or NVLink domain of GPUs) stay together: `data` is the way from one to
  the next. Slices of TPUs share nothing else. The hosts of GPUs may share `fsdp` too, since a model that fills several hosts
  has no other place, but never `context` and `tensor`, which talk in every layer's middle. Inside a slice the axes lie along
  the wires of its torus. Without several networks, and on the CPU, the order is that of `devices`.
  Raises ConfigError: axes that would cross the slow network.
  """
  networks = _networks(devices)
  shape, num_networks = tuple(sizes[axis] for axis in AXES), len(networks)
  if len({len(each) for each in networks}) > 1:
    raise ConfigError(
      f"the {num_networks} slices or hosts have {', '.join(str(len(each)) for each in networks)} devices: use as many of each"
    )
  if devices[0].platform == "tpu":
    if sizes["data"] % num_networks:
      raise ConfigError(
        f"mesh.data={sizes['data']}: the devices are {num_networks} slices of {len(networks[0])}, and mesh.data alone crosses"
        f" from slice to slice; use a multiple of {num_networks}"
      )
    inside = (sizes["data"] // num_networks, *shape[1:])
    # Split: an axis may be part of a physical one, as where 32 x 2 lie on 4 x 4 x 4.
    return np.concatenate([mesh_utils.create_device_mesh(inside, each, allow_split_physical_axes=True) for each in networks])
  together = sizes["context"] * sizes["tensor"]
  if num_networks > 1 and len(networks[0]) % together:
    raise ConfigError(
      f"mesh.context={sizes['context']} x mesh.tensor={sizes['tensor']} would cross between hosts: the devices are {num_networks}"
      f" hosts (or NVLink domains) of {len(networks[0])}, which {together} does not divide; use mesh.fsdp or mesh.data"
    )
  return np.array([device for each in networks for device in each]).reshape(shape)


def _networks(devices: Sequence[Any]) -> list[list[Any]]:
  """The devices by the fast network that they are on, those of several in the order of their numbers."""
  # TPUs have it where there are several slices; GPUs always: machines, or what NVLink joins of several. CPUs have none.
  index = [getattr(device, "slice_index", 0) or 0 for device in devices]
  found: dict[int, list[Any]] = {number: [] for number in sorted(set(index))}
  for number, device in zip(index, devices, strict=True):
    found[number].append(device)
  return [sorted(each, key=lambda device: device.id) for each in found.values()] if len(found) > 1 else [list(devices)]


def abstract_mesh(*, data: int, fsdp: int, context: int, tensor: int) -> AbstractMesh:
  """A mesh without devices, for dry runs; use it with `jax.sharding.use_abstract_mesh`. Sizes as `axis_sizes` gives them."""
  return AbstractMesh((data, fsdp, context, tensor), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(*logical: str | None) -> PartitionSpec:
  """Where an array with these dimensions lives.

  >>> spec("vocab", "embed")
  PartitionSpec('tensor', 'fsdp')
  """
  return PartitionSpec(*(None if name is None else LOGICAL_RULES[name] for name in logical))


def sharding(mesh: Mesh | AbstractMesh, *logical: str | None) -> NamedSharding:
  """As `spec`, on a mesh."""
  return NamedSharding(mesh, spec(*logical))  # pyright: ignore[reportArgumentType] (AbstractMesh is accepted)


def abstract(shape: tuple[int, ...], dtype: Any, *logical: str | None) -> jax.ShapeDtypeStruct:
  """An array with these dimensions that is not made; on the mesh that is set it has its place there."""
  mesh = current()
  return jax.ShapeDtypeStruct(shape, dtype, sharding=None if mesh is None else sharding(mesh, *logical))


def current() -> Mesh | AbstractMesh | None:
  """The mesh that is set, the one with devices if there is one; None if there is none. Not for use inside jit."""
  mesh = jax.sharding.get_mesh()
  if not mesh.empty:
    return mesh
  abstract = jax.sharding.get_abstract_mesh()
  return None if abstract.empty else abstract


def axis_size(name: str) -> int:
  """Devices along a mesh axis of the mesh that is set; 1 without one."""
  return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def platform() -> str:
  """What the mesh that is set is made of, which need not be in this machine: cpu, gpu or tpu."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  found = jax.default_backend() if device is None else device.platform
  return "gpu" if found in ("cuda", "rocm") else found


def num_parts(name: str) -> int:
  """Into how many parts the mesh that is set divides this dimension; 1 without one."""
  axes = LOGICAL_RULES[name] or ()
  return math.prod(axis_size(axis) for axis in ((axes,) if isinstance(axes, str) else axes))


def out(*logical: str | None) -> PartitionSpec | None:
  """The `out_sharding` argument of a product or gather; None without a mesh."""
  return None if jax.sharding.get_abstract_mesh().empty else spec(*logical)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Moves an array with these dimensions, inside or outside of jit, to where they live; its gradient moves back."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec(*logical))


def gathered(parameter: jax.Array, *logical: str | None) -> jax.Array:
  """A parameter with these dimensions as a product wants it: its width gathered over fsdp, still divided over tensor."""
  return constrain(parameter, *(None if name == "embed" else name for name in logical))


def einsum(equation: str, *operands: jax.Array, to: tuple[str | None, ...], **kwargs: Any) -> jax.Array:
  """`jnp.einsum` whose result has the dimensions `to`; for products that add up over devices."""
  return jnp.einsum(equation, *operands, out_sharding=out(*to), **kwargs)


def reshape(x: jax.Array, shape: tuple[int, ...], *, to: tuple[str | None, ...]) -> jax.Array:
  """`x.reshape(shape)` with the dimensions `to`, where a divided dimension is split."""
  return jax.lax.reshape(x, shape, out_sharding=out(*to))


def index_along(x: jax.Array, dim: int) -> jax.Array:
  """Each element's index along a dimension, int32 of the shape of `x` and where `x` is: for masks of it."""
  place = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding
  return jax.lax.broadcasted_iota(jnp.int32, x.shape, dim, out_sharding=place)


def merge_positions(x: jax.Array) -> jax.Array:
  """[B, T, D] -> [B * T, D] (whatever is between the first dimension and the last), or as it is where devices share a row.

  XLA's CPU products are up to twice as fast over one dimension of positions: for the gradient of a weight over two it first
  makes a transposed copy of an operand.
  """
  if axis_size("context") > 1:
    return x
  return reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]), to=("batch", None))


def per_device(function: Callable[..., Any], *, inputs: tuple[tuple[str | None, ...], ...], output: tuple[str | None, ...]):
  """`function` applied to each device's own part of arrays whose dimensions are `inputs`; itself without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  # Kernels have no rule for which axes their results vary over, so that check is off; the mesh tests compare with one device.
  return jax.shard_map(function, in_specs=tuple(spec(*names) for names in inputs), out_specs=spec(*output), check_vma=False)


def first_position(num_local: int) -> jax.Array | int:
  """Inside `per_device`: the row position of this device's first one, when it holds `num_local`."""
  return jax.lax.axis_index("context") * num_local if axis_size("context") > 1 else 0


def batch_shardings(mesh: Mesh | AbstractMesh) -> dict[int, NamedSharding]:
  """Shardings of a batch's arrays by their number of dimensions: 1 for `_B`, 2 for `_BT`."""
  return {1: sharding(mesh, "batch"), 2: sharding(mesh, "batch", "seq")}


def local_rows(mesh: Mesh, *, num_rows: int) -> slice:
  """The rows of a batch of `num_rows` that this process's devices hold."""
  indices = sharding(mesh, "batch").addressable_devices_indices_map((num_rows,)).values()
  bounds = [index[0].indices(num_rows) for index in indices]  # pyright: ignore[reportOptionalSubscript]
  return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def to_global(mesh: Mesh, batch: Any, *, num_rows: int | None = None) -> Any:
  """A batch of numpy arrays -> the same NamedTuple of global arrays.

  `batch` holds `local_rows(mesh, num_rows=num_rows)`; by default it holds every row.
  """
  total = batch[0].shape[0] if num_rows is None else num_rows
  offset = local_rows(mesh, num_rows=total).start if num_rows is not None else 0
  shardings = batch_shardings(mesh)

  def place(x: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # that would be a scalar
      start, stop, _ = index[0].indices(total)
      return x[(slice(start - offset, stop - offset), *index[1:])]

    return jax.make_array_from_callback((total, *x.shape[1:]), shardings[x.ndim], part)

  return type(batch)(*(place(x) for x in batch))


def check(
  sizes: Mapping[str, int], model: Any, *, batch_rows: int, microbatches: int, row_len: int, eval_rows: int, problems: Problems
) -> None:
  """Adds a line for everything that the mesh does not divide evenly; `model` is a ModelSpec, `sizes` the devices by axis.

  `eval_rows` is 0 where the rows of an evaluation are those of a microbatch.
  """
  replicas = sizes["data"] * sizes["fsdp"]
  rows = batch_rows // microbatches
  if batch_rows % microbatches:
    problems.add(f"train.microbatches={microbatches} does not divide train.batch_rows={batch_rows}")
  elif rows % replicas:
    problems.add(
      f"mesh.data={sizes['data']} x mesh.fsdp={sizes['fsdp']} does not divide the {rows} rows of a microbatch"
      f" (train.batch_rows={batch_rows} / train.microbatches={microbatches}); use a multiple of {replicas}"
    )
  if eval_rows and eval_rows % replicas:
    problems.add(f"eval.batch_rows={eval_rows}: must be a multiple of mesh.data x mesh.fsdp = {replicas}")
  divided = [
    ("context", "data.row_len", row_len),
    ("tensor", "the model's heads", model.num_heads),
    ("tensor", "the model's key/value heads", model.num_kv_heads),
    ("tensor", "the model's mlp width", model.mlp_width),
    ("tensor", "the model's vocabulary size", model.vocab_size),
    ("fsdp", "the model's width", model.width),
  ]
  for axis, what, size in divided:
    if size % sizes[axis]:
      problems.add(f"mesh.{axis}={sizes[axis]} does not divide {what} ({size}); use a divisor of it")
