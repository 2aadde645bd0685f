"""A compiled training step -> bytes of one device by what they are for, beside what the device has.

Invariant: the classes add up to what the compiler says that the step needs; nothing is put on a device.

What a class holds is counted at the moment when the step needs most: arguments by their shapes, the rest as preview.buffers finds
it in the compiled program. Outside of the layers a buffer of a parameter's shape is a gradient (or its sum over microbatches) or,
in the update, a new parameter or moment that waits for its place; else one that was made for the loss is the loss's; else a stack
over the layers was kept for the backward pass. With model.scan=False nothing is stacked: kept is what the forward pass makes and
the backward pass reads, but for the parameters of one layer. What is left serves the layer at work and the rest. `packing` is the
difference to the compiler's own total: gaps between buffers, above 0, or memory used twice in ways that preview.buffers does not
see, below.
"""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpt_jax import config as config_lib
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.preview import buffers, hlo
from cpt_jax.stream.batch import Batch
from cpt_jax.training import optimizer, state, step


class Memory(NamedTuple):
  """Bytes of one device when a step needs most."""

  parameters: int
  moments: int  # and the optimizer's counts
  batch: int  # and the rate
  gradients: int
  update: int  # new parameters and moments beside the old
  kept: int  # of every layer, for the backward pass
  layer: int  # by the layer at work, the embedding and whatever else has no class
  loss: int  # logits and what the loss makes of them
  packing: int  # gaps between buffers; below 0 where the compiler uses memory twice
  donated: int  # of parameters and moments, the part whose place the new ones take; in them already
  host: int  # of the host's memory, by offloading

  @property
  def total(self) -> int:
    """What the compiler says that one device needs for the step."""
    return sum(self) - self.donated - self.host


def of_compiled(stats: Any, program: hlo.Module, train_state: state.TrainState, *, is_scanned: bool) -> Memory:
  """The classes of a compiled `train_step(state, batch, rate)`, whose state was like `train_state` (ShapeDtypeStructs).

  `stats` is jax's `memory_analysis()` of it, `program` its text, read; `is_scanned`: the layers are one loop (model.scan)."""
  shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(train_state.params)}
  # Gradients outside of the loop over layers are whole before they are scattered.
  shapes |= {leaf.shape for name, leaf in train_state.params.items() if name != "layers"}
  num_layers = jax.tree.leaves(train_state.params["layers"])[0].shape[0] if is_scanned else None
  classes: dict[str, int] = dict.fromkeys(["gradients", "update", "kept", "layer", "loss"], 0)
  for buffer in buffers.at_peak(program):
    classes[_class(buffer, shapes, num_layers)] += buffer.num_bytes
  arguments, aliased = stats.argument_size_in_bytes, stats.alias_size_in_bytes
  parameters, moments = (sum(map(shard_bytes, jax.tree.leaves(tree))) for tree in (train_state.params, train_state.opt_state))
  # A CPU calls arguments and results its peak; a TPU leaves out of its temporaries what is not in its vector memory.
  total = max(stats.peak_memory_in_bytes, arguments + stats.output_size_in_bytes - aliased + stats.temp_size_in_bytes)
  batch, host = arguments - parameters - moments, stats.host_temp_size_in_bytes
  known = Memory(parameters, moments, batch=batch, packing=0, donated=aliased, host=host, **classes)
  return known._replace(packing=total - known.total)


def _class(buffer: buffers.Buffer, shapes: set[tuple[int, ...]], num_layers: int | None) -> str:
  """`num_layers`: of a loop over the layers; None without one."""
  is_loss = re.search(r"[(/]loss[)/]", buffer.op_name)
  is_forward = "jvp(" in buffer.op_name and "transpose(" not in buffer.op_name
  # Inside a layer arrays may have the shape of a parameter, or be as long as there are layers, by chance.
  if not is_loss and re.search(r"jvp\(.*/body/(closed_call|eval_jaxpr)/", buffer.op_name):
    return "layer"
  if buffer.dims in shapes:
    # One of the forward pass is a parameter's cast.
    return "layer" if is_forward else "update" if "/update/" in buffer.op_name else "gradients"
  if is_loss:
    return "loss"
  if num_layers is None:
    is_parameter = re.search(r"/(split|squeeze)$", buffer.op_name)  # of a layer, as the model takes it out of the stack
    return "kept" if is_forward and not is_parameter and "transpose(" in buffer.last_read_by else "layer"
  is_stacked = re.search(r"(^|/while|/dynamic_update_slice|/broadcast_in_dim|/closed_call)$", buffer.op_name)
  return "kept" if is_stacked and len(buffer.dims) > 1 and buffer.dims[0] == num_layers else "layer"


def of_step(config: Any, spec: ModelSpec, *, source_weights: Sequence[float]) -> Memory:
  """Compiles the step of a resolved config for the mesh that is set."""
  traced, train_state = trace_step(config, spec, source_weights=source_weights)
  compiled = traced.lower().compile()
  return of_compiled(compiled.memory_analysis(), hlo.parse(compiled.as_text()), train_state, is_scanned=config.model.scan)


def trace_step(config: Any, spec: ModelSpec, *, source_weights: Sequence[float]) -> tuple[Any, state.TrainState]:
  """The step of a run with this config (of the stage that trains most) for the mesh that is set, and its state's shapes."""
  mesh = mesh_lib.current()
  assert mesh is not None, "set a mesh first"
  train_state = state.abstract(spec, optimizer.from_config(config, spec))
  stage = optimizer.largest_stage(config, spec)
  train_step = jax.jit(step.from_config(config, spec, source_weights=source_weights, stage=stage), donate_argnums=0)
  rate = jax.ShapeDtypeStruct((), jnp.float32)
  return train_step.trace(train_state, abstract_batch(config, mesh), rate), train_state


def abstract_batch(config: Any, mesh: Any) -> Batch:
  """Shapes, dtypes and places of a step's batch."""
  shardings, rows, row_len = mesh_lib.batch_shardings(mesh), config.train.batch_rows, config.data.row_len

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[len(shape)])

  ids_BT, weights_BT = array(jnp.int32, rows, row_len), array(jnp.float32, rows, row_len)
  return Batch(ids_BT, ids_BT, weights_BT, ids_BT, ids_BT, array(jnp.int32, rows))


def of_step_elsewhere(config: Any, spec: ModelSpec, *, source_weights: Sequence[float], sizes: Mapping[str, int]) -> Memory:
  """As `of_step` on a mesh of these sizes of CPU devices, which another process makes: this one cannot have more than it has.

  Raises subprocess.CalledProcessError: it failed; its `stderr` says why.
  """
  environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(math.prod(sizes.values()))}
  job = pickle.dumps((config, spec, tuple(source_weights), dict(sizes)))
  done = subprocess.run([sys.executable, "-m", __spec__.name], input=job, env=environ, capture_output=True, check=True)
  return Memory(**json.loads(done.stdout))


def _of_job() -> None:
  config, spec, source_weights, sizes = pickle.load(sys.stdin.buffer)
  jax.set_mesh(mesh_lib.make_mesh(**sizes))
  print(json.dumps(of_step(config, spec, source_weights=source_weights)._asdict()))


def device_bytes() -> int | None:
  """What a device of this machine has for programs; None where it does not say (a CPU)."""
  stats = jax.local_devices()[0].memory_stats()
  return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def what_to_change(memory: Memory, config: Any) -> str:
  """What makes the largest class smaller."""
  state_bytes = memory.parameters + memory.moments + memory.gradients + memory.update
  sizes = {"state": state_bytes, "kept": memory.kept, "layer": memory.layer, "loss": memory.loss}
  rows = config.train.batch_rows
  parts = [a for a in range(config.train.microbatches + 1, rows + 1) if rows % a == 0][:1]
  fewer = f"train.microbatches={parts[0]}" if parts else "a smaller data.row_len"
  smaller = [fewer, "more devices along mesh.fsdp or mesh.context"]
  ladder = [name for name in config_lib.KEYS["model.remat"].choices if "_offload" not in name]
  below = ladder[ladder.index(config.model.remat.removesuffix("_offload")) + 1 :]
  changes = {
    "state": ["more devices along mesh.fsdp", "optimizer.mu_dtype='bfloat16'", "more patterns in optimizer.frozen"],
    "kept": [f"model.remat='{name}'" for name in below[:1]] + smaller,
    "layer": smaller,
    "loss": [f"model.loss_chunk={max(1, step.settings_from_config(config).loss_chunk // 2)}", *smaller],
  }[max(sizes, key=lambda name: sizes[name])]
  changes = [change for change in changes if config.optimizer.mu_dtype not in change]
  return f"{changes[0]}, or {' or '.join(changes[1:])}"


def shard_bytes(leaf: Any) -> int:
  """Bytes of one device's part of an array or ShapeDtypeStruct."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def kept_bytes(config: Any, spec: ModelSpec, sizes: Mapping[str, int], itemsize: int) -> int:
  """By arithmetic: what the layers keep for the backward pass, per microbatch and device; `itemsize` of the compute dtype.

  The "plain" attention keeps its probabilities, too, [rows, heads, row, row], unless model.remat makes them again.
  """
  rows = config.train.batch_rows // config.train.microbatches / (sizes["data"] * sizes["fsdp"])
  positions = rows * config.data.row_len / sizes["context"]
  of_position = transformer.kept_bytes(spec, config.model.remat, itemsize=itemsize, tensor=sizes["tensor"])
  has_scores = config.model.remat == "none" and config.model.attention == "plain"
  scores = positions * config.data.row_len * spec.num_heads / sizes["tensor"] * itemsize if has_scores else 0.0
  return int(spec.num_layers * (positions * of_position + scores))


if __name__ == "__main__":
  _of_job()
