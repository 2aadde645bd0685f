"""A base and text of a domain -> the same base grown in several ways, trained alike, and tables of what that did.

Run:   python tools/vocab_experiment.py --domain examples/corpora/poetry_ci.jsonl.gz --join 10 --output plan/vocab/zh
"""

import argparse
import functools
import gzip
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax import config as config_lib
from cpt_jax.data import documents, store
from cpt_jax.data.shuffle import mix64
from cpt_jax.train import console, loop
from cpt_jax.vocab import initialise, kinds
from cpt_jax.vocab import texts as texts_lib
from tools import make_example_data as cutter

ROOT = pathlib.Path(__file__).resolve().parent.parent
HELDOUT_FRAC = 0.02  # as configs/pretrain.py: what is held out here was held out of the base


def read(path: str) -> Iterator[str]:
  for record in documents.PartReader(documents.Part(path)):
    yield record.text


def is_heldout(text: str) -> bool:
  place = mix64(np.array([store.text_hash(text)], np.uint64))[0]
  return bool(place < np.uint64(int(HELDOUT_FRAC * 2**64)))


def limit_heldout(texts: Iterable[str], *, heldout_bytes: int) -> tuple[list[str], list[str]]:
  """Training texts, and of the held-out ones those of the least hashes until they have so many bytes; the others are left out."""
  train, held = [], []
  for text in dict.fromkeys(texts):
    (held if is_heldout(text) else train).append(text)
  held.sort(key=lambda t: int(mix64(np.array([store.text_hash(t)], np.uint64))[0]))
  sizes = np.cumsum([len(t.encode()) for t in held])
  return train, held[: int(np.searchsorted(sizes, heldout_bytes)) + 1]


def write(path: pathlib.Path, texts: Iterable[str]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as packed:
    for text in texts:
      packed.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")


CHARACTERS = 2_000, 6_000  # of a document that is cut from a page


def domain_documents(path: str, *, join: int) -> list[str]:
  """Records joined in their order, `join` to a document; pages of a .txt file between form feeds are cut instead."""
  if path.endswith(".txt"):
    rng = random.Random(0)
    works = cutter.read_works(pathlib.Path(path))
    return [part for work in works for part in cutter.cut(work, rng=rng, chars=CHARACTERS, lines=False)]
  found = list(read(path))
  return ["\n\n".join(found[at : at + join]) for at in range(0, len(found), join)]


LOW, HIGH, RARE = "0:0.9", "0.9:1", "0:0.5"
SIZE = 400
_COUNT, _USE = ["--band_by=count"], ["--band_by=use"]
# Arm -> how tools/grow_vocab.py grows it; {low} is what the arm of that name saved.
GROWN: dict[str, list[str]] = {
  "count_low": [*_COUNT, f"--band={LOW}"],
  "count_high": [*_COUNT, f"--band={HIGH}"],
  "count_high_equal": [*_COUNT, f"--band={HIGH}", "--saving={count_low}"],
  "use_low": [*_USE, "--band=low"],
  "use_high": [*_USE, "--band=high"],
  "use_high_equal": [*_USE, "--band=high", "--saving={use_low}"],
  "count_rare": [*_COUNT, f"--band={RARE}"],
}
INITS = [name for name in initialise.INITIALISERS if name != "mean"]
GROWN |= {f"rows_{name}": [*GROWN["count_high"], f"--input_rows={name}"] for name in INITS}
NOISY = ("rows_gaussian", "rows_random")  # grown anew for each seed
GENERAL_BYTES = 22_000  # of English that is held out
STEPS, EVERY = 48, 6


def base_dir(folder: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
  if arm == "none":
    return ROOT / "examples" / "base"
  return folder / "bases" / (f"{arm}-{seed}" if arm in NOISY else arm)


def grow(folder: pathlib.Path, arm: str, seed: int, *, general: Sequence[str]) -> pathlib.Path:
  """The base of an arm, grown if it is not there yet."""
  output = base_dir(folder, arm, seed)
  if output.exists():
    return output
  arguments = []
  for argument in GROWN[arm]:
    for other in ("count_low", "use_low"):
      if "{" + other + "}" in argument:
        argument = argument.replace("{" + other + "}", f"{saving(grow(folder, other, 0, general=general)):.9f}")
    arguments.append(argument)
  command = [sys.executable, str(ROOT / "tools" / "grow_vocab.py"), f"--hf={ROOT / 'examples' / 'base'}"]
  command += [f"--domain={folder / 'grow.jsonl.gz'}", f"--size={SIZE}", f"--seed={seed}", f"--output={output}"]
  if "use" in arm or arm == "rows_weighted":
    command += [f"--general={file}" for file in general]
  output.parent.mkdir(parents=True, exist_ok=True)
  done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
  output.with_suffix(".txt").write_text(done.stdout, encoding="utf-8")
  print(f"grown {output}", flush=True)
  return output


def saving(base: pathlib.Path) -> float:
  """What its pieces save of the tokens that they were chosen from."""
  record = json.loads((base / "vocabulary.json").read_text(encoding="utf-8"))
  return sum(piece["saved"] for piece in record["pieces"]) / sample_tokens(base.parent.parent)


@functools.cache
def sample_tokens(folder: pathlib.Path) -> int:
  """Tokens of the base that tools/grow_vocab.py chooses pieces from."""
  found = texts_lib.sample([str(folder / "grow.jsonl.gz")], max_bytes=50_000_000, heldout_frac=0.1)
  base = kinds.load(str(ROOT / "examples" / "base"))
  return sum(len(ids) for batch in texts_lib.batches(iter(found.train)) for ids in base.tokenizer.encode_contents(batch))


def run_config(folder: pathlib.Path, arm: str, base: pathlib.Path, *, seed: int, steps: int) -> Any:
  c = config_lib.default()
  c.seed = seed
  c.start.hf = str(base)
  c.data.row_len = 256
  c.data.heldout_frac = HELDOUT_FRAC
  store_of = folder / "stores" / (f"{arm}-{seed}" if arm in NOISY else arm)
  for name, role, share in ("general", "replay", 0.25), ("domain", "domain", 0.75):
    text = folder / f"{name}.jsonl.gz"
    c.data.sources[name] = config_lib.source(store=str(store_of / name), text=str(text), role=role, share=share)
  c.train.length = f"{steps} steps"
  c.train.batch_rows = 16
  c.schedule.name = "constant"
  c.schedule.lr_peak = 1e-3
  c.schedule.warmup = "3 steps"
  c.eval.every = f"{EVERY} steps"
  c.eval.tokens = 10**9
  c.checkpoint.every = "100%"
  c.checkpoint.keep_last = 1
  c.checkpoint.export_hf = False
  c.log.every = 4
  return c


def name_of(arm: str, seed: int, steps: int) -> str:
  return f"{arm}-seed{seed}" + (f"-steps{steps}" if steps != STEPS else "")


def train(folder: pathlib.Path, arm: str, seed: int, *, steps: int, general: Sequence[str]) -> int:
  """One run, unless it is there."""
  path = folder / "runs" / name_of(arm, seed, steps)
  if (path / "summary.json").is_file():
    return 0
  base = base_dir(folder, arm, seed) if arm == "none" else grow(folder, arm, seed, general=general)
  start = time.time()
  with console.muted():
    code = loop.run(run_config(folder, arm, base, seed=seed, steps=steps), path)
  if code == 0:
    shutil.rmtree(path / "ckpt", ignore_errors=True)
  print(f"{path.name}: {code}, {time.time() - start:.0f} s", flush=True)
  return code


def prepare(folder: pathlib.Path, *, domain: str, join: int, heldout_bytes: int) -> None:
  if (folder / "domain.jsonl.gz").exists():
    return
  training, held = limit_heldout(domain_documents(domain, join=join), heldout_bytes=heldout_bytes)
  write(folder / "grow.jsonl.gz", training)
  english = limit_heldout(read(str(ROOT / "examples/corpora/english.jsonl.gz")), heldout_bytes=GENERAL_BYTES)
  write(folder / "general.jsonl.gz", [*english[0], *english[1]])
  write(folder / "domain.jsonl.gz", [*training, *held])


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--domain")
  parser.add_argument("--general", action="append", default=[])
  parser.add_argument("--join", type=int, default=1)
  parser.add_argument("--heldout_bytes", type=int, default=30_000)
  parser.add_argument("--arms", nargs="+", default=["none", *GROWN])
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  args = parser.parse_args(argv)
  folder = args.output.resolve()
  prepare(folder, domain=args.domain, join=args.join, heldout_bytes=args.heldout_bytes)
  for seed in args.seeds:
    for arm in args.arms:
      if code := train(folder, arm, seed, steps=args.steps, general=args.general):
        return code
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
