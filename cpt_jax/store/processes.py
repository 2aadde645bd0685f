"""The units of a store that are not finished -> done, by this process or several, with a progress bar.

Invariant: how many processes do the work changes nothing of what they write; none of them outlives this one.
"""

import concurrent.futures
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import rich.console
import rich.progress

from cpt_jax.store import tokenization, units
from cpt_jax.store.token_files import IN_PROGRESS
from cpt_jax.store.units import UNIT_BYTES, Unit
from cpt_jax.store.work import Counters, Job, Task, Worker


def run(job: Job, tokenizer: tokenization.Tokenizer, *, num_workers: int, progress: bool) -> None:
  """Does the units that are not finished yet; with `num_workers` 0 by as many processes as there are cores and work."""
  for path in (Path(job.task.output) / IN_PROGRESS).iterdir():  # what interrupted processes left
    if path.name.count(".") > 1:
      path.unlink()
  markers, counters = units.read_markers(job.task.output, job.units), Counters()
  for marker, unit in zip(markers, job.units, strict=True):
    if marker:
      counters.add("bytes", sum(piece.num_bytes for piece in unit))
      counters.add("documents", marker["info"]["num_documents"])
      counters.add("tokens", marker["info"]["num_tokens"])
      counters.add("bad", marker["num_bad"])
  todo = [i for i, marker in enumerate(markers) if marker is None]
  todo_bytes = sum(piece.num_bytes for i in todo for piece in job.units[i])
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  wanted = num_workers or min(cores, -(-todo_bytes // UNIT_BYTES))
  num_processes = max(min(wanted, len(todo)), 1)
  with _Display(progress, job, counters, num_done=len(job.units) - len(todo)) as display:
    if num_processes == 1:
      worker = Worker(job.task, tokenizer, counters, tick=display.show)
      for i in todo:
        worker.run(i, job.units[i])
    else:
      num_threads = max(wanted // num_processes, 1)
      _run_processes(job, todo, counters, num_processes=num_processes, num_threads=num_threads, show=display.show)


def _run_processes(
  job: Job, todo: list[int], counters: Counters, *, num_processes: int, num_threads: int, show: Callable[[], None]
) -> None:
  pool = concurrent.futures.ProcessPoolExecutor(
    num_processes,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_process,
    initargs=(job.task, counters, num_threads),
  )
  try:
    pending = {pool.submit(_run_in_process, i, job.units[i]) for i in todo}
    while pending:
      done, pending = concurrent.futures.wait(pending, timeout=0.25, return_when=concurrent.futures.FIRST_EXCEPTION)
      show()
      for future in done:
        future.result()
  except concurrent.futures.process.BrokenProcessPool:
    advice = "a worker process died, most likely for want of memory; run again with fewer --num_workers"
    raise OSError(errno.ENOMEM, advice, job.task.output) from None
  finally:
    counters.add("stop", 1)  # those still at work stop at their next batch
    pool.shutdown(wait=True, cancel_futures=True)


_process_worker: Worker | None = None  # of this worker process


def _start_process(task: Task, counters: Counters, num_threads: int) -> None:
  global _process_worker
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
  os.environ["RAYON_NUM_THREADS"] = str(num_threads)
  parent = multiprocessing.parent_process()
  assert parent is not None
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # do not outlive a killed parent
  _process_worker = Worker(task, task.load_tokenizer(), counters)


def _run_in_process(number: int, unit: Unit) -> None:
  assert _process_worker is not None
  _process_worker.run(number, unit)


class _Display:
  """A progress bar on a terminal, a plain line now and then elsewhere."""

  _LINE_SECS = 20.0

  def __init__(self, is_shown: bool, job: Job, counters: Counters, *, num_done: int):
    console = rich.console.Console(stderr=True)
    self._counters, self._total = counters, sum(piece.num_bytes for unit in job.units for piece in unit)
    self._is_plain = is_shown and not console.is_terminal
    self._start_bytes, self._start_secs = counters["bytes"], time.monotonic()
    self._line_secs = self._start_secs
    if is_shown and num_done:
      print(f"{job.task.output}: goes on; {num_done} of {len(job.units)} units of work are finished", file=sys.stderr)
    self._has_bar, text = is_shown and console.is_terminal, rich.progress.TextColumn
    columns = text("prepare"), rich.progress.BarColumn(), rich.progress.TaskProgressColumn(), text("{task.fields[figures]}")
    left = rich.progress.TimeRemainingColumn(compact=True)
    self._bar = rich.progress.Progress(*columns, left, console=console, disable=not self._has_bar)
    self._row = self._bar.add_task("", total=self._total, completed=self._start_bytes, figures="")

  def __enter__(self) -> "_Display":
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._has_bar:
      self.show()
    self._bar.stop()

  def show(self) -> None:
    """Brings the display up to date."""
    now = time.monotonic()
    if not self._has_bar and not (self._is_plain and now - self._line_secs >= self._LINE_SECS):
      return
    counted = self._counters
    done, num_bad = counted["bytes"], counted["bad"]
    rate = (done - self._start_bytes) / max(now - self._start_secs, 1e-3)
    bad = f"  {num_bad:,} bad" if num_bad else ""
    tokens = f"{counted['documents']:,} documents  {counted['tokens'] / 1e6:,.1f} M tokens"
    figures = f"{rate / 1e6:.2f} MB/s  {tokens}{bad}"
    if self._has_bar:
      self._bar.update(self._row, completed=done, figures=figures)
    else:
      self._line_secs = now
      left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else ""
      print(f"prepare: {100 * done / max(self._total, 1):.0f}%  {figures}  {left}", file=sys.stderr, flush=True)
