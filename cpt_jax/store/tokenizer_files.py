"""The files of a tokenizer -> which of them is its vocabulary, and what those beside it say of special tokens.

Invariant: what the files say is what transformers would find in them; what contradicts itself is an error.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cpt_jax import hub, shipped
from cpt_jax.config import ConfigError, did_you_mean

MAX_FILE_BYTES = 256 << 20  # the largest in use (Gemma's) has 33 MB; a bigger file is not a tokenizer
_TOKENIZER_CONFIG = "tokenizer_config.json"
_NAMING_FILES = (_TOKENIZER_CONFIG, "special_tokens_map.json")
_NUMBERING_FILES = ("config.json", "generation_config.json")
_CHAT_TEMPLATE = "chat_template.jinja"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class SpecialTokens(NamedTuple):
  """Tokens that stand for no text, and those that were added to a vocabulary."""

  bos_id: int | None
  eos_id: int | None  # None where neither the files nor the caller name one
  eos_problem: str  # what to say then
  special_tokens: list[str]
  special_ids: frozenset[int]
  added_tokens: list[str]  # besides the special ones: always found in a text as they are
  added_ids: dict[str, int]  # id of each special or added token that stands beside the model's own pieces
  named_tokens: dict[str, str]  # "bos_token" -> "<s>", ...: those that the files name


def find(path: Path) -> Path:
  """The file of the vocabulary: the path itself, or what lies in the directory."""
  path = Path(shipped.find(str(path)))
  if path.is_file():
    if path.suffix not in (".json", ".model"):
      raise ConfigError(f"{path}: no tokenizer file; expected tokenizer.json, a SentencePiece *.model, or a directory with one")
    return path
  if not path.is_dir():
    raise ConfigError(
      f"{path}: no such tokenizer; expected a Hugging Face directory, tokenizer.json or a SentencePiece *.model"
      + hub.how_to_get(path)
    )
  for name in ("tokenizer.json", "tokenizer.model"):
    if (path / name).is_file():
      return path / name
  models = sorted(path.glob("*.model"))
  if len(models) == 1:
    return models[0]
  found = f"{len(models)} *.model files; name one of them" if models else "neither tokenizer.json nor a *.model file"
  raise ConfigError(
    f"{path}: {found}. A slow tokenizer (vocab.json + merges.txt) becomes a tokenizer.json with "
    "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
  )


def read_json(path: Path) -> dict[str, Any]:
  """The object in a settings file; empty where there is no such file."""
  if not path.is_file():
    return {}
  if path.stat().st_size > MAX_FILE_BYTES:
    raise ConfigError(f"{path}: {path.stat().st_size} bytes is no settings file of a model")
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path}: broken JSON ({error}); copy the file again") from None
  if not isinstance(content, dict):
    raise ConfigError(f"{path}: holds a {type(content).__name__}, expected an object")
  return content


class SideFiles:
  """What the settings files beside a vocabulary say."""

  def __init__(self, directory: Path):
    self.directory = directory
    self._content = {name: read_json(directory / name) for name in (*_NAMING_FILES, *_NUMBERING_FILES)}

  @property
  def tokenizer_config(self) -> dict[str, Any]:
    """tokenizer_config.json."""
    return self._content[_TOKENIZER_CONFIG]

  def named_tokens(self) -> dict[str, str]:
    """The tokens that the files name, by the names under which chat templates know them."""
    found = {}
    for key in _NAMED_TOKENS:
      for name in _NAMING_FILES:
        value = self._content[name].get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
          found.setdefault(key, value)
    return found

  def chat_template(self) -> str:
    """As transformers finds it: the file, else the entry of tokenizer_config.json, of several the one named default."""
    file = self.directory / _CHAT_TEMPLATE
    if file.is_file():
      if file.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{file}: {file.stat().st_size} bytes is no chat template")
      try:
        return file.read_text(encoding="utf-8")
      except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: invalid UTF-8 at byte {error.start}; copy the file again") from None
    value = self.tokenizer_config.get("chat_template")
    if isinstance(value, list):
      named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict) and isinstance(t.get("name"), str)}
      value = named.get("default")
    return value if isinstance(value, str) else ""

  def special_id(self, kind: str, token_to_id: Callable[[str], int | None]) -> int | None:
    """The id of the `kind` ("eos" or "bos") token, None where no file names one."""
    for name in _NAMING_FILES:
      value = self._content[name].get(f"{kind}_token")
      if isinstance(value, dict):
        value = value.get("content")
      if value is None:
        continue
      found = token_to_id(value) if isinstance(value, str) else None
      if found is None:
        file = self.directory / name
        raise ConfigError(f"{file}: {kind}_token is {value!r}, which the tokenizer does not have; correct the file")
      return found
    for name in _NUMBERING_FILES:
      value = self._content[name].get(f"{kind}_token_id")
      if isinstance(value, list):
        value = value[0] if value else None
      if value is None:
        continue
      if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{self.directory / name}: {kind}_token_id is {value!r}, expected an id from 0 up")
      return value
    return None


def check_ids(file: Path, *, vocab_size: int, **ids: int | None) -> None:
  """Raises ConfigError where the id of `eos` or `bos` is none of the vocabulary."""
  for kind, number in ids.items():
    if number is not None and number >= vocab_size:
      raise ConfigError(f"{file.parent}: {kind}_token_id is {number}, but the largest id of {file.name} is {vocab_size - 1}")


def chosen_eos(
  file: Path, eos_token: str, found: int | None, token_to_id: Callable[[str], int | None], special: list[str]
) -> tuple[int | None, str]:
  """The id of EOS after the caller's wish, and what to say when there is none."""
  if eos_token:
    eos_id = token_to_id(eos_token)
    if eos_id is None:
      raise ConfigError(f"--eos_token={eos_token!r}: {file} has no such token.{did_you_mean(eos_token, special)}")
    return eos_id, ""
  known = f"; its special tokens: {' '.join(special[:20])}" if special else ""
  return found, (
    f"{file}: no end-of-document token (EOS): no eos_token in {' or '.join(_NAMING_FILES)}, no eos_token_id in "
    f"{' or '.join(_NUMBERING_FILES)}; name one with --eos_token or add it to {file.parent / _TOKENIZER_CONFIG}{known}"
  )
