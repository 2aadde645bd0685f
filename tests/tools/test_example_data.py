"""The shipped example files are what examples/README.md says, and the cutting into documents loses nothing."""

import gzip
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from cpt_jax.model import spec as spec_lib


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
