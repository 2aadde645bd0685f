"""A config -> what the run would do, said without a device and without training.

Invariant: every figure comes from the code that the run uses (the same opened inputs, schedule, groups and shardings).
Called by main; its arithmetic by probe.stacked, too.
"""

import math
import pathlib
from typing import Any

import jax

from cpt_jax import config as config_lib
from cpt_jax import mesh as mesh_lib
from cpt_jax import trees
from cpt_jax.model import spec as spec_lib
from cpt_jax.train import console, guard, loop, optimizer, schedule, state, step


def describe(config: Any, workdir: pathlib.Path) -> int:
  """Prints the plan of a run; returns exit code 0.

  Raises:
    ConfigError: what the run itself would refuse.
  """
  inputs = loop.open_inputs(config, workdir)
  config, spec = inputs.config, inputs.spec
  sizes, assumed = _mesh_sizes(config)
  loop.check_mesh(sizes, spec, config)
  num_steps = config_lib.num_steps(config)

  console.say(f"run      {workdir}")
  console.say(
    f"model    {spec.family}, {spec_lib.num_parameters(spec):,} parameters, {spec.num_layers} layers of width {spec.width}"
  )
  console.say(f"start    {inputs.begin.describe(optimizer=config.start.optimizer)}")
  console.say(f"mesh     {' x '.join(f'{name} {size}' for name, size in sizes.items())}{assumed}")
  _data(inputs, num_steps)
  console.table(
    f"learning rate: schedule {config.schedule.name}",
    ["at", "step", "rate"],
    [[what, at, f"{rate:.3e}"] for what, at, rate in schedule.table(inputs.rates, num_steps=num_steps)],
  )
  mesh = mesh_lib.abstract_mesh(**sizes)
  with jax.sharding.use_abstract_mesh(mesh):
    abstract = state.abstract(spec, inputs.tx)
    _groups(config, abstract.params)
    _placement(abstract, config, spec, sizes)
  _events(inputs, num_steps)
  console.say("\ndry run: nothing was trained. Without --dry_run this command trains.")
  return loop.EXIT_DONE


def _mesh_sizes(config: Any) -> tuple[dict[str, int], str]:
  """The mesh of the run; where -1 asks for the devices of a machine that this one is not, one along that axis."""
  fixed = math.prod(size for size in config.mesh.values() if size != -1)
  asks = -1 in config.mesh.values()
  devices = jax.device_count()
  if asks and devices % fixed == 0:
    return mesh_lib.axis_sizes(**config.mesh, num_devices=devices), f", from the {devices} of this machine"
  return mesh_lib.axis_sizes(**config.mesh, num_devices=fixed), f", taking the {fixed} that mesh.* names" if asks else ""


def _data(inputs: loop.Inputs, num_steps: int) -> None:
  config, summaries = inputs.config, inputs.loader.describe()
  positions = num_steps * config_lib.tokens_per_step(config)
  console.table(
    f"data: {num_steps:,} steps x {config.train.batch_rows} rows x {config.data.row_len} positions = {console.count(positions)}, "
    f"packed {config.data.packing}; shares are normalised",
    [
      "source",
      "role",
      "training docs",
      "training tokens",
      "held-out docs",
      "share at start",
      "at end",
      "tokens read",
      "epochs",
      "filled",
      "docs cut",
    ],
    [
      [row.source, row.role, f"{row.train_documents:,}", console.count(row.train_tokens), f"{row.heldout_documents:,}"]
      + [
        f"{row.share_start:.3f}",
        f"{row.share_end:.3f}",
        console.count(row.tokens),
        f"{row.epochs:.2f}",
        f"{row.efficiency:.2%}",
        f"{row.num_split:,}",
      ]
      for row in summaries
    ],
    left=2,
  )
  console.data_changes(inputs.loader, rate=float(inputs.rates(inputs.begin.step)))
  for row in summaries:
    if row.end:
      console.say(f"end      {row.source} runs out in {row.end}")
    for note in row.notes:
      console.say(f"note: {note}")


def _groups(config: Any, params: Any) -> None:
  console.table(
    "parameter groups (AdamW)",
    ["leaves", "parameters", "rate x", "weight decay"],
    [
      [", ".join(g.leaves), f"{g.num_parameters:,}", g.rate, f"{g.weight_decay:g}"]
      for g in optimizer.from_config_groups(config, params)
    ],
  )


def _placement(abstract: state.TrainState, config: Any, spec: spec_lib.ModelSpec, sizes: dict[str, int]) -> None:
  rows = []
  for path, leaf in trees.paths(abstract.params).items():
    rows.append([path, f"{leaf.dtype}{list(leaf.shape)}", str(leaf.sharding.spec), console.size(_shard_bytes(leaf))])
  console.table("parameters and where they live", ["leaf", "shape", "sharding", "per device"], rows, left=3)

  params = sum(map(_shard_bytes, jax.tree.leaves(abstract.params)))
  moments = sum(map(_shard_bytes, jax.tree.leaves(abstract.opt_state)))
  dtype = step.settings_from_config(config).compute_dtype
  activations = activation_bytes(config, spec, sizes, dtype.itemsize)
  console.table(
    "memory of one device (arithmetic; the compiler's own temporaries come on top)",
    ["what", "size"],
    [
      ["parameters, float32", console.size(params)],
      ["optimizer state", console.size(moments)],
      ["gradients, float32", console.size(params * (1 if config.train.microbatches == 1 else 2))],
      ["base's parameters for drift, at most", console.size(params)],
      [f"activations kept for the backward pass, {dtype.name}, remat {config.model.remat}", console.size(activations)],
    ],
  )


def _shard_bytes(leaf: Any) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def activation_bytes(config: Any, spec: spec_lib.ModelSpec, sizes: dict[str, int], itemsize: int) -> int:
  """Inputs that the layers keep for the backward pass, per microbatch and device.

  full: the layer's input. dots: that and the outputs of its products. none: those, the norms' and the gate's results as well;
  without a fused kernel also the scores, [rows, heads, row, row].
  """
  rows = config.train.batch_rows // config.train.microbatches / (sizes["data"] * sizes["fsdp"])
  positions = rows * config.data.row_len / sizes["context"]
  heads = spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads) / sizes["tensor"]
  products = heads + 2 * spec.mlp_width / sizes["tensor"] + 2 * spec.width
  width = {"full": spec.width, "dots": spec.width + products}.get(
    config.model.remat, 5 * spec.width + 2 * products + 2 * spec.mlp_width / sizes["tensor"]
  )
  scores = positions * config.data.row_len * spec.num_heads / sizes["tensor"] if config.model.remat == "none" else 0.0
  return int(spec.num_layers * (positions * width + scores) * itemsize)


def _events(inputs: loop.Inputs, num_steps: int) -> None:
  config = inputs.config
  every_eval, every_save = (config_lib.steps_of(config, key) for key in ("eval.every", "checkpoint.every"))
  often = f"before the first step, every {every_eval} steps, at the end"
  console.say(f"evaluations  {often}; up to {config.eval.tokens:,} held-out tokens a source")
  console.say(f"checkpoints  every {every_save} steps and at the end; the newest {config.checkpoint.keep_last} are kept")
  for line in guard.describe(config, inputs.loader):
    console.say(f"guard        {line}")
  export = "a Hugging Face directory at the end" if config.checkpoint.export_hf else "none (checkpoint.export_hf=False)"
  console.say(f"export       {export}")
