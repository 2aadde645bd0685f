"""The run, told in order: resolve and open, mesh, data, compile, start, loop, close.

Invariant: evaluate if due, save if due, THEN fetch rows, dispatch the step, and write the metrics of the step before.
R runs of one shape may be trained at once, as one program on one device: a stack, which differs in that it saves nothing.
"""

import bisect
import contextlib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cpt_jax import config as config_lib, exits
from cpt_jax.config import ConfigError
from cpt_jax.devices import hosts, mesh as mesh_lib, signals
from cpt_jax.model import spec as spec_lib
from cpt_jax.stream.batch import Batch
from cpt_jax.training import checkpoint, console, guard, inputs as inputs_lib, metrics, perplexity, recorder, start, step
from cpt_jax.training.stack import Stack

_AGAIN = -1  # a guard has changed what lies ahead: start again, from the checkpoint that it names


def run(config: Any, workdir: pathlib.Path, *, bar: Any = None) -> int:
  """Trains as `config` says, keeping everything in `workdir`; returns the process's exit code.

  Started again with the same arguments it goes on from its newest checkpoint, and ends with the same parameters as if it had
  never stopped. On several hosts each runs this at the same time; process 0 alone keeps the records and speaks.

  `bar` shows how far it is instead of console.TrainProgress, whose methods it has.
  """
  return run_stack([config], [workdir], bar=bar)[0]


def run_stack(configs: Sequence[Any], workdirs: Sequence[pathlib.Path], *, bar: Any = None) -> tuple[int, list[str]]:
  """`run` for R runs at once on the first device, which differ in rates, shares and seed alone; stopped, they begin again.

  Returns the exit code, and for each run "" or how it diverged.
  Raises FloatingPointError: all have diverged; an argument for each.
  """
  # A guard writes down what it decides, and the run starts again: so it is the same whether it was killed there or not.
  while (result := _run(configs, workdirs, bar=bar))[0] == _AGAIN:
    pass
  return result


def _run(configs: Sequence[Any], workdirs: Sequence[pathlib.Path], *, bar: Any) -> tuple[int, list[str]]:
  console.console.quiet |= not hosts.is_main()
  # ---- 1. resolve and open: model config, stores, schedule, optimizer ----
  stack = Stack(len(configs))
  opened = [inputs_lib.open_inputs(config, workdir) for config, workdir in zip(configs, workdirs, strict=True)]
  stack.check(opened)
  first = opened[0]
  config, spec, loader, num_steps = first.config, first.spec, first.loader, first.loader.end_step

  with contextlib.ExitStack() as claims, signals.stop_signals() as stop:
    for inputs, workdir in zip(opened, workdirs, strict=True):
      claims.enter_context(checkpoint.claim(workdir, inputs.config))
      _agree(inputs, workdir)
    summaries = [summary for workdir in workdirs if (summary := metrics.read_summary(workdir, num_steps))]
    if len(summaries) == len(workdirs):
      console.say(f"{workdirs[0]} is complete at step {num_steps}; nothing to do")
      console.summary(summaries[0])
      return exits.DONE, [""] * len(workdirs)

    # ---- 2. mesh ----
    mesh = stack.make_mesh(config)
    inputs_lib.check_mesh(mesh.shape, spec, config)
    jax.set_mesh(mesh)
    batch_rows, eval_rows = config.train.batch_rows, loader.eval_batch_rows
    my_rows, my_eval_rows = (mesh_lib.local_rows(mesh, num_rows=rows) for rows in (batch_rows, eval_rows))

    # ---- 3. data ----
    limits = {"max_tokens": config.eval.tokens, "max_bytes": config.eval.bytes}
    heldout = {name: loader.heldout_rows(name, **limits, rows=my_eval_rows) for name in loader.names}

    # ---- 4. compile: at first use, from the cache when this program was compiled before ----
    jit = jax.jit if not config.debug.no_jit else lambda f, **_: f
    in_a_row = stack.known(loader.max_documents), stack.known(max(held.max_documents for held in heldout.values()))

    @functools.cache
    def train_step(stage: int) -> step.TrainStep:
      arguments: dict[str, Any] = dict(source_weights=loader.loss_weights, max_documents=in_a_row[0])
      return jit(stack.map(step.from_config(config, spec, **arguments, stage=stage)), donate_argnums=0)

    settings = step.settings_from_config(config, max_documents=in_a_row[1])
    eval_step = jit(stack.map(step.make_eval_step(spec, settings=settings, num_sources=len(loader.names)), in_axes=(0, None)))

    def to_device(batch: Batch) -> Batch:
      return mesh_lib.to_global(mesh, batch, num_rows=eval_rows)

    def evaluate(params: Any, names: Sequence[str] = loader.names) -> list[dict[str, perplexity.SourceLoss]]:
      rows = {name: heldout[name] for name in names}
      return perplexity.evaluate(params, rows, eval_step=eval_step, to_device=to_device, parts=stack.parts)

    # ---- 5. start ----
    _say_start(first, workdirs[0], mesh)
    runs = [recorder.Recorder(*of_run, mesh=mesh, heldout=heldout) for of_run in zip(opened, workdirs, strict=True)]
    watch, checkpoints = runs[0].watch, runs[0].checkpoints  # a stack saves nothing and has no guard that acts
    params = recorder.load_base(runs, stack, evaluate)
    keeps = {"keep_optimizer": config.start.optimizer == "keep", "moments": config.start.moments}
    train_state = stack.map(lambda params: start.initial_state(first.begin, params, spec, first.tx, **keeps))(params)
    del params  # the step donates the state; the base lives on in a copy

    # ---- 6. loop ----
    first_step = first.begin.step
    last_step = max(first_step, min(num_steps, config.debug.stop_after or num_steps))
    eval_every, save_every = config_lib.steps_of(config, "eval.every"), config_lib.steps_of(config, "checkpoint.every")
    stages = config_lib.stages(config)
    borders = [stage.end for stage in stages[:-1]]
    batches = zip(*(inputs.loader.batches(first_step, rows=my_rows) for inputs in opened), strict=True)
    evaluates_first = any(run.missing for run in runs) or first_step % eval_every == 0 or first_step == last_step
    for run in runs:
      run.begin(evaluates_first=evaluates_first)
    bar = bar or console.TrainProgress(start_step=first_step, num_steps=num_steps)
    pending: list[tuple[int, step.StepMetrics]] = []  # the step that was dispatched last, until it was read

    def report() -> None:
      for finished, measured in pending:
        bar.advance(finished)
        for run, of_run in zip(runs, stack.parts(jax.device_get(measured)), strict=True):
          run.saw(finished, of_run, bar=bar)
      pending.clear()
      if all(run.diverged for run in runs):
        jax.block_until_ready(train_state)  # a process must not end with a step in flight
        raise FloatingPointError(*(run.diverged for run in runs))

    with contextlib.ExitStack() as files:
      for each in (*runs, bar):
        files.callback(each.close)
      for now in range(first_step, last_step + 1):
        # ORDER: evaluate, save, and only then fetch rows; a resume begins at exactly this line.
        stopping = stop.reached(now) and now < last_step
        save_due = stopping or now == last_step or (now % save_every == 0 and now > first_step)
        eval_due = now % eval_every == 0 or now == last_step or (save_due and config.checkpoint.best_metric)
        eval_due = not stopping and (evaluates_first if now == first_step else eval_due)
        if eval_due or watch.reads_at(now):
          report()
        if eval_due:
          for run in runs:
            run.meter.pause()
          with bar.phase("evaluate"):
            losses = evaluate(train_state.params)
          is_guarded = now % eval_every == 0 or now == num_steps
          for r, run in enumerate(runs):
            run.evaluated(now, losses[r], stack.part(train_state.params, r), bar=bar, is_guarded=is_guarded)
        decision = None if stopping else watch.decide(now, loader)
        save_due = (save_due or watch.saves(now)) if decision is None else decision["to_step"] == now
        if save_due and stack.is_alone and now not in checkpoints.steps():
          report()
          runs[0].save(now, train_state, is_evaluated=eval_due)
        if decision is not None:
          # ORDER: the checkpoint that it names is whole, then the decision is on disk, and only then anything follows from it.
          checkpoints.wait()
          runs[0].decided(decision)
        if stopping or now == last_step or decision is not None:
          break
        batch = stack.to_device(mesh, next(batches), num_rows=batch_rows)
        rates = stack.join([inputs.rates(now) for inputs in opened], np.stack)
        stage = bisect.bisect(borders, now)
        if config.train.stages and now in (first_step, *borders):
          report()
          console.say(console.stage(stage, stages))
          for run in runs:
            run.meter.enters_stage(metrics.stage_flops(config, spec, stage))
        train_state, measured = train_step(stage)(train_state, batch, rates)
        report()  # of the step before, while this one runs
        pending.append((now + 1, measured))
        for run in runs:
          run.meter.dispatched(num_positions=config_lib.tokens_per_step(config))

    # ---- 7. close ----
    diverged = [run.diverged for run in runs]
    if stopping:
      console.say(f"stopped by a signal at step {now}, which is saved; the same command goes on from here")
      return exits.STOPPED, diverged
    if decision is not None:
      return _after(decision), diverged
    for r, run in enumerate(runs):
      run.finish(now, stack.part(train_state.params, r))
    return exits.DONE, diverged


def _agree(inputs: inputs_lib.Inputs, workdir: pathlib.Path) -> None:
  """Raises ConfigError where processes do not start from the same, or somebody has trained in `workdir` meanwhile."""
  config, begin = inputs.config, inputs.begin
  with hosts.main_first("workdir"):  # it is claimed and has its records when the others look
    if start.choose_start(config, workdir, inputs.base) != begin:
      raise ConfigError(f"--workdir={workdir}: another process saved a step there in this moment; give the same command again")
    same = checkpoint.identity(config, workdir)
  here = {"data fingerprint": inputs.loader.fingerprint, "start": begin.describe(), "model": str(inputs.spec)}
  hosts.agree(same | here)
  if hosts.is_main():  # the others have looked
    start.remove_void(workdir)


def _say_start(inputs: inputs_lib.Inputs, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
  """What is about to run."""
  config, begin, loader = inputs.config, inputs.begin, inputs.loader
  described = begin.describe(optimizer=config.start.optimizer, moments=config.start.moments)
  console.header(config, workdir, inputs.spec, mesh, described, num_parameters=spec_lib.num_parameters(inputs.spec))
  if note := step.remat_note(config):
    console.say(f"remat    {note}")
  console.guards(config, loader, inputs.decisions, inputs.asked)
  console.data_changes(loader, rate=float(inputs.rates(begin.step)))


def _after(decision: dict) -> int:
  """How a guard's decision goes on."""
  if decision["act"] != "stop":
    return _AGAIN
  console.say(guard.advice(decision))
  return exits.GUARD
