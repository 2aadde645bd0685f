"""What runs measure -> their files, their guards and their checkpoints.

Invariant: the numbers of a step are read while the next one runs; R runs that are trained at once each have a recorder of their
own, and one that has diverged leaves the others as they are.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cpt_jax import config as config_lib
from cpt_jax.devices import hosts
from cpt_jax.model import pretrained
from cpt_jax.training import checkpoint, console, drift, guard, metrics, start
from cpt_jax.training.inputs import Inputs
from cpt_jax.training.perplexity import SourceLoss
from cpt_jax.training.stack import Stack


class Recorder:
  """The records of one run, from where it begins: `begin` opens them, `close` closes them."""

  def __init__(self, inputs: Inputs, workdir: pathlib.Path, *, mesh: jax.sharding.Mesh, heldout: Mapping[str, Any], saves: bool):
    config, begin, loader = inputs.config, inputs.begin, inputs.loader
    self.inputs, self.loader, self.workdir = inputs, loader, workdir
    self.checkpoints = checkpoint.from_config(config, workdir) if saves else None
    meta = checkpoint.read_meta(workdir, begin.checkpoint) if begin.kind == "run" else {}
    self.base = inputs.base._replace(checkpoint=meta["base_checkpoint"]) if meta else inputs.base  # that run may have gone on
    self.base_losses = start.kept_losses(meta, heldout, replaced=loader.replaced)
    self.losses: dict[str, SourceLoss] = {}  # of the last evaluation
    self.base_copy: Any = None  # the base's parameters, from which drift is measured
    self.meter = metrics.from_config(config, loader.names, inputs.spec, mesh, state=meta.get("meter"))
    self.watch = guard.from_config(config, loader, inputs.decisions, inputs.asked, state=meta.get("guard"), first_step=begin.step)
    self.diverged = ""  # or how
    self._record_dir = workdir if hosts.is_main() else None

  @property
  def missing(self) -> tuple[str, ...]:
    """Sources whose base has not been evaluated yet."""
    return tuple(name for name in self.loader.names if name not in self.base_losses)

  def begin(self, *, evaluates_first: bool) -> None:
    """Opens the files, without what they hold of a future that was given up."""
    config, first_step = self.inputs.config, self.inputs.begin.step
    if self._record_dir is not None:
      metrics.write_segments(self.workdir, self.loader.record())
      guard.drop_after(self.workdir, first_step)
    self._writer = metrics.Writer(
      self._record_dir, start_step=first_step, evaluates_first=evaluates_first, tensorboard=config.log.tensorboard
    )
    self._need()

  def saw(self, step: int, measured: Any, *, bar: Any) -> None:
    """Takes in, on the host, what the step measured that finished `step` updates."""
    reading = self.meter.read(step, measured)
    if reading.values is not None:
      self._writer.train(reading)
      bar.show(reading)
    note = self.watch.saw(reading, self.loader)
    if note is not None:
      console.say(f"guard    {guard.words(note)}")
      self._note(note)
    if self.watch.is_lost:
      self.diverged = guard.lost_words(self.watch.in_a_row, reading.step, self.workdir)

  def evaluated(self, now: int, losses: dict[str, SourceLoss], params: Any, *, bar: Any, is_guarded: bool) -> None:
    """Takes in an evaluation of `params`, the parameters after `now` updates; the guards look at it where `is_guarded`."""
    config, spec = self.inputs.config, self.inputs.spec
    self.losses, self.base_losses = losses, losses | self.base_losses
    moved = {} if self.base_copy is None else drift.by_layer(params, self.base_copy)
    self._writer.eval(now, losses, self.base_losses, moved, flops=metrics.training_flops(config, spec, now))
    self._writer.ledger(now, self.loader.ledger(now))
    bar.evaluated(now, losses, self.base_losses)
    warning = self.watch.evaluated(now, losses, self.base_losses) if is_guarded else ""
    if warning:
      console.say(f"guard    {warning}")

  def save(self, now: int, state: Any, *, is_evaluated: bool) -> None:
    """Saves the state after `now` updates with all that a start needs to go on from it; `is_evaluated`: `losses` are of it."""
    if self.checkpoints is None or now in self.checkpoints.steps():
      return
    of_base = {name: loss._asdict() for name, loss in self.base_losses.items()}
    kept = {"loader": self.loader.state(now), "hf_config": self.inputs.hf_config, "base_losses": of_base}
    kept |= {"base_checkpoint": self.base.checkpoint, "guard": self.watch.state(), "meter": self.meter.state()}
    self._need()
    self.checkpoints.save(state, now, meta=kept, losses=self.losses if is_evaluated else {})

  def wait(self) -> None:
    """Until what was saved is on disk."""
    if self.checkpoints is not None:
      self.checkpoints.wait()

  def decided(self, decision: dict) -> None:
    """Writes down what a guard has decided."""
    self._note(decision)
    console.say(f"guard    {guard.words(decision)}. Written to {self.workdir / guard.FILE}")

  def close(self) -> None:
    """Ends the files; what is being saved is waited for."""
    self._writer.close()
    if self.checkpoints is not None:
      self.checkpoints.close()

  def finish(self, now: int, params: Any) -> None:
    """Exports the parameters, where that is asked for, and writes and shows what the run came to."""
    inputs, config, exported, saved = self.inputs, self.inputs.config, "", ""
    if config.checkpoint.export_hf and now == self.loader.end_step:
      exported, files = str(self.workdir / "hf"), start.files_dir(config, self.base)
      pretrained.save_params(params, inputs.spec, exported, source_dir=files, hf_config=inputs.hf_config)
    if self.checkpoints is not None:
      saved = str(self.workdir / "ckpt" / str(now))
    said, decided = self.loader.ledger(now), guard.summary(self.workdir)
    result = metrics.summary(now, self.base_losses, self.losses, said, saved, exported, decided)
    if now == self.loader.end_step:
      result = metrics.with_predictions(result, config.plan.losses)
    if self._record_dir is not None:
      metrics.write_summary(self.workdir, result)
    console.summary(result)

  def _need(self) -> None:
    if self.checkpoints is not None:
      self.checkpoints.need(self.watch.needed)

  def _note(self, record: dict) -> None:
    if self._record_dir is not None:
      guard.add(self._record_dir, record)


class Recorders:
  """The recorders of R runs that are trained at once, step by step."""

  def __init__(
    self,
    stack: Stack,
    opened: Sequence[Inputs],
    workdirs: Sequence[pathlib.Path],
    *,
    mesh: jax.sharding.Mesh,
    heldout: Mapping[str, Any],  # source -> stream.pipeline.HeldOut
  ):
    self._stack = stack
    self._bar: Any = None
    self._runs = [
      Recorder(inputs, workdir, mesh=mesh, heldout=heldout, saves=stack.is_alone)
      for inputs, workdir in zip(opened, workdirs, strict=True)
    ]
    self._pending: tuple[int, Any] | None = None  # the step that was dispatched last, and what it measures
    self._num_positions = config_lib.tokens_per_step(opened[0].config)

  def load_base(self, evaluate: Callable) -> Any:
    """The parameters from which the runs started at first, each with those of its seed.

    A source that has joined a run since is compared with them too. None where they are not kept any more.
    """
    first = self._runs[0]
    bases = start.bases(first.base, first.inputs.spec, [run.inputs.config.seed for run in self._runs])
    for run, (_, copy) in zip(self._runs, bases, strict=True):
      run.base_copy = copy
    params = self._stack.join([params for params, _ in bases])
    if params is None:
      gone = f"{first.base.path} does not keep its checkpoint of step {first.base.checkpoint} any more"
      console.say(f"{gone}: drift is not measured")
    elif first.inputs.begin.kind == "run":
      first.base_losses |= {name: loss for name, (loss,) in evaluate(params, first.missing).items()}
    return params

  @property
  def are_new(self) -> bool:
    """Has the base of some source not been evaluated."""
    return any(run.missing for run in self._runs)

  def begin(self, *, evaluates_first: bool, bar: Any) -> None:
    """Opens the files, without what they hold of a future that was given up."""
    self._bar = bar
    for run in self._runs:
      run.begin(evaluates_first=evaluates_first)

  @property
  def diverged(self) -> list[str]:
    """Of each run how it diverged, or ""."""
    return [run.diverged for run in self._runs]

  def dispatched(self, step: int, measured: Any) -> None:
    """The step that finishes `step` updates is on its way."""
    self._pending = (step, measured)
    for run in self._left():
      run.meter.dispatched(num_positions=self._num_positions)

  def report(self, in_flight: Any) -> None:
    """Waits for the step that was dispatched last, unless that was done before, and takes in what it measured.

    Raises:
      FloatingPointError: every run has diverged; an argument for each. What is `in_flight` has landed then.
    """
    if self._pending is None:
      return
    (step, measured), self._pending = self._pending, None
    self._bar.advance(step)
    for run, of_run in zip(self._runs, self._stack.parts(jax.device_get(measured)), strict=True):
      if not run.diverged:
        run.saw(step, of_run, bar=self._bar)
    if all(self.diverged):
      jax.block_until_ready(in_flight)  # a process must not end with a step in flight
      raise FloatingPointError(*self.diverged)

  def reads_at(self, now: int) -> bool:
    """Must all be read before it is decided how to go on."""
    return any(run.watch.reads_at(now) for run in self._left())

  def enter_stage(self, stage: int) -> None:
    """One of train.stages begins."""
    for run in self._runs:
      run.meter.enters_stage(metrics.stage_flops(run.inputs.config, run.inputs.spec, stage))

  def evaluate(self, now: int, params: Any, evaluate: Callable, *, is_guarded: bool) -> None:
    """Measures the parameters after `now` updates; the guards look at it where `is_guarded`."""
    self._pause()
    with self._bar.phase("evaluate"):
      losses = evaluate(params)
    for r, (run, own) in enumerate(zip(self._runs, self._stack.parts(params), strict=True)):
      if not run.diverged:
        of_run = {name: of_runs[r] for name, of_runs in losses.items()}
        run.evaluated(now, of_run, own, bar=self._bar, is_guarded=is_guarded)

  def decide(self, now: int) -> dict | None:
    """What a guard says must be done after `now` updates; never in a stack, which has no checkpoint to go back to."""
    return self._runs[0].watch.decide(now, self._runs[0].loader) if self._stack.is_alone else None

  def wait(self) -> None:
    """Until all that was saved is on disk."""
    for run in self._runs:
      run.wait()

  def decided(self, decision: dict) -> None:
    """Writes down what a guard has decided."""
    self._runs[0].decided(decision)

  def saves(self, now: int) -> bool:
    """Must there be a checkpoint to go back to."""
    return any(run.watch.saves(now) for run in self._runs)

  def save(self, now: int, state: Any, *, is_evaluated: bool) -> None:
    """Saves each run's state after `now` updates; `is_evaluated`: its losses are known."""
    self._pause()
    for run, own in zip(self._runs, self._stack.parts(state), strict=True):
      run.save(now, own, is_evaluated=is_evaluated)

  def close(self) -> None:
    """Ends the files."""
    for run in self._runs:
      run.close()

  def finish(self, now: int, params: Any) -> None:
    """What each run came to that has not diverged."""
    for run, own in zip(self._runs, self._stack.parts(params), strict=True):
      if not run.diverged:
        run.finish(now, own)

  def _pause(self) -> None:
    for run in self._runs:
      run.meter.pause()

  def _left(self) -> list[Recorder]:
    return [run for run in self._runs if not run.diverged]
