"""A run's record and a step -> what the model saw in it: each row's source, epoch and documents, decoded. Needs no device.

Invariant: prints the rows that training read (the same loader, from the run's own record), or refuses if a store has changed.

Exit codes: 0 done, 78 no such run or step, or a store that is not what it was.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.stream import pipeline

_RUN = flags.DEFINE_string("run", "", "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "The step, from 0: its batch makes the update from `step` to `step` + 1.")
_ROWS = flags.DEFINE_list("rows", [], "Rows of the batch to show, e.g. 0,5; all by default.")
_CHARS = flags.DEFINE_integer("chars", 300, "Characters of each document's text to show, from both ends; 0 = all.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object a row, with the whole text, instead of text for people.")


def rows_of(run: pathlib.Path, step: int, chosen: list[int]) -> list[dict[str, Any]]:
  """What the rows of a step's batch hold; `chosen` are rows of the batch, () = all.

  Raises:
    ConfigError: no such run, step or row, or a store that is not what it was.
  """
  try:
    record = json.loads((run / "segments.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ConfigError(f"--run={run}: {pathlib.Path(error.filename).name} is missing; name the --workdir of a run") from None
  loader = pipeline.from_record(record, step)
  if step >= loader.end_step:
    raise ConfigError(f"--step={step}: the run ends at step {loader.end_step}, where a source of it runs out")
  wrong = [b for b in chosen if not 0 <= b < loader.batch_rows]
  if wrong:
    raise ConfigError(f"--rows={wrong}: a batch has the rows 0 to {loader.batch_rows - 1}")
  tokenizer = tokenizer_lib.load(config["data"]["tokenizer"])
  return [_row(loader, tokenizer, step, b) for b in chosen or range(loader.batch_rows)]


def _row(loader: pipeline.Loader, tokenizer: tokenizer_lib.Tokenizer, step: int, b: int) -> dict[str, Any]:
  index = step * loader.batch_rows + b
  m, nth, pieces = loader.locate(index)
  source, plan, batch = loader.sources[m], loader.plans[m], loader.row(index)
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
    "step": step,
    "row": b,
    "source": source.name,
    "source_row": nth,
    "epoch": nth // plan.num_rows,
    "filled": int((batch.segments_BT > 0).sum()),
    "targets": int((batch.weights_BT > 0).sum()),
    "documents": documents,
  }


def _lines(row: dict[str, Any], *, chars: int, row_len: int) -> list[str]:
  lines = [
    f"row {row['row']}: {row['source']}, its row {row['source_row']:,}, epoch {row['epoch']}; {row['filled']} of {row_len} "
    f"positions filled, {row['targets']} targets"
  ]
  for d in row["documents"]:
    part = "whole" if (d["from"], d["to"]) == (0, d["of"]) else f"tokens {d['from']:,} to {d['to'] - 1:,} of {d['of']:,}"
    masked = "" if d["targets"] == d["to"] - d["from"] - 1 else f", {d['targets']} targets"
    lines += [f"  document {d['document']:,} ({part}{masked})", f"    {_cut(d['text'], chars)!r}"]
  return lines


def _cut(text: str, chars: int) -> str:
  half = chars // 2
  return text if not chars or len(text) <= chars else f"{text[:half]} [...] {text[-half:]}"


def main(argv: list[str]) -> int:
  """Exit code, after printing the rows or what is wrong."""
  try:
    if len(argv) > 1 or not _RUN.value or _STEP.value is None:
      raise ConfigError("name a run and a step: python tools/show_batch.py --run runs/quickstart --step 17")
    if not all(b.isdigit() for b in _ROWS.value):
      raise ConfigError(f"--rows={','.join(_ROWS.value)}: numbers of rows, e.g. 0,5")
    found = rows_of(pathlib.Path(_RUN.value), _STEP.value, [int(b) for b in _ROWS.value])
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  if _JSON.value:
    for row in found:
      print(json.dumps(row, ensure_ascii=False))
    return 0
  row_len = json.loads((pathlib.Path(_RUN.value) / "segments.json").read_text(encoding="utf-8"))["settings"]["data.row_len"]
  print(f"step {_STEP.value} of {_RUN.value}: {len(found)} rows")
  for row in found:
    print("\n".join(_lines(row, chars=_CHARS.value, row_len=row_len)))
  return 0


if __name__ == "__main__":
  app.run(main)
