"""A model directory and batches of tokens -> seconds of every training step, here and in Hugging Face's Trainer.

Invariant: every side starts from the same safetensors, reads the same batches, does the same AdamW in float32, and runs in a
fresh process on the cores that it is told.
"""

import contextlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tools.bench import bench_samples

OPTIMIZER = dict(lr=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
LOG_EVERY = 10  # steps between records, in both trainers
# Ours, and the one that it is held against: the whole trainer with the whole trainer, the bare step with the bare step.
PAIRS = {"cpt_jax loop": "HF Trainer", "cpt_jax step": "HF model + AdamW"}


class Clock:
  """Wall and process CPU time at every tick."""

  def __init__(self):
    self._ticks: list[tuple[float, float]] = []

  def tick(self) -> None:
    """A step is finished, or the first is about to begin."""
    self._ticks.append((time.perf_counter(), time.process_time()))

  def seconds(self, *, skip: int) -> dict[str, list[float]]:
    """Of each step after the first `skip`."""
    pairs = list(zip(self._ticks[skip:], self._ticks[skip + 1 :], strict=False))
    return {"wall_secs": [b[0] - a[0] for a, b in pairs], "cpu_secs": [b[1] - a[1] for a, b in pairs]}


class Training:
  """What training.loop has built when its loop begins: mesh, state and the jitted step."""

  def __init__(self, config: Any, spec: Any, make_params: Callable[[], Any], rates: Callable[[int], Any], **step_options: Any):
    """Builds it.

    Args:
      config: of which mesh, optimizer and step are made.
      spec: of the model.
      make_params: is called when the mesh is set.
      rates: number of the step -> its rate.
      **step_options: of `step.from_config`, beside the config and the model.
    """
    import jax

    from cpt_jax.devices import mesh as mesh_lib
    from cpt_jax.training import optimizer, state, step

    self.config, self.spec = config, spec
    self.mesh = mesh_lib.make_mesh(**config.mesh)
    jax.set_mesh(self.mesh)
    self._rates, self._num_done = rates, 0
    self.state = state.create(make_params(), optimizer.from_config(config, spec))
    self._step = jax.jit(step.from_config(config, spec, **step_options), donate_argnums=0)

  def step(self, batch: Any) -> Any:
    """One update; returns its metrics."""
    self.state, measured = self._step(self.state, batch, self._rates(self._num_done))
    self._num_done += 1
    return measured

  def to_device(self, batch: Any) -> Any:
    """As training.loop does."""
    from cpt_jax.devices import mesh as mesh_lib

    return mesh_lib.to_global(self.mesh, batch)


def of_base(config: Any, base: str | os.PathLike, *, num_sources: int) -> Training:
  """With the weights of a base and the config's rates."""
  from cpt_jax.model import pretrained, spec as spec_lib, transformer
  from cpt_jax.training import schedule

  spec = spec_lib.from_hf(spec_lib.load_hf_config(base))

  def load() -> Any:
    return pretrained.load_params(base, spec, transformer.abstract_params(spec))

  return Training(config, spec, load, schedule.from_config(config), source_weights=(1.0,) * num_sources)


class Hooks:
  """What training.loop asks at every step before it fetches rows: signals, guards, and whether anything is due."""

  def __init__(self, inputs: Any, workdir: pathlib.Path):
    from cpt_jax import config as config_lib
    from cpt_jax.devices import signals
    from cpt_jax.training import checkpoint, guard

    self._stop, self._loader = signals.StopRequest(), inputs.loader
    self._checkpoints = checkpoint.from_config(inputs.config, workdir)
    self._watch = guard.from_config(inputs.config, inputs.loader, [], inputs.asked, state=None, first_step=0)
    self._every = [config_lib.steps_of(inputs.config, key) for key in ("eval.every", "checkpoint.every")]

  def ask(self, now: int) -> None:
    """At a border between steps at which nothing is due."""
    due = [now % every == 0 for every in self._every]
    due += [self._stop.reached(now), self._watch.reads_at(now), self._watch.decide(now, self._loader) is not None]
    due += [self._watch.saves(now), now in self._checkpoints.steps()]
    assert not any(due) or now == 0, "nothing is due between two evaluations"

  def saw(self, reading: Any) -> None:
    """A step has been read."""
    self._watch.saw(reading, self._loader)

  def close(self) -> None:
    """Ends the checkpoints' threads."""
    self._checkpoints.close()


class Loop:
  """The loop of training.loop between two evaluations: rows, device, step, meter, metrics.jsonl and lines of progress.

  `host_secs` adds up what the host spends on fetching rows, on placing them and on dispatching the step; work that waits for
  the device is not in it. `losses` are those of the records.
  """

  def __init__(
    self,
    training: Training,
    batches: Iterator[Any],
    directory: pathlib.Path,
    *,
    names: tuple[str, ...],
    num_steps: int,
    hooks: Hooks | None = None,
  ):
    from cpt_jax.training import console, metrics

    directory.mkdir(parents=True, exist_ok=True)
    self._training, self._batches, self._hooks = training, batches, hooks
    self._writer = metrics.Writer(directory, start_step=0, evaluates_first=True, tensorboard=False)
    self._meter = metrics.from_config(training.config, names, training.spec, training.mesh)
    self._lines = io.StringIO()
    with contextlib.redirect_stdout(self._lines):
      self._bar = console.TrainProgress(start_step=0, num_steps=num_steps)
    self._step = 0
    self._pending: tuple[int, Any] | None = None
    self.losses: list[float] = []
    self.host_secs = dict(rows=0.0, to_device=0.0, dispatch=0.0)

  def run(self, num_steps: int, *, clock: Clock | None = None) -> None:
    """So many steps, and the wait for the last one."""
    with contextlib.redirect_stdout(self._lines):
      for _ in range(num_steps):
        if self._hooks is not None:
          self._hooks.ask(self._step)
        begin = time.perf_counter()
        batch = next(self._batches)
        fetched = time.perf_counter()
        placed = self._training.to_device(batch)
        moved = time.perf_counter()
        measured = self._training.step(placed)
        dispatched = time.perf_counter()
        if self._report() and clock is not None:
          clock.tick()
        self._step += 1
        self._pending = (self._step, measured)
        self._meter.dispatched(num_positions=batch.tokens_BT.size)
        for name, secs in zip(self.host_secs, (fetched - begin, moved - fetched, dispatched - moved), strict=True):
          self.host_secs[name] += secs
      if self._report() and clock is not None:
        clock.tick()

  def close(self) -> None:
    """Ends the files."""
    if self._hooks is not None:
      self._hooks.close()
    self._bar.close()
    self._writer.close()

  def _report(self) -> bool:
    import jax

    if self._pending is None:
      return False
    (step, measured), self._pending = self._pending, None
    reading = self._meter.read(step, jax.device_get(measured))
    self._bar.advance(reading.step)
    if self._hooks is not None:
      self._hooks.saw(reading)
    if reading.values is not None:
      self._writer.train(reading)
      self._bar.show(reading)
      self.losses.append(reading.values["loss"])
    return True


def settings(base: str | os.PathLike, *, rows: int, row_len: int, num_steps: int) -> Any:
  """The configuration of every measurement: defaults, but for the shape, the start and a constant rate."""
  from cpt_jax import config as config_lib

  c = config_lib.default()
  c.start.hf = str(base)
  c.data.row_len = row_len
  c.train.batch_rows = rows
  c.train.length = f"{num_steps} steps"
  c.schedule.name, c.schedule.warmup = "constant", "0 steps"
  c.schedule.lr_peak, c.schedule.lr_final = OPTIMIZER["lr"], 0.0
  for key in ("b1", "b2", "eps", "weight_decay", "clip_norm"):
    c.optimizer[key] = OPTIMIZER[key]
  c.log.every = LOG_EVERY
  return c


def batch_of(tokens_BT: Any) -> Any:
  """Rows that are a document each; the last position has nothing to predict, as in Hugging Face's loss."""
  import numpy as np

  from cpt_jax.stream.batch import Batch

  rows, row_len = tokens_BT.shape
  weights_BT = np.ones((rows, row_len), np.float32)
  weights_BT[:, -1] = 0
  positions_BT = np.broadcast_to(np.arange(row_len, dtype=np.int32), (rows, row_len))
  return Batch(
    tokens_BT, np.roll(tokens_BT, -1, axis=1), weights_BT, np.ones_like(tokens_BT), positions_BT.copy(), np.zeros(rows, np.int32)
  )


def _our_step(base: pathlib.Path, tokens_SBT: Any, clock: Clock) -> list[float]:
  import jax

  training = _our_training(base, tokens_SBT)
  batches = [training.to_device(batch_of(tokens_BT)) for tokens_BT in tokens_SBT]
  losses = []
  clock.tick()
  for batch in batches:
    sums = jax.block_until_ready(training.step(batch)).sums
    clock.tick()
    losses.append(sums)
  return [float(sums.loss / sums.tokens) for sums in losses]


def _our_loop(base: pathlib.Path, tokens_SBT: Any, clock: Clock) -> list[float]:
  training = _our_training(base, tokens_SBT)
  batches = iter([batch_of(tokens_BT) for tokens_BT in tokens_SBT])
  loop = Loop(training, batches, base / f"loop_{os.getpid()}", names=("text",), num_steps=len(tokens_SBT))
  clock.tick()
  loop.run(len(tokens_SBT), clock=clock)
  loop.close()
  return loop.losses


def _our_training(base: pathlib.Path, tokens_SBT: Any) -> Training:
  num_steps, rows, row_len = tokens_SBT.shape
  return of_base(settings(base, rows=rows, row_len=row_len, num_steps=num_steps), base, num_sources=1)


def _hf_model(base: pathlib.Path) -> Any:
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(len(bench_samples.cores()))
  return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()


def _hf_step(base: pathlib.Path, tokens_SBT: Any, clock: Clock) -> list[float]:
  import torch

  model, o = _hf_model(base), OPTIMIZER
  decayed = [p for p in model.parameters() if p.ndim > 1]  # all but the norms, as in our default rules
  others = [p for p in model.parameters() if p.ndim <= 1]
  groups = [{"params": decayed, "weight_decay": o["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=o["lr"], betas=(o["b1"], o["b2"]), eps=o["eps"], fused=True)
  batches = [torch.from_numpy(tokens_BT).long() for tokens_BT in tokens_SBT]
  losses = []
  clock.tick()
  for batch in batches:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"])
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    clock.tick()
  return losses


def _hf_trainer(base: pathlib.Path, tokens_SBT: Any, clock: Clock) -> list[float]:
  import torch
  import transformers

  class Ticks(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
      if state.global_step == 0:
        clock.tick()

    def on_step_end(self, args, state, control, **kwargs):
      clock.tick()

  class KeepsLosses(transformers.Trainer):
    losses: list[Any] = []  # noqa: RUF012 (one trainer a process)

    def training_step(self, *args, **kwargs):
      self.losses.append(super().training_step(*args, **kwargs))
      return self.losses[-1]

  num_steps, rows, row_len = tokens_SBT.shape
  examples = [{"input_ids": row, "labels": row} for row in torch.from_numpy(tokens_SBT.reshape(-1, row_len)).long()]
  o = OPTIMIZER
  args = transformers.TrainingArguments(
    output_dir=str(base / "hf_trainer"),
    use_cpu=True,
    per_device_train_batch_size=rows,
    max_steps=num_steps,
    train_sampling_strategy="sequential",
    learning_rate=o["lr"],
    lr_scheduler_type="constant",
    adam_beta1=o["b1"],
    adam_beta2=o["b2"],
    adam_epsilon=o["eps"],
    weight_decay=o["weight_decay"],
    max_grad_norm=o["clip_norm"],
    logging_steps=LOG_EVERY,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
  )
  trainer = KeepsLosses(model=_hf_model(base), args=args, train_dataset=examples, callbacks=[Ticks()])
  trainer.train()
  return [float(loss) for loss in trainer.losses]


_SIDES = {"cpt_jax step": _our_step, "cpt_jax loop": _our_loop, "HF model + AdamW": _hf_step, "HF Trainer": _hf_trainer}


def _main(side: str, directory: pathlib.Path, num_steps: int, skip: int) -> None:
  import numpy as np

  clock = Clock()
  losses = _SIDES[side](directory, np.load(directory / "tokens.npy")[:num_steps], clock)
  print(json.dumps({"side": side, "losses": losses, **clock.seconds(skip=skip)}))


if __name__ == "__main__":
  bench_samples.take_cores(sys.argv[5])
  _main(sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:5]))
