"""What a run measures -> its files, its guards and its checkpoints.

Invariant: what is recorded of a run follows from its own numbers alone; one that has diverged is not recorded any further.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cpt_jax.devices import hosts
from cpt_jax.model import pretrained
from cpt_jax.training import checkpoint, console, drift, guard, metrics, start
from cpt_jax.training.inputs import Inputs
from cpt_jax.training.perplexity import SourceLoss
from cpt_jax.training.stack import Stack


class Recorder:
  """One run from where it begins: `begin` opens its files, `close` ends them.

  `heldout`: source -> stream.pipeline.HeldOut.
  """

  def __init__(self, inputs: Inputs, workdir: pathlib.Path, *, mesh: jax.sharding.Mesh, heldout: Mapping[str, Any]):
    config, begin, loader = inputs.config, inputs.begin, inputs.loader
    meta = checkpoint.read_meta(workdir, begin.checkpoint) if begin.kind == "run" else {}
    self.inputs, self.loader, self.workdir = inputs, loader, workdir
    self.base = inputs.base._replace(checkpoint=meta["base_checkpoint"]) if meta else inputs.base  # that run may have gone on
    self.base_losses = start.kept_losses(meta, heldout, replaced=loader.replaced)
    self.losses: dict[str, SourceLoss] = {}  # of the last evaluation
    self.base_copy: Any = None  # the base's parameters, from which drift is measured
    self.checkpoints = checkpoint.from_config(config, workdir)
    self.meter = metrics.from_config(config, loader.names, inputs.spec, mesh, state=meta.get("meter"))
    self.watch = guard.from_config(config, loader, inputs.decisions, inputs.asked, state=meta.get("guard"), first_step=begin.step)
    self.checkpoints.need(self.watch.needed)
    self.diverged = ""  # or how

  @property
  def missing(self) -> tuple[str, ...]:
    """Sources whose base has not been evaluated yet."""
    return tuple(name for name in self.loader.names if name not in self.base_losses)

  def begin(self, *, evaluates_first: bool) -> None:
    """Opens the files, without what they hold of a future that was given up; process 0 alone writes any."""
    first_step, tensorboard = self.inputs.begin.step, self.inputs.config.log.tensorboard
    if hosts.is_main():
      metrics.keep(self.workdir / "periods.json", self.loader.periods())
      guard.drop_after(self.workdir, first_step)
    run_dir = self.workdir if hosts.is_main() else None
    self._writer = metrics.Writer(run_dir, start_step=first_step, evaluates_first=evaluates_first, tensorboard=tensorboard)

  def saw(self, now: int, measured: Any, *, bar: Any) -> None:
    """Takes in, on the host, what the step measured that finished `now` updates."""
    if self.diverged:
      return
    reading = self.meter.read(now, measured)
    if reading.values is not None:
      self._writer.train(reading)
      bar.show(reading)
    note = self.watch.saw(reading, self.loader)
    if note is not None:
      self._note(note, guard.words(note))
    if self.watch.is_lost:
      self.diverged = guard.lost_words(self.watch.in_a_row, now, self.workdir)

  def evaluated(self, now: int, losses: dict[str, SourceLoss], params: Any, *, bar: Any, is_guarded: bool) -> None:
    """Takes in an evaluation of `params`, the parameters after `now` updates; the guards look at it where `is_guarded`."""
    if self.diverged:
      return
    self.losses, self.base_losses = losses, losses | self.base_losses
    moved = {} if self.base_copy is None else drift.by_layer(params, self.base_copy)
    flops = metrics.training_flops(self.inputs.config, self.inputs.spec, now)
    self._writer.eval(now, losses, self.base_losses, moved, flops=flops)
    self._writer.ledger(now, self.loader.ledger(now))
    bar.evaluated(now, losses, self.base_losses)
    warning = self.watch.evaluated(now, losses, self.base_losses) if is_guarded else ""
    if warning:
      console.say(f"guard    {warning}")

  def save(self, now: int, state: Any, *, is_evaluated: bool) -> None:
    """Saves the state after `now` updates with all that a start needs to go on from it; `is_evaluated`: `losses` are of it."""
    self.meter.pause()
    of_base = {name: loss._asdict() for name, loss in self.base_losses.items()}
    kept = {"loader": self.loader.state(now), "hf_config": self.inputs.hf_config, "base_losses": of_base}
    kept |= {"base_checkpoint": self.base.checkpoint, "guard": self.watch.state(), "meter": self.meter.state()}
    self.checkpoints.need(self.watch.needed)
    self.checkpoints.save(state, now, meta=kept, losses=self.losses if is_evaluated else {})

  def decided(self, decision: dict) -> None:
    """Writes down what a guard has decided."""
    self._note(decision, f"{guard.words(decision)}. Written to {self.workdir / guard.FILE}")

  def close(self) -> None:
    """Ends the files; what is being saved is waited for."""
    self._writer.close()
    self.checkpoints.close()

  def finish(self, now: int, params: Any) -> None:
    """Exports the parameters, where that is asked for, and writes and shows what the run came to, unless it has diverged."""
    if self.diverged:
      return
    inputs, config, is_over, exported = self.inputs, self.inputs.config, now == self.loader.end_step, ""
    if config.checkpoint.export_hf and is_over:
      exported, files = str(self.workdir / "hf"), self.base.path if self.base.kind == "hf" else config.data.tokenizer
      pretrained.save_params(params, inputs.spec, exported, source_dir=files, hf_config=inputs.hf_config)
    saved = str(self.workdir / "ckpt" / str(now)) if now in checkpoint.saved_steps(self.workdir) else ""
    read, decided = self.loader.ledger(now), guard.summary(self.workdir)
    predicted = config.plan.losses if is_over else ()
    result = metrics.summary(now, self.base_losses, self.losses, read, saved, exported, decided, predicted)
    if hosts.is_main():
      metrics.keep(self.workdir / "summary.json", result)
    console.summary(result)

  def _note(self, entry: dict, words: str) -> None:
    if hosts.is_main():
      guard.add(self.workdir, entry)
    console.say(f"guard    {words}")


def load_base(runs: Sequence[Recorder], stack: Stack, evaluate: Callable) -> Any:
  """The parameters from which the runs started at first; a source that has joined a run since is compared with them too.

  None if they were another run's, which does not keep them any more.
  """
  base, spec = runs[0].base, runs[0].inputs.spec
  seeds = [run.inputs.config.seed if base.kind == "scratch" else 0 for run in runs]  # of random parameters
  bases = {seed: start.base_params(base, spec, seed=seed) for seed in set(seeds)}
  copies = {seed: drift.keep_base(params) for seed, params in bases.items()}
  for run, seed in zip(runs, seeds, strict=True):
    run.base_copy = copies[seed]
  params = stack.join([bases[seed] for seed in seeds])
  if params is None:
    console.say(f"{base.path} does not keep its checkpoint of step {base.checkpoint} any more: drift is not measured")
  elif runs[0].inputs.begin.kind == "run" and runs[0].missing:
    runs[0].base_losses |= evaluate(params, runs[0].missing)[0]
  return params
