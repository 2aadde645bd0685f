"""Configs of trials of one shape -> their run directories, trained at once as one program on one device.

Invariant: each trial reads the rows, has the rates and makes the updates that it would alone: the update is training.step's own,
mapped over a leading dimension R of trials. A trial that diverges leaves the others as they are.

Nothing is saved on the way: a stack that is interrupted begins again.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import spec as spec_lib
from cpt_jax.preview import memory as memory_lib
from cpt_jax.stream.batch import Batch
from cpt_jax.training import checkpoint, drift, guard, loop, metrics, perplexity, start, state, step

# Bytes of a parameter while it is trained: itself, two moments, its gradient, its update, all float32.
_BYTES_PER_PARAMETER = 5 * 4
_MEMORY_FRAC = 0.7  # of a device's memory that a stack may take by this arithmetic; chosen by hand


def run_stack(configs: Sequence[Any], workdirs: Sequence[pathlib.Path], *, bar: Any) -> tuple[int, list[str]]:
  """Trains every config in its run directory.

  Returns the exit code as loop.run does, and for each trial "" or how it diverged; the others are complete.

  Raises:
    ConfigError: what a run would refuse; trials that differ in more than rates, shares and seed; a source that runs out.
  """
  # ---- 1. resolve and open ----
  opened = [loop.open_inputs(config) for config in configs]
  first = opened[0]
  config, spec, num_steps = first.config, first.spec, first.loader.num_steps
  for inputs in opened:
    if inputs.loader.end_step != num_steps:
      raise ConfigError("a source of a trial runs out before its end; trials of one stack have one length: use --stack=1")
  loop.check_mesh(_one_device(), spec, config)
  with contextlib.ExitStack() as open_files, loop.stop_signals() as stop:
    for inputs, workdir in zip(opened, workdirs, strict=True):
      open_files.enter_context(checkpoint.claim(workdir, inputs.config))
      metrics.write_segments(workdir, inputs.loader.record())

    # ---- 2. one device, one program ----
    mesh = mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])
    jax.set_mesh(mesh)
    names, loader = first.loader.names, first.loader
    limits = {"max_tokens": config.eval.tokens, "max_bytes": config.eval.bytes}
    heldout = {name: loader.heldout_rows(name, **limits) for name in names}
    update = step.from_config(config, spec, source_weights=loader.loss_weights)
    train_step = jax.jit(jax.vmap(update), donate_argnums=0)
    loss_sums = step.make_eval_step(spec, settings=step.settings_from_config(config), num_sources=len(names))
    eval_step = jax.jit(jax.vmap(loss_sums, in_axes=(0, None)))

    def evaluate(params: Any) -> list[dict[str, perplexity.SourceLoss]]:
      by_trial: list[dict[str, perplexity.SourceLoss]] = [{} for _ in opened]
      for name, held in heldout.items():
        sums = jax.device_get([eval_step(params, mesh_lib.to_global(mesh, batch)) for batch in held.batches])
        for r, losses in enumerate(by_trial):
          losses[name] = perplexity.source_loss(held, [_trial(of_batch, r) for of_batch in sums])
      return by_trial

    # ---- 3. start ----
    seeds = [inputs.config.seed for inputs in opened] if first.base.kind == "scratch" else [config.seed]
    bases = [start.base_params(first.base, spec, seed=seed) for seed in seeds]
    base_copies = [drift.keep_base(params) for params in bases] * (len(opened) // len(seeds))
    train_state = _stacked(bases * (len(opened) // len(seeds)), first.tx)
    del bases
    base_losses = evaluate(train_state.params)

    # ---- 4. loop ----
    eval_every = config_lib.steps_of(config, "eval.every")
    batches = [inputs.loader.batches(0) for inputs in opened]
    rates_SR = np.stack([inputs.rates(np.arange(num_steps)) for inputs in opened], axis=1)
    writers = [
      metrics.Writer(workdir, start_step=0, evaluates_first=True, tensorboard=inputs.config.log.tensorboard)
      for inputs, workdir in zip(opened, workdirs, strict=True)
    ]
    for writer in writers:
      open_files.enter_context(contextlib.closing(writer))
    meters = [metrics.from_config(inputs.config, names, spec, mesh) for inputs in opened]
    watches = [
      guard.from_config(inputs.config, inputs.loader, inputs.decisions, inputs.asked, state=None, first_step=0)
      for inputs in opened
    ]
    diverged = [""] * len(opened)
    losses, pending = base_losses, None

    def report() -> None:
      """Of the step before: each trial's metrics to its own meter and file."""
      if pending is None:
        return
      finished, measured = pending[0], jax.device_get(pending[1])
      for r, (meter, writer) in enumerate(zip(meters, writers, strict=True)):
        if not diverged[r]:
          meter.dispatched(finished, _trial(measured, r), num_positions=config_lib.tokens_per_step(config))
          reading = meter.read()
          assert reading is not None, "of the step that was dispatched just now"
          if reading.values is not None:
            writer.train(reading)
          note = watches[r].saw(reading, opened[r].loader)
          if note is not None:
            guard.add(workdirs[r], note)
          if watches[r].is_lost:
            diverged[r] = guard.lost_words(watches[r].in_a_row, reading.step, workdirs[r])
      bar.advance(finished)

    for now in range(num_steps + 1):
      # ORDER: as in training.loop: evaluate, and only then fetch rows.
      if now % eval_every == 0 or now == num_steps:
        report()
        pending = None
        losses = evaluate(train_state.params) if now else base_losses
        for r, (inputs, writer, meter) in enumerate(zip(opened, writers, meters, strict=True)):
          meter.pause()
          if not diverged[r]:
            moved = drift.by_layer(_trial(train_state.params, r), base_copies[r])
            writer.eval(now, losses[r], base_losses[r], moved, flops=metrics.training_flops(inputs.config, spec, now))
            writer.ledger(now, inputs.loader.ledger(now))
      if now == num_steps or all(diverged) or stop.reached(now):
        break
      batch = _to_device(mesh, [next(of_one) for of_one in batches])
      train_state, measured = train_step(train_state, batch, rates_SR[now])
      report()  # of the step before, while this one runs
      pending = now + 1, measured

    # ---- 5. close ----
    if now < num_steps and not all(diverged):
      return loop.EXIT_PREEMPTED, diverged
    for r, (inputs, workdir) in enumerate(zip(opened, workdirs, strict=True)):
      if not diverged[r]:
        result = metrics.summary(now, base_losses[r], losses[r], inputs.loader.ledger(now), "", "", guard.summary(workdir))
        metrics.write_summary(workdir, result)
  return loop.EXIT_DONE, diverged


def how_many(config: Any) -> int:
  """Trials of this config that one device holds at once: as many as its memory has room for; 1 on a CPU, which gains little.

  By arithmetic: parameters, moments, gradients and updates in float32, and the activations that preview.memory counts, in
  _MEMORY_FRAC of the memory that the device says it has.
  """
  memory = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
  if not memory or "bytes_limit" not in memory:
    return 1
  inputs = loop.open_inputs(config)
  sizes, itemsize = _one_device(), step.settings_from_config(inputs.config).compute_dtype.itemsize
  activations = memory_lib.kept_bytes(inputs.config, inputs.spec, sizes, itemsize)
  one = spec_lib.num_parameters(inputs.spec) * _BYTES_PER_PARAMETER + activations
  return max(1, int(_MEMORY_FRAC * memory["bytes_limit"] / one))


def _one_device() -> dict[str, int]:
  return dict.fromkeys(mesh_lib.AXES, 1)


def _stacked(bases: Sequence[Any], optimizer: Any) -> state.TrainState:
  """The trials' states before the first update, along a new first dimension R."""
  params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases)
  return jax.vmap(lambda of_one: state.TrainState(jnp.zeros((), jnp.int32), of_one, optimizer.init(of_one)))(params)


def _trial(tree: Any, r: int) -> Any:
  """One trial's part."""
  return jax.tree.map(lambda leaf: leaf[r], tree)


def _to_device(mesh: Any, batches: Sequence[Batch]) -> Batch:
  """One batch of each trial -> the same arrays with a first dimension R."""
  return Batch(
    *(
      jax.device_put(stacked, mesh_lib.sharding(mesh, None, *("batch", "seq")[: stacked.ndim - 1]))
      for stacked in (np.stack(leaves) for leaves in zip(*batches, strict=True))
    )
  )
