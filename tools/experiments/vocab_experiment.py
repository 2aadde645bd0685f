"""A base and text of a domain -> the base grown in several ways and trained alike, and a small file of what was measured.

Run:   python -m tools.experiments.vocab_experiment --domain examples/corpora/poetry_ci.jsonl.gz --join 10 \
           --base_text store/text --output plan/vocab/zh
       python -m tools.experiments.vocab_experiment --collect plan/vocab/zh --output .../measured/vocabulary/zh.jsonl

The first goes on where it was stopped. Tables: vocab_results.py; what was asked and found: docs/results/experiments.md, 2.
"""

import argparse
import functools
import gzip
import itertools
import json
import pathlib
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax import config as config_lib, exits, journal
from cpt_jax.cli import app
from cpt_jax.config import ConfigError
from cpt_jax.model import spec as spec_lib
from cpt_jax.store import documents, token_files, token_store
from cpt_jax.store.records import BadRecord, Part, Rules
from cpt_jax.stream.shuffle import mix64
from cpt_jax.training import console, loop
from cpt_jax.vocab import changes, initialise, kinds, texts as texts_lib
from cpt_jax.vocab.bases import Base
from cpt_jax.vocab.grow import RECORD
from tools.fixtures import make_example_data

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "examples" / "base"
ENGLISH = ROOT / "examples" / "corpora" / "english.jsonl.gz"

# By hand: 400 pieces are what every band has in both domains, and a run of these steps takes about 100 s of CPU time.
SIZE = 400
STEPS, EVERY, SHORT_STEPS = 48, 6, 24
GENERAL_BYTES = 22_000  # of English, held out
HELDOUT_FRAC = 0.02  # as configs/pretrain.py: what is held out here was held out of the base
PAGE_CHARS = 2_000, 6_000  # of a document that is cut from a page
CHINESE_FRAC = 0.05  # of the tokens that the base was trained on

# Arm -> how cpt vocab grow grows it. EQUAL: by as many pieces as save what count_low saves.
EQUAL = "equal"
HIGH = ["--band_by=count", "--band=0.9:1"]
BANDS: dict[str, list[str]] = {
  "count_low": ["--band_by=count", "--band=0:0.9"],
  "count_high": HIGH,
  "count_high_equal": [*HIGH, EQUAL],
  "count_rare": ["--band_by=count", "--band=low"],
  "use_low": ["--band_by=use", "--band=low"],
  "use_high": ["--band_by=use", "--band=high"],
}
GROWN = BANDS | {f"rows_{name}": [*HIGH, f"--input_rows={name}"] for name in initialise.INITIALISERS if name != "mean"}
NOISY = ("rows_gaussian", "rows_random")  # grown with other noise for each seed
# Arm -> the base that it trains and train.stages.
STAGED: dict[str, tuple[str, tuple]] = {
  "staged_rows": ("count_high", (("new_rows", "25%", 1e-3), ("all", "75%", 1e-3))),
  "staged_three": ("count_high", (("new_rows", "20%", 1e-2), ("embeddings", "20%", 3e-3), ("all", "60%", 1e-3))),
}


class Arm(NamedTuple):
  """One way to continue, with one seed."""

  name: str
  seed: int
  steps: int = STEPS

  @property
  def run(self) -> str:
    """Of its run directory."""
    return f"{self.name}-seed{self.seed}" + (f"-steps{self.steps}" if self.steps != STEPS else "")

  @property
  def base(self) -> str:
    """Of the directory of its base, and of its stores."""
    grown = STAGED[self.name][0] if self.name in STAGED else self.name
    return f"{grown}-{self.seed}" if grown in NOISY else grown


def arm_of(run: str) -> Arm:
  """The arm of a run directory's name."""
  name, seed, *steps = run.split("-")
  return Arm(name, int(seed.removeprefix("seed")), int(steps[0].removeprefix("steps")) if steps else STEPS)


# ---- texts ----


def read(path: pathlib.Path) -> Iterator[str]:
  """The texts of a file."""
  yield from texts_of(documents.open_part(Part(str(path)), Rules()))


def texts_of(records: Iterable[Any]) -> Iterator[str]:
  """Of records that could be read.

  Raises:
    ConfigError: one that could not.
  """
  for record in records:
    if isinstance(record, BadRecord):
      raise ConfigError(f"{record.file}:{record.line}: {record.reason}")
    yield record.text


def domain_documents(path: pathlib.Path, *, join: int) -> list[str]:
  """Records in their order, `join` to a document; of a .txt file the pages between form feeds, cut at paragraph borders."""
  if path.suffix == ".txt":
    rng = random.Random(0)
    works = make_example_data.read_works(path)
    return [part for work in works for part in make_example_data.cut(work, rng=rng, chars=PAGE_CHARS, lines=False)]
  found = list(read(path))
  return ["\n\n".join(found[at : at + join]) for at in range(0, len(found), join)]


def place(text: str) -> int:
  """By which a store's readers hold documents out: those of the least places (`data.sources`)."""
  return int(mix64(np.array([token_files.text_hash(text)], np.uint64))[0])


def is_heldout(text: str) -> bool:
  """Whether a run here evaluates it instead of training on it."""
  return place(text) < int(HELDOUT_FRAC * 2**64)


def split(texts: Iterable[str], *, heldout_bytes: int) -> tuple[list[str], list[str]]:
  """Training texts, and held-out ones in the order of their places until they have so many bytes; the rest is left out."""
  training, heldout = [], []
  for text in dict.fromkeys(texts):
    (heldout if is_heldout(text) else training).append(text)
  heldout.sort(key=place)
  sizes = np.cumsum([len(text.encode()) for text in heldout])
  return training, heldout[: int(np.searchsorted(sizes, heldout_bytes)) + 1]


def write(path: pathlib.Path, texts: Iterable[str]) -> None:
  """One JSON line a text, gzipped."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
    file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def base_mix(base_text: pathlib.Path) -> list[str]:
  """English and Chinese in the shares in which the base saw them, of what tools/fixtures/make_example_data.py --output wrote."""
  english, chinese = (list(read(base_text / f"{name}.jsonl.gz")) for name in ("english", "chinese"))
  base = kinds.load(str(BASE))
  of_english, of_chinese = (num_tokens(base, texts) for texts in (english, chinese))
  wanted = of_english * CHINESE_FRAC / (1 - CHINESE_FRAC) / of_chinese
  size = sum(len(text.encode()) for text in chinese)
  return [*english, *make_example_data.sample(chinese, max_bytes=int(size * wanted))]


def num_tokens(base: Base, texts: Iterable[str]) -> int:
  """Of all texts."""
  return sum(len(ids) for batch in texts_lib.batches(iter(texts)) for ids in base.tokenizer.encode_contents(batch))


def prepare(folder: pathlib.Path, *, domain: pathlib.Path, join: int, heldout_bytes: int, base_text: pathlib.Path | None) -> None:
  """The texts of all arms: what is trained on and evaluated, what pieces are chosen from, what says how old pieces are used."""
  if not (folder / "domain.jsonl.gz").exists():
    training, heldout = split(domain_documents(domain, join=join), heldout_bytes=heldout_bytes)
    write(folder / "grow.jsonl.gz", training)  # no piece is chosen by what is evaluated
    write(folder / "general.jsonl.gz", itertools.chain(*split(read(ENGLISH), heldout_bytes=GENERAL_BYTES)))
    write(folder / "domain.jsonl.gz", [*training, *heldout])
  if base_text and not (folder / "use.jsonl.gz").exists():
    write(folder / "use.jsonl.gz", base_mix(base_text))


# ---- runs ----


def grow(folder: pathlib.Path, arm: Arm) -> pathlib.Path:
  """The base of an arm, grown by cpt vocab grow if it is not there yet."""
  if arm.base == "none":
    return BASE
  output = folder / "bases" / arm.base
  if output.exists():
    return output
  flags = GROWN[arm.base.removesuffix(f"-{arm.seed}")]
  if flags[-1] == EQUAL:
    flags = [*flags[:-1], f"--saving={saved(folder, grow(folder, Arm('count_low', arm.seed))):.9f}"]
  flags = [*flags, f"--hf={BASE}", f"--domain={folder / 'grow.jsonl.gz'}", f"--size={SIZE}", f"--seed={arm.seed}"]
  if "--band_by=use" in flags or "--input_rows=weighted" in flags:
    flags.append(f"--general={folder / 'use.jsonl.gz'}")
  output.parent.mkdir(parents=True, exist_ok=True)
  code = app.main(["vocab", "grow", *flags, f"--output={output}"])
  if code:
    raise ConfigError(f"{output}: cpt vocab grow ended with exit code {code}")
  return output


def saved(folder: pathlib.Path, grown: pathlib.Path) -> float:
  """The share of tokens that a grown base's pieces save, of the sample that they were chosen from."""
  record = json.loads((grown / RECORD).read_text(encoding="utf-8"))
  return sum(piece["saved"] for piece in record["pieces"]) / sample_tokens(folder)


@functools.cache
def sample_tokens(folder: pathlib.Path) -> int:
  """Tokens of the sample that cpt vocab grow chooses pieces from: what is not in its own held-out tenth."""
  found = texts_lib.sample([str(folder / "grow.jsonl.gz")], max_bytes=50_000_000, heldout_frac=0.1)
  return num_tokens(kinds.load(str(BASE)), found.train)


def run_config(folder: pathlib.Path, arm: Arm, base: pathlib.Path) -> Any:
  """A run: the quickstart's, at a constant rate, so that curves compare at every point."""
  c = config_lib.default()
  c.seed = arm.seed
  c.start.hf = str(base)
  c.data.row_len = 256
  c.data.heldout_frac = HELDOUT_FRAC
  for name, role, share in ("general", "replay", 0.25), ("domain", "domain", 0.75):
    stored, text = folder / "stores" / arm.base / name, folder / f"{name}.jsonl.gz"
    c.data.sources[name] = config_lib.source(store=str(stored), text=str(text), role=role, share=share)
  c.train.length = f"{arm.steps} steps"
  c.train.batch_rows = 16
  if arm.name in STAGED:
    c.train.stages = STAGED[arm.name][1]
  c.schedule.name = "constant"
  c.schedule.lr_peak = 1e-3
  c.schedule.warmup = "3 steps"
  c.eval.every = f"{max(EVERY, arm.steps // 8)} steps"
  c.eval.tokens = 10**9  # all that is held out
  c.checkpoint.every = "100%"
  c.checkpoint.keep_last = 1
  c.checkpoint.export_hf = arm.steps > STEPS  # for tools/experiments/vocab_where.py
  c.log.every = 4
  return c


def train(folder: pathlib.Path, arm: Arm) -> int:
  """One run, unless it is there; returns the exit code of loop.run."""
  path = folder / "runs" / arm.run
  if (path / "summary.json").is_file():
    return exits.DONE
  base = grow(folder, arm)
  console.say(f"{path}")
  with console.muted():
    code = loop.run(run_config(folder, arm, base), path)
  if code == exits.DONE:
    shutil.rmtree(path / "ckpt", ignore_errors=True)
  return code


# ---- what was measured ----


class Heldout(NamedTuple):
  """A source's held-out documents under one tokenizer, beside the base's."""

  documents: int
  bytes: int
  target_bytes: int  # without documents' first tokens, which are never targets
  changed: float  # share of the base's tokens that are no longer there
  saved: float  # share of the base's tokens


def heldout(folder: pathlib.Path, source: str, base: Base, grown: Base) -> Heldout:
  """Read from the texts."""
  texts = [text for text in read(folder / f"{source}.jsonl.gz") if is_heldout(text)]
  old, new = (one.tokenizer.encode_contents(texts) for one in (base, grown))
  compared = changes.compare(texts, old, new, lengths_W=grown.lengths_V)
  target_bytes = compared.bytes - int(sum(grown.lengths_V[ids[0]] for ids in new))
  changed = compared.changed_tokens / compared.tokens
  return Heldout(compared.documents, compared.bytes, target_bytes, round(changed, 5), round(compared.saved_frac, 5))


def growth(folder: pathlib.Path, grown: pathlib.Path) -> dict[str, Any]:
  """What was added."""
  if grown == BASE:
    return {"pieces": 0}
  pieces = json.loads((grown / RECORD).read_text(encoding="utf-8"))["pieces"]
  middle = {key: float(np.median([piece[key] for piece in pieces])) for key in ("count", "use")}
  return {"pieces": len(pieces), "saved": round(saved(folder, grown), 5), **middle}


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
  """A record of each complete run."""
  base = kinds.load(str(BASE))

  @functools.cache
  def of_base(name: str) -> tuple[dict[str, Any], dict[str, Heldout], int, float]:
    path = BASE if name == "none" else folder / "bases" / name
    grown = kinds.load(str(path))
    spec = spec_lib.from_hf(spec_lib.load_hf_config(path))
    held = {source: heldout(folder, source, base, grown) for source in ("general", "domain")}
    return growth(folder, path), held, grown.vocab_size, spec_lib.flops_per_token(spec, 256, frozen=())[0]

  records = []
  for path in sorted((folder / "runs").iterdir()):
    if not (path / "summary.json").is_file():
      continue
    arm = arm_of(path.name)
    added, held, num_ids, flops = of_base(arm.base)
    evals = [record for record in journal.read(path / "metrics.jsonl") if record["kind"] == "eval"]
    if (evals[0]["step"], evals[-1]["step"]) != (0, arm.steps):
      raise ConfigError(f"{path}: evaluations are missing; remove the run, and make it again")
    ledger = {record["step"]: {one["source"]: one for one in record["sources"]} for record in journal.read(path / "ledger.jsonl")}
    stores = {source: token_store.open_store(folder / "stores" / arm.base / source) for source in held}
    for source, found in held.items():
      assert all((e["sources"][source]["documents"], e["sources"][source]["bytes"]) == found[:2] for e in evals), path
    assert all(one["epochs"] < 1 for one in ledger[arm.steps].values()), path  # no text is read twice
    tokens = [{source: one["tokens"] for source, one in ledger[e["step"]].items()} for e in evals]
    per_token = {source: (opened.num_bytes or 0) / opened.num_tokens for source, opened in stores.items()}
    records.append(
      {
        "arm": arm.name, "seed": arm.seed, "steps": arm.steps, "ids": num_ids, "growth": added, "flops_per_token": flops,
        "heldout": {source: found._asdict() for source, found in held.items()},
        "eval_steps": [e["step"] for e in evals],
        "tokens": [sum(read.values()) for read in tokens],
        "bytes": [round(sum(count * per_token[source] for source, count in read.items())) for read in tokens],
        "nats": {s: [round(e["sources"][s]["loss"] * e["sources"][s]["tokens"], 2) for e in evals] for s in held},
      }
    )  # fmt: skip
  return records


def main(argv: Sequence[str]) -> int:
  """Makes what is missing, or collects what is there; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--domain", type=pathlib.Path, help="its text: .jsonl (.gz), or .txt with form feeds between pages")
  parser.add_argument("--join", type=int, default=1, help="records of a .jsonl to a document")
  parser.add_argument("--heldout_bytes", type=int, default=30_000, help="of the domain that are evaluated")
  parser.add_argument(
    "--base_text", type=pathlib.Path, help="the base's own text, by tools/fixtures/make_example_data.py --output"
  )
  parser.add_argument("--arms", nargs="+", default=["none", *GROWN, *STAGED], choices=["none", *GROWN, *STAGED])
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--steps", type=int, help=f"by default {STEPS}, of rows_ arms {SHORT_STEPS}")
  parser.add_argument("--collect", type=pathlib.Path, help="a folder that the runs are in; --output is then the file to make")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="a folder for all of it")
  args = parser.parse_args(argv)
  try:
    if args.collect:
      records = collect(args.collect.resolve())
      args.output.parent.mkdir(parents=True, exist_ok=True)
      args.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
      console.say(f"{len(records)} complete runs -> {args.output}")
      return 0
    folder = args.output.resolve()
    prepare(folder, domain=args.domain, join=args.join, heldout_bytes=args.heldout_bytes, base_text=args.base_text)
    for seed in args.seeds:
      for name in args.arms:
        steps = args.steps or (SHORT_STEPS if name.startswith("rows_") else STEPS)
        if code := train(folder, Arm(name, seed, steps)):
          return code
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
