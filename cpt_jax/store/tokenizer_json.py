"""A tokenizer.json of Hugging Face's tokenizers -> its model, its special tokens, and what decides its ids.

Invariant: special tokens that a text spells stay text, and nothing about the ids is random.
"""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenizer_files
from cpt_jax.store.spelling import Located
from cpt_jax.store.tokenizer_files import SideFiles, SpecialTokens

_PROBES = ("a", "The cat sat on 12 mats.")


class FastModel:
  """A model of the tokenizers library."""

  can_locate = True

  def __init__(self, file: Path, raw: bytes, model: tokenizers.Tokenizer, *, content: dict[str, Any], vocab_size: int):
    model.no_truncation()  # settings that some files carry from fine-tuning
    model.no_padding()
    model.encode_special_tokens = True  # special tokens spelt in a document stay text
    self.vocab_size = vocab_size
    self.is_byte_level = "ByteLevel" in json.dumps([content.get("decoder")])
    self.unk_id = _unk_id(content["model"], model)
    self.prefix, self.suffix = _surroundings(file, model)
    self._file, self._raw, self._model = file, raw, model

  def pieces(self) -> dict[int, str]:
    """The ids that spell text, in the model's own spelling."""
    return {number: piece for piece, number in self._model.get_vocab(with_added_tokens=False).items()}

  def encode(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added."""
    return [e.ids for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

  def decode(self, ids: list[int]) -> str:
    """The text of ids, without special tokens."""
    return self._model.decode(ids, skip_special_tokens=True)

  def locate(self, texts: list[str], *, has_control: bool, has_begins: bool) -> list[Located]:
    """See Tokenizer.locate."""
    bare = self._locating_model
    bare.encode_special_tokens = not has_control
    if not has_begins:
      return [Located(e.ids, None) for e in bare.encode_batch_fast(texts, add_special_tokens=False)]
    found = bare.encode_batch(texts, add_special_tokens=False)
    # By number, for a list of all places takes more memory than the rest: 120 bytes for each token.
    return [Located(e.ids, functools.partial(_begin, e)) for e in found]

  @functools.cached_property
  def _locating_model(self) -> tokenizers.Tokenizer:
    # Without the post-processor, which may move the places of tokens that begin with a space.
    bare = _construct(self._file, json.dumps({**json.loads(self._raw), "post_processor": None}).encode("utf-8"))
    bare.no_truncation()
    bare.no_padding()
    return bare


def load(file: Path, raw: bytes, side: SideFiles, *, eos_token: str) -> tuple[FastModel, SpecialTokens, list[Any]]:
  """The model, its special tokens, and what a fingerprint is made of."""
  content = _parsed(file, raw)
  canonical = _canonical(content)
  model, added = _construct(file, raw), content.get("added_tokens") or []
  eos_in_files, bos_in_files = (side.special_id(kind, model.token_to_id) for kind in ("eos", "bos"))
  special = [t["content"] for t in added if t.get("special")]
  eos_id, eos_problem = tokenizer_files.chosen_eos(file, eos_token, eos_in_files, model.token_to_id, special)
  vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
  tokenizer_files.check_ids(file, vocab_size=vocab_size, eos=eos_id, bos=bos_in_files)
  # EOS and BOS are control tokens even where the file forgot to say so.
  control = {eos_id, bos_in_files} - {None}
  plain = [t for t in added if t["id"] in control and not t.get("special")]
  if plain or content["model"].get("dropout"):
    special += [t["content"] for t in plain]
    for token in plain:
      token["special"] = True
    content["model"]["dropout"] = None  # BPE dropout would make the ids random
    raw = json.dumps(content).encode("utf-8")
    model = _construct(file, raw)
  fast = FastModel(file, raw, model, content=content, vocab_size=vocab_size)
  bos_id = fast.prefix[0] if fast.prefix else bos_in_files
  named = side.named_tokens()
  for key, number in ("eos_token", eos_id), ("bos_token", bos_id):
    token = None if number is None else model.id_to_token(number)
    if token is not None:
      named.setdefault(key, token)
  special_ids = frozenset(t["id"] for t in added if t.get("special"))
  others, ids = [t["content"] for t in added if not t.get("special")], {t["content"]: t["id"] for t in added}
  beside = {"added_tokens": others, "added_ids": ids, "named_tokens": named}
  tokens = SpecialTokens(bos_id, eos_id, eos_problem, special_tokens=special, special_ids=special_ids, **beside)
  return fast, tokens, [canonical, vocab_size, eos_in_files, bos_in_files, fast.prefix, fast.suffix]


def _parsed(file: Path, raw: bytes) -> dict[str, Any]:
  try:
    content = json.loads(raw)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{file}: broken JSON ({error}); copy the file again") from None
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    raise ConfigError(f"{file}: no tokenizer.json of Hugging Face tokenizers (it has no 'model' object)")
  return content


def _unk_id(model: dict[str, Any], loaded: tokenizers.Tokenizer) -> int | None:
  """The id that a tokenizer.json gives to what it cannot spell; Unigram models name it by number."""
  if model.get("unk_token") is not None:
    return loaded.token_to_id(model["unk_token"])
  return model.get("unk_id")


def _begin(encoding: tokenizers.Encoding, number: int) -> int:
  place = encoding.token_to_chars(number)
  assert place is not None  # as it is of tokens that the post-processor adds
  return place[0]


def _construct(file: Path, raw: bytes) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_buffer(raw)
  except Exception as error:  # the library raises plain Exception (and ValueError) for all that it cannot read
    raise ConfigError(f"{file}: the tokenizers library {tokenizers.__version__} cannot read it: {error}") from None


def _surroundings(file: Path, model: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
  """Ids that the post-processor puts before and after a text."""
  found = []
  for probe in _PROBES:
    bare = model.encode(probe, add_special_tokens=False).ids
    full = model.encode(probe, add_special_tokens=True).ids
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare] if bare else []
    found += [(full[:i], full[i + len(bare) :]) for i in starts[:1]]
  if len(found) != len(_PROBES) or found[0] != found[1]:
    raise ConfigError(f"{file}: its post-processor does more than add tokens before and after a text, which is not supported")
  return found[0]


def _canonical(content: dict[str, Any]) -> list[Any]:
  """What decides the ids, free of how the file is written (key order, spaces, defaults, both forms of merges)."""
  model = {k: v for k, v in content["model"].items() if v is not None and v is not False and k != "dropout"}
  if isinstance(model.get("vocab"), dict):
    model["vocab"] = sorted([i, piece] for piece, i in model["vocab"].items())
  if "merges" in model:
    model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
  flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
  added = sorted([t["id"], t["content"], [bool(t.get(f)) for f in flags]] for t in content.get("added_tokens") or [])
  return [model, added, *(_without_none(content.get(part)) for part in ("normalizer", "pre_tokenizer"))]


def _without_none(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _without_none(v) for k, v in value.items() if v is not None}
  return [_without_none(v) for v in value] if isinstance(value, list) else value
