"""Entries of `data.sources` -> opened, checked sources, each split into training and held-out documents.

Invariant: a document is held out iff the hash of its text says so, whatever the seed, the run and the other documents, so
copies go together.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError, Problems
from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.store.store import TokenStore, open_store

Knots = tuple[tuple[float, float, str], ...]
# More than this share is never advised to be held out (by hand): little would be left to learn from.
MOST_HELDOUT = 0.5


@dataclasses.dataclass(frozen=True)
class Source:
  """A token store with its part in the run. Document numbers are those of the store."""

  name: str
  store: TokenStore
  _: dataclasses.KW_ONLY
  role: str  # "replay" or "domain"
  share: Knots  # (step, share, curve), see stream.quotas
  heldout_frac: float
  at_end: str  # "repeat", "stop", "renormalise", "error": what happens when it was read `max_epochs` times
  max_epochs: float  # 0 = once; with "repeat" = no limit
  loss_weight: float  # of its tokens in the objective
  min_tokens: int  # of a training document; 0 = no limit
  max_tokens: int
  length_shares: tuple[tuple[int, float], ...]  # see stream.selection

  @functools.cached_property
  def _split_hashes(self) -> np.ndarray:
    return mix64(self.store.doc_hashes())

  @functools.cached_property
  def _is_heldout(self) -> np.ndarray:
    # The fraction as an exact 64-bit threshold: a float comparison would round 2**-11 of the hashes.
    return self._split_hashes < np.uint64(int(self.heldout_frac * 2**64))

  @functools.cached_property
  def train_documents(self) -> np.ndarray:
    """Documents that may be trained on, rising."""
    return np.flatnonzero(~self._is_heldout)

  @functools.cached_property
  def heldout_documents(self) -> np.ndarray:
    """Documents kept for evaluation, in the order of their hashes."""
    heldout = np.flatnonzero(self._is_heldout)
    return heldout[np.argsort(self._split_hashes[heldout], kind="stable")]

  @property
  def is_trained(self) -> bool:
    """Has it a share above 0 at any time."""
    return any(share > 0 for _, share, _ in self.share)

  def num_pairs(self, documents: np.ndarray) -> int:
    """(input, target) pairs of documents of the store: their tokens less one each."""
    return int(np.maximum(self.store.lengths[documents] - 1, 0).sum())


def measured(name: str, store: TokenStore, *, heldout_frac: float) -> Source:
  """A source of no run, whose held-out documents are looked at; the rest as a config has it by default."""
  fields = ("at_end", "max_epochs", "loss_weight", "min_tokens", "max_tokens", "length_shares")
  rest = {field: config_lib.FIELDS[field].default for field in fields}
  return Source(name, store, role="", share=(), heldout_frac=heldout_frac, **rest)


def mix64(values: np.ndarray) -> np.ndarray:
  """Scrambles uint64s one-to-one (splitmix64, doi 10.1145/2660193.2660195), so that any hash will do, a counter too."""
  z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def from_config(config, problems: Problems) -> list[Source]:
  """Opens every entry of config.data.sources, by name; what is wrong goes to `problems`, and such a source is left out."""
  expected = _tokenizer_fingerprint(config, problems)
  found = []
  for name, entry in config.data.sources.items():
    key = f"data.sources.{name}"
    if entry.text and not os.path.exists(entry.store):
      problems.add(
        f"{key}.store={entry.store!r}: not made yet; make it from {key}.text with cpt prepare --input {entry.text!r} "
        f"--tokenizer {config.data.tokenizer or config.start.hf} --output {entry.store}"
      )
      continue
    try:
      store = open_store(entry.store)
    except ConfigError as error:
      problems.add(f"{key}.store: {error}")
      continue
    source = Source(
      name,
      store,
      role=entry.role,
      share=knots(config, name),
      heldout_frac=config.data.heldout_frac,
      length_shares=tuple((int(from_tokens), float(share)) for from_tokens, share in entry.length_shares),
      **{key: entry[key] for key in ("at_end", "max_epochs", "loss_weight", "min_tokens", "max_tokens")},
    )
    if check(source, problems):
      found.append(source)
  _check_tokenizers(found, expected, problems)
  return found


def check(source: Source, problems: Problems) -> bool:
  """Can the source be split, evaluated and (if its share says so) trained on."""
  key, store = f"data.sources.{source.name}", source.store
  if store.num_documents == 0 or store.num_tokens == 0:
    problems.add(f"{key}.store={str(store.path)!r}: the store is empty; give cpt prepare text to read")
    return False
  sizes = f"{store.num_documents} documents of {str(store.path)!r}"
  pairs = np.maximum(store.lengths - 1, 0)
  if pairs[source.heldout_documents].sum() == 0:
    if why := too_few_documents(store):
      problems.add(f"{key}.store={str(store.path)!r}: {why}")
      return False
    hint = "" if pairs.any() else "; its documents have less than two tokens each"
    if pairs.any():
      needed = least_heldout_frac(store)
      hint = f"; from {needed:.2g} on one would be" if needed >= source.heldout_frac else ""
    problems.add(
      f"data.heldout_frac={source.heldout_frac:g}: none of the {sizes} ({key}) is held out, so nothing could be evaluated{hint}; "
      "raise it, or split long documents"
    )
    return False
  if source.is_trained and pairs[source.train_documents].sum() == 0:
    if why := too_few_documents(store):
      problems.add(f"{key}.store={str(store.path)!r}: {why}")
      return False
    problems.add(
      f"data.heldout_frac={source.heldout_frac:g}: leaves none of the {sizes} ({key}) to train on; "
      f"lower it, give more text, or set {key}.share=0.0 to evaluate only"
    )
    return False
  return True


def least_heldout_frac(store: TokenStore) -> float:
  """The heldout_frac from which on a document is held out."""
  return float(mix64(store.doc_hashes()[store.lengths > 1]).min()) / 2**64


def too_few_documents(store: TokenStore) -> str:
  """Why no sane share of the documents can be held out, and what to do; "" where one can."""
  num = len(np.unique(store.doc_hashes()[store.lengths > 1]))
  if not num or (num > 1 and least_heldout_frac(store) < MOST_HELDOUT):
    return ""
  what = "one document cannot" if num == 1 else f"so few documents ({num}) can hardly"
  return (
    f"{what} be split into training and held-out text: give more text, or split it into documents (.txt: a line that holds one "
    "form feed between two of them; .jsonl: a record each)"
  )


def check_vocabulary(sources: Sequence[Source], vocab_size: int, problems: Problems) -> None:
  """Adds a problem for each store with a token id that the model has no row for: JAX would clamp it without a word."""
  for source in sources:
    largest = source.store.max_token_id
    largest = source.store.read_max_token_id() if largest is None else largest
    if largest >= vocab_size:
      problems.add(
        f"data.sources.{source.name}.store={str(source.store.path)!r}: holds token id {largest}, the model's vocabulary has "
        f"{vocab_size} rows (ids 0..{vocab_size - 1}); prepare the text with the tokenizer of the model that the run starts "
        "from, or start from the model that cpt vocab grow wrote with a grown tokenizer"
      )


def knots(config, name: str) -> Knots:
  """A source's share over time, times in steps, not rounded."""
  entry = config.data.sources[name]
  found = [(when, float(shares.get(name, 0.0)), "hold") for when, shares in config.data.shares] or entry.share
  return tuple((float(config_lib.steps_at(config, when)), share, curve) for when, share, curve in found)


def _tokenizer_fingerprint(config, problems: Problems) -> tuple[str, str] | None:
  """(whose, fingerprint) of the tokenizer that stores must have been made with; None where the config names none."""
  path = config.data.tokenizer or config.start.hf
  if not path:
    return None
  try:
    return path, tokenizer_lib.load(path).fingerprint
  except ConfigError as error:
    problems.add(f"{'data.tokenizer' if config.data.tokenizer else 'start.hf'}: {error}")
    return None


def _check_tokenizers(sources: list[Source], expected: tuple[str, str] | None, problems: Problems) -> None:
  """Every store by one tokenizer. A store made by datatrove alone does not say which: nothing to compare."""
  for source in sources:
    found = source.store.tokenizer_fingerprint
    if found is None:
      continue
    if expected is None:
      expected = f"source {source.name}", found
    elif found != expected[1]:
      problems.add(
        f"data.sources.{source.name}.store={str(source.store.path)!r}: made with tokenizer {found}, expected {expected[1]} "
        f"(that of {expected[0]}); prepare its text again with --tokenizer, or set data.tokenizer to the right one"
      )
