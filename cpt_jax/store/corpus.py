"""Tokens and texts of a sample -> figures: distances, fertility, scripts, lengths, what a vocabulary saves.

Invariant: pure functions of their arguments; counts in, shares out, no share of nothing.
"""

import collections
import lzma
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

# Scripts that put no space between words: there a token's cost is counted per character.
WORDLESS = frozenset(
  ["Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese", "Balinese", "Yi"]
)
WORDLESS_FRAC = 0.2  # of the letters, from which on a text is counted so (by hand: Japanese manuals quote much English)
_SCRIPT_NAMES = {"CJK": "Han", "IDEOGRAPHIC": "Han", "KANGXI": "Han"}  # first word of a character's Unicode name
_NO_SCRIPT = frozenset(["COMBINING", "MODIFIER", "FULLWIDTH", "HALFWIDTH", "MATHEMATICAL", "DOUBLE", "FEMININE", "MASCULINE"])
# A vocabulary made for a comparison: about as many pieces as expansions have added (9 to 20 thousand: ChipNeMo, EEVE 2402.14714,
# Swallow 2404.17790, Chinese-LLaMA 2304.08177).
OWN_VOCAB_SIZE = 16_384
COMPRESSED_BYTES = 500_000  # of text that is compressed for a comparison; half a second of time
MIN_OWN_BYTES = 200_000  # of text to make it from; with less it learns the text by heart (chosen by hand)


class Text(NamedTuple):
  """A sample's text."""

  bytes: int  # UTF-8
  characters: int  # without white space
  words: int  # between white space
  letters_frac: float  # of the characters
  scripts: dict[str, float]  # share of the letters, largest first
  unit: str  # "word", or "character" where a fifth of the letters or more are of scripts without spaces
  fertility: float  # tokens per unit


class Lengths(NamedTuple):
  """Documents of a store, in tokens."""

  median: float
  p90: float
  p99: float
  longest: int
  over_4k_frac: float  # share of the tokens that stand in documents longer than 4,096
  over_32k_frac: float  # than 32,768
  over_context_frac: float  # than the base's context
  beyond_context_frac: float  # share of the tokens before which a document has more tokens than the context


def jensen_shannon_bits(counts_V: np.ndarray, others_V: np.ndarray) -> float:
  """Jensen-Shannon divergence of two distributions given as counts, in bits: 0 for equal ones, 1 for nothing in common.

  `[1, 1]` and `[1, 0]` -> 0.3113.
  """
  p_V, q_V = (counts / counts.sum() for counts in (np.asarray(counts_V, np.float64), np.asarray(others_V, np.float64)))
  mean_V = (p_V + q_V) / 2
  return float(min(max((_relative_bits(p_V, mean_V) + _relative_bits(q_V, mean_V)) / 2, 0.0), 1.0))


def _relative_bits(p_V: np.ndarray, mean_V: np.ndarray) -> float:
  has = p_V > 0
  return float(np.sum(p_V[has] * np.log2(p_V[has] / mean_V[has])))


def halves(parts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Parts dealt out one by one, each to the half that has less; a single part is cut in the middle."""
  if len(parts) == 1:
    middle = len(parts[0]) // 2
    return [parts[0][:middle]], [parts[0][middle:]]
  dealt: tuple[list[np.ndarray], list[np.ndarray]] = [], []
  sizes = [0, 0]
  for part in parts:
    side = int(sizes[1] < sizes[0])
    dealt[side].append(part)
    sizes[side] += len(part)
  return dealt


def count_tokens(parts: Iterable[np.ndarray], *, vocab_size: int, max_tokens: int) -> np.ndarray:
  """How often each id stands in the first `max_tokens` of the parts, int64 [V]."""
  counts_V, left = np.zeros(vocab_size, np.int64), max_tokens
  for part in parts:
    counts_V += np.bincount(part[:left], minlength=vocab_size)
    left -= min(len(part), left)
    if left == 0:
      break
  return counts_V


def describe_text(texts: Iterable[str], *, num_tokens: int) -> Text:
  """Words, characters and scripts of texts that are `num_tokens` tokens."""
  found: collections.Counter[str] = collections.Counter()
  num_words = num_bytes = 0
  for text in texts:
    found.update(text)
    num_words += len(text.split())
    num_bytes += len(text.encode("utf-8"))
  characters = sum(n for character, n in found.items() if not character.isspace())
  letters: collections.Counter[str] = collections.Counter()
  for character, n in found.items():
    if (script := script_of(character)) is not None:
      letters[script] += n
  num_letters = letters.total()
  wordless = sum(n for script, n in letters.items() if script in WORDLESS)
  unit, num_units = ("word", num_words)
  if wordless > WORDLESS_FRAC * num_letters:
    unit, num_units = "character", characters
  return Text(
    bytes=num_bytes,
    characters=characters,
    words=num_words,
    letters_frac=num_letters / max(characters, 1),
    scripts={script: n / num_letters for script, n in letters.most_common()},
    unit=unit,
    fertility=num_tokens / max(num_units, 1),
  )


def script_of(character: str) -> str | None:
  """'Latin', 'Han', ... of a letter; None of anything else."""
  if not unicodedata.category(character).startswith("L"):
    return None
  first = unicodedata.name(character, "UNNAMED").split()[0].split("-")[0]
  return None if first in _NO_SCRIPT else _SCRIPT_NAMES.get(first, first.capitalize())


def new_scripts_frac(scripts: dict[str, float], general: dict[str, float], *, rare_frac: float = 0.01) -> float:
  """Share of the letters in scripts of which the general source has less than `rare_frac`."""
  return sum(share for script, share in scripts.items() if general.get(script, 0.0) < rare_frac)


def describe_lengths(lengths: np.ndarray, *, context: int) -> Lengths:
  """Lengths of all documents; `context` is the base's, in tokens."""
  total = max(int(lengths.sum()), 1)
  median, p90, p99 = np.quantile(lengths, [0.5, 0.9, 0.99]).tolist()

  def in_longer(than: int) -> float:
    return float(lengths[lengths > than].sum() / total)

  return Lengths(
    median=median,
    p90=p90,
    p99=p99,
    longest=int(lengths.max()),
    over_4k_frac=in_longer(4096),
    over_32k_frac=in_longer(32_768),
    over_context_frac=in_longer(context),
    beyond_context_frac=float(np.maximum(lengths - context, 0).sum() / total),
  )


def own_vocabulary_tokens(texts: Sequence[str], others: Sequence[str], *, vocab_size: int) -> int | None:
  """Tokens of `others` by a byte-level BPE made from `texts`; None where these are too short to make one."""
  if sum(len(text.encode("utf-8")) for text in texts) < MIN_OWN_BYTES:
    return None
  own = tokenizers.Tokenizer(tokenizers.models.BPE())
  own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
  )
  own.train_from_iterator(texts, trainer=trainer)
  return sum(len(encoded.ids) for encoded in own.encode_batch(list(others)))


def beginnings(texts: Sequence[str], *, num_bytes: int = COMPRESSED_BYTES) -> bytes:
  """UTF-8 of at most `num_bytes`: of every text its beginning, as long as its equal share, or 4,096 characters."""
  share = max(num_bytes // max(len(texts), 1), 4096)
  return "\n".join(text[:share] for text in texts).encode("utf-8")[:num_bytes]


def compressed_bits(data: bytes) -> float:
  """Bits per byte of xz, which knows nothing beforehand and learns the text as it reads it."""
  return 8 * len(lzma.compress(data, preset=6)) / len(data)


def ratio_error(sums: Sequence[float], weights: Sequence[float]) -> float:
  """Standard error of sum(sums) / sum(weights), its parts taken as independent draws; infinite for a single part."""
  n = len(sums)
  if n < 2:
    return math.inf
  ratio = sum(sums) / sum(weights)
  squares = sum((s - ratio * w) ** 2 for s, w in zip(sums, weights, strict=True))
  return (n / (n - 1) * squares) ** 0.5 / sum(weights)
