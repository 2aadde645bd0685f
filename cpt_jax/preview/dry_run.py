"""A config -> what the run would do, said without data on a device and without training.

Invariant: every figure comes from the code that the run uses (the same opened inputs, schedule, groups, shardings and step).
"""

import math
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from cpt_jax import config as config_lib, exits, trees
from cpt_jax.config import Problems
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import spec as spec_lib
from cpt_jax.preview import memory
from cpt_jax.store import documents, tokenization
from cpt_jax.stream import sources, summary
from cpt_jax.training import console, guard, inputs as inputs_lib, optimizer, schedule, start, state, step


def describe(config: Any, workdir: pathlib.Path) -> int:
  """Prints what a run would do; returns exit code 0. Writes nothing: a text that is not prepared yet is not read.

  Raises ConfigError: what the run itself would refuse.
  """
  resolved = inputs_lib.resolve(config)
  config, spec = resolved.config, resolved.spec
  sizes, assumed = mesh_sizes(config)
  inputs_lib.check_mesh(sizes, spec, config)  # before any text is read
  missing = inputs_lib.unprepared(config)
  inputs = None if missing else inputs_lib.open_texts(resolved, workdir, writes=False)
  begin = inputs.begin if inputs else start.choose_start(config, workdir, resolved.base)
  num_steps = config_lib.num_steps(config)

  console.say(f"run      {workdir}")
  console.say(
    f"model    {spec.family}, {spec_lib.num_parameters(spec):,} parameters, {spec.num_layers} layers of width {spec.width}"
  )
  console.say(f"start    {begin.describe(optimizer=config.start.optimizer, moments=config.start.moments)}")
  console.say(f"mesh     {' x '.join(f'{name} {size}' for name, size in sizes.items())}{assumed}")
  if inputs:
    _data(inputs, num_steps)
  else:
    _unprepared(config, missing, num_steps)
  _shares(config)
  console.table(
    f"learning rate: schedule {config.schedule.name}",
    ["at", "step", "rate"],
    [[what, at, f"{rate:.3e}"] for what, at, rate in schedule.table(resolved.rates, num_steps=num_steps)],
  )
  mesh = mesh_lib.abstract_mesh(**sizes)
  with jax.sharding.use_abstract_mesh(mesh):
    abstract = state.abstract(spec, resolved.tx)
    _groups(config, spec)
    placed = [
      [path, f"{leaf.dtype}{list(leaf.shape)}", str(leaf.sharding.spec), console.size(memory.shard_bytes(leaf))]
      for path, leaf in trees.paths(abstract.params).items()
    ]
    console.table("parameters and where they live", ["leaf", "shape", "sharding", "per device"], placed, left=3)
  _memory(resolved, abstract, sizes)
  in_force = {source.name: source.share for source in inputs.loader.sources} if inputs else None
  _events(config, in_force or {name: sources.knots(config, name) for name in config.data.sources}, begin.step)
  console.say("\ndry run: nothing was trained. Without --dry_run this command trains.")
  return exits.DONE


def mesh_sizes(config: Any) -> tuple[dict[str, int], str]:
  """The mesh of the run; where -1 asks for the devices of a machine that this one is not, one along that axis."""
  fixed = math.prod(size for size in config.mesh.values() if size != -1)
  asks = -1 in config.mesh.values()
  devices = jax.device_count()
  if asks and devices % fixed == 0:
    return mesh_lib.axis_sizes(**config.mesh, num_devices=devices), f", from the {devices} of this machine"
  return mesh_lib.axis_sizes(**config.mesh, num_devices=fixed), f", taking the {fixed} that mesh.* names" if asks else ""


def _data(inputs: inputs_lib.Inputs, num_steps: int) -> None:
  config, summaries = inputs.config, summary.describe(inputs.loader)
  positions = num_steps * config_lib.tokens_per_step(config)
  console.table(
    f"data: {num_steps:,} steps x {config.train.batch_rows} rows x {config.data.row_len} positions = {console.count(positions)}, "
    f"packed {config.data.packing}; shares are normalised",
    [
      "source", "role", "training docs", "training tokens", "held-out docs", "share at start", "at end", "tokens read",
      "epochs", "filled", "docs cut",
    ],
    [
      [row.source, row.role, f"{row.train_documents:,}", console.count(row.train_tokens), f"{row.heldout_documents:,}"]
      + [
        f"{row.share_start:.3f}", f"{row.share_end:.3f}", console.count(row.tokens), f"{row.epochs:.2f}",
        f"{row.efficiency:.2%}", f"{row.num_split:,}",
      ]
      for row in summaries
    ],
    left=2,
  )  # fmt: skip
  console.data_changes(inputs.loader, rate=float(inputs.rates(inputs.begin.step)))
  for row in summaries:
    if row.end:
      console.say(f"end      {row.source} runs out in {row.end}")
    for note in row.notes:
      console.say(f"note: {note}")


def _unprepared(config: Any, missing: dict[str, Any], num_steps: int) -> None:
  """What the run would do before its first step, and what cannot be said before that."""
  positions, problems = num_steps * config_lib.tokens_per_step(config), Problems()
  size = f"{num_steps:,} steps x {config.train.batch_rows} rows x {config.data.row_len} positions = {console.count(positions)}"
  console.say(f"data     {size}, packed {config.data.packing}")
  for name, entry in missing.items():
    with problems.collect():
      files = documents.find_files([entry.text], flag=f"data.sources.{name}.text")
      num_bytes = sum(pathlib.Path(file).stat().st_size for file in files)
      console.say(f"prepare  {name}: {len(files)} file(s) of {entry.text}, {console.size(num_bytes)}, into {entry.store}")
  with problems.collect():
    tokenization.load(config.data.tokenizer)
  problems.raise_if_any()
  console.say(
    "         not known before that: documents, tokens, epochs, and when a source ends. The run prepares first; cpt prepare does "
    "it without training"
  )


def _shares(config: Any) -> None:
  """Says what shares are normalised to, where they do not add up to 1."""
  entries = config.data.sources.items()
  given = [(f"from {when} on", dict(of_sources)) for when, of_sources in config.data.shares]
  ends = ("at the start", 0), ("at the end", -1)
  given = given or [(at, {name: entry.share[i][1] for name, entry in entries}) for at, i in ends]
  for at, of_sources in given:
    total = math.fsum(of_sources.values())
    if total and not math.isclose(total, 1.0, rel_tol=1e-6):
      taken = ", ".join(f"{name} {share / total:.3g}" for name, share in of_sources.items())
      console.say(f"shares   add up to {total:g} {at}: taken as {taken}")


def _groups(config: Any, spec: spec_lib.ModelSpec) -> None:
  stages = config_lib.stages(config)
  for i in range(len(stages)):
    which = f", {console.stage(i, stages)}" if config.train.stages else ""
    console.table(
      f"parameter groups (AdamW){which}",
      ["leaves", "parameters", "rate x", "weight decay"],
      [
        [", ".join(g.leaves), f"{g.num_parameters:,}", g.rate, f"{g.weight_decay:g}"]
        for g in optimizer.from_config_groups(config, spec, stage=i)
      ],
    )


def _memory(inputs: inputs_lib.Resolved, abstract: state.TrainState, sizes: dict[str, int]) -> None:
  """The classes of the step as it is compiled for this mesh; by arithmetic where it cannot be."""
  config = inputs.config
  if note := step.remat_note(config):
    console.say(f"remat    {note}")
  found, compiled_for = _compiled(inputs, sizes)
  if isinstance(found, str):
    console.say(f"memory   by arithmetic, {found}")
    _arithmetic(config, inputs.spec, abstract, sizes)
    return
  settings = step.settings_from_config(config)
  dtype = settings.compute_dtype.name
  console.table(
    f"memory of one device when a step needs most, compiled for {compiled_for}",
    ["what", "size", ""],
    [
      ["parameters, float32", console.size(found.parameters), ""],
      [f"moments, the first in {config.optimizer.mu_dtype}", console.size(found.moments), ""],
      ["gradients", console.size(found.gradients), ""],
      ["new parameters and moments beside the old", console.size(found.update), f"{console.size(found.donated)} in their place"],
      [f"activations of all layers kept for the backward pass, {dtype}", console.size(found.kept), f"remat {config.model.remat}"],
      ["activations of the layer at work, and the rest", console.size(found.layer), ""],
      ["loss", console.size(found.loss), f"chunks of {settings.loss_chunk} positions"],
      ["batch", console.size(found.batch), ""],
      ["packing: gaps, or (below 0) memory used twice", console.size(found.packing), ""],
      ["the step, by the compiler", console.size(found.total), ""],
      *([["of the host's memory, by offloading", console.size(found.host), ""]] if found.host else []),
    ],
    left=1,
  )
  base = found.parameters  # in bfloat16 where the base was stored so
  peak, has = found.total + base, memory.device_bytes()
  console.say(f"peak     {console.size(peak)} of a device: the step, and up to {console.size(base)} of the base, for drift")
  if has is not None and peak <= has:
    console.say(f"         fits: a device has {console.size(has)}")
  elif has is not None:
    console.say(f"         does NOT fit: a device has {console.size(has)}. Try {memory.what_to_change(found, config)}")


def _compiled(inputs: inputs_lib.Resolved, sizes: dict[str, int]) -> tuple[memory.Memory | str, str]:
  """The classes and the devices that the step was compiled for, or why it was not."""
  needed, devices = math.prod(sizes.values()), jax.devices()
  platform = devices[0].platform
  arguments = dict(source_weights=[entry.loss_weight for entry in inputs.config.data.sources.values()])
  try:
    if needed <= len(devices):
      with jax.set_mesh(mesh_lib.make_mesh(**sizes, devices=devices[:needed])):
        found = memory.of_step(inputs.config, inputs.spec, **arguments)
    elif platform == "cpu":
      found = memory.of_step_elsewhere(inputs.config, inputs.spec, sizes=sizes, **arguments)
    else:
      here = f"{len(devices)} of the {needed} devices of this mesh are here"
      return f"since {here}; cpt compile compiles for devices that are not", ""
  except subprocess.CalledProcessError as error:
    return f"since the step did not compile for {needed} CPU devices: {error.stderr.decode().strip().splitlines()[-1]}", ""
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return f"since the compiler finds no room for the step: {str(error).splitlines()[0]}", ""
  return found, f"{needed} x {devices[0].device_kind}"


def _arithmetic(config: Any, spec: spec_lib.ModelSpec, abstract: state.TrainState, sizes: dict[str, int]) -> None:
  params, moments = (sum(map(memory.shard_bytes, jax.tree.leaves(tree))) for tree in (abstract.params, abstract.opt_state))
  dtype = step.settings_from_config(config).compute_dtype
  parts = 0 if config.train.microbatches == 1 else jnp.dtype(config.train.accumulate_dtype).itemsize
  console.table(
    "memory of one device (the layer at work, the loss and gaps come on top)",
    ["what", "size"],
    [
      ["parameters, float32", console.size(params)],
      [f"moments, the first in {config.optimizer.mu_dtype}", console.size(moments)],
      ["gradients, float32, and their sum over microbatches", console.size(params + params // 4 * parts)],
      ["base's parameters for drift, at most", console.size(params)],
      [
        f"activations of all layers kept for the backward pass, {dtype.name}, remat {config.model.remat}",
        console.size(memory.kept_bytes(config, spec, sizes, dtype.itemsize)),
      ],
    ],
  )


def _events(config: Any, knots: dict[str, sources.Knots], start_step: int) -> None:
  every_eval, every_save = (config_lib.steps_of(config, key) for key in ("eval.every", "checkpoint.every"))
  often = f"before the first step, every {every_eval} steps, at the end"
  amount = f"{config.eval.bytes:,} held-out bytes" if config.eval.bytes else f"{config.eval.tokens:,} held-out tokens"
  console.say(f"evaluations  {often}; up to {amount} a source")
  console.say(f"checkpoints  every {every_save} steps and at the end; the newest {config.checkpoint.keep_last} are kept")
  for line in guard.describe(config, knots, start_step=start_step):
    console.say(f"guard        {line}")
  export = "a Hugging Face directory at the end" if config.checkpoint.export_hf else "none (checkpoint.export_hf=False)"
  console.say(f"export       {export}")
