"""A loader -> what a run will read of each source, for people.

Invariant: the figures are those that the run counts; nothing is read for them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cpt_jax.stream.pipeline import Loader
from cpt_jax.stream.selection import Selection
from cpt_jax.stream.sources import Source

# Up to here repeats are worth almost as much as new text (Muennighoff et al. 2305.16264; D-CPT law, 2406.01375).
MANY_EPOCHS = 4.0


class SourceSummary(NamedTuple):
  """What a run reads of a source, for people."""

  source: str
  role: str
  store: str  # its directory
  store_tokens: int
  train_documents: int
  train_tokens: int  # an epoch's targets
  train_rows: int  # an epoch's rows
  efficiency: float  # share of the rows' positions that are no padding
  num_split: int  # documents of an epoch that are cut
  selection: Selection
  heldout_documents: int
  heldout_tokens: int  # targets of all held-out documents
  share_start: float  # normalised, of the first batch that this start reads
  share_end: float  # normalised, of the last batch
  rows: int  # that the run reads
  tokens: int  # that the run reads, from the mean row; `Loader.ledger` counts exactly
  epochs: float
  end: str  # when it runs out, and what happens then
  notes: tuple[str, ...]  # what deserves a second look


def describe(loader: Loader) -> list[SourceSummary]:
  """What the run will read, an entry for each source."""
  rows, last_step = loader.order.rows(loader.end_step), max(loader.end_step - 1, loader.start_step)
  steps = (loader.start_step, last_step) if loader.end_step > loader.start_step else ()
  first, last = [loader.order.shares(step) for step in steps] or ({}, {})
  words = {"renormalise": "others share what is left", "stop": "the run stops", "error": "refused"}
  ends = {name: f"step {step}: {words[action]}" for name, step, action in loader.order.ends}
  summaries = []
  for source, layout, chosen in zip(loader.sources, loader.layouts, loader.selections, strict=True):
    epochs = rows[source.name] / layout.num_rows if rows[source.name] else 0.0
    summary = SourceSummary(
      source=source.name,
      role=source.role,
      store=str(source.store.path),
      store_tokens=source.store.num_tokens,
      train_documents=len(source.train_documents),
      train_tokens=layout.num_targets,
      train_rows=layout.num_rows,
      efficiency=layout.efficiency,
      num_split=layout.num_split,
      selection=chosen,
      heldout_documents=len(source.heldout_documents),
      heldout_tokens=source.num_pairs(source.heldout_documents),
      share_start=first.get(source.name, 0.0),
      share_end=last.get(source.name, 0.0),
      rows=rows[source.name],
      tokens=round(epochs * layout.num_targets),
      epochs=epochs,
      end=ends.get(source.name, "" if not epochs else _epoch_words(loader, source.name, layout.num_rows)),
      notes=tuple(_notes(source, chosen, epochs)),
    )
    summaries.append(summary)
  return summaries


def _epoch_words(loader: Loader, name: str, epoch_rows: int) -> str:
  """When a source that is repeated was read whole."""
  low, high = loader.start_step, loader.end_step
  if loader.order.rows(high)[name] < epoch_rows or loader.order.rows(low)[name] >= epoch_rows:
    return ""
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if loader.order.rows(middle)[name] < epoch_rows else (low, middle)
  return f"step {high}: it is repeated"


def _notes(source: Source, chosen: Selection, epochs: float) -> Iterator[str]:
  if not source.is_trained:
    yield f"{source.name} is evaluated, not trained on"
  elif epochs > MANY_EPOCHS:
    yield (
      f"{source.name} is read {epochs:.3g} times; up to about {MANY_EPOCHS:g} repeats are worth almost as much as new text, "
      "later ones less and less (Muennighoff et al. 2305.16264; for continual pretraining the D-CPT law, 2406.01375)"
    )
  if source.is_trained and source.loss_weight == 0:
    yield f"{source.name} is read but nothing is learnt from it (loss_weight=0)"
  if chosen.num_too_short or chosen.num_too_long:
    left_out = chosen.tokens_too_short + chosen.tokens_too_long
    yield (
      f"{source.name}: {chosen.num_too_short:,} documents are too short and {chosen.num_too_long:,} too long; "
      f"{left_out:,} tokens are left out"
    )
  for bracket in chosen.brackets:
    yield (
      f"{source.name}: documents from {bracket.from_tokens:,} tokens are {bracket.share:.1%} of its tokens (asked for "
      f"{bracket.share_wanted:.1%}), each read {bracket.copies:.3g} times an epoch"
    )
