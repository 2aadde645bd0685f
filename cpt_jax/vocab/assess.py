"""Tokenizers, text of a domain and general text -> how each vocabulary fits, what more pieces would save, and what to do.

Invariant: tokens are counted over all of the text; what pieces would save is counted by a grown tokenizer on documents that they
were not chosen from.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax import config as config_lib, shipped
from cpt_jax.config import ConfigError, Problems
from cpt_jax.journal import write_atomically
from cpt_jax.progress import Progress
from cpt_jax.store import corpus, documents, tokenization
from cpt_jax.vocab import candidates, grow, kinds, texts as texts_lib, verdict
from cpt_jax.vocab.bases import Base
from cpt_jax.vocab.verdict import RULES, Finding

SIZES = (500, 1000, 2000, 4000, 8000, 16_000)  # pieces of the curve; published growths: 9 to 20 thousand
SAMPLE_BYTES = 5_000_000  # of domain text that pieces are chosen from and tried on
HELDOUT_FRAC = 0.2  # of that text, on which pieces are tried; by hand


class Fit(NamedTuple):
  """A vocabulary on a text, all of it."""

  tokens: int
  bytes_per_token: float
  fertility: float  # tokens per word, or per character (corpus.Text.unit)
  byte_frac: float  # tokens that are one byte of a character of several
  unknown_frac: float
  used_frac: float  # of the vocabulary


class Point(NamedTuple):
  """What growing by `num_pieces` gives on held-out documents."""

  num_pieces: int
  saved_frac: float  # of the tokens
  context_gain: float  # text in a context of so many tokens, times as much as before
  new_parameters: int | None  # None: the base's config.json is not there


@dataclasses.dataclass(frozen=True)
class Assessment:
  """One tokenizer on the texts."""

  name: str
  path: str
  vocab_size: int
  kind: str  # "" for one that cannot grow
  cannot_grow: str  # why
  domain: Fit
  general: Fit
  distance_bits: float  # Jensen-Shannon, between domain and general text
  noise_bits: float  # between halves of either text, the larger: what chance and the halves' topics make
  own_saving_frac: float | None  # None: too little text for a vocabulary of its own
  text_tokens: float  # what a run would read of the domain
  curve: list[Point]
  findings: dict[str, Finding]
  answer: str
  because: str

  @property
  def fits(self) -> bool:
    """Does the vocabulary suit the text as it is."""
    return verdict.fits({name: finding.met for name, finding in self.findings.items()})

  def as_json(self) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts."""
    record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    record |= {side: record[side]._asdict() for side in ("domain", "general")}
    record["curve"] = [point._asdict() for point in self.curve]
    record["findings"] = {
      name: {"value": f.value, "threshold": f.rule.threshold, "sign": f.rule.sign, "met": f.met, "basis": f.rule.basis}
      for name, f in self.findings.items()
    }
    return record


class Comparison(NamedTuple):
  """A base's tokenizer and others on the same texts."""

  assessments: list[Assessment]  # the base's first
  texts: dict[str, corpus.Text]  # domain, general

  @property
  def instead(self) -> Assessment | None:
    """Of the others the one to take instead of the base's, if any."""
    return better(self.assessments)

  @property
  def answer(self) -> str:
    """What to do, as vocab.verdict names it."""
    return self.assessments[0].answer if self.instead is None else verdict.OTHER_BASE


@dataclasses.dataclass
class Counted:
  """A text while it is read: ids of every tokenizer by halves."""

  halves_2V: list[np.ndarray]  # of each tokenizer
  text: corpus.Text | None = None
  num_parts: int = 0


def count(
  tokenizer_list: Sequence[tokenization.Tokenizer], batches: Iterator[list[str]], *,
  on_part: Callable[[str], object] = lambda _: None,
) -> Counted:  # fmt: skip
  """Counts the ids of all tokenizers in one pass; `on_part` sees every part."""
  counted = Counted([np.zeros((2, tokenizer.vocab_size), np.int64) for tokenizer in tokenizer_list])

  def passing() -> Iterator[str]:
    for batch in batches:
      for halves_2V, tokenizer in zip(counted.halves_2V, tokenizer_list, strict=True):
        for at, ids in enumerate(tokenizer.encode_contents(batch), counted.num_parts):
          halves_2V[at % 2] += np.bincount(np.array(ids, np.int64), minlength=halves_2V.shape[1])
      counted.num_parts += len(batch)
      for text in batch:
        on_part(text)
        yield text

  counted.text = corpus.describe_text(passing(), num_tokens=0)
  return counted


def fit(tokenizer: tokenization.Tokenizer, counts_V: np.ndarray, text: corpus.Text) -> Fit:
  """Figures of a vocabulary from its counts on a text."""
  tokens = int(counts_V.sum())
  if not tokens:
    raise ConfigError(f"{tokenizer.path}: makes no token of the text; give text with words in it")
  units = text.words if text.unit == "word" else text.characters
  return Fit(
    tokens=tokens, bytes_per_token=text.bytes / tokens, fertility=tokens / max(units, 1),
    byte_frac=float(counts_V[sorted(tokenizer.byte_ids)].sum() / tokens),
    unknown_frac=0.0 if tokenizer.unk_id is None else float(counts_V[tokenizer.unk_id] / tokens),
    used_frac=float((counts_V > 0).mean()),
  )  # fmt: skip


def distance(domain_2V: np.ndarray, general_2V: np.ndarray) -> tuple[float, float]:
  """Jensen-Shannon bits between the texts, and the larger one between the halves of either.

  Of each text how often either half of it has each id, [2, V].
  """
  noises = [corpus.jensen_shannon_bits(*side_2V) for side_2V in (domain_2V, general_2V) if side_2V.sum(axis=1).all()]
  return corpus.jensen_shannon_bits(domain_2V.sum(axis=0), general_2V.sum(axis=0)), max(noises, default=0.0)


def curve(base: Base, sample: texts_lib.Sample, *, sizes: Sequence[int] = SIZES, min_count: int = grow.MIN_COUNT) -> list[Point]:
  """Tokens that the first `size` candidates of the training side save on the held-out side, as far as there are candidates."""
  spelt = [text for words in grow.words_of(base, sample.train) if (text := candidates.spell(words))]
  if not spelt or not sample.heldout:
    return []
  learnt = candidates.learn(spelt, num_merges=max(sizes), min_count=min_count)
  general_counts_V = np.zeros(base.vocab_size, np.int64)
  pool = candidates.candidates(base, learnt, general_counts_V=general_counts_V).pieces
  before = sum(map(len, base.tokenizer.encode_contents(sample.heldout)))
  found, width = [], _embedding_width(base.path.parent)
  for size in sorted({min(size, len(pool)) for size in sizes} - {0}):
    chosen = grow.select(base, pool, size=size, banned=set(), most_saved=before * len(pool))
    grown = grow.load_grown(base, base.grown(chosen))
    after = sum(map(len, grown.encode_contents(sample.heldout)))
    found.append(Point(len(chosen), 1 - after / before, before / after, None if width is None else width * len(chosen)))
  return found


def _embedding_width(directory: pathlib.Path) -> int | None:
  """Parameters of one more token: its rows in the embedding and, where it is not tied, in the head."""
  file = directory / "config.json"
  if not file.is_file():
    return None
  hf_config = json.loads(file.read_bytes())
  width = hf_config.get("hidden_size")
  return None if not isinstance(width, int) else width * (1 if hf_config.get("tie_word_embeddings") else 2)


def assess(
  path: str, tokenizer: tokenization.Tokenizer, domain_2V: np.ndarray, general_2V: np.ndarray, *, domain_text: corpus.Text,
  general_text: corpus.Text, sample: texts_lib.Sample, own_tokens: int | None, domain_bytes: float | None = None,
  budget_tokens: float | None = None,
) -> Assessment:  # fmt: skip
  """One tokenizer: figures, rules and answer. `domain_bytes`: of text that exists, where what was read is a part of it."""
  domain, general = (
    fit(tokenizer, side_2V.sum(axis=0), text) for side_2V, text in ((domain_2V, domain_text), (general_2V, general_text))
  )
  bits, noise = distance(domain_2V, general_2V)
  heldout = sum(map(len, tokenizer.encode_contents(sample.heldout)))
  own = None if own_tokens is None or not heldout else 1 - own_tokens / heldout
  there = (domain_text.bytes if domain_bytes is None else domain_bytes) / domain.bytes_per_token * verdict.REPEATS
  text_tokens = there if budget_tokens is None else min(there, budget_tokens)
  values = {"far": bits - noise, "own saves": own, "bytes": domain.byte_frac, "unknown": domain.unknown_frac}
  findings = {name: rule.find((values | {"enough text": text_tokens})[name]) for name, rule in RULES.items()}
  kind, cannot_grow, points = "", "", []
  try:
    base = kinds.load(path)
    kind, points = base.kind, curve(base, sample)
  except ConfigError as error:
    cannot_grow = str(error)
  answer = verdict.answer({name: finding.met for name, finding in findings.items()})
  if answer == verdict.EXPAND and cannot_grow:
    answer = verdict.OTHER_BASE
  return Assessment(
    tokenizer.name, path, tokenizer.vocab_size, kind, cannot_grow, domain, general, bits, noise, own, text_tokens, points,
    findings, answer, _because(answer, findings, cannot_grow),
  )  # fmt: skip


def _because(answer: str, findings: dict[str, Finding], cannot_grow: str) -> str:
  met = {name for name, finding in findings.items() if finding.met}
  is_far = "far" in met
  why = [name for name in ("own saves", "bytes", "unknown") if name in met]
  if answer == verdict.KEEP:
    if is_far:
      return "the text is far from general text, but the vocabulary spells it as well as one of its own would"
    return (
      "the text's tokens are spread much as those of general text: the first condition is not met"
      if not why
      else (
        f"{', '.join(why)} met, but the text's tokens are spread much as those of general text: the first condition is not met"
      )
    )
  unfit = f"the vocabulary does not fit ({', '.join(['far'] * is_far + why)})"
  if answer == verdict.EXPAND:
    return f"{unfit} and there is enough text to make up for new rows: both conditions are met"
  if "enough text" in met:
    return f"{unfit} and there is enough text, but this tokenizer cannot grow: {cannot_grow}"
  return f"{unfit}, but there is too little text to make up for new rows: the second condition is not met"


def better(assessments: Sequence[Assessment]) -> Assessment | None:
  """Of the tokenizers behind the first the one to take instead: it fits, and spells the domain in the fewest tokens."""
  if assessments[0].fits:
    return None
  others = [other for other in assessments[1:] if other.fits]
  return max(others, key=lambda other: other.domain.bytes_per_token, default=None)


def compare(
  tokenizers: Sequence[str | os.PathLike], *, domain: Sequence[str], general: Sequence[str], domain_gb: float | None = None,
  budget: str = "", output: str | os.PathLike = "",
) -> Comparison:  # fmt: skip
  """Assesses tokenizers, the base's first, on all of the texts.

  Args:
    tokenizers: Hugging Face directories, tokenizer.json or *.model files.
    domain: text files or globs of what is to be learnt.
    general: of text like the base's own.
    domain_gb: domain text that exists in all, 10^9 bytes, where `domain` is a part of it.
    budget: tokens of domain text that the run would read, e.g. "2B tokens"; "" = all, as often as repeats are worth it.
    output: a file for all figures; "" = none.

  Raises:
    ConfigError: all that is wrong with the settings.
    DataError: text that cannot be read.
  """
  problems, files = Problems(), {}
  paths = [shipped.find(os.fspath(path)) for path in tokenizers]
  for name, patterns in ("domain", domain), ("general", general):
    if not patterns:
      problems.add(f"--{name} is empty: name text files, e.g. --{name} 'texts/{name}/*.jsonl.gz'")
      continue
    with problems.collect():
      files[name] = documents.find_files(patterns, flag=f"--{name}")
  if not paths:
    problems.add("--tokenizers is empty: name the base's Hugging Face directory, then others to compare it with")
  if len(set(paths)) < len(paths):
    problems.add(f"--tokenizers={','.join(paths)}: names one twice")
  if domain_gb is not None and domain_gb <= 0:
    problems.add(f"--domain_gb={domain_gb}: give 10^9 bytes above 0")
  budget_tokens = None
  try:
    budget_tokens = config_lib.parse_tokens(budget) if budget else None
  except ValueError as error:
    problems.add(f"--budget={error}")
  opened = {}
  for path in paths:
    with problems.collect():
      opened[path] = tokenization.load(path)
  problems.raise_if_any()
  domain_bytes = None if domain_gb is None else domain_gb * 1e9
  found = _compare(opened, files, domain_bytes=domain_bytes, budget_tokens=budget_tokens)
  if output:
    record: dict[str, Any] = {"command": sys.argv, "answer": found.answer}
    record["texts"] = {name: text._asdict() for name, text in found.texts.items()}
    record["tokenizers"] = [each.as_json() for each in found.assessments]
    write_atomically(pathlib.Path(output), (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
  return found


def _compare(
  opened: dict[str, tokenization.Tokenizer], files: dict[str, list[str]], *, domain_bytes: float | None,
  budget_tokens: float | None,
) -> Comparison:  # fmt: skip
  """Reads both texts once and measures every tokenizer on them."""
  sampler = texts_lib.Sampler(
    wanted_bytes=SAMPLE_BYTES, there_bytes=texts_lib.total_bytes(files["domain"]), heldout_frac=HELDOUT_FRAC
  )
  counted, found = {}, []
  with Progress() as progress:
    for name, of_side in files.items():
      advance = progress.part(f"{name}: count tokens (kB)", sum(os.path.getsize(file) for file in of_side), unit=1000)
      batches = texts_lib.batches(texts_lib.parts(of_side, on_bytes=advance))
      counted[name] = count(list(opened.values()), batches, on_part=sampler.add if name == "domain" else lambda _: None)
    texts = {name: side.text for name, side in counted.items()}
    sample, own_tokens = sampler.sample, {}
    for at, (path, tokenizer) in enumerate(opened.items()):
      advance = progress.part(f"try pieces of {path} on held-out text", 1)
      size = min(corpus.OWN_VOCAB_SIZE, tokenizer.vocab_size)
      if size not in own_tokens:
        own_tokens[size] = corpus.own_vocabulary_tokens(sample.train, sample.heldout, vocab_size=size)
      found.append(
        assess(
          path, tokenizer, counted["domain"].halves_2V[at], counted["general"].halves_2V[at], domain_text=texts["domain"],
          general_text=texts["general"], sample=sample, own_tokens=own_tokens[size], domain_bytes=domain_bytes,
          budget_tokens=budget_tokens,
        )
      )  # fmt: skip
      advance(1)
  return Comparison(found, texts)
