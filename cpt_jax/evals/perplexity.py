"""Held-out rows of every source -> loss and bits per byte.

Invariant: sums over whole documents, each target once, divided once; padding counts for nothing.
Called by train.loop, probe.stacked.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax


class SourceLoss(NamedTuple):
  """A source's held-out loss under one set of parameters."""

  loss: float  # nats per token
  bits_per_byte: float  # comparable between tokenizers
  tokens: int  # targets that were predicted
  bytes: int  # UTF-8 bytes of the documents
  documents: int


def evaluate(
  params: Any, heldout: dict[str, Any], *, eval_step: Callable, to_device: Callable, on_batch: Callable[[], None] = lambda: None
) -> dict[str, SourceLoss]:
  """Loss of `params` on the held-out documents of each source.

  Args:
    heldout: source name -> data.pipeline.HeldOut
    eval_step: the jitted `train.step.make_eval_step`
    to_device: numpy batch -> global arrays
    on_batch: called after each batch, for a progress bar
  """
  return {
    name: source_loss(held, jax.device_get([eval_step(params, to_device(batch)) for batch in _each(held.batches, on_batch)]))
    for name, held in heldout.items()
  }


def _each(batches: Iterable, on_batch: Callable[[], None]) -> Iterable:
  for batch in batches:
    yield batch
    on_batch()


def source_loss(held: Any, sums: Sequence[Any]) -> SourceLoss:
  """From the loss sums of all its batches, on the host."""
  # Float64: a float32 running sum would round away the last digits of a long evaluation.
  loss_sum = math.fsum(float(s.loss) for s in sums)
  num_tokens = sum(int(s.tokens) for s in sums)
  assert num_tokens == held.num_tokens, f"evaluated {num_tokens} targets of {held.num_tokens}"
  return SourceLoss(
    loss_sum / num_tokens, loss_sum / math.log(2) / held.num_bytes, num_tokens, held.num_bytes, held.num_documents
  )
