"""Whether a vocabulary fits: counts, distances, the curve on held-out text, every answer, and the two commands."""

import itertools
import json
import string

import factory
import numpy as np
import pytest
import tokenizers as tokenizers_library
from hypothesis import given, strategies as st
from shipped import poems

from cpt_jax.cli import app
from cpt_jax.model import spec as spec_lib
from cpt_jax.store import corpus, prepare, tokenization
from cpt_jax.vocab import assess, grow, kinds, texts as texts_lib, verdict


def test_counts_are_of_all_tokens_in_one_pass(root, fixtures):
  paths = (root / "examples" / "base", fixtures / "sentencepiece")
  tokenizer_list = [tokenization.load(path) for path in paths]
  texts = [json.loads(line)["text"] for line in (fixtures / "corpus.jsonl").read_text().splitlines()]
  seen = []
  counted = assess.count(tokenizer_list, iter([texts[:70], texts[70:]]), on_part=seen.append)
  assert seen == texts
  assert counted.text == corpus.describe_text(texts, num_tokens=0)
  for tokenizer, halves_2V in zip(tokenizer_list, counted.halves_2V, strict=True):
    for half in 0, 1:
      ids = list(itertools.chain(*tokenizer.encode_contents(texts[half::2])))
      np.testing.assert_array_equal(halves_2V[half], np.bincount(ids, minlength=tokenizer.vocab_size))
    fit = assess.fit(tokenizer, halves_2V.sum(axis=0), counted.text)
    ids = list(itertools.chain(*tokenizer.encode_contents(texts)))
    assert fit.tokens == len(ids) and fit.bytes_per_token == pytest.approx(sum(len(t.encode()) for t in texts) / len(ids))
    assert fit.byte_frac == pytest.approx(sum(i in tokenizer.byte_ids for i in ids) / len(ids))
    assert fit.used_frac == pytest.approx(len(set(ids)) / tokenizer.vocab_size)


def test_the_noise_is_the_larger_distance_of_halves():
  near, far = np.array([[5, 5], [5, 5]]), np.array([[9, 1], [1, 9]])
  bits, noise = assess.distance(near, far)
  assert bits == 0.0 and noise == corpus.jensen_shannon_bits(far[0], far[1]) > 0.3
  assert assess.distance(near, np.array([[7, 0], [0, 0]]))[1] == 0.0  # one part alone has no halves


@pytest.mark.parametrize("kind", ["examples/base", "tests/fixtures/sentencepiece"])
def test_the_curve_is_what_a_grown_tokenizer_saves_on_held_out_text(root, kind, monkeypatch):
  texts = poems(root, 150_000)
  sample = texts_lib.Sample(texts[: len(texts) * 4 // 5], texts[len(texts) * 4 // 5 :])
  base = kinds.load(root / kind)
  points = assess.curve(base, sample, sizes=(50, 200, 2000), min_count=20)
  assert [p.num_pieces for p in points][:2] == [50, 200] and points[2].num_pieces > 200
  assert 0 < points[0].saved_frac < points[1].saved_frac < points[2].saved_frac < 0.8
  monkeypatch.setattr(grow, "MIN_BYTES", 50_000)
  grown = grow.grow(base, sample.train, size=200)
  change = grown.changes(iter([sample.heldout]))
  assert points[1].saved_frac == pytest.approx(change.saved_frac, abs=2e-3)  # another pool, other ties
  assert points[1].context_gain == pytest.approx(1 / (1 - points[1].saved_frac))
  config = json.loads((root / "examples" / "base" / "config.json").read_text())
  tables = 1 if config["tie_word_embeddings"] else 2
  assert points[1].new_parameters == (200 * tables * config["hidden_size"] if kind == "examples/base" else None)


RULES = list(verdict.RULES)


@given(st.tuples(*[st.booleans()] * len(RULES)))
def test_both_conditions_are_required(values):
  met = dict(zip(RULES, values, strict=True))
  found = verdict.answer(met)
  is_unfit = met["unknown"] or (met["far"] and (met["own saves"] or met["bytes"]))
  assert (found == verdict.EXPAND) == (is_unfit and met["enough text"])
  assert (found == verdict.KEEP) == (not is_unfit) == verdict.fits(met)


@given(st.sampled_from(RULES), st.one_of(st.none(), st.floats(0, 1e12)))
def test_a_rule_is_its_figure_against_its_threshold(name, value):
  finding = verdict.RULES[name].find(value)
  assert finding.met == (value is not None and value >= verdict.RULES[name].threshold)


def assessment(root, path, domain, general, **more):
  tokenizer = tokenization.load(path)
  sides = [assess.count([tokenizer], iter([texts])) for texts in (domain, general)]
  sample = texts_lib.Sample(domain[::2], domain[1::2])
  return assess.assess(
    str(path), tokenizer, *(side.halves_2V[0] for side in sides), domain_text=sides[0].text, general_text=sides[1].text,
    sample=sample, own_tokens=None, **more,
  )  # fmt: skip


def test_answers_and_their_reasons(root, fixtures, tmp_path):
  english = [json.loads(line) for line in (fixtures / "corpus.jsonl").read_text().splitlines()]
  english = [record["text"] for record in english if record["source"] == "austen"]
  chinese = poems(root, 60_000)
  base = root / "examples" / "base"
  found = assessment(root, base, chinese, english)
  assert found.answer == verdict.OTHER_BASE and "the second condition is not met" in found.because and not found.fits
  found = assessment(root, base, chinese, english, domain_bytes=200e9)
  assert found.answer == verdict.EXPAND and "both conditions are met" in found.because
  assert found.text_tokens == pytest.approx(4 * 200e9 / found.domain.bytes_per_token)
  found = assessment(root, base, chinese, english, domain_bytes=200e9, budget_tokens=1e9)
  assert found.answer == verdict.OTHER_BASE and found.text_tokens == 1e9
  same = assessment(root, base, english[::2], english[1::2], domain_bytes=200e9)
  assert same.answer == verdict.KEEP and "the first condition is not met" in same.because and same.fits
  assert assess.better([found, same]) is same and assess.better([same, found]) is None and assess.better([found, found]) is None


def test_a_tokenizer_that_cannot_grow_is_measured_all_the_same(root, fixtures, tmp_path):
  letters = [*string.ascii_letters, *string.digits, *string.punctuation]
  vocab = {piece: i for i, piece in enumerate(["[UNK]", *letters, *(f"##{letter}" for letter in letters)])}
  made = tokenizers_library.Tokenizer(tokenizers_library.models.WordPiece(vocab, unk_token="[UNK]"))
  made.pre_tokenizer = tokenizers_library.pre_tokenizers.Whitespace()
  made.save(str(tmp_path / "tokenizer.json"))
  found = assessment(root, tmp_path, poems(root, 30_000), ["plain English text"] * 9, domain_bytes=1e12)
  assert found.curve == [] and "a WordPiece model cannot grow" in found.cannot_grow and found.domain.unknown_frac > 0.5
  assert found.answer == verdict.OTHER_BASE and "this tokenizer cannot grow" in found.because


# ---- the commands ----


def test_assessing_and_growing_the_shipped_base(root, tmp_path, fixtures, capsys):
  (tmp_path / "zh.txt").write_text("\n\f\n".join(poems(root, 250_000)), encoding="utf-8")
  (tmp_path / "en.txt").write_text("\n\f\n".join(poems(root, 60_000, name="english")), encoding="utf-8")
  corpora = ["--domain", str(tmp_path / "zh.txt"), "--general", str(tmp_path / "en.txt")]
  two = f"{root / 'examples' / 'base'},{fixtures / 'sentencepiece'}"
  assert app.main(["vocab", "assess", "--tokenizers", two, *corpora, "--output", str(tmp_path / "a.json")]) == 0
  said = capsys.readouterr()
  assert "tokens saved by adding so many pieces" in said.out and "CHOOSE ANOTHER BASE" in said.out
  assert "domain: count tokens" in said.err and f"try pieces of {fixtures / 'sentencepiece'}" in said.err
  record = json.loads((tmp_path / "a.json").read_text())
  assert record["answer"] == "choose another base" and len(record["tokenizers"]) == 2
  assert record["tokenizers"][0]["findings"]["enough text"]["met"] is False

  options = ["--size=64", "--multiple=32", "--input_rows=similar", "--protect", str(tmp_path / "en.txt")]
  base = ["--hf", str(root / "examples" / "base"), "--output", str(tmp_path / "grown")]
  assert app.main(["vocab", "grow", *base, *corpora, *options]) == 0
  assert f"wrote {tmp_path / 'grown'}: 4,160 ids in 4,160 rows\nnext: cpt prepare" in capsys.readouterr().out
  grown = json.loads((tmp_path / "grown" / "vocabulary.json").read_text())
  assert (grown["base_vocab_size"], grown["vocab_size"], grown["rows"]) == (4096, 4160, 4160)
  assert grown["changes"]["protected, all"]["changed_documents"] == 0 and len(grown["pieces"]) == 64
  tokenizer = tokenization.load(tmp_path / "grown")
  spec = spec_lib.from_hf(spec_lib.load_hf_config(tmp_path / "grown"))
  assert tokenizer.fingerprint == grown["fingerprint"] and tokenizer.vocab_size == 4160 <= spec.vocab_size
  # A store of the grown tokenizer does not fit the base that did not grow.
  from cpt_jax.config import Problems
  from cpt_jax.store.token_store import open_store
  from cpt_jax.stream import sources

  prepare.prepare([str(tmp_path / "zh.txt")], tokenizer=str(tmp_path / "grown"), output=str(tmp_path / "s"), progress=False)
  source = factory.source("zh", open_store(tmp_path / "s"), role="domain", share=(), heldout_frac=0.1)
  problems = Problems()
  sources.check_vocabulary([source], 4096, problems)
  assert "the model's vocabulary has 4096 rows" in problems.lines[0] and "vocab grow" in problems.lines[0]


@pytest.mark.parametrize(
  "command,messages",
  [
    ("assess --tokenizers nowhere", ["--domain is empty", "--general is empty", "nowhere: no such tokenizer"]),
    ("grow --band 0.9:0.2 --input_rows meen", ["--band='0.9:0.2'", "Did you mean mean?", "--hf is empty", "--output is empty"]),
    ("grow --size=0 --saving=2 --scale=-1", ["--size=0: must be 1 or more", "--saving=2.0", "--scale=-1.0: must be 0 or more"]),
  ],
)
def test_what_is_wrong_with_flags_is_said_at_once(command, messages, capsys):
  assert app.main(["vocab", *command.split()]) == 78
  said = capsys.readouterr().err
  assert all(message in said for message in messages), said
