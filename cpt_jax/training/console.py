"""What a run shows a person: a progress bar on a terminal, plain lines elsewhere, and its tables.

Invariant: nothing here changes the run, and a closed pipe does not end it.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.console
import rich.progress
import rich.table
import rich.text

from cpt_jax import progress
from cpt_jax.training import guard

# Into a file or a pipe tables are written at a fixed width; rich would fold them to 80 columns.
_IS_TERMINAL = sys.stdout.isatty()


class _Console(rich.console.Console):
  def on_broken_pipe(self) -> None:
    """Nobody reads any more (`| head`): rich would end the process, a run goes on without words."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails once more


console = _Console(highlight=False, width=None if _IS_TERMINAL else 160)


@contextmanager
def muted() -> Iterator[None]:
  """Nothing is shown meanwhile: the block's work is told otherwise."""
  before, console.quiet = console.quiet, True
  try:
    yield
  finally:
    console.quiet = before


def say(text: str) -> None:
  """A line of plain text."""
  console.print(text, markup=False, soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[Any]], *, left: int = 1) -> None:
  """A table; the first `left` columns are names, the rest figures."""
  made = rich.table.Table(title=title, title_justify="left", title_style="bold", box=rich.table.box.SIMPLE_HEAD, pad_edge=False)
  for i, column in enumerate(columns):
    made.add_column(column, justify="left" if i < left else "right", overflow="fold")
  for row in rows:
    made.add_row(*(rich.text.Text(str(cell)) for cell in row))
  console.print(made)


def count(n: float) -> str:
  """1,234,567 -> 1.23M; below 100,000 all digits."""
  for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
    if abs(n) >= scale:
      return f"{n / scale:.2f}{letter}"
  return f"{n:,.0f}"


def size(num_bytes: float) -> str:
  """Bytes for people, in powers of 1024."""
  for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if abs(num_bytes) >= scale:
      return f"{num_bytes / scale:.2f} {unit}"
  return f"{num_bytes:.0f} B"


def _bar(what: str, *middle: rich.progress.ProgressColumn, on: rich.console.Console) -> rich.progress.Progress:
  """A bar that has begun; one that is never seen where there is no terminal."""
  made = rich.progress.Progress(*progress.columns(what, *middle), console=on, disable=not console.is_terminal)
  made.start()
  return made


class TrainProgress:
  """The bar of a run (a terminal) or a line at each `show` (a file or a pipe)."""

  def __init__(self, *, start_step: int, num_steps: int):
    self._num_steps, self._start_step, self._started = num_steps, start_step, time.monotonic()
    columns = rich.progress.MofNCompleteColumn(), rich.progress.TextColumn("{task.fields[figures]}")
    self._bar = _bar("{task.fields[phase]}", *columns, on=console)
    self._task = self._bar.add_task("", total=num_steps, completed=start_step, phase="train", figures="")

  def advance(self, step: int) -> None:
    """`step` updates are finished."""
    self._bar.update(self._task, completed=step)

  def show(self, reading: Any) -> None:
    """A training.metrics.Reading: loss of each source, rate and speed."""
    values = reading.values
    losses = "  ".join(f"{name} {loss:.3f}" for name, loss in values["source_loss"].items())
    figures = f"{losses}  rate {values['rate']:.2e}  {count(reading.tokens_per_sec)} tok/s"
    if reading.mfu is not None:
      figures += f"  MFU {reading.mfu['causal']:.1%}"
    if console.is_terminal:
      self._bar.update(self._task, figures=figures)
      return
    elapsed = time.monotonic() - self._started
    left = elapsed / max(reading.step - self._start_step, 1) * (self._num_steps - reading.step)
    done = f"step {reading.step}/{self._num_steps}  loss {values['loss']:.3f}"
    say(f"{done}  {figures}  grad {values['grad_norm']:.2f}  left {clock(left)}")

  def evaluated(self, step: int, losses: dict[str, Any], base_losses: dict[str, Any]) -> None:
    """A line for an evaluation: each source's held-out loss and its change against the base."""
    parts = [f"{name} {now.loss:.4f} ({now.loss - base_losses[name].loss:+.4f})" for name, now in losses.items()]
    say(f"eval {step}/{self._num_steps}  held-out nats/token (change)  " + "  ".join(parts))

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Names what is going on instead of training."""
    self._bar.update(self._task, phase=name)
    yield
    self._bar.update(self._task, phase="train")

  def close(self) -> None:
    """Ends the bar."""
    self._bar.stop()


class Bar:
  """A bar over `total` parts of some work, with the time left; nothing where there is no terminal.

  It has a console of its own, so it is seen while the other one is muted.
  """

  def __init__(self, total: int):
    self._bar = _bar("{task.description}", rich.progress.TaskProgressColumn(), on=_Console(highlight=False))
    self._task = self._bar.add_task("", total=total)

  def describe(self, text: str) -> None:
    """What is being worked at."""
    self._bar.update(self._task, description=text)

  def advance(self, parts: int) -> None:
    """So many more are done."""
    self._bar.update(self._task, advance=parts)

  def stop(self) -> None:
    """Ends the bar."""
    self._bar.stop()


def clock(seconds: float) -> str:
  """75 -> 1:15, 3675 -> 1:01:15."""
  minutes, secs = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def header(config: Any, workdir: Any, spec: Any, mesh: Any, start: str, *, num_parameters: int) -> None:
  """What is about to run."""
  shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  say(f"run      {workdir}")
  say(f"model    {spec.family}, {count(num_parameters)} parameters, {spec.num_layers} layers of width {spec.width}")
  say(f"start    {start}")
  say(f"devices  {mesh.devices.size} x {mesh.devices.flat[0].device_kind}: {shape}")
  say(f"length   {config.train.length}, {config.train.batch_rows} rows of {config.data.row_len} a step")


def stage(index: int, stages: Sequence[Any]) -> str:
  """One of a run's stages, in words."""
  one = stages[index]
  where = f"stage {index + 1} of {len(stages)}, steps {one.first:,} to {one.end - 1:,}"
  return f"{where}: {one.describe()}, lr_peak {one.schedule['lr_peak']:g}"


def data_changes(loader: Any, *, rate: float) -> None:
  """What is new in a run that goes on, and where it ends before its length."""
  if loader.is_changed:
    before, now = (list(period.sources) for period in loader.order.periods[-2:])
    words = [f"{name} joins" for name in now if name not in before] + [f"{name} leaves" for name in before if name not in now]
    skipped = {name: loader.order.periods[-1].num_skipped(name) - loader.order.periods[-2].num_skipped(name) for name in now}
    words += [f"{n:,} rows of {name} are passed over" for name, n in skipped.items() if n]
    changed = "; ".join(words) or "shares or lengths changed"
    say(f"data     period {len(loader.order.periods)} begins at step {loader.start_step}: {changed}; next rate {rate:.3e}")
  if loader.end_step < loader.num_steps:
    why = ", ".join(f"{name} runs out" for name, step, action in loader.order.ends if action != "renormalise")
    say(
      f"data     the run ends at step {loader.end_step} of {loader.num_steps}: {why}. The rate does not reach its last value; "
      f"train.length='{loader.end_step} steps' lets it"
    )


def guards(config: Any, loader: Any, decisions: list[dict], asked: Any) -> None:
  """A line for each guard that is on, and for what they have decided."""
  shares = {source.name: source.share for source in loader.sources}
  for line in guard.describe(config, shares, start_step=loader.start_step):
    say(f"guard    {line}")
  for decision in decisions:
    say(f"guard    decided before: {guard.words(decision)}")
  if not guard.is_followed(asked, decisions):
    say("guard    the config asks for other shares than it did then: they are taken as they stand, not as a guard changed them")


def meaning(change: float, role: str) -> str:
  """A change of a source's held-out loss in a word."""
  return "learning" if change < 0 else "" if change == 0 else "forgetting" if role == "replay" else "loss rose"


def summary(result: dict[str, Any]) -> None:
  """The table at the end: per source the base, the result and the difference, and what was consumed."""
  rows = []
  for source in result["sources"]:
    base, now, role = source["base"], source["result"], source["role"]
    change = now["loss"] - base["loss"]
    rows.append(
      [source["source"], role, f"{base['loss']:.4f}", f"{now['loss']:.4f}", f"{change:+.4f}", meaning(change, role)]
      + [f"{base['bits_per_byte']:.4f}", f"{now['bits_per_byte']:.4f}", f"{now['bits_per_byte'] - base['bits_per_byte']:+.4f}"]
      + [count(source["tokens"]), count(source["documents"]), f"{source['epochs']:.2f}"]
    )
  table(
    f"held-out loss at step {result['step']}: nats per token, bits per byte, and what was trained on",
    ["source", "role", "base", "result", "change", "", "base b/B", "result b/B", "change b/B", "tokens", "documents", "epochs"],
    rows,
    left=2,
  )
  planned = [source for source in result["sources"] if "predicted" in source]
  if planned:
    table(
      "what the plan had predicted: nats per token",
      ["source", "predicted", "from", "to", "measured", "off by", ""],
      [
        [source["source"], *(f"{source['predicted'][key]:.4f}" for key in ("loss", "low", "high"))]
        + [f"{source['result']['loss']:.4f}", f"{source['result']['loss'] - source['predicted']['loss']:+.4f}"]
        + ["within" if source["predicted"]["low"] <= source["result"]["loss"] <= source["predicted"]["high"] else "outside"]
        for source in planned
      ],
    )
  say(f"checkpoint    {result['checkpoint']}")
  for line in result["guard"]:
    say(f"guard         {line}")
  if result["exported"]:
    say(f"Hugging Face  {result['exported']}")
