"""A base and text of a domain -> a base with a larger vocabulary: tokenizer, embedding rows, config.json, and what that changes.

Invariant: old ids, old rows and all other weights stay as they are, byte for byte. Without weights beside the tokenizer only the
tokenizer grows.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax import shipped
from cpt_jax.config import Problems
from cpt_jax.model import expansion, hf_files
from cpt_jax.progress import Progress
from cpt_jax.store import documents
from cpt_jax.vocab import grow, initialise, kinds, similarity, texts as texts_lib
from cpt_jax.vocab.bases import Base
from cpt_jax.vocab.changes import Changes
from cpt_jax.vocab.grow import Grown

HELDOUT_FRAC = 0.1  # of the domain: what growth is tried on
_REPLACED = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclasses.dataclass(frozen=True)
class Growth:
  """A base that was grown, and what was asked of it."""

  grown: Grown
  changes: dict[str, Changes]  # text -> what growth changes in its tokenisation
  used_frac: float  # of the new pieces: those that stand in the domain's held-out text
  rows: int  # of the tables, padding counted
  has_model: bool  # else the tokenizer grew alone
  size: int
  saving: float
  output: pathlib.Path


class _Base(NamedTuple):
  """What is grown."""

  tokenizer: Base
  model: expansion.Model | None
  initialisers: dict[str, initialise.Block]  # of the tables' new rows
  names: dict[str, str]  # input, output -> the initialiser's


class _Read(NamedTuple):
  """What was read of the texts."""

  sample: texts_lib.Sample
  counts_V: np.ndarray | None  # of old pieces, in a half of the general text
  changes: dict[str, Changes]


def grow_base(
  hf: str | os.PathLike,  # the base, a Hugging Face directory, or a tokenizer alone
  *,
  domain: Sequence[str],  # text files or globs that pieces are chosen from
  output: str | os.PathLike,  # the directory to write
  general: Sequence[str] = (),  # text like the base's own
  protect: Sequence[str] = (),  # text whose tokenisation must not change at all
  size: int = 8000,  # pieces to add, at most
  saving: float = 1.0,  # stop once the pieces save this share of the domain's tokens
  band: str = "all",  # low, high, all, or quantiles such as "0.2:0.6"
  band_by: str = "use",  # what the band is of, "use" or "count"; see vocab.grow.grow
  min_count: int = grow.MIN_COUNT,  # times that a piece must stand in the sample of the domain
  sample_mb: float = 50,  # 10^6 bytes of the domain that pieces are chosen from, at most
  input_rows: str = "mean",  # how new embedding rows are made, of vocab.initialise.INITIALISERS
  output_rows: str = "",  # new head rows, of the same choices; "" = mean. Not for tied models
  scale: float = 1.0,  # of the noise of gaussian and random rows, in standard deviations
  seed: int = 0,  # of that noise
  multiple: int = 128,  # rows are padded to a multiple of it
) -> Growth:
  """Chooses pieces that shorten the domain's text, writes the base with them, and measures what they change.

  Raises ConfigError: all that is wrong with the settings, the base and the texts; DataError: text that cannot be read.
  """
  problems, files = Problems(), {}
  for name, patterns in ("domain", domain), ("general", general), ("protect", protect):
    if patterns:
      with problems.collect():
        files[name] = documents.find_files(patterns, flag=f"--{name}")
  if not domain:
    problems.add("--domain is empty: name the text that pieces are chosen from, e.g. --domain 'texts/zh/*.txt'")
  if not output:
    problems.add("--output is empty: name the directory to write")
  least = {"size": (size, 1), "min_count": (min_count, 2), "sample_mb": (sample_mb, 0.2), "scale": (scale, 0)}
  least["multiple"] = multiple, 1
  for name, (value, low) in least.items():
    if not value >= low:
      problems.add(f"--{name}={value}: must be {low} or more")
  if not 0 <= saving <= 1:
    problems.add(f"--saving={saving}: a share of the tokens, from 0 to 1")
  quantiles = _read_band(band, problems)
  base = _open(shipped.find(os.fspath(hf)), input_rows, output_rows, problems)
  if "weighted" in (input_rows, output_rows) and not general:
    problems.add("--input_rows or --output_rows is weighted: give --general, in which old pieces are counted")
  problems.raise_if_any()
  assert base is not None

  with Progress() as progress:
    options = dict(size=size, saving=saving, band=quantiles, band_by=band_by, min_count=min_count)
    grown, read = _choose(base.tokenizer, files, progress, max_bytes=int(sample_mb * 1e6), options=options)
    # A base's own padding is taken up first: new ids are rows that it has already.
    rows = grow.num_rows(max(grown.vocab_size, 0 if base.model is None else base.model.rows), multiple=multiple)
    old = _old_rows(base, grown, read, seed=seed, scale=scale)
    _write(base, grown, read, pathlib.Path(output), rows=rows, old=old, progress=progress)
  used = grow.count_ids(grown.tokenizer, texts_lib.batches(iter(read.sample.heldout)))[grown.base.vocab_size :]
  used_frac = float((used > 0).mean())
  return Growth(grown, read.changes, used_frac, rows, base.model is not None, size, saving, pathlib.Path(output))


def _open(hf: str, input_rows: str, output_rows: str, problems: Problems) -> _Base | None:
  """The base and how its new rows are made; None, and what is wrong in `problems`."""
  tokenizer = model = None
  if not hf:
    problems.add("--hf is empty: name the base, a Hugging Face directory or a tokenizer's file")
  else:
    with problems.collect():
      tokenizer = kinds.load(hf)
  if tokenizer is not None and any((pathlib.Path(hf) / name).exists() for name in (hf_files.SINGLE, hf_files.INDEX)):
    with problems.collect():
      model = expansion.open_model(hf, vocab_size=tokenizer.vocab_size)
  is_tied = model is not None and model.is_tied
  if is_tied and output_rows:
    problems.add(f"--output_rows={output_rows}: {hf} ties its head to the embedding; leave it out, --input_rows counts")
  names = {"input": input_rows, "output": input_rows if is_tied else output_rows or "mean"}
  made: dict[str, initialise.Block] = {}
  with problems.collect():
    made[expansion.EMBEDDING] = initialise.find(input_rows, flag="--input_rows")
    made[expansion.HEAD] = initialise.find(names["output"], flag="--output_rows")
  return None if tokenizer is None else _Base(tokenizer, model, made, names)


def _read_band(value: str, problems: Problems) -> tuple[float, float]:
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


def _choose(
  base: Base, files: dict[str, list[str]], progress: Progress, *, max_bytes: int, options: dict[str, Any]
) -> tuple[Grown, _Read]:
  """Chooses the pieces and measures what they change."""

  def reading(what: str, name: str) -> Callable[[int], None]:
    return progress.part(f"{what} (kB)", sum(os.path.getsize(path) for path in files[name]), unit=1000)

  def batches(name: str, what: str, keep: Callable[[str], bool] = lambda _: True) -> Iterator[list[str]]:
    parts = texts_lib.parts(files[name], on_bytes=reading(what, name))
    return texts_lib.batches(text for text in parts if keep(text))

  on_bytes = reading("read the domain", "domain")
  sample = texts_lib.sample(files["domain"], max_bytes=max_bytes, heldout_frac=HELDOUT_FRAC, on_bytes=on_bytes)
  # One half of the general text says which pieces are used, the other is what the report is of.
  counts_V = None
  if "general" in files:
    counts_V = grow.count_ids(base.tokenizer, batches("general", "count old pieces", lambda text: texts_lib.place(text) >= 0.5))
  progress.part("choose pieces")
  protect = (lambda: batches("protect", "check protected text")) if "protect" in files else None
  grown = grow.grow(base, sample.train, general_counts_V=counts_V, protect=protect, **options)
  changes = {"domain, held out": grown.changes(texts_lib.batches(iter(sample.heldout)))}
  if "general" in files:
    halves = batches("general", "compare general text", lambda text: texts_lib.place(text) < 0.5)
    changes["general, held out"] = grown.changes(halves)
  if "protect" in files:
    changes["protected, all"] = grown.changes(batches("protect", "verify protected text"))
    assert changes["protected, all"].changed_documents == 0
  return grown, _Read(sample, counts_V, changes)


def _write(base: _Base, grown: Grown, read: _Read, output: pathlib.Path, *, rows: int, old: Any, progress: Progress) -> None:
  """The directory: tokenizer, its record, and the model where there is one."""
  tokenizer, model = base.tokenizer, base.model
  record = grow.record(grown, rows=rows) | {
    "command": sys.argv,
    "changes": {name: change._asdict() for name, change in read.changes.items()},
    "rows_by": base.names,
  }
  source = tokenizer.path.parent
  needed = 0 if model is None else expansion.num_bytes(model, rows=rows)
  with hf_files.atomic_directory(output, num_bytes=needed + len(grown.raw)) as partial:
    for path in hf_files.carried_files(source):
      if path.name not in _REPLACED or (path.name == "added_tokens.json" and tokenizer.file_name == "tokenizer.model"):
        hf_files.copy_file(path, partial / path.name)
    hf_files.write_file(partial / tokenizer.file_name, grown.raw)
    if model is not None:
      num_padding = rows - grown.vocab_size
      new = {name: expansion.make_rows(base.initialisers[name], old, num_padding=num_padding) for name in model.tables}
      sizes = {"num_old": tokenizer.vocab_size, "vocab_size": grown.vocab_size, "rows": rows}
      expansion.write(model, partial, **sizes, new=new, on_bytes=progress.part("write the model (kB)", needed, unit=1000))
    elif (source / "config.json").is_file():
      sizes = {"vocab_size": rows, expansion.TRUE_SIZE: grown.vocab_size, expansion.BASE_SIZE: tokenizer.vocab_size}
      config = hf_files.load_json(source / "config.json") | sizes
      hf_files.write_file(partial / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    hf_files.write_file(partial / grow.RECORD, _record_text(record).encode())


def _record_text(record: dict[str, Any]) -> str:
  """JSON with a line for each key and each piece."""
  pieces = ",\n".join(f"  {json.dumps(piece, ensure_ascii=False)}" for piece in record["pieces"])
  lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items() if key != "pieces"]
  return "{\n" + ",\n".join([*lines, f' "pieces": [\n{pieces}\n ]']) + "\n}\n"


def _old_rows(base: _Base, grown: Grown, read: _Read, *, seed: int, scale: float) -> Callable[[np.ndarray], initialise.OldRows]:
  """What initialisers start from, for a table's old rows."""
  neighbours = None
  if base.model is not None and initialise.similar in base.initialisers.values():
    encoded = (ids for batch in texts_lib.batches(iter(read.sample.train)) for ids in grown.tokenizer.encode_contents(batch))
    neighbours = similarity.neighbours(similarity.embed(encoded, vocab_size=grown.vocab_size), num_old=grown.base.vocab_size)
  return functools.partial(
    initialise.OldRows,
    pieces=initialise.replaced([piece.old for piece in grown.pieces]),
    overlap=initialise.overlapping(grown.base.texts, grown.pieces),
    counts_V=read.counts_V,
    neighbours=neighbours,
    seed=seed,
    scale=scale,
  )
