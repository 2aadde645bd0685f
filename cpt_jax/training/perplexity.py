"""Held-out rows of every source -> loss and bits per byte.

Invariant: sums over whole documents, each target once, divided once, by tokens or by the bytes that these spell, which are all
but the documents' first tokens'; padding counts for nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class SourceLoss(NamedTuple):
  """A source's held-out loss under one set of parameters."""

  loss: float  # nats per token
  bits_per_byte: float  # comparable between tokenizers
  tokens: int  # targets that were predicted
  bytes: int  # UTF-8 bytes of the documents
  documents: int
  # Those that the targets spell, by which bits_per_byte divide; None in records of versions that divided by all.
  target_bytes: int | None = None


def evaluate(
  params: Any,
  heldout: Mapping[str, Any],
  *,
  eval_step: Callable,
  to_device: Callable,
  parts: Callable[[Any], Iterable] = lambda sums: (sums,),
) -> list[dict[str, SourceLoss]]:
  """Loss of `params` on the held-out documents of each source (name -> stream.heldout.HeldOut), for each run that they are of.

  `parts` divides the sums of the jitted `eval_step` between the runs.
  """
  found = []
  for held in heldout.values():
    sums = jax.device_get([eval_step(params, to_device(batch)) for batch in held.batches])
    found.append([source_loss(held, of_run) for of_run in zip(*map(parts, sums), strict=True)])
  return [dict(zip(heldout, of_run, strict=True)) for of_run in zip(*found, strict=True)]


def source_loss(held: Any, sums: Sequence[Any]) -> SourceLoss:
  """From the loss sums of all its batches, on the host."""
  # Float64: a float32 running sum would round away the last digits of a long evaluation.
  loss_sum = math.fsum(float(s.loss) for s in sums)
  num_tokens = sum(int(s.tokens) for s in sums)
  assert num_tokens == held.num_tokens, f"evaluated {num_tokens} targets of {held.num_tokens}"
  bits_per_byte = loss_sum / math.log(2) / held.num_target_bytes if held.num_target_bytes else math.nan
  return SourceLoss(loss_sum / num_tokens, bits_per_byte, num_tokens, held.num_bytes, held.num_documents, held.num_target_bytes)


def recorded(values: Mapping[str, Any], held: Any | None) -> SourceLoss:
  """A loss that a checkpoint keeps; one of an older version's with the target bytes of the same held-out documents."""
  loss = SourceLoss(**values)
  if loss.target_bytes is not None or held is None or held.num_bytes != loss.bytes or not held.num_target_bytes:
    return loss
  return loss._replace(bits_per_byte=loss.bits_per_byte * loss.bytes / held.num_target_bytes, target_bytes=held.num_target_bytes)
