"""Public-domain texts -> the shipped example corpora, the base model's pretraining text and its tokenizer.

Invariant: the same input files give the same bytes; every shipped English document is also in the pretraining text, unchanged.
Run by hand, once; examples/README.md says with which input. Nothing imports it.
"""

import argparse
import gzip
import hashlib
import json
import pathlib
import random
import re
import sys
from collections.abc import Iterable, Iterator

from rich.progress import track

# Folder and name of each text in the corpora directory: documents separated by a line holding one form feed.
ENGLISH = (
  "austen-novels",
  "moby-dick",
  "state-of-the-union",
  "bible-web",
  "world-factbook",
  "treasury-of-david",
  "henry-commentary",
)
HARD_WRAPPED = ("austen-novels", "moby-dick")  # line ends inside paragraphs are the printed page's, not the author's
CHINESE = {"poetry-yuan": None, "classics": None, "poetry-tang-song": 4_000_000}  # bytes taken; None = all
DOMAIN = "poetry-ci"  # never in the pretraining text: the quickstart's new domain
SHIPPED_ENGLISH_BYTES = 2_300_000
DOCUMENT_CHARS = {"en": (2_000, 6_000), "zh": (700, 2_000)}
VOCAB_SIZE = 4096
EOS = "<|endoftext|>"  # id 0
CHINESE_TOKEN_FRAC = 0.05  # of the tokenizer's training text, about what the base model is trained on


def read_works(path: pathlib.Path) -> list[str]:
  """The documents of one corpus file."""
  if not path.is_file():
    sys.exit(f"{path} does not exist; --corpora is the directory with en/ and zh/ that examples/README.md describes")
  return [work.strip() for work in path.read_text(encoding="utf-8").split("\f") if work.strip()]


def unwrap(text: str) -> str:
  """Joins the lines of each paragraph, but for short lines (verse, headings, letters)."""
  return re.sub(r"(?<=[^\n]{55})\n(?=[^\n])", " ", text)


def units(work: str, *, lines: bool, max_chars: int) -> Iterator[tuple[str, str]]:
  """(separator before, text) pieces of a work that a document border may fall between; joined they are the work again.

  Paragraphs (`lines`: lines); those longer than `max_chars` at sentence ends.
  """
  between = "\n" if lines else "\n\n"
  work = re.sub(r"[ \t]*\n[ \t]*", "\n", work)
  for paragraph in re.split(r"\n+" if lines else r"\n{2,}", work):
    if len(paragraph) <= max_chars:
      yield between, paragraph
      continue
    for i, sentence in enumerate(re.split(r"(?<=[.!?;]) +(?=\S)", paragraph)):
      yield between if i == 0 else " ", sentence


def cut(work: str, *, rng: random.Random, chars: tuple[int, int], lines: bool) -> Iterator[str]:
  """Documents of about `chars` (least, most) characters, cut at the borders that `units` allows."""
  low, high = chars
  between = "\n" if lines else "\n\n"
  document, target, pending = "", rng.randint(low, high), None
  for separator, text in units(work, lines=lines, max_chars=low // 2):
    if document and len(document) + len(text) > target:
      if pending:
        yield pending
      pending, document, target = document, "", rng.randint(low, high)
    document = document + separator + text if document else text
  if pending and len(document) < low // 2:  # a short rest stays with what it belongs to
    pending, document = f"{pending}{between}{document}", ""
  yield from (d for d in (pending, document) if d)


def title_first(poem: str) -> str:
  """Moves the tune's name, which ends a poem in the files, to its head: name, poet, lines."""
  lines = poem.split("\n")
  if len(lines) < 3 or lines[-1].endswith(("\u3002", "\uff01", "\uff1f", "\uff0c")):  # a line that ends so is no name
    return poem
  return "\n".join([lines[-1], *lines[:-1]])


def documents(path: pathlib.Path, *, language: str) -> list[str]:
  """The documents of one corpus file, cut; exact repeats dropped."""
  name = path.stem
  rng = random.Random(name)
  works = read_works(path)
  if name == DOMAIN:
    found = [title_first(poem.strip()) for work in works for poem in work.split("\n\n")]
  else:
    if name in HARD_WRAPPED:
      works = [unwrap(work) for work in works]
    lines = name in ("world-factbook", "classics")
    found = [d for work in works for d in cut(work, rng=rng, chars=DOCUMENT_CHARS[language], lines=lines)]
  return [d for d in dict.fromkeys(found) if d.strip()]


def num_bytes(texts: Iterable[str]) -> int:
  """UTF-8 bytes of the texts."""
  return sum(len(t.encode()) for t in texts)


def sample(texts: list[str], *, max_bytes: int) -> list[str]:
  """A reproducible sample in the order of the input, within `max_bytes`."""
  # The salt keeps the choice independent of the hash that later splits documents into training and held-out ones.
  order = sorted(texts, key=lambda t: hashlib.sha256(b"example data" + t.encode()).digest())
  chosen, total = set(), 0
  for text in order:
    total += len(text.encode())
    if total > max_bytes:
      break
    chosen.add(text)
  return [t for t in texts if t in chosen]


def write(path: pathlib.Path, corpora: dict[str, list[str]]) -> None:
  """One JSON line per document; no clock and no file name in the gzip header, so that the file is reproducible."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=9, mtime=0) as packed:
    for source, texts in corpora.items():
      for text in texts:
        packed.write(json.dumps({"text": text, "source": source}, ensure_ascii=False).encode() + b"\n")
  count = sum(len(t) for t in corpora.values())
  size = sum(num_bytes(t) for t in corpora.values())
  print(f"wrote {path}: {count:,} documents, {size / 1e6:.2f} MB of text, {path.stat().st_size / 1e6:.2f} MB on disk")


def is_kept_back(text: str) -> bool:
  """Whether a document is left out of the tokenizer's training, to measure the tokenizer on (1 in 50)."""
  return hashlib.sha256(b"tokenizer" + text.encode()).digest()[0] < 5


def train_tokenizer(texts: list[str], output: pathlib.Path) -> None:
  """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into `output`: byte-level BPE, digits one by one."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  # The alphabet is the 256 bytes: any text can be written and comes back exactly.
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE,
    special_tokens=[EOS],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=sys.stderr.isatty(),
  )
  tokenizer.train_from_iterator(texts, trainer, length=len(texts))
  assert tokenizer.get_vocab_size() == VOCAB_SIZE and tokenizer.token_to_id(EOS) == 0
  output.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(output / "tokenizer.json"))
  special = {"eos_token": EOS, "pad_token": EOS}
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **special,
    "model_max_length": 2048,
    "clean_up_tokenization_spaces": False,
  }
  (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
  (output / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
  print(f"wrote {output}/tokenizer.json, tokenizer_config.json, special_tokens_map.json: {VOCAB_SIZE} pieces")


def measure(tokenizer_file: pathlib.Path, corpora: dict[str, list[str]]) -> None:
  """Prints bytes per token of each corpus and checks that every text comes back as it was."""
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(tokenizer_file))
  for name, texts in corpora.items():
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    wrong = sum(tokenizer.decode(ids) != text for ids, text in zip(encoded, texts, strict=True))
    tokens = sum(len(ids) for ids in encoded)
    rate = num_bytes(texts) / tokens
    print(f"  {name}: {rate:.3f} bytes per token over {len(texts):,} documents ({tokens:,} tokens); {wrong} not restored")


def main() -> None:
  """Builds everything; see --help."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--corpora", type=pathlib.Path, required=True, help="directory with en/*.txt and zh/*.txt")
  parser.add_argument("--examples", type=pathlib.Path, required=True, help="gets corpora/*.jsonl.gz and base/tokenizer*.json")
  parser.add_argument("--output", type=pathlib.Path, help="gets the base's pretraining text: english.jsonl.gz, chinese.jsonl.gz")
  args = parser.parse_args()

  files = [("en", n) for n in ENGLISH] + [("zh", n) for n in CHINESE] + [("zh", DOMAIN)]
  cut_up = {
    name: documents(args.corpora / folder / f"{name}.txt", language=folder)
    for folder, name in track(files, "cutting into documents", disable=not sys.stderr.isatty())
  }
  english = {name: cut_up[name] for name in ENGLISH}
  chinese = {n: cut_up[n] if limit is None else sample(cut_up[n], max_bytes=limit) for n, limit in CHINESE.items()}
  all_english = sum(num_bytes(t) for t in english.values())
  # In proportion to the pretraining text, so that the shipped text is a fair sample of what the base was trained on.
  shipped = {n: sample(t, max_bytes=int(SHIPPED_ENGLISH_BYTES * num_bytes(t) / all_english)) for n, t in english.items()}
  write(args.examples / "corpora" / "english.jsonl.gz", shipped)
  write(args.examples / "corpora" / "poetry_ci.jsonl.gz", {DOMAIN: cut_up[DOMAIN]})
  if args.output:
    write(args.output / "english.jsonl.gz", english)
    write(args.output / "chinese.jsonl.gz", chinese)
  flat_english = [t for texts in english.values() for t in texts]
  flat_chinese = [t for texts in chinese.values() for t in texts]
  # Chinese costs about half as many bytes a token as English, hence the 0.5.
  chinese_bytes = int(0.5 * num_bytes(flat_english) * CHINESE_TOKEN_FRAC / (1 - CHINESE_TOKEN_FRAC))
  training = [t for t in flat_english + sample(flat_chinese, max_bytes=chinese_bytes) if not is_kept_back(t)]
  base = args.examples / "base"
  train_tokenizer(training, base)
  measure(
    base / "tokenizer.json",
    {
      "English, documents it was not trained on": [t for t in flat_english if is_kept_back(t)],
      "Chinese, documents it was not trained on": [t for t in flat_chinese if is_kept_back(t)],
      DOMAIN: cut_up[DOMAIN],
    },
  )


if __name__ == "__main__":
  main()
