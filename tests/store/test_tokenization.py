"""Tokenizers of base models: their own ids, EOS once, control tokens never from text, and a fingerprint that tells them apart."""

import json
import shutil

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers

from cpt_jax.config import ConfigError
from cpt_jax.store import tokenization, tokenizer_files

KINDS = ["tokenizer", "sentencepiece"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture
def copy(tmp_path, fixtures):
  """A directory with the small tokenizer of a kind, to be changed."""
  return lambda kind="tokenizer": shutil.copytree(fixtures / kind, tmp_path / kind)


def change(path, edit):
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(texts=st.lists(TEXTS, max_size=4))
def test_ids_give_the_text_back_and_end_in_eos_once(fixtures, kind, texts):
  loaded = tokenization.load(fixtures / kind)
  for ids, text in zip(loaded.encode_documents(texts).ids, texts, strict=True):
    assert ids[0] == loaded.bos_id == 1 and ids[-1] == loaded.eos_id == 2
    assert not {1, 2} & set(ids[1:-1]) and max(ids) < loaded.vocab_size
    if "\u2581" not in text:  # the letter that stands for a space in these tokenizers
      assert loaded.decode(ids) == text


def test_ids_are_those_of_the_libraries(fixtures):
  text = "Emma Woodhouse, handsome, clever, and rich"
  fast = tokenizers.Tokenizer.from_file(str(fixtures / "tokenizer" / "tokenizer.json"))
  assert tokenization.load(fixtures / "tokenizer").encode_documents([text]).ids == [[*fast.encode(text).ids, 2]]
  slow = sentencepiece.SentencePieceProcessor(model_file=str(fixtures / "sentencepiece" / "tokenizer.model"))
  assert tokenization.load(fixtures / "sentencepiece").encode_documents([text]).ids == [[1, *slow.encode(text), 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_stay_text(fixtures, kind):
  loaded = tokenization.load(fixtures / kind)
  text = "a<s>b</s> <unk>"
  found = loaded.encode_documents([text, "plain < s>"])
  assert (found.num_special_text, found.num_control_ids) == (1, 0)
  assert not {0, 1, 2} & set(found.ids[0][1:-1])
  assert loaded.decode(found.ids[0]) == text


def test_control_ids_that_the_text_gives_all_the_same_are_counted(copy):
  directory = copy()
  change(directory / "tokenizer_config.json", lambda c: c.update(eos_token="\n"))
  found = tokenization.load(directory).encode_documents(["a\nb", "ab"])
  assert found.num_control_ids == 1


def test_eos_that_the_file_forgot_to_mark_as_special_stays_text_too(copy):
  directory = copy()
  change(directory / "tokenizer.json", lambda c: c["added_tokens"][2].update(special=False))
  found = tokenization.load(directory).encode_documents(["a</s>b"])
  assert found.num_control_ids == 0 and found.num_special_text == 1


def test_tokenizer_that_adds_eos_itself(copy):
  directory = copy()
  plain = tokenization.load(directory).encode_documents(["ab"]).ids

  def edit(content):
    content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}

  change(directory / "tokenizer.json", edit)
  assert tokenization.load(directory).encode_documents(["ab"]).ids == plain


def test_tokenizer_that_adds_nothing_itself(copy):
  directory = copy()
  change(directory / "tokenizer.json", lambda c: c.update(post_processor=None))
  assert tokenization.load(directory).encode_documents(["ab"]).ids[0][0] != 1
  directory = copy("sentencepiece")
  change(directory / "tokenizer_config.json", lambda c: c.update(add_bos_token=False))
  assert tokenization.load(directory).encode_documents(["ab"]).ids[0][0] != 1


def test_settings_left_over_from_fine_tuning_do_not_act(copy):
  directory = copy()
  plain = tokenization.load(directory)

  def edit(content):
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    content["model"]["dropout"] = 0.9

  change(directory / "tokenizer.json", edit)
  loaded, text = tokenization.load(directory), "It is a truth universally acknowledged"
  assert loaded.encode_documents([text]).ids == plain.encode_documents([text]).ids
  assert loaded.fingerprint == plain.fingerprint


# Where EOS comes from.


@pytest.mark.parametrize(
  ("files", "eos_id"),
  [
    ({"tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {"eos_token_id": 0}}, 2),
    ({"tokenizer_config.json": {"eos_token": {"content": "<s>", "lstrip": False}}}, 1),
    ({"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "<s>"}}, 1),
    ({"config.json": {"eos_token_id": [0, 1]}, "generation_config.json": {"eos_token_id": 1}}, 0),
    ({"config.json": {"eos_token_id": 0}}, 0),
    ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": 1}}, 1),
  ],
)
def test_eos_is_found(copy, files, eos_id):
  directory = copy()
  (directory / "tokenizer_config.json").unlink()
  for name, content in files.items():
    (directory / name).write_text(json.dumps(content))
  assert tokenization.load(directory).eos_id == eos_id
  assert tokenization.load(directory / "tokenizer.json").eos_id == eos_id


def test_no_eos_is_a_named_error_and_can_be_given(copy):
  directory = copy()
  (directory / "tokenizer_config.json").unlink()
  loaded = tokenization.load(directory)
  assert loaded.eos_id is None and loaded.vocab_size == 300
  with pytest.raises(ConfigError, match="name one with --eos_token"):
    loaded.encode_documents(["a"])
  given = tokenization.load(directory, eos_token="</s>")
  assert given.encode_documents(["a"]).ids[0][-1] == 2
  assert given.fingerprint == loaded.fingerprint  # so that a run, which names no EOS, takes the store
  with pytest.raises(ConfigError, match="Did you mean <s>"):
    tokenization.load(directory, eos_token="<s/>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("tokenizer_config.json", {"eos_token": "<|nope|>"}, "which the tokenizer does not have"),
    ("config.json", {"eos_token_id": "2"}, "expected an id"),
    ("config.json", {"eos_token_id": -1}, "expected an id"),
    ("config.json", {"eos_token_id": 100_000}, "the largest id"),
  ],
)
def test_wrong_eos_is_a_named_error(copy, kind, name, content, words):
  directory = copy(kind)
  (directory / "tokenizer_config.json").unlink()
  (directory / name).write_text(json.dumps(content))
  with pytest.raises(ConfigError, match=words):
    tokenization.load(directory)


def test_sentencepiece_names_its_own_eos_and_counts_added_tokens(copy):
  directory = copy("sentencepiece")
  (directory / "tokenizer_config.json").unlink()
  assert tokenization.load(directory).eos_id == 2
  plain = tokenization.load(directory).fingerprint
  (directory / "added_tokens.json").write_text('{"<|im_end|>": 341}')
  (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
  loaded = tokenization.load(directory)
  assert (loaded.eos_id, loaded.vocab_size) == (341, 342)
  found = loaded.encode_documents(["a<|im_end|>"])
  assert (found.num_special_text, found.num_control_ids, found.ids[0].count(341)) == (1, 0, 1)
  assert loaded.decode(found.ids[0]) == "a<|im_end|>"
  assert loaded.fingerprint != plain


# Files.


def test_what_is_no_tokenizer(tmp_path, copy):
  for path, words in (tmp_path / "no", "no such tokenizer"), (tmp_path, "neither tokenizer"), (__file__, "expected token"):
    with pytest.raises(ConfigError, match=words):
      tokenization.load(path)
  directory = copy()
  for content in b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff", b"[" * 100_000:
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
      tokenization.load(directory)
  directory = copy("sentencepiece")
  for content in b"", b"hello" * 100:
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.model"):
      tokenization.load(directory)
  for content in "{", "[]":
    (directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
      tokenization.load(directory)


def test_file_size_is_limited(copy, monkeypatch):
  monkeypatch.setattr(tokenizer_files, "MAX_FILE_BYTES", 1000)
  with pytest.raises(ConfigError, match="at most 1000"):
    tokenization.load(copy())


# The fingerprint.


def test_fingerprint_does_not_depend_on_how_the_file_is_written(copy):
  directory = copy()
  first = tokenization.load(directory).fingerprint
  file = directory / "tokenizer.json"
  content = json.loads(file.read_text())
  file.write_text(json.dumps(dict(reversed(content.items())), indent=3, sort_keys=True))
  assert tokenization.load(directory).fingerprint == first
  content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
  content["model"] = {k: v for k, v in content["model"].items() if v is not None and v is not False}
  file.write_text(json.dumps(content, ensure_ascii=False))
  assert tokenization.load(directory).fingerprint == first
  file.write_text(tokenizers.Tokenizer.from_file(str(file)).to_str())
  assert tokenization.load(directory).fingerprint == first


def _swap_merges(c):
  c["model"]["merges"][0], c["model"]["merges"][1] = c["model"]["merges"][1], c["model"]["merges"][0]


def _swap_ids(c):
  v = c["model"]["vocab"]
  v["a"], v["b"] = v["b"], v["a"]


@pytest.mark.parametrize(
  "edit",
  [
    _swap_merges,
    _swap_ids,
    lambda c: c["model"].update(byte_fallback=False),
    lambda c: c["added_tokens"][2].update(content="</s2>"),
    lambda c: c["added_tokens"].append({**c["added_tokens"][2], "id": 300, "content": "<new>"}),
    lambda c: c.update(normalizer={"type": "NFC"}),
    lambda c: c.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    lambda c: c.update(post_processor=None),
  ],
)
def test_fingerprint_tells_tokenizers_apart(copy, edit):
  directory = copy()
  (directory / "tokenizer_config.json").unlink()
  (directory / "config.json").write_text('{"eos_token_id": 2}')
  first = tokenization.load(directory).fingerprint
  change(directory / "tokenizer.json", edit)
  assert tokenization.load(directory).fingerprint != first


def test_fingerprint_holds_the_special_ids(copy):
  directory = copy()
  first = tokenization.load(directory).fingerprint
  change(directory / "tokenizer_config.json", lambda c: c.update(eos_token="<s>"))
  assert tokenization.load(directory).fingerprint != first


# ---- bytes that a document's first token spells ----


@pytest.mark.parametrize("kind", ["examples/base", "tests/fixtures/tokenizer", "tests/fixtures/sentencepiece"])
@hypothesis.given(text=st.one_of(TEXTS, st.text("The at\n\u4eba\u751f", max_size=20)).filter(lambda t: t and "\u2581" not in t))
def test_the_first_token_and_what_follows_spell_the_text(root, kind, text):
  loaded = tokenization.load(root / kind)
  if loaded.path.suffix == ".json":
    piece_of = tokenizers.Tokenizer.from_file(str(loaded.path)).id_to_token
  else:
    piece_of = sentencepiece.SentencePieceProcessor(model_file=str(loaded.path)).id_to_piece
  first, *rest = loaded.encode_contents([text])[0]
  pieces = [piece_of(number) for number in rest]
  if kind == "examples/base":
    spelt = sum(map(len, pieces))
  else:
    spelt = sum(1 if piece.startswith("<0x") else len(piece.replace("\u2581", " ").encode()) for piece in pieces)
  assert loaded.opening_bytes_V[first] + spelt == len(text.encode())


def test_special_tokens_open_a_document_with_no_bytes(fixtures, root):
  for path in (fixtures / "tokenizer", fixtures / "sentencepiece", root / "examples" / "base"):
    loaded = tokenization.load(path)
    assert loaded.opening_bytes_V.shape == (loaded.vocab_size,)
    control = {loaded.eos_id, loaded.bos_id, loaded.unk_id, *loaded.special_ids} - {None}
    assert control and not loaded.opening_bytes_V[sorted(control)].any()
    assert len(loaded.byte_ids) == 128 and (loaded.opening_bytes_V[sorted(loaded.byte_ids)] == 1).all()
  base = tokenization.load(root / "examples" / "base")  # which adds no space
  (first, *_), (spaced, *_) = base.encode_contents(["The cat", " The cat"])
  assert (base.opening_bytes_V[first], base.opening_bytes_V[spaced]) == (3, 4)


def test_added_tokens_spell_themselves(copy):
  directory = copy()
  extra = {"id": 300, "content": "\u00e9t\u00e9", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  change(directory / "tokenizer.json", lambda c: c["added_tokens"].append({**extra, "special": False}))
  loaded = tokenization.load(directory)
  assert loaded.encode_contents(["\u00e9t\u00e9"]) == [[300]] and loaded.opening_bytes_V[300] == 5
