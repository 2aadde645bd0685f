"""Evaluation texts + training documents -> which of the documents share a run of words with an evaluation text.

Invariant: a match is of the words themselves, never of their hashes alone, and depends on the document's own text only.

Words are runs of letters and digits, in lower case and without accents; all else is between words. Each character of a
script without spaces (Han, Kana, Thai, ...) is a word. A document that shares `ngram_words` words in a row with an evaluation
text is contaminated. This is GPT-3's rule for its training data (2005.14165, appendix C: 13 words, in lower case, without
punctuation) but for two things: GPT-3 cut out the match and 200 characters around it, where here the document goes; and it
let runs of words pass that are in more than ten documents, where here they are reported, for a person to judge.
"""

import functools
import hashlib
import io
import itertools
import os
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.journal import write_atomically
from cpt_jax.store import documents
from cpt_jax.store.records import BadRecord, Document, Part, Rules

NGRAM_WORDS = 13
MIN_WORDS = 8  # a text of fewer than `ngram_words` words is matched as a whole down to this; below it GPT-3 saw matches by chance
_SEPARATOR, _IGNORED, _ALONE = 0, 1, 1 << 31  # in place of a character: between words; nothing; flag: it is a word by itself
# Thai and Lao, Myanmar, Khmer, Kana and other signs of Chinese and Japanese, Han, and Han of the planes 2 and 3.
SPACELESS = (
  *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3021, 0x312F), (0x31A0, 0x31BF)),
  *((0x31F0, 0x31FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x323AF)),
)
_ASSIGNED = 0x32400  # characters from here on are private, tags or not assigned
_LETTERS = 64  # of a word, before the factors of its letters repeat
_BATCH_CHARACTERS = 1 << 18  # the arrays of a batch fit in a processor's cache; measured best of 2**16 to 2**22


class Match(NamedTuple):
  """What a document shares with an evaluation text."""

  ngram: str  # folded words with a space between two
  file: str  # of the evaluation text


class _Words(NamedTuple):
  """The words of several texts."""

  char_C: np.ndarray  # uint32 folded characters, without what is between words
  start_W: np.ndarray  # int64 first character of each word, and the number of characters as one more
  text_W: np.ndarray  # int64 number of the text that each word is of

  def ngram(self, first: int, num_words: int) -> str:
    edges = self.start_W[first : first + num_words + 1].tolist()
    return " ".join(self.char_C[a:b].astype("<u4").tobytes().decode("utf-32-le") for a, b in itertools.pairwise(edges))


class _Grams(NamedTuple):
  """The runs of one number of words, sorted by hash; a run that is in several places is there as often."""

  num_words: int
  hash_G: np.ndarray  # uint64
  first_G: np.ndarray  # int64 first word, counted through all evaluation texts

  def is_there(self) -> np.ndarray:
    """Is there a run whose hash has these upper bits? bool [power of two]. Nearly all words of a document end here."""
    num_bits = min(max((16 * len(self.hash_G)).bit_length(), 12), 27)
    table = np.zeros(1 << num_bits, bool)
    table[_upper_bits(self.hash_G, table)] = True
    return table


class Contamination:
  """The runs of words of evaluation texts; made by `build`, `from_texts` or `load`."""

  def __init__(
    self, words: _Words, grams: list[_Grams], *, files: list[str], file_T: np.ndarray, ngram_words: int, num_short: int
  ):
    self.ngram_words = ngram_words
    self.num_texts = len(file_T)
    self.num_short = num_short  # texts of under MIN_WORDS words, which nothing is compared with
    self.num_ngrams = sum(len(np.unique(g.hash_G)) for g in grams)
    self._words, self._grams = words, grams
    self._tables = [g.is_there() for g in grams]
    self._files, self._file_T = files, file_T

  @property
  def digest(self) -> str:
    """Identifies the runs of words, whatever the names and the order of the files."""
    digest = hashlib.blake2b(f"{self.ngram_words} {MIN_WORDS}".encode(), digest_size=16)
    for grams in self._grams:
      digest.update(np.unique(grams.hash_G).astype("<u8").tobytes())
    return digest.hexdigest()

  def found(self, text: str) -> Match | None:
    """The first run of words of the text that an evaluation text has too."""
    return self.find([text])[0]

  def find(self, texts: list[str]) -> list[Match | None]:
    """`found` of each text; many short ones at once cost less."""
    return [match for batch in _batches(texts) for match in self._find(batch)]

  def _find(self, texts: list[str]) -> list[Match | None]:
    words, hits = _words(texts), []
    hashes = _hashes(words, [g.num_words for g in self._grams])
    for grams, table, hash_W in zip(self._grams, self._tables, hashes, strict=True):
      first_H = np.flatnonzero(table[_upper_bits(hash_W, table)])
      place_H = np.minimum(np.searchsorted(grams.hash_G, hash_W[first_H]), len(grams.hash_G) - 1)
      first_H = first_H[grams.hash_G[place_H] == hash_W[first_H]]
      first_H = first_H[words.text_W[first_H] == words.text_W[first_H + grams.num_words - 1]]
      hits += [(first, hash_W[first], grams) for first in first_H.tolist()]
    matches: list[Match | None] = [None] * len(texts)
    for first, value, grams in sorted(hits, key=lambda hit: hit[0]):
      number = int(words.text_W[first])
      if matches[number] is None:
        matches[number] = self._verified(words.ngram(first, grams.num_words), value, grams)
    return matches

  def _verified(self, ngram: str, value: np.uint64, grams: _Grams) -> Match | None:
    """The match, unless only the hashes are equal."""
    left, right = (int(np.searchsorted(grams.hash_G, value, side)) for side in ("left", "right"))
    for first in grams.first_G[left:right].tolist():
      if self._words.ngram(first, grams.num_words) == ngram:
        return Match(ngram, self._files[int(self._file_T[self._words.text_W[first]])])
    return None

  def save(self, path: str | os.PathLike) -> None:
    """Writes what `load` reads, so that many processes need not read the evaluation texts."""
    arrays: dict[str, Any] = {**self._words._asdict(), "files": np.array(self._files), "file_T": self._file_T}
    arrays["counts"] = np.array([self.ngram_words, self.num_short])
    for grams in self._grams:
      arrays |= {f"hash_{grams.num_words}": grams.hash_G, f"first_{grams.num_words}": grams.first_G}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def load(path: str | os.PathLike) -> Contamination:
  """The Contamination that was saved."""
  with np.load(path) as arrays:
    lengths = sorted(int(name.removeprefix("hash_")) for name in arrays.files if name.startswith("hash_"))
    ngram_words, num_short = arrays["counts"].tolist()
    words = _Words(*(arrays[name] for name in _Words._fields))
    grams = [_Grams(n, arrays[f"hash_{n}"], arrays[f"first_{n}"]) for n in lengths]
    of_files = {"files": arrays["files"].tolist(), "file_T": arrays["file_T"]}
    return Contamination(words, grams, **of_files, ngram_words=ngram_words, num_short=num_short)


def build(inputs: list[str], *, fields: list[str], ngram_words: int = NGRAM_WORDS) -> Contamination:
  """Reads evaluation texts; `inputs` are as `documents.find_files` takes them, `ngram_words` in a row make a match.

  Each of the `fields` of .jsonl and .parquet records is a text of its own, and a record needs one of them at least.
  Raises ConfigError: no file, or a run of words so short that it is shared by chance; DataError: a record that cannot be read,
  for a benchmark is compared with as a whole.
  """
  if ngram_words < MIN_WORDS:
    raise ConfigError(f"--ngram_words={ngram_words}: must be {MIN_WORDS} or more; shorter runs of words are shared by chance")
  files, texts, file_T = documents.find_files(inputs, flag="--decontaminate"), [], []
  for number, file in enumerate(files):
    found = _read(file, fields)
    texts += found
    file_T += [number] * len(found)
  contamination = from_texts(texts, files=files, file_T=np.array(file_T, np.int64), ngram_words=ngram_words)
  if not contamination.num_ngrams:
    raise ConfigError(f"--decontaminate {' '.join(files[:3])}: no text of {MIN_WORDS} words or more in {len(files)} files")
  return contamination


def from_texts(texts: list[str], *, files: list[str], file_T: np.ndarray, ngram_words: int = NGRAM_WORDS) -> Contamination:
  """The runs of words of texts; `file_T` is the number of the file that each is of."""
  parts, num_texts, num_chars = [_words([])], 0, 0
  for batch in _batches(texts):
    part = _words(batch)
    parts.append(_Words(part.char_C, part.start_W + num_chars, part.text_W + num_texts))
    num_texts, num_chars = num_texts + len(batch), num_chars + len(part.char_C)
  words = _Words(
    np.concatenate([p.char_C for p in parts]),
    np.concatenate([*(p.start_W[:-1] for p in parts), [num_chars]]),
    np.concatenate([p.text_W for p in parts]),
  )
  count_T = np.bincount(words.text_W, minlength=len(texts))
  whole_T = (count_T >= MIN_WORDS) & (count_T < ngram_words)
  lengths, grams = sorted({*count_T[whole_T].tolist(), ngram_words}), []
  for n, hash_W in zip(lengths, _hashes(words, lengths), strict=True):
    text_W = words.text_W[: len(hash_W)]
    is_one_text_W = text_W == words.text_W[n - 1 : n - 1 + len(hash_W)]
    first_G = np.flatnonzero(is_one_text_W & ((n == ngram_words) | (count_T[text_W] == n)))
    first_G = first_G[np.argsort(hash_W[first_G], kind="stable")]
    if len(first_G):
      grams.append(_Grams(n, hash_W[first_G], first_G))
  num_short = int((count_T < MIN_WORDS).sum())
  return Contamination(words, grams, files=files, file_T=file_T, ngram_words=ngram_words, num_short=num_short)


def _read(file: str, fields: list[str]) -> list[str]:
  """The texts of a file, record by record."""
  found: dict[int, list[str]] = {}
  bad: dict[int, BadRecord] = {}
  kind, _ = documents.file_kind(file)
  for field in fields[:1] if kind == "txt" else fields:
    for record in documents.open_part(Part(file), Rules(text_field=field)):
      if isinstance(record, Document):
        found.setdefault(record.line, []).append(record.text)
      else:
        bad.setdefault(record.line, record)
  lost = [record for line, record in sorted(bad.items()) if line not in found]
  if lost:
    reason = lost[0].reason.replace("(--text_field)", "(--decontaminate_field)")
    raise documents.DataError(f"--decontaminate {file}:{lost[0].line}: {reason}; {len(lost)} records cannot be compared with")
  return [text for line in sorted(found) for text in found[line]]


def _batches(texts: list[str]) -> Iterator[list[str]]:
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if size >= _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


# Text -> words -> hashes.


def _words(texts: list[str]) -> _Words:
  end_T = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
  code_C = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), "<u4")
  fold_C = _folded()[code_C]
  is_kept_C = fold_C != _IGNORED
  if not is_kept_C.all():
    end_T = np.cumsum(is_kept_C)[end_T - 1]
    fold_C = fold_C[is_kept_C]
  place_C = np.flatnonzero(fold_C != _SEPARATOR)
  char_C = fold_C[place_C]
  is_alone_C = char_C >= _ALONE
  is_start_C = np.ones(len(char_C), bool)
  is_start_C[1:] = is_alone_C[1:] | is_alone_C[:-1] | (place_C[1:] > place_C[:-1] + 1)
  start_W = np.flatnonzero(is_start_C)
  text_W = np.searchsorted(end_T, place_C[start_W], side="right")
  return _Words(char_C & np.uint32(_ALONE - 1), np.append(start_W, len(char_C)), text_W)


@functools.cache
def _folded() -> np.ndarray:
  """uint32 [0x110000]: what stands for each character."""
  table = np.zeros(0x110000, np.uint32)
  for code in range(_ASSIGNED):
    char = chr(code)
    category = unicodedata.category(char)
    if category == "Cf" or 0xFE00 <= code <= 0xFE0F or (category[0] == "M" and unicodedata.combining(char)):
      table[code] = _IGNORED  # soft hyphen, joiners, variation selectors, accents
    elif category[0] in "LMN":  # marks that are left are vowels of Indic scripts
      table[code] = ord(_fold(char))
  table[0xE0100:0xE01F0] = _IGNORED  # variation selectors of Han
  for first, last in SPACELESS:
    part = table[first : last + 1]
    part[part > _IGNORED] |= np.uint32(_ALONE)
  table.flags.writeable = False
  return table


def _fold(char: str) -> str:
  """Lower case, compatibility form (full width to plain) and without accents, where that is one character."""
  for change in str.lower, functools.partial(unicodedata.normalize, "NFKC"), str.lower:
    changed = change(char)
    char = changed if len(changed) == 1 else char
  bare = [c for c in unicodedata.normalize("NFD", char) if not unicodedata.combining(c)]
  return bare[0] if len(bare) == 1 else char


def _mixed(number: int) -> int:
  """SplitMix64 (Steele, Lea, Flood 2014): random odd factors that are the same in every version of numpy."""
  z = (number * 0x9E3779B97F4A7C15) & (1 << 64) - 1
  for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB):
    z = ((z ^ (z >> shift)) * factor) & (1 << 64) - 1
  return (z ^ (z >> 31)) | 1


_LETTER_FACTORS = np.array([_mixed(i + 1) for i in range(_LETTERS)], np.uint64)


def _hashes(words: _Words, lengths: list[int]) -> Iterator[np.ndarray]:
  """Hashes of the runs of so many words (rising) that start at each word; each array is used before the next is asked for."""
  start_W, num_words = words.start_W[:-1], len(words.text_W)
  letter_C = np.arange(len(words.char_C)) - np.repeat(start_W, np.diff(words.start_W))
  product_C = words.char_C * _LETTER_FACTORS[letter_C & (_LETTERS - 1)]
  word_W = np.add.reduceat(product_C, start_W) if num_words else np.zeros(0, np.uint64)
  word_W ^= word_W >> np.uint64(32)  # so that the order of words matters even where words differ in their upper bits only
  word_W *= np.uint64(_mixed(_LETTERS + 1))
  word_W ^= word_W >> np.uint64(29)
  sum_W, done = np.zeros(num_words, np.uint64), 0
  for length in lengths:
    for k in range(done, length):
      sum_W = sum_W[: max(num_words - k, 0)]
      sum_W += word_W[k:] * np.uint64(_mixed(_LETTERS + 2 + k))
    done = length
    yield sum_W


def _upper_bits(hash_W: np.ndarray, table: np.ndarray) -> np.ndarray:
  return hash_W >> np.uint64(65 - len(table).bit_length())
