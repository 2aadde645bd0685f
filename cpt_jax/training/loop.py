"""The run, told in order: resolve and open, mesh, data, compile, start, loop, close.

Invariant: evaluate if due, save if due, THEN fetch rows, dispatch the step, and write the metrics of the step before.
"""

import bisect
import contextlib
import functools
import pathlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import hosts
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import pretrained
from cpt_jax.model import spec as spec_lib
from cpt_jax.store import prepare, store
from cpt_jax.stream import pipeline, sources
from cpt_jax.stream.batch import Batch
from cpt_jax.training import checkpoint, console, drift, guard, metrics, optimizer, perplexity, schedule, start, step

EXIT_DONE, EXIT_PREEMPTED, EXIT_GUARD = 0, 75, 88
_AGAIN = -1  # a guard has changed what lies ahead: start again, from the checkpoint that it names


class Inputs(NamedTuple):
  """What a config names, opened and checked."""

  config: Any
  base: start.Start
  begin: start.Start
  spec: spec_lib.ModelSpec
  hf_config: dict
  loader: pipeline.Loader
  decisions: list[dict]
  asked: dict[str, sources.Knots]
  rates: schedule.Staged
  tx: optax.GradientTransformationExtraArgs


def open_inputs(config: Any, workdir: pathlib.Path | None = None) -> Inputs:
  """Opens model config, tokenizer and stores, prepares stores that name their text, and makes schedule and optimizer.

  Needs no device. A run that has saved steps in `workdir` goes on from them; without one it is a new run.

  Raises:
    ConfigError: everything that is wrong with them, a line each.
  """
  config = config_lib.resolve(config)
  base = start.choose_base(config)
  with config.unlocked():
    config.data.tokenizer = start.tokenizer_path(config)
  spec, hf_config = start.load_spec(base)
  problems = Problems()
  start.check_row_len(config, spec, problems)
  start.check_moments(config, spec, problems)
  with problems.collect():
    rates = schedule.from_config(config)
    tx = optimizer.from_config(config, spec)
  with problems.collect():
    if base.kind == "hf":
      pretrained.check_files(base.path, spec)
  problems.raise_if_any()  # before hours of preparing
  with hosts.main_first("data"):  # the others find its stores and packing plans, or make their own on their own disks
    _prepare_missing_stores(config)
    opened = sources.from_config(config, problems)
    sources.check_vocabulary(opened, spec.num_ids, problems)
    problems.raise_if_any()
    begin = start.choose_start(config, workdir, base)
    past = start.data_past(begin)
    if past and begin.kind == "resume" and (changed := pipeline.changed_settings(config, past)):
      console.say(f"the texts are read from their beginning, not from where {begin.path} was: {', '.join(changed)}")
      past = None
    # What the run's guards have decided is in force as if the config said it.
    decisions = guard.decisions(workdir, step=begin.step)
    asked = {source.name: source.share for source in opened}
    loader = pipeline.from_config(
      config,
      guard.in_force(opened, decisions),
      vocab_size=spec.num_ids,
      past=past,
      start_step=begin.step,
      skip=guard.rows_to_skip(decisions, step=begin.step),
    )
  return Inputs(config, base, begin, spec, hf_config, loader, decisions, asked, rates, tx)


def run(config: Any, workdir: pathlib.Path, *, bar: Any = None) -> int:
  """Trains as `config` says, keeping everything in `workdir`; returns the process's exit code.

  Started again with the same arguments it goes on from its newest checkpoint, and ends with the same parameters as if it had
  never stopped. On several hosts each runs this at the same time; process 0 alone keeps the records and speaks.

  `bar` shows how far it is instead of console.TrainProgress, whose methods it has.
  """
  # A guard writes down what it decides, and the run starts again: so it is the same whether it was killed there or not.
  while (code := _run(config, workdir, bar=bar)) == _AGAIN:
    pass
  return code


def _run(config: Any, workdir: pathlib.Path, *, bar: Any) -> int:
  console.console.quiet |= not hosts.is_main()
  # ---- 1. resolve and open: model config, stores, schedule, optimizer ----
  config, base, begin, spec, hf_config, loader, decisions, asked, rates, tx = open_inputs(config, workdir)
  num_steps = loader.end_step

  with checkpoint.claim(workdir, config), stop_signals() as stop:
    with hosts.main_first("workdir"):  # it is claimed and has its records when the others look
      if start.choose_start(config, workdir, base) != begin:
        raise ConfigError(f"--workdir={workdir}: another process saved a step there in this moment; give the same command again")
      same = checkpoint.identity(config, workdir)
    hosts.agree(same | {"data fingerprint": loader.fingerprint, "start": begin.describe(), "model": str(spec)})
    if hosts.is_main():  # the others have looked
      start.remove_void(workdir)
    finished = metrics.read_summary(workdir, num_steps)
    if finished is not None:
      console.say(f"{workdir} is complete at step {num_steps}; nothing to do")
      console.summary(finished)
      return EXIT_DONE

    # ---- 2. mesh ----
    mesh = mesh_lib.make_mesh(**config.mesh)
    check_mesh(mesh.shape, spec, config)
    jax.set_mesh(mesh)
    batch_rows, eval_rows = config.train.batch_rows, loader.eval_batch_rows
    my_rows, my_eval_rows = (mesh_lib.local_rows(mesh, num_rows=rows) for rows in (batch_rows, eval_rows))

    # ---- 3. data ----
    limits = {"max_tokens": config.eval.tokens, "max_bytes": config.eval.bytes}
    heldout = {name: loader.heldout_rows(name, **limits, rows=my_eval_rows) for name in loader.names}

    # ---- 4. compile: at first use, from the cache when this program was compiled before ----
    settings = step.settings_from_config(config, max_documents=max(held.max_documents for held in heldout.values()))
    jit = jax.jit if not config.debug.no_jit else lambda f, **_: f

    @functools.cache
    def train_step(stage: int) -> step.TrainStep:
      arguments: dict[str, Any] = dict(source_weights=loader.loss_weights, max_documents=loader.max_documents)
      return jit(step.from_config(config, spec, **arguments, stage=stage), donate_argnums=0)

    eval_step = jit(step.make_eval_step(spec, settings=settings, num_sources=len(loader.names)))

    def to_device(batch: Batch, num_rows: int = eval_rows) -> Batch:
      return mesh_lib.to_global(mesh, batch, num_rows=num_rows)

    def evaluate(params: Any, names: tuple[str, ...]) -> dict[str, perplexity.SourceLoss]:
      return perplexity.evaluate(params, {name: heldout[name] for name in names}, eval_step=eval_step, to_device=to_device)

    # ---- 5. start ----
    checkpoints = checkpoint.from_config(config, workdir)
    described = begin.describe(optimizer=config.start.optimizer, moments=config.start.moments)
    console.header(config, workdir, spec, mesh, described, num_parameters=spec_lib.num_parameters(spec))
    if note := step.remat_note(config):
      console.say(f"remat    {note}")
    console.guards(config, loader, decisions, asked)
    console.data_changes(loader, rate=float(rates(begin.step)))
    meta = checkpoints.meta(begin.checkpoint) if begin.kind == "run" else {}
    kept = meta.get("base_losses", {})
    base_losses = {name: perplexity.recorded(values, heldout.get(name)) for name, values in kept.items()}
    for name in loader.replaced & base_losses.keys():  # measured on documents that are not this source's any more
      del base_losses[name]
    if meta:
      base = base._replace(checkpoint=meta["base_checkpoint"])  # the other run may have gone on since
    params = start.base_params(base, spec, seed=config.seed)
    if params is None:
      console.say(f"{base.path} does not keep its checkpoint of step {base.checkpoint} any more: drift is not measured")
    elif meta:  # a source that has joined the run is compared with the base too
      base_losses |= evaluate(params, tuple(name for name in loader.names if name not in base_losses))
    base_copy = None if params is None else drift.keep_base(params)
    keeps = {"keep_optimizer": config.start.optimizer == "keep", "moments": config.start.moments}
    train_state = start.initial_state(begin, params, spec, tx, checkpoints, **keeps)
    del params  # the step donates the state; the base lives on in base_copy
    first_step = int(train_state.step)
    watch = guard.from_config(config, loader, decisions, asked, state=meta["guard"] if meta else None, first_step=first_step)
    checkpoints.need(watch.needed)
    if hosts.is_main():
      metrics.write_segments(workdir, loader.record())
      guard.drop_after(workdir, first_step)

    # ---- 6. loop ----
    last_step = max(first_step, min(num_steps, config.debug.stop_after or num_steps))
    eval_every, save_every = config_lib.steps_of(config, "eval.every"), config_lib.steps_of(config, "checkpoint.every")
    stages = config_lib.stages(config)
    borders = [stage.end for stage in stages[:-1]]
    batches = loader.batches(first_step, rows=my_rows)
    evaluates_first = not base_losses.keys() >= set(loader.names) or first_step % eval_every == 0 or first_step == last_step
    record_dir = workdir if hosts.is_main() else None
    writer = metrics.Writer(
      record_dir, start_step=first_step, evaluates_first=evaluates_first, tensorboard=config.log.tensorboard
    )
    meter = metrics.from_config(config, loader.names, spec, mesh, state=meta["meter"] if meta else None)
    bar = bar or console.TrainProgress(start_step=first_step, num_steps=num_steps)
    losses = dict(base_losses)

    def report() -> None:
      reading = meter.read()
      if reading is None:
        return
      bar.advance(reading.step)
      if reading.values is not None:
        writer.train(reading)
        bar.show(reading)
      note = watch.saw(reading, loader)
      if note is not None:
        console.say(f"guard    {guard.words(note)}")
        if record_dir is not None:
          guard.add(record_dir, note)
      if watch.is_lost:
        jax.block_until_ready(train_state)  # a process must not end with a step in flight
        raise FloatingPointError(guard.lost_words(watch.in_a_row, reading.step, workdir))

    with contextlib.closing(checkpoints), contextlib.closing(writer), contextlib.closing(bar):
      for now in range(first_step, last_step + 1):
        # ORDER: evaluate, save, and only then fetch rows; a resume begins at exactly this line.
        stopping = stop.reached(now) and now < last_step
        save_due = stopping or now == last_step or (now % save_every == 0 and now > first_step)
        eval_due = now % eval_every == 0 or now == last_step or (save_due and config.checkpoint.best_metric)
        eval_due = evaluates_first if now == first_step else eval_due
        if watch.reads_at(now):
          report()
        if eval_due and not stopping:
          report()
          meter.pause()
          with bar.phase("evaluate"):
            losses = evaluate(train_state.params, loader.names)
          base_losses = losses | base_losses
          moved = {} if base_copy is None else drift.by_layer(train_state.params, base_copy)
          writer.eval(now, losses, base_losses, moved, flops=metrics.training_flops(config, spec, now))
          writer.ledger(now, loader.ledger(now))
          bar.evaluated(now, losses, base_losses)
          if now % eval_every == 0 or now == num_steps:
            warning = watch.evaluated(now, losses, base_losses)
            if warning:
              console.say(f"guard    {warning}")
        decision = None if stopping else watch.decide(now, loader)
        save_due = (save_due or watch.saves(now)) if decision is None else decision["to_step"] == now
        if save_due and now not in checkpoints.steps():
          report()
          meter.pause()
          of_base = {name: loss._asdict() for name, loss in base_losses.items()}
          kept = {"loader": loader.state(now), "hf_config": hf_config, "base_losses": of_base, "base_checkpoint": base.checkpoint}
          kept |= {"guard": watch.state(), "meter": meter.state()}
          checkpoints.need(watch.needed)
          checkpoints.save(train_state, now, meta=kept, losses=losses if eval_due and not stopping else {})
        if decision is not None:
          # ORDER: the checkpoint that it names is whole, then the decision is on disk, and only then anything follows from it.
          checkpoints.wait()
          if record_dir is not None:
            guard.add(record_dir, decision)
          console.say(f"guard    {guard.words(decision)}. Written to {workdir / guard.FILE}")
        if stopping or now == last_step or decision is not None:
          break
        batch = next(batches)
        stage = bisect.bisect(borders, now)
        if config.train.stages and now in (first_step, *borders):
          report()
          console.say(console.stage(stage, stages))
          meter.enters_stage(metrics.stage_flops(config, spec, stage))
        train_state, measured = train_step(stage)(train_state, to_device(batch, batch_rows), rates(now))
        report()  # of the step before, while this one runs
        meter.dispatched(now + 1, measured, num_positions=config_lib.tokens_per_step(config))

    # ---- 7. close ----
    if stopping:
      console.say(f"stopped by a signal at step {now}, which is saved; the same command goes on from here")
      return EXIT_PREEMPTED
    if decision is not None and decision["act"] != "stop":
      return _AGAIN
    if decision is not None:
      console.say(guard.advice(decision))
      return EXIT_GUARD
    exported = ""
    if config.checkpoint.export_hf and now == num_steps:
      exported = str(workdir / "hf")
      pretrained.save_params(train_state.params, spec, exported, source_dir=start.files_dir(config, base), hf_config=hf_config)
    result = metrics.summary(
      now, base_losses, losses, loader.ledger(now), str(workdir / "ckpt" / str(now)), exported, guard.summary(workdir)
    )
    if now == num_steps:
      result = metrics.with_predictions(result, config.plan.losses)
    if hosts.is_main():
      metrics.write_summary(workdir, result)
    console.summary(result)
    return EXIT_DONE


def check_mesh(sizes: Mapping[str, int], spec: spec_lib.ModelSpec, config: Any) -> None:
  """Raises ConfigError with every size that the mesh does not divide."""
  problems = Problems()
  mesh_lib.check(
    sizes,
    spec,
    batch_rows=config.train.batch_rows,
    microbatches=config.train.microbatches,
    row_len=config.data.row_len,
    eval_rows=config.eval.batch_rows,
    problems=problems,
  )
  problems.raise_if_any()


class StopRequest:
  """Set by the first SIGTERM or SIGINT; the loop saves and ends at a border between steps."""

  asked = False

  def reached(self, step: int) -> bool:
    """Is this the border: the next one, or that on which all processes agree when one of them was asked."""
    return hosts.reached_stop(step) if hosts.num_processes_connected() > 1 else self.asked


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT into a request; the second ends the process as usual."""
  request = StopRequest()
  before = {}
  several = hosts.num_processes_connected() > 1

  def ask(number, frame):
    request.asked = True
    for each, handler in before.items():
      signal.signal(each, handler)
    if several:
      signal.raise_signal(signal.SIGTERM)

  # In a run of several processes jax waits for SIGTERM itself, and tells the others.
  for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
    before[number] = signal.signal(number, ask)
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _prepare_missing_stores(config: Any) -> None:
  """Tokenises the text of each source whose store is not finished yet."""
  for name, entry in config.data.sources.items():
    if not entry.text or (pathlib.Path(entry.store) / store.MANIFEST).exists():
      continue
    console.say(f"data.sources.{name}: preparing {entry.text} into {entry.store}")
    report = prepare.prepare(
      [entry.text],
      tokenizer=config.data.tokenizer,
      output=entry.store,
      on_bad=config.data.on_bad,
      max_bad=config.data.max_bad,
      **{key: entry[key] for key in ("records", "text_field", "answer_field", "train_on")},
    )
    for line in report.lines():
      console.say(line)
