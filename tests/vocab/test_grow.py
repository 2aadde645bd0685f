"""Growing a vocabulary: old ids and merges stay, new pieces are reachable, protected text does not change, bytes come back."""

import gzip
import io
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings, strategies as st

from cpt_jax.config import ConfigError
from cpt_jax.vocab import candidates, changes, grow, kinds, texts as texts_lib
from cpt_jax.vocab.bases import Piece, Words
from cpt_jax.vocab.scores import MARGIN, unigram_scores

KINDS = ["byte-level BPE", "BPE", "SentencePiece BPE", "SentencePiece unigram", "Unigram"]
BPE_KINDS = KINDS[:3]
SIZE = 100


@pytest.fixture(scope="session")
def corpora(root):
  """Some of the shipped texts: Chinese poems to learn, English as what the bases know."""
  found = {}
  for name, size in (("poetry_ci", 80_000), ("english", 80_000)):
    with gzip.open(root / "examples" / "corpora" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
      texts, total = [], 0
      for line in file:
        texts.append(json.loads(line)["text"])
        total += len(texts[-1].encode())
        if total > size:
          break
    found[name] = texts
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(grow, "MIN_BYTES", 50_000)  # or the tests would take minutes
    yield found


@pytest.fixture(scope="session")
def bases(root, fixtures, tmp_path_factory, corpora):
  """A base of every kind, by its name."""
  directory = tmp_path_factory.mktemp("bases")
  lines = [line for text in corpora["english"] for line in text.split("\n") if line]
  for name in ("spm_unigram", "unigram"):
    (directory / name).mkdir()
    shutil.copy(fixtures / "tokenizer" / "tokenizer_config.json", directory / name)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines[:3000]), model_writer=model, model_type="unigram", vocab_size=600, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
  )  # fmt: skip
  (directory / "spm_unigram" / "tokenizer.model").write_bytes(model.getvalue())
  fast = tokenizers.Tokenizer(tokenizers.models.Unigram())
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  fast.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.UnigramTrainer(
    vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
  )
  fast.train_from_iterator(lines[:3000], trainer)
  fast.save(str(directory / "unigram" / "tokenizer.json"))
  paths = [root / "examples" / "base", fixtures / "tokenizer", fixtures / "sentencepiece", directory / "spm_unigram"]
  found = [kinds.load(path) for path in [*paths, directory / "unigram"]]
  assert [base.kind for base in found] == KINDS
  return dict(zip(KINDS, found, strict=True))


@pytest.fixture(scope="session")
def grown(bases, corpora):
  """Every base grown by 100 pieces of the poems."""
  return {kind: grow.grow(base, corpora["poetry_ci"], size=SIZE) for kind, base in bases.items()}


def batches(texts):
  return texts_lib.batches(iter(texts))


# ---- what must hold of every kind ----


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_keep_their_meaning_and_new_ones_follow(kind, grown):
  found = grown[kind]
  base, wider = found.base, kinds_of(found)
  assert len(found.pieces) == SIZE and found.tokenizer.vocab_size == base.vocab_size + SIZE == found.vocab_size
  for number, text in base.texts.items():
    assert wider.texts[number] == text
  for i, piece in enumerate(found.pieces):
    assert wider.texts[base.vocab_size + i] == piece.text
  assert (found.tokenizer.bos_id, found.tokenizer.eos_id) == (base.tokenizer.bos_id, base.tokenizer.eos_id)
  assert found.tokenizer.special_ids == base.tokenizer.special_ids and found.tokenizer.unk_id == base.tokenizer.unk_id
  assert found.tokenizer.fingerprint != base.tokenizer.fingerprint


def kinds_of(found):
  """A grown tokenizer as a base again: it may grow further."""
  import pathlib
  import tempfile

  with tempfile.TemporaryDirectory() as directory:
    grow.write_tokenizer(found.base, found.raw, pathlib.Path(directory))
    return kinds.load(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_is_reachable(kind, grown, corpora):
  found = grown[kind]
  assert not found.base.unreachable(found.raw, found.pieces)
  seen = Counter(i for text in corpora["poetry_ci"] for i in found.tokenizer.encode_contents([text])[0])
  never = [p.text for i, p in enumerate(found.pieces) if not seen[found.base.vocab_size + i]]
  # What is only ever part of a longer piece need not be seen; all else is.
  assert all(any(text in piece.text != text for piece in found.pieces) for text in never)


TEXTS = st.text(
  st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\u6625\u82b1\u79cb\u6708\u4f55\u6642\u4e86 the,\n")),
  max_size=40,
)
SPECIAL_TEXTS = st.one_of(TEXTS, st.builds("{}<s>{}<|endoftext|></s>{}".format, TEXTS, TEXTS, TEXTS))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=SPECIAL_TEXTS)
def test_what_the_base_brings_back_comes_back(kind, grown, text):
  found = grown[kind]
  before, after = (t.decode(t.encode_contents([text])[0]) for t in (found.base.tokenizer, found.tokenizer))
  assert after == text or before != text


@pytest.mark.parametrize("kind", BPE_KINDS)
@settings(max_examples=60)
@given(text=TEXTS)
def test_bpe_grows_by_joining_the_base_s_own_tokens(kind, grown, text):
  found = grown[kind]
  lengths_W = found.lengths_W()
  old, new = (np.array(t.encode_contents([text])[0], np.int64) for t in (found.base.tokenizer, found.tokenizer))
  ends = [set(np.cumsum(lengths_W[ids]).tolist()) for ids in (old, new)]
  assert ends[1] <= ends[0]  # no token of the base is cut
  assert len(new) <= len(old)
  if max(new, default=0) < found.base.vocab_size:
    assert new.tolist() == old.tolist()


@pytest.mark.parametrize("kind", BPE_KINDS[1:])
def test_old_merges_come_first_in_the_base_s_own_language(kind, bases, corpora):
  """New pieces above the base's (score 0, as widely copied) would join what the base's own merges keep apart."""
  found = grow.grow(bases[kind], 2 * corpora["english"], size=60)
  lengths_W, num_changed = found.lengths_W(), 0
  for text in corpora["english"]:
    old, new = (np.array(t.encode_contents([text])[0], np.int64) for t in (found.base.tokenizer, found.tokenizer))
    assert set(np.cumsum(lengths_W[new]).tolist()) <= set(np.cumsum(lengths_W[old]).tolist())
    num_changed += len(new) < len(old)
  assert num_changed


@pytest.mark.parametrize("kind", KINDS[:4])  # the last has no bytes: it spells now what was one unknown token
def test_growth_saves_what_was_counted(kind, grown, corpora):
  found = grown[kind]
  change = found.changes(batches(corpora["poetry_ci"]))
  predicted = sum(piece.saved for piece in found.pieces)
  assert change.tokens - change.tokens_after == pytest.approx(predicted, rel=0.02)
  assert change.changed_documents == change.documents > 0


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE", "SentencePiece unigram"])
def test_protected_text_does_not_change(kind, bases, corpora):
  base = bases[kind]
  # Much of the text that pieces come from is protected, so that there is much to give up.
  protected = corpora["english"]
  train = corpora["poetry_ci"][: len(corpora["poetry_ci"]) // 2] + 2 * protected
  free = grow.grow(base, train, size=100)
  held = grow.grow(base, train, size=100, protect=lambda: batches(protected))
  assert free.changes(batches(protected)).changed_documents > 0
  for text in protected:
    assert held.tokenizer.encode_contents([text]) == base.tokenizer.encode_contents([text])
  assert held.dropped["protected"] > 0 and 90 <= len(held.pieces) <= 100  # others take their place


def test_protecting_all_leaves_nothing(bases, corpora):
  with pytest.raises(ConfigError, match=r"no piece is left of .* less protected text"):
    grow.grow(bases["byte-level BPE"], corpora["poetry_ci"], size=20, protect=lambda: batches(corpora["poetry_ci"]))


# ---- candidates ----


@given(st.lists(st.text("abcd ", min_size=1, max_size=30), min_size=1, max_size=8))
def test_merges_are_the_most_frequent_pairs_in_turn(texts):
  spelt = [words_of(text) for text in texts if text.strip()]
  if not spelt:
    return
  learnt = candidates.learn(spelt, num_merges=12, min_count=2)
  words = [[s.tolist() for s in map(candidates.symbols_of, text.split())] for text in spelt]
  words = [[chr(0x10000 + s) for s in word] for text in words for word in text]
  for left, right in learnt.merges:
    pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
    # The library counts overlapping pairs (aaa) as it likes: the chosen pair is the most frequent up to those.
    overlapping = sum(a == b == c for word in words for a, b, c in zip(word, word[1:], word[2:], strict=False))
    assert pairs[left, right] + overlapping >= max(pairs.values())
    words = [merged(word, left, right) for word in words]
  tokens = Counter(token for word in words for token in word)
  made = Counter()
  rule = {}
  for left, right in learnt.merges:
    rule.setdefault(left + right, (left, right))

  def visit(token, number):
    if token in rule:
      made[token] += number
      for part in rule[token]:
        visit(part, number)

  for token, number in tokens.items():
    visit(token, number)
  assert {text: made[text] for text in learnt.made} == learnt.made


def words_of(text):
  codes = [ord(c) - ord("a") for c in text if c != " "]
  starts = [i == 0 or text[i - 1] == " " for i, c in enumerate(text) if c != " "]
  return candidates.spell(Words(np.array(codes, np.int32), np.array(starts, bool), len(codes)))


def merged(word, left, right):
  out, i = [], 0
  while i < len(word):
    if word[i : i + 2] == [left, right]:
      out.append(left + right)
      i += 2
    else:
      out.append(word[i])
      i += 1
  return out


def test_bands_by_use_and_by_count(bases, corpora):
  base = bases["byte-level BPE"]
  general = corpora["poetry_ci"][1::8] + corpora["english"]
  counts_V = grow.count_ids(base.tokenizer, batches(general))
  train = corpora["poetry_ci"][::2] + corpora["english"]
  options = dict(size=30, general_counts_V=counts_V)
  found = {name: grow.grow(base, train, band=band, **options) for name, band in grow.BANDS.items()}
  uses = {name: [piece.use for piece in g.pieces] for name, g in found.items()}
  assert all(piece.use == max(counts_V[list(piece.old)]) for g in found.values() for piece in g.pieces)
  assert max(uses["low"]) <= found["low"].band.to < min(uses["high"]) and min(uses["high"]) > found["high"].band.above
  # Nothing that is used more than the bound is replaced anywhere: it stands in the text as often as before.
  new = grow.count_ids(found["low"].tokenizer, batches(general))[: base.vocab_size]
  assert (new[counts_V > found["low"].band.to] == counts_V[counts_V > found["low"].band.to]).all()
  rare = grow.grow(base, train, size=20, band=(0.0, 0.5), band_by="count")
  common = grow.grow(base, train, size=20, band=(0.5, 1.0), band_by="count")
  assert max(p.count for p in rare.pieces) <= rare.band.to <= common.band.above < min(p.count for p in common.pieces)


def test_growth_stops_at_the_saving_asked_for(bases, corpora):
  base = bases["byte-level BPE"]
  found = grow.grow(base, corpora["poetry_ci"], size=500, saving=0.1)
  change = found.changes(batches(corpora["poetry_ci"]))
  assert 0.1 <= change.saved_frac < 0.115 and len(found.pieces) < 500


# ---- what changed ----


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_lost_tokens_are_those_at_no_place_of_the_new_text(parts, data):
  text = "".join("abcde"[i] * i for i in parts)
  lengths_W = np.array([0, *range(1, 5), 2, 3])  # ids 1..4 spell 1..4 bytes, 5 and 6 two and three

  def draw():
    ids, left = [], len(text)
    while left:
      ids.append(data.draw(st.sampled_from([i for i in range(1, 7) if lengths_W[i] <= left])))
      left -= int(lengths_W[ids[-1]])
    return ids

  old, new = draw(), draw()
  spans = []
  for ids in (old, new):
    at, found = 0, set()
    for i in ids:
      found.add((at, i))
      at += int(lengths_W[i])
    spans.append(found)
  lost = len(spans[0] - spans[1])
  assert changes.num_lost(np.array(old), np.array(new), lengths_W=lengths_W) == lost
  total = changes.compare([text], [old], [new], lengths_W=lengths_W)
  assert total == (1, int(old != new), len(old), lost, len(new), len(text))


@given(st.text(max_size=200), st.integers(1, 20))
def test_parts_are_the_text(text, size):
  parts = list(texts_lib.cut(text, size=size))
  assert "".join(parts) == text and all(0 < len(part) <= size for part in parts)


def test_samples_follow_from_the_texts_alone():
  texts = [f"text {i}" for i in range(4000)]
  small, large = (texts_lib.Sampler(wanted_bytes=n, there_bytes=100, heldout_frac=0.2) for n in (30, 100))
  for text in texts:
    assert small.add(text) == large.add(text) == (texts_lib.place(text) < 0.2)
  assert len(large.sample.heldout) + len(large.sample.train) == 4000
  assert set(small.sample.heldout) < set(large.sample.heldout) and set(small.sample.train) < set(large.sample.train)
  assert 180 < len(small.sample.heldout) < 300 and 860 < len(small.sample.train) < 1060


# ---- scores of unigram pieces ----


def test_a_unigram_piece_scores_just_above_what_it_replaces():
  pieces = [Piece(text, (), (1,), 1, 1, 0) for text in ("ab", "abc", "zz")]
  found = unigram_scores({"a": -2.0, "b": -3.0, "c": -4.0, "long": -12.0}, pieces)
  assert found == pytest.approx([-5 + MARGIN, -9 + 2 * MARGIN, -12.0])  # none below the lowest: unknown characters cost as before


# ---- errors ----


def test_too_little_text(bases):
  with pytest.raises(ConfigError, match=rf"has 12 bytes, expected at least {grow.MIN_BYTES:,}: too few to estimate"):
    grow.grow(bases["BPE"], ["a short text"], size=10)


def test_a_band_of_uses_needs_general_text(bases, corpora):
  with pytest.raises(ConfigError, match="give --general"):
    grow.grow(bases["BPE"], corpora["poetry_ci"], size=10, band=(0.0, 0.5))


@pytest.mark.parametrize("model", [tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}), tokenizers.models.WordLevel({"[UNK]": 0})])
def test_kinds_that_cannot_grow(tmp_path, model):
  found = tokenizers.Tokenizer(model)
  found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  content = json.loads(found.to_str())
  content["model"]["vocab"] |= {piece: i + 10 for i, piece in enumerate(["The", "cat", "sat", "on", "12", "mats", "."])}
  content["model"]["unk_token"] = "[UNK]"
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ConfigError, match=f"a {content['model']['type']} model cannot grow: .*; take a base with"):
    kinds.load(tmp_path)


def test_a_unigram_file_with_tokens_behind_its_pieces(bases, tmp_path):
  content = json.loads(bases["Unigram"].path.read_bytes())
  token = content["added_tokens"][0] | {"id": 500, "content": "<extra>"}
  content["added_tokens"].append(token)
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ConfigError, match=r"added behind the 500 pieces of a Unigram model \(ids 500 to 500\)"):
    kinds.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_collide(kind, bases):
  base = bases[kind]
  special = base.tokenizer.special_tokens[0]
  known = next(text for text in base.texts.values() if text.isalpha())
  for text, message in ((special, "is a special token of the base"), (known, "is in the vocabulary already")):
    with pytest.raises(ConfigError, match=message):
      base.grown([Piece(text, (), (1,), 1, 1, 0)])
  with pytest.raises(ConfigError, match="is in the vocabulary already"):
    base.grown([Piece("zqzq", (), (1,), 1, 1, 0)] * 2)


# ---- tokens added behind the pieces ----


def test_added_tokens_behind_the_pieces_keep_their_ids(bases, corpora, tmp_path):
  """As Llama 3 has them: ids that the model's own vocabulary does not hold."""
  content = json.loads(bases["byte-level BPE"].path.read_bytes())
  template = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  content["added_tokens"] += [
    {"id": 4096, "content": "<|one|>", "special": True} | template,
    {"id": 4097, "content": "<tool>", "special": False} | template,
  ]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  shutil.copy(bases["byte-level BPE"].path.parent / "tokenizer_config.json", tmp_path)
  base = kinds.load(tmp_path)
  assert base.vocab_size == 4098
  found = grow.grow(base, corpora["poetry_ci"], size=30)
  loaded = tokenizers.Tokenizer.from_buffer(found.raw)
  assert [loaded.token_to_id(t) for t in ("<|one|>", "<tool>", found.pieces[0].text)] == [4096, 4097, 4098]
  for text in ("a <tool> b", "<|one|> x"):
    assert found.tokenizer.encode_contents([text]) == base.tokenizer.encode_contents([text])
  assert loaded.encode("<|one|>").ids == [4096]


def test_added_tokens_behind_a_sentencepiece_model_keep_their_ids(fixtures, corpora, tmp_path):
  shutil.copytree(fixtures / "sentencepiece", tmp_path / "base")
  (tmp_path / "base" / "added_tokens.json").write_text(json.dumps({"<pad>": 341, "<sep>": 340}))
  base = kinds.load(tmp_path / "base")
  found = grow.grow(base, corpora["poetry_ci"], size=30)
  model = sentencepiece.SentencePieceProcessor(model_proto=found.raw)
  assert [model.id_to_piece(i) for i in (340, 341, 342)] == ["<sep>", "<pad>", found.pieces[0].text]
  assert model.is_control(340) and model.is_control(341) and found.tokenizer.vocab_size == 342 + 30
  assert 340 not in found.tokenizer.encode_contents(["a <sep> b"])[0]


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_rows_are_the_least_multiple(vocab_size, multiple):
  rows = grow.num_rows(vocab_size, multiple=multiple)
  assert rows % multiple == 0 and vocab_size <= rows < vocab_size + multiple
