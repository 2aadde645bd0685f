"""SIGTERM and SIGINT -> a request to stop at the next border between steps.

Invariant: the first signal asks, the second ends the process as usual; several processes stop at the same step.
"""

import contextlib
import signal
from collections.abc import Iterator

from cpt_jax.devices import hosts


class StopRequest:
  """Set by the first signal; the run saves and ends at a border between steps."""

  asked = False

  def reached(self, step: int) -> bool:
    """Is this the border: the next one, or that on which all processes agree when one of them was asked."""
    return hosts.reached_stop(step) if hosts.num_processes_connected() > 1 else self.asked


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT in the block into a request."""
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
