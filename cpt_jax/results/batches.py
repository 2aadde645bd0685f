"""A run and a step -> the texts in the rows of its batch, as the model was given them.

Invariant: reads the run's own periods and its stores, never the config as it is now; every row is a function of its
number alone.
"""

import json
import pathlib
from typing import Any

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenization
from cpt_jax.stream import pipeline


def rows_of(run: pathlib.Path, step: int, chosen: list[int]) -> list[dict[str, Any]]:
  """What the rows of a step's batch hold; `chosen` are rows of the batch, () = all.

  Raises ConfigError: no such run, step or row, or a store that is not what it was.
  """
  try:
    periods = json.loads((run / "periods.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ConfigError(f"--run={run}: {pathlib.Path(error.filename).name} is missing; name the --workdir of a run") from None
  loader = pipeline.from_periods(periods, step)
  if step >= loader.end_step:
    raise ConfigError(f"--step={step}: the run ends at step {loader.end_step}, where a source of it runs out")
  wrong = [b for b in chosen if not 0 <= b < loader.batch_rows]
  if wrong:
    raise ConfigError(f"--rows={wrong}: a batch has the rows 0 to {loader.batch_rows - 1}")
  tokenizer = tokenization.load(config["data"]["tokenizer"])
  return [_row(loader, tokenizer, step, b) for b in chosen or range(loader.batch_rows)]


def _row(loader: pipeline.Loader, tokenizer: tokenization.Tokenizer, step: int, b: int) -> dict[str, Any]:
  index = step * loader.batch_rows + b
  m, nth, pieces = loader.locate(index)
  source, layout, batch = loader.sources[m], loader.layouts[m], loader.row(index)
  documents = []
  for doc, start, length in pieces:
    tokens = source.store.tokens(doc, start, length + 1).tolist()
    size = int(source.store.lengths[doc])
    mask = source.store.loss_mask(doc, start + 1, length)
    documents.append(
      {"document": doc, "from": start, "to": start + length + 1, "of": size, "targets": int(mask.sum())}
      | {"text": tokenizer.decode(tokens)}
    )
  return {
    "step": step, "row": b, "source": source.name, "source_row": nth, "epoch": nth // layout.num_rows,
    "filled": int((batch.segments_BT > 0).sum()), "targets": int((batch.weights_BT > 0).sum()), "documents": documents,
  }  # fmt: skip


def row_len_of(run: pathlib.Path) -> int:
  """Positions of a row."""
  return json.loads((run / "periods.json").read_text(encoding="utf-8"))["settings"]["data.row_len"]


def lines(row: dict[str, Any], *, chars: int, row_len: int) -> list[str]:
  """A row for people; of each document `chars` characters from both ends, 0 = all."""
  found = [
    f"row {row['row']}: {row['source']}, its row {row['source_row']:,}, epoch {row['epoch']}; {row['filled']} of {row_len} "
    f"positions filled, {row['targets']} targets"
  ]
  for d in row["documents"]:
    part = "whole" if (d["from"], d["to"]) == (0, d["of"]) else f"tokens {d['from']:,} to {d['to'] - 1:,} of {d['of']:,}"
    masked = "" if d["targets"] == d["to"] - d["from"] - 1 else f", {d['targets']} targets"
    found += [f"  document {d['document']:,} ({part}{masked})", f"    {_cut(d['text'], chars)!r}"]
  return found


def _cut(text: str, chars: int) -> str:
  half = chars // 2
  return text if not chars or len(text) <= chars else f"{text[:half]} [...] {text[-half:]}"
