"""A base and text of a domain -> a base with a larger vocabulary: tokenizer, embedding rows, config.json, and what that changes.

Invariant: old ids, old rows and all other weights stay as they are, byte for byte.

Without weights beside the tokenizer only the tokenizer grows. Exit codes: 0 done, 65 bad text, 74 disk, 78 wrong settings.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone that is not installed

import numpy as np

from cpt_jax.config import ConfigError, Problems
from cpt_jax.model import expansion, hf_files
from cpt_jax.store import documents
from cpt_jax.training import console
from cpt_jax.vocab import grow, initialise, kinds, similarity
from cpt_jax.vocab import texts as texts_lib
from cpt_jax.vocab.bases import Base
from cpt_jax.vocab.changes import Changes
from cpt_jax.vocab.grow import Grown

_HF = flags.DEFINE_string("hf", "", "The base: a Hugging Face directory, or a tokenizer alone.")
_DOMAIN = flags.DEFINE_multi_string("domain", [], "Text files or globs that pieces are chosen from; repeatable.")
_GENERAL = flags.DEFINE_multi_string("general", [], "Text files or globs of text like the base's own; repeatable.")
_PROTECT = flags.DEFINE_multi_string("protect", [], "Text whose tokenisation must not change at all; repeatable.")
_SIZE = flags.DEFINE_integer("size", 8000, "Pieces to add, at most.", lower_bound=1)
_SAVING = flags.DEFINE_float(
  "saving", 1.0, "Stop once the pieces save this share of the domain's tokens.", lower_bound=0.0, upper_bound=1.0
)
_BAND = flags.DEFINE_string("band", "all", "low, high, all, or quantiles such as 0.2:0.6.")
_BAND_BY = flags.DEFINE_enum(
  "band_by",
  "use",
  ["use", "count"],
  "What the band is of: how often the most used old piece that a new one replaces stands in --general, or how often the new "
  "piece itself stands in --domain.",
)
_MIN_COUNT = flags.DEFINE_integer(
  "min_count", grow.MIN_COUNT, "Times that a piece must stand in the sample of --domain.", lower_bound=2
)
_SAMPLE_MB = flags.DEFINE_float("sample_mb", 50, "10^6 bytes of --domain that pieces are chosen from, at most.", lower_bound=0.2)
_INPUT = flags.DEFINE_string("input_rows", "mean", f"New embedding rows: {', '.join(initialise.INITIALISERS)}.")
_OUTPUT_ROWS = flags.DEFINE_string("output_rows", "", "New head rows, of the same choices; by default mean. Not for tied models.")
_SCALE = flags.DEFINE_float("scale", 1.0, "Of the noise of gaussian and random rows, in standard deviations.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of that noise.")
_MULTIPLE = flags.DEFINE_integer("multiple", 128, "Rows are padded to a multiple of it, for the mesh.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "The directory to write.")

HELDOUT_FRAC = 0.1  # of the domain: what growth is tried on
_REPLACED = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclasses.dataclass(frozen=True)
class Request:
  """The flags, checked."""

  base: Base
  model: expansion.Model | None
  files: dict[str, list[str]]
  band: tuple[float, float]
  rows: dict[str, initialise.Block]


def read_flags(problems: Problems) -> Request | None:
  """The flags; what is wrong with them goes to `problems`."""
  files: dict[str, list[str]] = {}
  for name, flag in ("domain", _DOMAIN), ("general", _GENERAL), ("protect", _PROTECT):
    if flag.value:
      with problems.collect():
        files[name] = documents.find_files(flag.value, flag=f"--{name}")
  if not _DOMAIN.value:
    problems.add("--domain is empty: name the text that pieces are chosen from, e.g. --domain 'texts/zh/*.txt'")
  if not _OUTPUT.value:
    problems.add("--output is empty: name the directory to write")
  band = read_band(_BAND.value, problems)
  base = model = None
  if not _HF.value:
    problems.add("--hf is empty: name the base, a Hugging Face directory or a tokenizer's file")
  else:
    with problems.collect():
      base = kinds.load(_HF.value)
  directory = pathlib.Path(_HF.value)
  if base is not None and any((directory / name).exists() for name in (hf_files.SINGLE, hf_files.INDEX)):
    with problems.collect():
      model = expansion.open_model(directory, vocab_size=base.vocab_size)
  rows: dict[str, initialise.Block] = {}
  with problems.collect():
    rows[expansion.EMBEDDING] = initialise.find(_INPUT.value, flag="--input_rows")
    rows[expansion.HEAD] = initialise.find(_OUTPUT_ROWS.value or "mean", flag="--output_rows")
  if model is not None and model.is_tied:
    if _OUTPUT_ROWS.value:
      problems.add(
        f"--output_rows={_OUTPUT_ROWS.value}: {_HF.value} ties its head to the embedding; leave it out, --input_rows counts"
      )
    rows[expansion.HEAD] = rows.get(expansion.EMBEDDING, initialise.mean)
  names = {_INPUT.value, _OUTPUT_ROWS.value}
  if "weighted" in names and not _GENERAL.value:
    problems.add("--input_rows or --output_rows is weighted: give --general, in which old pieces are counted")
  return None if base is None else Request(base, model, files, band, rows)


def read_band(value: str, problems: Problems) -> tuple[float, float]:
  """(0.0, 0.5) of "low" or "0:0.5"."""
  if value in grow.BANDS:
    return grow.BANDS[value]
  low, _, high = value.partition(":")
  try:
    band = float(low), float(high)
  except ValueError:
    band = 1.0, 0.0
  if not 0 <= band[0] < band[1] <= 1:
    problems.add(f"--band={value!r}: write {', '.join(grow.BANDS)}, or two quantiles from 0 to 1, e.g. 0.2:0.6")
    return grow.BANDS["all"]
  return band


def run(request: Request) -> tuple[Grown, texts_lib.Sample, np.ndarray | None, dict[str, Changes]]:
  """Chooses the pieces and measures what they change."""
  base, files = request.base, request.files
  with console.progress() as bar:

    def reading(name: str, paths: list[str]) -> Callable[[int], None]:
      total = sum(os.path.getsize(path) for path in paths)
      task, read = bar.add_task(f"{name} (kB)", total=total // 1000), [0]

      def on_bytes(num_bytes: int) -> None:
        read[0] += num_bytes
        bar.update(task, completed=read[0] // 1000)

      return on_bytes

    def batches(name: str, what: str, keep: Callable[[str], bool] = lambda _: True) -> Iterator[list[str]]:
      parts = texts_lib.parts(files[name], on_bytes=reading(what, files[name]))
      return texts_lib.batches(text for text in parts if keep(text))

    domain = files["domain"]
    sample = texts_lib.sample(
      domain, max_bytes=int(_SAMPLE_MB.value * 1e6), heldout_frac=HELDOUT_FRAC, on_bytes=reading("read the domain", domain)
    )
    # One half of the general text says which pieces are used, the other is what the report is of.
    counts_V = None
    if "general" in files:
      counts_V = grow.count_ids(base.tokenizer, batches("general", "count old pieces", lambda text: texts_lib.place(text) >= 0.5))
    task = bar.add_task("choose pieces", total=None)
    grown = grow.grow(
      base,
      sample.train,
      size=_SIZE.value,
      band=request.band,
      band_by=_BAND_BY.value,
      saving=_SAVING.value,
      general_counts_V=counts_V,
      protect=(lambda: batches("protect", "check protected text")) if "protect" in files else None,
      min_count=_MIN_COUNT.value,
    )
    bar.remove_task(task)
    changes = {"domain, held out": grown.changes(texts_lib.batches(iter(sample.heldout)))}
    if "general" in files:
      halves = batches("general", "compare general text", lambda text: texts_lib.place(text) < 0.5)
      changes["general, held out"] = grown.changes(halves)
    if "protect" in files:
      changes["protected, all"] = grown.changes(batches("protect", "verify protected text"))
      assert changes["protected, all"].changed_documents == 0
  return grown, sample, counts_V, changes


def show(grown: Grown, sample: texts_lib.Sample, changes: dict[str, Changes]) -> None:
  """What was added, and what that changes."""
  base = grown.base
  console.say(f"base     {base.path}: {base.kind}, {base.vocab_size:,} ids")
  console.say(
    f"chosen   {len(grown.pieces):,} of {grown.num_candidates:,} candidates, ids {base.vocab_size:,} to {grown.vocab_size - 1:,}"
  )
  for why, number in grown.dropped.items():
    if number:
      console.say(f"dropped  {number:,}: {why}")
  if grown.num_outside:
    console.say(f"dropped  {grown.num_outside:,}: outside the band")
  if len(grown.pieces) < _SIZE.value and _SAVING.value == 1.0:
    console.say(f"fewer than the {_SIZE.value:,} of --size: no more candidates; give more domain text or a lower --min_count")
  readable = (grown.tokenizer.decode([number]) for number in range(base.vocab_size, grown.vocab_size))
  shown = [text for text in readable if "\ufffd" not in text]
  console.say(f"first    {' '.join(map(repr, shown[:20]))}")
  console.say(f"last     {' '.join(map(repr, shown[-20:]))}\n")
  rows = []
  for name, change in changes.items():
    rows.append([name, f"{change.documents:,}", f"{change.changed_documents:,}", console.count(change.tokens)])
    rows[-1] += [
      f"{change.changed_tokens:,}",
      f"{change.changed_tokens / max(change.tokens, 1):.3%}",
      console.count(change.tokens_after),
    ]
    rows[-1] += [f"{change.saved_frac:.1%}", f"{change.bytes / max(change.tokens_after, 1):.2f}"]
  heads = ["text", "parts", "changed", "tokens", "changed", "share", "tokens after", "saved", "bytes/token"]
  console.table("what growth changes in tokenisation (parts: documents, long ones cut)", heads, rows)
  used = grow.count_ids(grown.tokenizer, texts_lib.batches(iter(sample.heldout)))[base.vocab_size :]
  kind = "a unigram model: the best path over all pieces may change anywhere" if base.is_unigram else "old merges are done first"
  console.say(f"{(used > 0).mean():.0%} of the new pieces stand in the domain's held-out text; {kind}\n")


def write(
  request: Request, grown: Grown, sample: texts_lib.Sample, counts_V: np.ndarray | None, changes: dict[str, Changes]
) -> pathlib.Path:
  """The directory: tokenizer, its record, and the model where there is one."""
  base, model, output = grown.base, request.model, pathlib.Path(_OUTPUT.value)
  # A base's own padding is taken up first: new ids are rows that it has already.
  rows = grow.num_rows(max(grown.vocab_size, 0 if model is None else model.rows), multiple=_MULTIPLE.value)
  record = grow.record(grown, rows=rows) | {
    "command": sys.argv,
    "changes": {name: change._asdict() for name, change in changes.items()},
    "rows_by": {
      "input": _INPUT.value,
      "output": _INPUT.value if model is not None and model.is_tied else _OUTPUT_ROWS.value or "mean",
    },
  }
  source = base.path.parent
  needed = 0 if model is None else expansion.num_bytes(model, rows=rows)
  with hf_files.atomic_directory(output, num_bytes=needed + len(grown.raw)) as partial:
    for path in hf_files.carried_files(source):
      if path.name not in _REPLACED or (path.name == "added_tokens.json" and base.file_name == "tokenizer.model"):
        hf_files.copy_file(path, partial / path.name)
    hf_files.write_file(partial / base.file_name, grown.raw)
    if model is not None:
      new = expansion.make_rows
      sources = row_sources(request, grown, sample, counts_V)
      with console.progress() as bar:
        task, written = bar.add_task("write the model (kB)", total=needed // 1000), [0]

        def on_bytes(num_bytes: int) -> None:
          written[0] += num_bytes
          bar.update(task, completed=written[0] // 1000)

        expansion.write(
          model,
          partial,
          num_old=base.vocab_size,
          vocab_size=grown.vocab_size,
          rows=rows,
          new={name: new(request.rows[name], sources, num_padding=rows - grown.vocab_size) for name in model.tables},
          on_bytes=on_bytes,
        )
    elif (source / "config.json").is_file():
      sizes = {"vocab_size": rows, expansion.TRUE_SIZE: grown.vocab_size, expansion.BASE_SIZE: base.vocab_size}
      config = hf_files.load_json(source / "config.json") | sizes
      hf_files.write_file(partial / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    hf_files.write_file(partial / grow.RECORD, record_text(record).encode())
  return output


def record_text(record: dict[str, Any]) -> str:
  """JSON with a line for each key and each piece."""
  pieces = ",\n".join(f"  {json.dumps(piece, ensure_ascii=False)}" for piece in record["pieces"])
  lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items() if key != "pieces"]
  return "{\n" + ",\n".join([*lines, f' "pieces": [\n{pieces}\n ]']) + "\n}\n"


def row_sources(
  request: Request, grown: Grown, sample: texts_lib.Sample, counts_V: np.ndarray | None
) -> Callable[[np.ndarray], initialise.Sources]:
  """What initialisers start from, for a table's old rows."""
  neighbours = None
  if initialise.similar in request.rows.values():
    encoded = (ids for batch in texts_lib.batches(iter(sample.train)) for ids in grown.tokenizer.encode_contents(batch))
    neighbours = similarity.neighbours(similarity.embed(encoded, vocab_size=grown.vocab_size), num_old=grown.base.vocab_size)
  return functools.partial(
    initialise.Sources,
    pieces=initialise.replaced([piece.old for piece in grown.pieces]),
    overlap=initialise.overlapping(grown.base.texts, grown.pieces),
    counts_V=counts_V,
    neighbours=neighbours,
    seed=_SEED.value,
    scale=_SCALE.value,
  )


def grow_vocabulary() -> None:
  """The whole job, as the flags say.

  Raises:
    ConfigError: all that is wrong with the flags, the base and the texts.
  """
  problems = Problems()
  request = read_flags(problems)
  problems.raise_if_any()
  assert request is not None
  grown, sample, counts_V, changes = run(request)
  show(grown, sample, changes)
  output = write(request, grown, sample, counts_V, changes)
  saved = json.loads((output / grow.RECORD).read_bytes())
  console.say(
    f"wrote {output}: {saved['vocab_size']:,} ids in {saved['rows']:,} rows{'' if request.model else ' (tokenizer only)'}"
  )
  console.say(f"next: python tools/prepare_data.py --tokenizer {output} --input TEXT --output STORE, for every source of the run")


def main(argv: list[str]) -> int:
  """Exit code, after writing the grown base or printing what is wrong."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ConfigError(f"unexpected arguments {argv[1:]}: quote globs against the shell")
    grow_vocabulary()
  except (ConfigError, OSError) as error:
    print(error, file=sys.stderr)
    return error.exit_code if isinstance(error, ConfigError) else 74
  return 0


if __name__ == "__main__":
  app.run(main)
