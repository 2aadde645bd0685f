"""Public-domain books -> the small corpus and the two 300-piece tokenizers that the tests read.

Invariant: the same books give the same corpus and the same tokenizer.json, byte for byte.
Called by hand: python tools/make_fixtures.py --english austen-novels.txt --chinese poetry-ci.txt
"""

import io
import json
from pathlib import Path

import sentencepiece
from absl import app, flags
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

_ENGLISH = flags.DEFINE_string("english", None, "Jane Austen's novels: text, a form feed line between documents.", required=True)
_CHINESE = flags.DEFINE_string("chinese", None, "Song ci poetry: text, a form feed line between documents.", required=True)
_OUTPUT = flags.DEFINE_string("output", "tests/fixtures", "Directory to write to.")

NUM_ENGLISH, NUM_CHINESE = 160, 40
VOCAB_SIZE = 300
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2, as in Llama 2


def make_corpus(english: str, chinese: str) -> list[dict[str, str]]:
  """200 documents: paragraphs of the novels, evenly spread, and whole poems; one of four is a poem, at first."""
  paragraphs = [p for p in english.replace("\f", "").split("\n\n") if 150 <= len(p) <= 900]
  prose = [{"text": p, "source": "austen"} for p in paragraphs[:: len(paragraphs) // NUM_ENGLISH][:NUM_ENGLISH]]
  poems = [p.strip("\n") for p in chinese.split("\n\f\n")]
  songs = [p for poem in poems for p in poem.split("\n\n") if 40 <= len(p) <= 160]
  verse = [{"text": p, "source": "ci"} for p in songs[:: len(songs) // NUM_CHINESE][:NUM_CHINESE]]
  documents = []
  while prose or verse:
    documents += [prose.pop(0) for _ in range(min(4, len(prose)))] + [verse.pop(0) for _ in range(min(1, len(verse)))]
  return documents


def make_tokenizer(texts: list[str]) -> Tokenizer:
  """BPE with byte fallback in the manner of Llama 2: 3 special, 256 bytes, the rest pieces and merges."""
  tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
  bytes_ = [f"<0x{b:02X}>" for b in range(256)]
  words = [w for t in texts for w in normalizers.Replace(" ", "\u2581").normalize_str(t).replace("\u2581", " \u2581").split(" ")]
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE,
    special_tokens=[*SPECIAL, *bytes_],
    limit_alphabet=24,
    show_progress=False,
  )
  trained = Tokenizer(models.BPE())
  trained.train_from_iterator(words, trainer)
  content = json.loads(trained.to_str())
  tokenizer.model = models.BPE(
    vocab=content["model"]["vocab"],
    merges=[tuple(m) for m in content["model"]["merges"]],
    unk_token="<unk>",
    byte_fallback=True,
    fuse_unk=True,
  )
  tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
  tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  return tokenizer


def make_sentencepiece(texts: list[str]) -> bytes:
  """A SentencePiece BPE model with byte fallback and no normalisation."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for t in texts for line in t.split("\n") if line]),
    model_writer=model,
    model_type="bpe",
    vocab_size=VOCAB_SIZE + 40,
    byte_fallback=True,
    character_coverage=0.98,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def main(_) -> None:
  """Writes corpus.jsonl, tokenizer/ and sentencepiece/ under --output."""
  output = Path(_OUTPUT.value)
  documents = make_corpus(Path(_ENGLISH.value).read_text(encoding="utf-8"), Path(_CHINESE.value).read_text(encoding="utf-8"))
  texts = [d["text"] for d in documents]
  lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
  for name in ("tokenizer", "sentencepiece"):
    (output / name).mkdir(parents=True, exist_ok=True)
  (output / "corpus.jsonl").write_text(lines, encoding="utf-8")
  english = [t for t in texts if t.isascii()]
  make_tokenizer(english).save(str(output / "tokenizer" / "tokenizer.json"))
  (output / "sentencepiece" / "tokenizer.model").write_bytes(make_sentencepiece(english))
  settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  for name in ("tokenizer", "sentencepiece"):
    (output / name / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
  print(f"{output}: {len(documents)} documents, {len(lines.encode('utf-8'))} bytes")


if __name__ == "__main__":
  app.run(main)
