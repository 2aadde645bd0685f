"""Contamination: shared runs of words are found exactly, in any script, and nothing else is."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cpt_jax.config import ConfigError
from cpt_jax.store import decontaminate, documents, prepare, token_files, token_store, units

# What each piece of text is to the rule, written down by hand.
FOLDED = {
  **{c: c for c in "abe2"},
  **{
    "A": "a",
    "E": "e",
    "\u00e9": "e",
    "e\u0301": "e",
    "\u00c9": "e",
    "\uff22": "b",
    "\uff12": "2",
    "\u00b2": "2",
    "\U0001d400": "a",
  },
  **{"\u00ad": "", "\u200d": "", "\ufe0f": ""},  # soft hyphen, joiner, variation selector
  **dict.fromkeys(" \n-_,'\u3002\uff0c\u0000", " "),
  **{c: f" {c} " for c in "\u4e2d\u6587\u3042\u0e01\u0e34\U00020000"},  # Han, Kana, Thai letter and vowel, Han beyond 16 bits
  "\u0939\u093f": "\u0939\u093f",  # a Devanagari letter and its vowel
  "\u1e9e": "\u00df",  # capital sharp s
}
PIECES = st.lists(st.sampled_from(sorted(FOLDED)), max_size=40)
NUM_WORDS = 9


def of(texts, ngram_words=NUM_WORDS):
  return decontaminate.from_texts(texts, files=["f0", "f1"], file_T=np.arange(len(texts)) % 2, ngram_words=ngram_words)


def reference(texts, document, ngram_words=NUM_WORDS):
  """The first shared run of words of a document, by sets of tuples."""
  words, runs = document.split(), set()
  for text in map(str.split, texts):
    length = min(len(text), ngram_words)
    if length >= 8:
      runs |= {tuple(text[i : i + length]) for i in range(len(text) - length + 1)}
  for i in range(len(words)):
    for length in range(8, ngram_words + 1):
      if tuple(words[i : i + length]) in runs and i + length <= len(words):
        return " ".join(words[i : i + length])
  return None


def joined(pieces):
  return "".join(pieces), "".join(FOLDED[p] for p in pieces)


@hypothesis.given(texts=st.lists(PIECES, max_size=4), others=st.lists(PIECES, max_size=4), cut=st.integers(0, 30))
@hypothesis.settings(max_examples=300)
def test_against_sets_of_tuples(texts, others, cut):
  documents_ = [*others, *(t[cut:] + ["-"] + o for t, o in zip(texts, others, strict=False))]
  found = of([joined(t)[0] for t in texts]).find([joined(d)[0] for d in documents_])
  expected = [reference([joined(t)[1] for t in texts], joined(d)[1]) for d in documents_]
  assert [m.ngram if m else None for m in found] == expected


WORDS = st.lists(st.sampled_from(["one", "two", "\u4e2d"]), max_size=40)


@hypothesis.given(texts=st.lists(WORDS, max_size=5), others=st.lists(WORDS, max_size=30))
@hypothesis.settings(max_examples=200)
def test_many_matches_in_batches_and_with_equal_hashes(texts, others):
  texts, others = [[" ".join(words) for words in each] for each in (texts, others)]
  expected = [reference([t.replace("\u4e2d", " \u4e2d ") for t in texts], d) for d in others]
  contamination = of(texts)
  assert [m.ngram if m else None for m in contamination.find(others)] == expected
  hashes = decontaminate._hashes
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decontaminate, "_BATCH_CHARACTERS", 20)
    assert of(texts).digest == contamination.digest
    assert contamination.find(others) == of(texts).find(others) == [contamination.found(d) for d in others]
    patch.setattr(decontaminate, "_hashes", lambda *a: (h & np.uint64(3 << 62) for h in hashes(*a)))
    coarse = of(texts).find(others)
  assert [m.ngram if m else None for m in coarse] == expected


@pytest.fixture
def evals(tmp_path):
  """Two small benchmarks."""
  question = "Which of the four giant planets is the one with the largest number of known moons"
  lines = [{"question": f"{question} in year {i}?", "choices": f"saturn and {i}"} for i in range(3)]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  table = pyarrow.table({"question": ["It was the best of times it was the worst of times it was"], "note": ["x"]})
  pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
  return tmp_path


def test_build_reads_fields_and_names_the_file(evals):
  built = decontaminate.build([str(evals / "*")], fields=["question", "choices"])
  assert (built.num_texts, built.num_short) == (7, 3)
  assert built.found("The best of times, it was the worst of times. It was") is None  # 12 words
  match = built.found("[IT WAS\tTHE BEST OF TIMES]; IT WAS THE WORST OF...TIMES, it")
  assert match == ("it was the best of times it was the worst of times it", str(evals / "b.parquet"))
  assert built.found("He said: which of the four giant planets is the one with the largest number?").file == str(
    evals / "a.jsonl"
  )
  assert built.found("Which of the four giant planets is the one with the largest moon?") is None
  (evals / "c.txt").write_text("a b c d e f g h i j k l m n\n\f\na b\n")
  assert (
    decontaminate.build([str(evals / "c.txt")], fields=["question"]).found("b c d e f g h i j k l m n").file.endswith("c.txt")
  )


def test_digest_is_of_the_runs_of_words(evals, tmp_path):
  built = decontaminate.build([str(evals / "*")], fields=["question"])
  swapped = decontaminate.build([str(evals / "b*"), str(evals / "a*")], fields=["question"])
  longer = decontaminate.build([str(evals / "*")], fields=["question"], ngram_words=14)
  fewer = decontaminate.build([str(evals / "a*")], fields=["question"])
  assert built.digest == swapped.digest
  assert len({built.digest, longer.digest, fewer.digest}) == 3
  # ...and the same on every machine and with every version of numpy.
  assert of(["a b c d e f g h i j"]).digest == "2f8d287a5e63b05b50511eb330c2bd1c"


def test_saved_and_loaded(evals, tmp_path):
  built = decontaminate.build([str(evals / "*")], fields=["question", "choices"])
  built.save(tmp_path / "c.npz")
  loaded = decontaminate.load(tmp_path / "c.npz")
  assert (loaded.digest, loaded.num_texts, loaded.num_short, loaded.ngram_words) == (built.digest, 7, 3, 13)
  text = "Which of the four giant planets is the one with the largest number"
  assert loaded.found(text) == built.found(text) is not None


def test_what_cannot_be_compared_with_is_an_error(evals):
  for inputs, arguments, kind, words in (
    (
      ["a.jsonl"],
      {"fields": ["text"]},
      documents.DataError,
      r"a\.jsonl:1: field 'text' is missing.*--decontaminate_field.*3 rec",
    ),
    (["none*"], {"fields": ["text"]}, ConfigError, "--decontaminate .*no file matches"),
    (["a.jsonl"], {"fields": ["choices"]}, ConfigError, "no text of 8 words or more"),
    (["a.jsonl"], {"fields": ["question"], "ngram_words": 5}, ConfigError, "--ngram_words=5"),
  ):
    with pytest.raises(kind, match=words):
      decontaminate.build([str(evals / name) for name in inputs], **arguments)


# In the preparation of a store.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, fixtures):
  """Documents of which some spell an evaluation text; returns (glob, evaluation file, numbers of the contaminated)."""
  path = tmp_path_factory.mktemp("corpus")
  texts = [json.loads(line)["text"] for line in (fixtures / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
  evals = [f"Planted question number {i}: what do {i} people say when they meet the other {i + 7} of them?" for i in range(30)]
  (path / "evals.jsonl").write_text("".join(json.dumps({"question": t}) + "\n" for t in evals))
  planted = set(range(3, 200, 7))
  mixed = [t + (" " + evals[i % 30].upper() if i in planted else "") + " The end." for i, t in enumerate(texts)]
  lines = [json.dumps({"text": t}) for t in mixed]
  lines[50:50] = ["", "[]"]
  (path / "a.jsonl").write_text("\n".join(lines[:150]))
  (path / "b.jsonl").write_text("\n".join(lines[150:195]))
  (path / "c.jsonl").write_text("\n".join(lines[195:]))
  return str(path / "[abc].jsonl"), str(path / "evals.jsonl"), [(t, i in planted) for i, t in enumerate(mixed)]


def run(inputs, output, fixtures, contamination, **kwargs):
  arguments = {"tokenizer": str(fixtures / "tokenizer"), "num_workers": 1, "unit_bytes": 10_000, "progress": False} | kwargs
  return prepare.prepare([inputs], output=str(output), contamination=contamination, **arguments)


def test_prepared_store_is_that_of_the_clean_documents(tmp_path, fixtures, corpus):
  inputs, evals, documents_ = corpus
  contamination = decontaminate.build([evals], fields=["question"])
  report = run(inputs, tmp_path / "s", fixtures, contamination)
  clean = [t for t, is_planted in documents_ if not is_planted]
  opened = token_store.open_store(tmp_path / "s")
  assert opened.doc_hashes().tolist() == [token_files.text_hash(t) for t in clean]
  assert report.left_out == {"contaminated": len(documents_) - len(clean)} and report.num_bad == 1
  listed = [json.loads(line) for line in (tmp_path / "s" / prepare.CONTAMINATED).read_text().splitlines()]
  places = {}
  for file in documents.find_files([inputs]):
    with open(file, encoding="utf-8") as f:
      places |= {json.loads(line)["text"]: (file, n) for n, line in enumerate(f, 1) if line.startswith("{")}
  planted = [t for t, is_planted in documents_ if is_planted]
  assert [(c["file"], c["line"]) for c in listed] == [places[t] for t in planted]
  assert all(c["eval_file"] == evals for c in listed)
  assert [c["ngram"][:26] for c in listed] == [f"planted question number {n:<2}" for n in [i % 30 for i in range(3, 200, 7)]]
  assert report.frequent[0].num_documents == 1
  assert [line.split() for line in report.lines() if "left out" in line] == [["left", "out", "29", "contaminated"]]


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"unit_bytes": 1 << 20}])
def test_number_of_processes_and_units_change_nothing(tmp_path, fixtures, corpus, changes):
  inputs, evals, _ = corpus
  contamination = decontaminate.build([evals], fields=["question"])
  reports = [run(inputs, tmp_path / str(i), fixtures, contamination, **c) for i, c in enumerate(({}, changes))]
  stores = [token_store.open_store(tmp_path / str(i)) for i in range(2)]
  assert stores[0].doc_hashes().tolist() == stores[1].doc_hashes().tolist()
  for name in prepare.CONTAMINATED, prepare.BAD_RECORDS:
    assert (tmp_path / "0" / name).read_text() == (tmp_path / "1" / name).read_text()
  again = run(inputs, tmp_path / "0", fixtures, contamination)
  files = [units.InputFile.of(file) for file in documents.find_files([inputs])]
  cut = units.cut(files, unit_bytes=10_000, max_units=256)  # a unit with the end of one file and another file
  assert any(len(unit) == 2 and unit[0].part.start for unit in cut)
  assert again.was_finished and again[1:7] == reports[0][1:7] and again[9:] == reports[1][9:]


def test_other_evaluation_texts_are_noticed(tmp_path, fixtures, corpus, evals):
  inputs, planted, _ = corpus
  run(inputs, tmp_path / "s", fixtures, decontaminate.build([planted], fields=["question"]))
  other = decontaminate.build([planted, str(evals / "a*")], fields=["question"])
  longer = decontaminate.build([planted], fields=["question"], ngram_words=14)
  for contamination in other, longer, None:
    with pytest.raises(ConfigError, match=r"choose another --output(.|\n)*decontaminate: "):
      run(inputs, tmp_path / "s", fixtures, contamination)


def test_all_contaminated_is_an_error(tmp_path, fixtures, corpus):
  _, planted, _ = corpus
  (tmp_path / "in.txt").write_text("Planted question number 3: what do 3 people say when they meet the other 10 of them")
  with pytest.raises(documents.DataError, match=r"no document in 1 files: 0 bad records, 1 left out \(contaminated\)"):
    run(str(tmp_path / "in.txt"), tmp_path / "s", fixtures, decontaminate.build([planted], fields=["question"]))


def test_command(tmp_path, cpt, fixtures, corpus):
  inputs, planted, _ = corpus
  call = ["prepare", "--input", inputs, "--tokenizer", fixtures / "tokenizer", "--output", tmp_path / "s"]
  call += ["--decontaminate", planted, "--decontaminate_field", "question", "--num_workers", "1"]
  done = cpt(*call)
  assert done.returncode == 0 and "29  contaminated" in done.stdout, done
  done = cpt(*call, "--ngram_words", "3")
  assert done.returncode == 78 and "--ngram_words=3" in done.stderr
