"""The shipped example files are what examples/README.md says, and the cutting into documents loses nothing."""

import gzip
import json
import random

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from cpt_jax.model import spec as spec_lib
from tools.fixtures import make_example_data


@pytest.fixture(scope="module")
def tokenizer(root):
  return tokenizers.Tokenizer.from_file(str(root / "examples" / "base" / "tokenizer.json"))


@pytest.mark.parametrize(("name", "num_documents", "num_bytes"), [("english", 601, 2_284_334), ("poetry_ci", 21_045, 5_692_241)])
def test_corpora_are_as_described(root, name, num_documents, num_bytes):
  with gzip.open(root / "examples" / "corpora" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
    records = [json.loads(line) for line in lines]
  assert all(set(record) == {"text", "source"} for record in records)
  texts = [record["text"] for record in records]
  assert len(texts) == len(set(texts)) == num_documents
  assert sum(len(text.encode()) for text in texts) == num_bytes


@hypothesis.given(st.text())
def test_tokenizer_restores_any_text(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_model_fits_the_tokenizer(root, tokenizer):
  spec = spec_lib.from_hf(spec_lib.load_hf_config(root / "examples" / "base" / "config.json"))
  assert spec.vocab_size == tokenizer.get_vocab_size() == 4096
  assert spec_lib.num_parameters(spec) == 2_361_024
  assert tokenizer.token_to_id("<|endoftext|>") == 0


words = st.text(alphabet="ab.", min_size=1, max_size=12)
works = st.lists(st.lists(words, min_size=1, max_size=30).map(" ".join), min_size=1, max_size=20).map("\n\n".join)


@hypothesis.given(works, st.booleans())
def test_cutting_keeps_every_word_in_order(work, lines):
  documents = list(make_example_data.cut(work, rng=random.Random(0), chars=(60, 120), lines=lines))
  assert " ".join(documents).split() == work.split()


def test_cutting_keeps_to_the_lengths():
  work = "\n\n".join("A sentence of some words. " * n for n in random.Random(0).choices(range(1, 40), k=200))
  lengths = [len(document) for document in make_example_data.cut(work, rng=random.Random(1), chars=(2000, 6000), lines=False)]
  assert max(lengths) <= 7000 and min(lengths) >= 900 and len(set(lengths)) > 20


def test_sample_keeps_order_and_size():
  texts = [f"text {i}" for i in range(100)]
  chosen = make_example_data.sample(texts, max_bytes=200)
  assert chosen == sorted(chosen, key=texts.index) and 150 < make_example_data.num_bytes(chosen) <= 200
  assert set(make_example_data.sample(texts, max_bytes=100)) < set(chosen)


def test_files_are_reproducible(tmp_path):
  for name in ("a", "b"):
    make_example_data.write(tmp_path / name / f"{name}.gz", {"source": ["one", "two"]})
  assert (tmp_path / "a" / "a.gz").read_bytes() == (tmp_path / "b" / "b.gz").read_bytes()
