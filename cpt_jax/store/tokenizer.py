"""Tokenizer files of a base model (tokenizer.json or a SentencePiece model) -> token ids of documents.

Invariant: a document's ids are the tokenizer's own, with what it adds itself (BOS), and end in EOS exactly once; text
that spells a special token, such as "<|endoftext|>", stays text.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers

from cpt_jax import hub
from cpt_jax.config import ConfigError, did_you_mean

MAX_FILE_BYTES = 256 << 20  # the largest in use (Gemma's) has 33 MB; a bigger file is not a tokenizer
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")
_CHAT_TEMPLATE = "chat_template.jinja"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBES = ("a", "The cat sat on 12 mats.")
SPACE = "\u2581"  # SentencePiece's mark of a space


class Encoded(NamedTuple):
  """Documents as ids, and what was noticed about them."""

  ids: list[list[int]]
  num_special_text: int  # documents whose text spells a special token; it was encoded as plain text
  num_control_ids: int  # documents whose own text gave the id of EOS or BOS


class Located(NamedTuple):
  """The ids of a text, and where each begins in it."""

  ids: list[int]
  begin: Callable[[int], int] | None  # number of an id -> the character where it begins; never falls, ids may share one


class Tokenizer:
  """A loaded tokenizer; make one with `load`."""

  def __init__(
    self,
    *,
    path: Path,
    fingerprint: str,
    vocab_size: int,
    bos_id: int | None,
    eos_id: int | None,
    eos_problem: str,
    prefix: Sequence[int],
    suffix: Sequence[int],
    special_tokens: Sequence[str],
    added_tokens: Sequence[str],
    added_ids: dict[str, int],
    named_tokens: dict[str, str],
    chat_template: str,
    special_ids: Sequence[int],
    unk_id: int | None,
    find_pieces: Callable[[], dict[int, str]],
    is_byte_level: bool,
    encode_texts: Callable[[list[str]], list[list[int]]],
    locate_texts: Callable[[list[str], bool, bool], list[Located]] | None,
    decode_ids: Callable[[list[int]], str],
  ):
    self.path = path
    self.fingerprint = fingerprint  # of all that decides the ids, and of EOS and BOS as the files give them
    self.vocab_size = vocab_size  # largest id + 1
    self.bos_id = bos_id
    self.eos_id = eos_id  # None where neither the files nor the caller name one
    self.special_tokens = list(special_tokens)
    self.added_tokens = list(added_tokens)  # besides the special ones: always found in a text as they are
    self.added_ids = added_ids  # id of each special or added token that stands beside the model's own pieces
    self.named_tokens = named_tokens  # "bos_token" -> "<s>", ...: those that the files name
    self.chat_template = chat_template  # jinja source; "" where there is none
    self.special_ids = frozenset(special_ids)
    self.unk_id = unk_id  # what stands for text that the vocabulary cannot spell; None where it spells everything
    self._find_pieces, self._is_byte_level = find_pieces, is_byte_level
    self.can_locate = locate_texts is not None
    self._locate_texts = locate_texts
    self._eos_problem = eos_problem
    self._prefix, self._suffix = list(prefix), list(suffix)
    self._encode_texts, self._decode_ids = encode_texts, decode_ids
    self._special_search = Spellings(special_tokens)

  @property
  def name(self) -> str:
    """The directory's name (or the file's), for people."""
    named = self.path.parent if self.path.name in ("tokenizer.json", "tokenizer.model") else self.path
    return named.resolve().name

  @functools.cached_property
  def byte_ids(self) -> frozenset[int]:
    """Ids of single bytes of characters that have several: what spells a character for which there is no token."""
    vocab = {piece: number for number, piece in self._pieces.items()}
    spelt = byte_characters() if self._is_byte_level else [f"<0x{byte:02X}>" for byte in range(0x100)]
    return frozenset(vocab[piece] for piece in spelt[0x80:] if piece in vocab)

  @functools.cached_property
  def _pieces(self) -> dict[int, str]:
    """The ids that spell text, in the model's own spelling."""
    return self._find_pieces()

  @functools.cached_property
  def opening_bytes_V(self) -> np.ndarray:
    """UTF-8 bytes that each id spells where a text begins with it, int64 [V]; special tokens and the unknown one have 0.

    A space that the tokenizer itself puts before a text, as SentencePiece does, is no part of it. Of a text that begins with a
    space this is one byte too few where the tokenizer then adds none.
    """
    space = byte_characters()[ord(" ")] if self._is_byte_level else SPACE
    (probe,) = self._encode_texts(["a"])
    added = int("".join(self._pieces.get(number, "") for number in probe).startswith(space))
    bytes_V = np.zeros(self.vocab_size, np.int64)
    for number, piece in self._pieces.items():
      bytes_V[number] = self._num_bytes(piece) - (added if piece.startswith(space) else 0)
    for piece, number in self.added_ids.items():
      bytes_V[number] = 0 if piece in self.special_tokens else len(piece.encode())  # found in a text as it is
    bytes_V[[number for number in (self.unk_id, self.bos_id, self.eos_id) if number is not None]] = 0
    return bytes_V

  def _num_bytes(self, piece: str) -> int:
    if self._is_byte_level:
      return len(piece)
    return 1 if is_byte_piece(piece) else len(piece.replace(SPACE, " ").encode())

  def require_eos(self) -> int:
    """The id of EOS.

    Raises:
      ConfigError: none is known; the message says where it was looked for.
    """
    if self.eos_id is None:
      raise ConfigError(self._eos_problem)
    return self.eos_id

  def encode_documents(self, texts: list[str]) -> Encoded:
    """Ids of each document, EOS last; texts must be valid Unicode (no lone surrogates)."""
    prefix, suffix = self.surroundings()
    control = {self.require_eos(), self.bos_id} - {None}
    contents = self.encode_contents(texts)
    return Encoded(
      ids=[prefix + ids + suffix for ids in contents],
      num_special_text=sum(self.has_special_text(text) for text in texts),
      num_control_ids=sum(any(c in ids for c in control) for ids in contents),
    )

  def encode_contents(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added; special tokens spelt in it stay text."""
    return self._encode_texts(texts)

  def surroundings(self) -> tuple[list[int], list[int]]:
    """The ids that stand before and behind those of a document's text, EOS the last of them."""
    eos_id = self.require_eos()
    return self._prefix, self._suffix if self._suffix[-1:] == [eos_id] else [*self._suffix, eos_id]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Ids of each document: what the tokenizer itself adds, and EOS exactly once, at the end."""
    return self.encode_documents(texts).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return self._decode_ids([int(i) for i in ids])

  def has_special_text(self, text: str) -> bool:
    """Does the text spell a special token?"""
    return self._special_search.first_in(text) != ""

  def locate(self, texts: list[str], *, has_control: bool, has_begins: bool = True) -> list[Located]:
    """Ids of each text and where they begin; nothing is added. `has_control`: special tokens spelt in it become their ids.

    Only where `can_locate`: a tokenizer.json says what begins where, a SentencePiece model alone does not. Without
    `has_begins` it is a quarter faster.
    """
    assert self._locate_texts is not None
    return self._locate_texts(texts, has_control, has_begins)


class Spellings:
  """Finds the first of some tokens that a text spells."""

  def __init__(self, tokens: Sequence[str]):
    # Plain substring search for two letters is far faster than the pattern, and nearly always ends the matter.
    self._starts = sorted({t[:2] for t in tokens if t})
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

  def first_in(self, text: str) -> str:
    """The token, "" where there is none."""
    if not any(start in text for start in self._starts):
      return ""
    found = self._pattern.search(text)
    return found[0] if found else ""


def load(path: str | os.PathLike, *, eos_token: str = "") -> Tokenizer:
  """Loads a tokenizer from a Hugging Face directory, or from a tokenizer.json or SentencePiece .model file.

  EOS is looked for in tokenizer_config.json, special_tokens_map.json, config.json and generation_config.json (the first
  of a list), then in the SentencePiece model; `eos_token` overrides them all and does not enter the fingerprint.

  Raises:
    ConfigError: no tokenizer file, a broken one, or special tokens that do not exist.
  """
  file = _find(Path(path))
  size = file.stat().st_size
  if size > MAX_FILE_BYTES:
    raise ConfigError(f"{file}: {size} bytes; a tokenizer file has at most {MAX_FILE_BYTES}, so this is something else")
  raw = file.read_bytes()
  side = {name: _read_side_file(file.parent / name) for name in _SIDE_FILES}
  loader = _load_fast if file.suffix == ".json" else _load_sentencepiece
  return loader(file, raw, side, eos_token)


def _find(path: Path) -> Path:
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


def _read_side_file(path: Path) -> dict[str, Any]:
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


def _named_tokens(side: dict[str, dict]) -> dict[str, str]:
  """The tokens that the side files name, by the names under which chat templates know them."""
  found = {}
  for key in _NAMED_TOKENS:
    for name in _SIDE_FILES[:2]:
      value = side[name].get(key)
      value = value.get("content") if isinstance(value, dict) else value
      if isinstance(value, str):
        found.setdefault(key, value)
  return found


def _chat_template(directory: Path, side: dict[str, dict]) -> str:
  """As transformers finds it: the file, else the entry of tokenizer_config.json, of several the one named default."""
  file = directory / _CHAT_TEMPLATE
  if file.is_file():
    if file.stat().st_size > MAX_FILE_BYTES:
      raise ConfigError(f"{file}: {file.stat().st_size} bytes is no chat template")
    try:
      return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise ConfigError(f"{file}: invalid UTF-8 at byte {error.start}; copy the file again") from None
  value = side[_SIDE_FILES[0]].get("chat_template")
  if isinstance(value, list):
    named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict) and isinstance(t.get("name"), str)}
    value = named.get("default")
  return value if isinstance(value, str) else ""


def _special_id(kind: str, side: dict[str, dict], token_to_id: Callable[[str], int | None], directory: Path) -> int | None:
  """The id of the `kind` ("eos" or "bos") token by the side files, None where none of them names one."""
  for name in _SIDE_FILES[:2]:
    value = side[name].get(f"{kind}_token")
    if isinstance(value, dict):
      value = value.get("content")
    if value is None:
      continue
    found = token_to_id(value) if isinstance(value, str) else None
    if found is None:
      raise ConfigError(f"{directory / name}: {kind}_token is {value!r}, which the tokenizer does not have; correct the file")
    return found
  for name in _SIDE_FILES[2:]:
    value = side[name].get(f"{kind}_token_id")
    if isinstance(value, list):
      value = value[0] if value else None
    if value is None:
      continue
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
      raise ConfigError(f"{directory / name}: {kind}_token_id is {value!r}, expected an id from 0 up")
    return value
  return None


def _chosen_eos(file: Path, eos_token: str, found: int | None, token_to_id, special: list[str]) -> tuple[int | None, str]:
  """The id of EOS after the caller's wish, and what to say when there is none."""
  if eos_token:
    eos_id = token_to_id(eos_token)
    if eos_id is None:
      raise ConfigError(f"--eos_token={eos_token!r}: {file} has no such token.{did_you_mean(eos_token, special)}")
    return eos_id, ""
  known = f"; its special tokens: {' '.join(special[:20])}" if special else ""
  return found, (
    f"{file}: no end-of-document token (EOS): no eos_token in {' or '.join(_SIDE_FILES[:2])}, no eos_token_id in "
    f"{' or '.join(_SIDE_FILES[2:])}; name one with --eos_token or add it to {file.parent / _SIDE_FILES[0]}{known}"
  )


def _digest(content: Any) -> str:
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


# Hugging Face fast tokenizers.


def _load_fast(file: Path, raw: bytes, side: dict[str, dict], eos_token: str) -> Tokenizer:
  try:
    content = json.loads(raw)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{file}: broken JSON ({error}); copy the file again") from None
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    raise ConfigError(f"{file}: no tokenizer.json of Hugging Face tokenizers (it has no 'model' object)")
  model = _construct(file, raw)
  directory = file.parent
  eos_in_files = _special_id("eos", side, model.token_to_id, directory)
  bos_in_files = _special_id("bos", side, model.token_to_id, directory)
  special = [t["content"] for t in content.get("added_tokens") or [] if t.get("special")]
  eos_id, eos_problem = _chosen_eos(file, eos_token, eos_in_files, model.token_to_id, special)
  vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
  for kind, number in ("eos", eos_id), ("bos", bos_in_files):
    if number is not None and number >= vocab_size:
      raise ConfigError(f"{directory}: {kind}_token_id is {number}, but the largest id of {file.name} is {vocab_size - 1}")
  canonical = _canonical(content)
  # EOS and BOS are control tokens even where the file forgot to say so.
  control = {eos_id, bos_in_files} - {None}
  plain = [t for t in content.get("added_tokens") or [] if t["id"] in control and not t.get("special")]
  dropout = content["model"].get("dropout")
  if plain or dropout:
    special += [t["content"] for t in plain]
    for token in plain:
      token["special"] = True
    content["model"]["dropout"] = None  # BPE dropout would make the ids random
    raw = json.dumps(content).encode("utf-8")
    model = _construct(file, raw)
  model.no_truncation()  # settings that some files carry from fine-tuning
  model.no_padding()
  model.encode_special_tokens = True  # special tokens spelt in a document stay text
  prefix, suffix = _surroundings(file, model)

  @functools.cache
  def locating_model() -> tokenizers.Tokenizer:
    # Without the post-processor, which may move the places of tokens that begin with a space.
    bare = _construct(file, json.dumps({**json.loads(raw), "post_processor": None}).encode("utf-8"))
    bare.no_truncation()
    bare.no_padding()
    return bare

  def locate_texts(texts: list[str], has_control: bool, has_begins: bool) -> list[Located]:
    bare = locating_model()
    bare.encode_special_tokens = not has_control
    if not has_begins:
      return [Located(e.ids, None) for e in bare.encode_batch_fast(texts, add_special_tokens=False)]
    found = bare.encode_batch(texts, add_special_tokens=False)
    # By number, for a list of all places takes more memory than the rest: 120 bytes for each token.
    return [Located(e.ids, functools.partial(_begin, e)) for e in found]

  named = _named_tokens(side)
  for key, number in ("eos_token", eos_id), ("bos_token", prefix[0] if prefix else bos_in_files):
    token = None if number is None else model.id_to_token(number)
    if token is not None:
      named.setdefault(key, token)
  fingerprint = _digest([canonical, vocab_size, eos_in_files, bos_in_files, prefix, suffix])
  return Tokenizer(
    path=file,
    fingerprint=fingerprint,
    vocab_size=vocab_size,
    bos_id=prefix[0] if prefix else bos_in_files,
    eos_id=eos_id,
    eos_problem=eos_problem,
    prefix=prefix,
    suffix=suffix,
    special_tokens=special,
    added_tokens=[t["content"] for t in content.get("added_tokens") or [] if not t.get("special")],
    added_ids={t["content"]: t["id"] for t in content.get("added_tokens") or []},
    named_tokens=named,
    chat_template=_chat_template(directory, side),
    special_ids=[t["id"] for t in content.get("added_tokens") or [] if t.get("special")],
    unk_id=_unk_id(content["model"], model),
    find_pieces=lambda: {number: piece for piece, number in model.get_vocab(with_added_tokens=False).items()},
    is_byte_level="ByteLevel" in json.dumps([content.get("decoder")]),
    locate_texts=locate_texts,
    encode_texts=lambda texts: [e.ids for e in model.encode_batch_fast(texts, add_special_tokens=False)],
    decode_ids=lambda ids: model.decode(ids, skip_special_tokens=True),
  )


def _unk_id(model: dict[str, Any], loaded: tokenizers.Tokenizer) -> int | None:
  """The id that a tokenizer.json gives to what it cannot spell; Unigram models name it by number."""
  if model.get("unk_token") is not None:
    return loaded.token_to_id(model["unk_token"])
  return model.get("unk_id")


def is_byte_piece(piece: str) -> bool:
  """Is it a piece such as `<0xE4>`, by which SentencePiece and its kin spell a byte."""
  return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def byte_characters() -> list[str]:
  """How byte-level vocabularies write each byte (GPT-2): as Latin-1 where that prints, the others count on from 256."""
  prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  moved = {byte: 256 + n for n, byte in enumerate(byte for byte in range(256) if byte not in prints)}
  return [chr(moved.get(byte, byte)) for byte in range(256)]


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


# SentencePiece.


def _load_sentencepiece(file: Path, raw: bytes, side: dict[str, dict], eos_token: str) -> Tokenizer:
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
  except (RuntimeError, OSError, ValueError) as error:
    raise ConfigError(f"{file}: sentencepiece cannot read it: {error}") from None
  added = _added_tokens(file.parent, side)
  size = model.get_piece_size()

  def token_to_id(token: str) -> int | None:
    if token in added:
      return added[token]
    number = model.piece_to_id(token)
    return number if number != model.unk_id() or model.id_to_piece(number) == token else None

  ids = {}
  for kind, own in ("eos", model.eos_id()), ("bos", model.bos_id()):
    found = _special_id(kind, side, token_to_id, file.parent)
    ids[kind] = found if found is not None else (own if own >= 0 else None)
  special = [model.id_to_piece(i) for i in range(size) if model.is_control(i) or model.is_unknown(i)] + list(added)
  eos_id, eos_problem = _chosen_eos(file, eos_token, ids["eos"], token_to_id, special)
  vocab_size = max([size - 1, *added.values()]) + 1
  for kind, number in ("eos", eos_id), ("bos", ids["bos"]):
    if number is not None and number >= vocab_size:
      raise ConfigError(f"{file.parent}: {kind}_token_id is {number}, but the largest id of {file.name} is {vocab_size - 1}")
  settings = side["tokenizer_config.json"]
  adds_bos = settings.get("add_bos_token", True)  # as Llama's tokenizer; models without BOS (T5) have no id for it
  prefix = [ids["bos"]] if adds_bos and ids["bos"] is not None else []
  return Tokenizer(
    path=file,
    fingerprint=_digest([hashlib.sha256(raw).hexdigest(), sorted(added.items()), ids["eos"], ids["bos"], prefix]),
    vocab_size=vocab_size,
    bos_id=ids["bos"],
    eos_id=eos_id,
    eos_problem=eos_problem,
    prefix=prefix,
    suffix=[],
    special_tokens=special,
    added_tokens=[],
    added_ids=added,
    named_tokens=_named_tokens(side),
    chat_template=_chat_template(file.parent, side),
    special_ids=[],
    unk_id=model.unk_id() if model.unk_id() >= 0 else None,
    find_pieces=lambda: {i: model.id_to_piece(i) for i in range(size) if not (model.is_control(i) or model.is_unknown(i))},
    is_byte_level=False,
    locate_texts=None,
    encode_texts=lambda texts: model.encode(texts, out_type=int),
    decode_ids=lambda numbers: model.decode([n for n in numbers if n < size and not model.is_control(n)]),
  )


def _added_tokens(directory: Path, side: dict[str, dict]) -> dict[str, int]:
  """Tokens that were added behind the SentencePiece pieces, by text; they are never made from a document's text."""
  added = {}
  for number, token in (side["tokenizer_config.json"].get("added_tokens_decoder") or {}).items():
    content = token.get("content") if isinstance(token, dict) else None
    if not str(number).isdigit() or not isinstance(content, str):
      raise ConfigError(f"{directory / _SIDE_FILES[0]}: added_tokens_decoder[{number!r}] is {token!r}, expected a token object")
    added[content] = int(number)
  for content, number in _read_side_file(directory / "added_tokens.json").items():
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
      raise ConfigError(f"{directory / 'added_tokens.json'}: {content!r} has id {number!r}, expected an id from 0 up")
    added[content] = number
  return added
