"""Grown bases as transformers and sentencepiece load them: the same ids, the same text, the same logits."""

import json

import numpy as np
import pytest
from test_assess import poems, run_tool

from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.vocab import grow, kinds

TEXTS = [
  "The cat sat on the mat.",
  "\u6625\u82b1\u79cb\u6708\u4f55\u6642\u4e86\n\u5f80\u4e8b\u77e5\u591a\u5c11",
  "a \u6625 1234 <s>x",
  "\U0001f600\tz",
]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["examples/base", "tests/fixtures/tokenizer", "tests/fixtures/sentencepiece"])
def test_transformers_gives_the_ids_of_the_grown_tokenizer(root, tmp_path, kind):
  transformers = pytest.importorskip("transformers")
  base = kinds.load(root / kind)
  found = grow.grow(base, poems(root, 210_000), size=60)
  grow.write_tokenizer(base, found.raw, tmp_path)
  name = "LlamaTokenizer" if kind.endswith("sentencepiece") else "PreTrainedTokenizerFast"
  file = tmp_path / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(theirs) == found.vocab_size
  ours = tokenizer_lib.load(tmp_path)
  for text in TEXTS[:2] + poems(root, 20_000):
    ids = ours.encode_contents([text])[0]
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert max(ids) >= base.vocab_size or text == TEXTS[0]


@pytest.mark.parity
def test_sentencepiece_loads_the_grown_model(fixtures, tmp_path, root):
  import sentencepiece

  base = kinds.load(fixtures / "sentencepiece")
  found = grow.grow(base, poems(root, 210_000), size=60)
  (tmp_path / "grown.model").write_bytes(found.raw)
  model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "grown.model"))
  assert model.get_piece_size() == found.vocab_size
  for text in TEXTS:
    assert model.encode(text) == found.tokenizer.encode_contents([text])[0]
    assert model.decode(model.encode(text)) == text


@pytest.mark.parity
def test_transformers_loads_the_grown_model_with_its_old_logits(root, tmp_path):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  (tmp_path / "zh.txt").write_text("\n\f\n".join(poems(root, 300_000)), encoding="utf-8")
  options = ["--domain", tmp_path / "zh.txt", "--size", 50, "--output", tmp_path / "grown"]
  done = run_tool(root, "grow_vocab.py", "--hf", root / "examples" / "base", *options)
  assert done.returncode == 0, done.stderr
  logits = []
  ids = torch.tensor([[5, 99, 1000, 2047, 17, 4000]])
  for directory in (root / "examples" / "base", tmp_path / "grown"):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
      logits.append(model(ids).logits.numpy()[..., :4096])
  np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)
  assert model.config.vocab_size == 4224 and model.config.true_vocab_size == 4146
