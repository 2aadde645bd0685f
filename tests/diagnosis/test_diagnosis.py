"""Which kind of continual pretraining, from figures: their properties, every verdict, and a diagnosis of the shipped base."""

import ast
import gzip
import itertools
import json
import math
import shlex

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from store_writer import StoreWriter

import cpt_jax
from cpt_jax import config as config_lib
from cpt_jax.cli import app
from cpt_jax.config import Problems
from cpt_jax.diagnosis import measure, tables, verdict
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.progress import Progress
from cpt_jax.store import corpus, prepare, tokenization
from cpt_jax.store.token_store import open_store
from cpt_jax.stream import excerpts
from cpt_jax.stream.sources import mix64
from cpt_jax.training import loop

counts = hnp.arrays(np.int64, 7, elements=st.integers(0, 1000)).filter(lambda x: x.sum() > 0)


# ---- distances ----


@given(counts, counts)
def test_the_distance_is_what_entropies_say(p, q):
  def entropy(x):
    return -sum(v * math.log2(v) for v in x if v > 0)

  shares = [x / x.sum() for x in (p, q)]
  expected = entropy((shares[0] + shares[1]) / 2) - sum(map(entropy, shares)) / 2
  assert corpus.jensen_shannon_bits(p, q) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_halves_have_every_part_once_and_differ_by_one_part_at_most(sizes):
  parts = [np.full(size, i) for i, size in enumerate(sizes)]
  left, right = corpus.halves(parts)
  assert sorted(np.concatenate([*left, *right]).tolist()) == sorted(np.concatenate(parts).tolist())
  assert abs(sum(map(len, left)) - sum(map(len, right))) <= max(sizes)


@given(st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=6), st.integers(1, 40))
def test_counts_are_of_the_first_tokens(parts, max_tokens):
  tokens = list(itertools.chain(*parts))[:max_tokens]
  found = corpus.count_tokens([np.array(p, np.uint16) for p in parts], vocab_size=7, max_tokens=max_tokens)
  assert found.tolist() == [tokens.count(v) for v in range(7)]


# ---- texts ----


@pytest.mark.parametrize(
  "text,tokens,unit,fertility,scripts",
  [
    ("the cat sat on the mat", 9, "word", 1.5, {"Latin": 1.0}),
    ("\u0441\u043d\u0435\u0433 \u0438\u0434\u0435\u0442", 8, "word", 4.0, {"Cyrillic": 1.0}),
    ("\u5e8a\u524d\u660e\u6708\u5149\uff0c\u7591\u662f\u5730\u4e0a\u971c\u3002", 24, "character", 2.0, {"Han": 1.0}),
    ("\u3053\u306e file \u3092\u8aad\u3080", 9, "character", 1.0, {"Latin": 4 / 9, "Hiragana": 4 / 9, "Han": 1 / 9}),
    ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", 3, "character", 0.5, {"Thai": 1.0}),
    ("a 1 + 2 ;", 5, "word", 1.0, {"Latin": 1.0}),
    ("1 2 3", 3, "word", 1.0, {}),
  ],
)
def test_fertility_counts_words_where_a_script_has_them(text, tokens, unit, fertility, scripts):
  found = corpus.describe_text([text], num_tokens=tokens)
  assert (found.unit, found.bytes) == (unit, len(text.encode()))
  assert found.fertility == pytest.approx(fertility)
  assert found.scripts == pytest.approx(scripts) and list(found.scripts.values()) == sorted(found.scripts.values(), reverse=True)


def test_letters_of_scripts_that_the_general_text_lacks():
  general = {"Latin": 0.995, "Greek": 0.005}
  assert corpus.new_scripts_frac({"Latin": 0.4, "Han": 0.5, "Greek": 0.1}, general) == pytest.approx(0.6)
  assert corpus.new_scripts_frac(general, general) == 0.005


@given(hnp.arrays(np.int64, st.integers(1, 50), elements=st.integers(1, 100_000)), st.integers(1, 50_000))
def test_shares_of_tokens_by_length(lengths, context):
  found, total = corpus.describe_lengths(lengths, context=context), lengths.sum()
  assert found.longest == lengths.max() and found.median == np.median(lengths)
  assert found.over_context_frac == pytest.approx(sum(n for n in lengths if n > context) / total)
  assert found.beyond_context_frac == pytest.approx(sum(max(n - context, 0) for n in lengths) / total)
  assert found.beyond_context_frac <= found.over_context_frac
  assert found.over_32k_frac <= found.over_4k_frac <= 1


def test_an_own_vocabulary_needs_text_and_saves_tokens():
  rng = np.random.default_rng(0)
  words = ["".join(chr(0x4E00 + i) for i in rng.integers(0, 300, 3)) for _ in range(200)]
  text = ["".join(rng.choice(words, 400)) for _ in range(120)]
  assert corpus.own_vocabulary_tokens(text[:5], text[60:], vocab_size=2000) is None
  own = corpus.own_vocabulary_tokens(text[:60], text[60:], vocab_size=2000)
  assert own < 0.5 * sum(len(t) for t in text[60:])


def test_what_compresses_by_itself():
  noise = np.random.default_rng(0).bytes(50_000)
  assert corpus.compressed_bits(noise) > 7.9 and corpus.compressed_bits(b"abc" * 20_000) < 0.1
  texts = ["a" * 10_000, "b" * 10, "\u9f98" * 9000]
  data = corpus.beginnings(texts, num_bytes=20_000)
  assert len(data) == 20_000 and data.startswith(b"a" * 6666 + b"\n" + b"b" * 10 + b"\n")


def test_the_error_of_a_ratio_is_that_of_the_mean_where_weights_are_equal():
  values = np.random.default_rng(1).normal(size=40)
  assert corpus.ratio_error(list(3 * values), [3.0] * 40) == pytest.approx(values.std(ddof=1) / math.sqrt(40))
  assert corpus.ratio_error([2.0], [3.0]) == math.inf


# ---- samples ----


def store_of(directory, sizes, *, seed=0):
  rng = np.random.default_rng(seed)
  with StoreWriter(directory, vocab_size=300, eos_id=0) as writer:
    for i, size in enumerate(sizes):
      writer.add(rng.integers(1, 300, size), text=f"document {i} of {size}")
  return open_store(directory)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=90), st.integers(2, 3000), st.sampled_from([0, 50]))
def test_excerpts_are_of_the_store_in_the_order_of_hashes(tmp_path_factory, sizes, max_tokens, part_tokens):
  store = store_of(tmp_path_factory.mktemp("drawn") / "s", sizes)
  drawn = excerpts.draw(store, max_tokens=max_tokens, part_tokens=part_tokens)
  ranks = mix64(store.doc_hashes())[drawn.documents]
  assert (np.diff(ranks.astype(object)) > 0).all() if len(drawn) > 1 else True
  num_documents = min(sum(size > 1 for size in sizes), 64)
  largest = max(-(-max_tokens // max(num_documents, 1)), part_tokens, 2)
  available = sum(min(size, largest) for size in sizes if size > 1)
  assert min(available, max_tokens) <= drawn.num_tokens <= max_tokens + 1
  for i in range(len(drawn)):
    document, begin = store.document(int(drawn.documents[i])), int(drawn.begins[i])
    np.testing.assert_array_equal(drawn.excerpt(i), document[begin : begin + int(drawn.lengths[i])])
  assert drawn.num_cut == sum(drawn.lengths[i] < sizes[d] for i, d in enumerate(drawn.documents))


# ---- byte tokens ----


# ---- rules ----


def figures(name="law", *, bits_per_byte=1.0, error=0.01, bits=0.05, scripts=None, beyond=0.0, own=0.0, byte=0.0, **more):
  return verdict.Figures(
    name,
    verdict.Store("store", 100, more.get("tokens", 10**6), 4 * 10**6, 0.25),
    verdict.Loss(3.0, 0.03, bits_per_byte, error, 10_000, 20, "20 held-out documents"),
    verdict.Compressed(more.get("xz", 2.0), 2.0, 500_000),
    verdict.Vocabulary(10**5, byte, more.get("unknown", 0.0), 0.5, own),
    verdict.Distance(bits, 0.05, 10**5),
    corpus.Lengths(500, 900, 2000, 4000, 0.0, 0.0, beyond, beyond),
    corpus.Text(10**6, 10**6, 10**5, 0.9, scripts or {"Latin": 1.0}, "word", 1.5),
  )


GENERAL = figures("general")


@pytest.mark.parametrize(
  "case,kinds,practice",
  [
    (dict(), ("none needed",), ""),
    (dict(bits_per_byte=1.2, error=0.2), ("none needed",), ""),  # not shown to be worse
    (dict(error=math.inf), ("domain knowledge",), "weak"),  # of one document: not shown to be as good
    (dict(bits=0.6, bits_per_byte=1.4, error=math.inf), ("domain knowledge",), "strong"),  # nor to be another language
    (dict(beyond=0.8), ("long context",), "long"),
    (dict(bits_per_byte=1.1), ("domain knowledge",), "weak"),  # like general text, but the base does worse on it
    (dict(bits=0.4, bits_per_byte=0.9), ("domain knowledge",), "weak"),
    (dict(bits=0.4, bits_per_byte=0.9, beyond=0.6), ("domain knowledge", "long context"), "weak"),
    (dict(bits=0.6, bits_per_byte=0.7), ("domain knowledge",), "strong"),  # source code
    (dict(bits=0.3, bits_per_byte=1.4), ("domain knowledge",), "strong"),
    (dict(bits=0.6, bits_per_byte=1.4), ("language",), "language"),
    (dict(bits=0.6, bits_per_byte=1.4, xz=2.8), ("domain knowledge",), "strong"),  # hard for anybody
    (dict(bits=0.6, bits_per_byte=1.0, xz=1.5), ("language",), "language"),  # easy, but not for the base
    (dict(bits=0.3, bits_per_byte=1.4, scripts={"Han": 1.0}), ("language",), "language"),
    (dict(bits=0.9, bits_per_byte=1.1, scripts={"Han": 1.0}), ("domain knowledge",), "strong"),  # a language that it knows
    (dict(bits=0.9, bits_per_byte=3.0, beyond=0.9), ("language", "long context"), "language"),
  ],
)
def test_every_kind(case, kinds, practice):
  judged = verdict.judge(figures(**case), GENERAL)
  assert (judged.kinds, judged.practice) == (kinds, practice)
  assert judged.because and practice in ("", *verdict.PRACTICES)


@pytest.mark.parametrize(
  "case,budget,expected",
  [
    (dict(), None, "do not expand"),
    (dict(own=None, tokens=10**12), None, "do not expand"),
    (dict(bits=0.6, own=0.1, tokens=10**12), None, "do not expand"),  # text and distance alone are no reason
    (dict(own=0.5, tokens=10**12), None, "do not expand"),  # nor are savings on a text like the base's own
    (dict(bits=0.6, own=0.5), None, "choose another base"),
    (dict(bits=0.6, byte=0.2), None, "choose another base"),
    (dict(unknown=0.05), None, "choose another base"),
    (dict(bits=0.6, own=0.5, tokens=13 * 10**9), None, "expand"),  # four times read
    (dict(bits=0.6, own=0.5, tokens=12 * 10**9), None, "choose another base"),
    (dict(bits=0.6, own=0.5, tokens=10**12), 10e9, "choose another base"),  # the run reads no more
    (dict(bits=0.6, own=0.5, tokens=10**12), 60e9, "expand"),
  ],
)
def test_every_answer_about_the_vocabulary(case, budget, expected):
  judged = verdict.judge(figures(**case), GENERAL, budget_tokens=budget)
  assert judged.vocabulary == expected and judged.vocabulary_because


@given(*[st.booleans()] * 5)
def test_verdicts_follow_from_the_rules_met(near, far, script, good, high):
  met = dict(zip(["near", "far", "other script", "as good", "high loss"], [near, far, script, good, high], strict=True))
  short, practice = verdict.kinds(met | {"long": False})
  long, _ = verdict.kinds(met | {"long": True})
  assert len(short) == 1 and (practice == "") == (short == ("none needed",)) == (near and good)
  assert long == (("long context",) if near and good else (*short, "long context"))
  assert (short == ("language",)) == ((far or script) and high and not (near and good))


def test_practices_are_ranges_and_their_configs_exist(root):
  for practice in verdict.PRACTICES.values():
    assert practice.rate[0] < practice.rate[1] < practice.rate[2] <= 1
    assert 0 < practice.replay[0] <= practice.replay[1] < practice.replay[2] < 1
    assert (root / practice.config).exists()


# ---- with a model ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, fixtures, tiny_hf_config):
  """A base with random weights, and a store of the fixture's corpus."""
  directory = tmp_path_factory.mktemp("diagnosed")
  spec = spec_lib.from_hf(tiny_hf_config)
  params = transformer.init(spec, jax.random.key(0))
  pretrained.save_params(params, spec, directory / "hf", source_dir=fixtures / "tokenizer", hf_config=tiny_hf_config)
  prepare.prepare([str(fixtures / "corpus.jsonl")], tokenizer=str(directory / "hf"), output=str(directory / "s"), progress=False)
  return directory


def opened(directory):
  problems = Problems()
  base = measure.open_base(str(directory / "hf"), problems)
  store = measure.open_store("a", str(directory / "s"), base, problems)
  problems.raise_if_any()
  return base, store


def test_the_loss_is_the_run_s_own_base_evaluation(tiny, tmp_path):
  c = config_lib.default()
  c.start.hf = str(tiny / "hf")
  c.data.row_len, c.data.heldout_frac = 64, 0.3
  for name, share in ("a", 1.0), ("b", 1.0):
    c.data.sources[name] = config_lib.source(store=str(tiny / "s"), share=share)
  c.train.length, c.train.batch_rows, c.schedule.warmup = "1 steps", 8, "0 steps"
  c.eval.tokens, c.checkpoint.export_hf = 8000, False
  assert loop.run(c, tmp_path / "run") == 0
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  theirs = {source["source"]: source["base"] for source in summary["sources"]}

  base, store = opened(tiny)
  held = {n: measure.hold_out(n, i, store, base, max_tokens=8000, heldout_frac=0.3, row_len=64) for i, n in enumerate("ab")}
  with Progress() as progress:
    ours = measure.evaluate(base, held, config=config_lib.default(), progress=progress)
  for name in "ab":
    assert "held-out" in ours[name].sample
    for key in ("tokens", "documents"):
      assert getattr(ours[name], key) == theirs[name][key]
    for key in ("loss", "bits_per_byte"):
      assert getattr(ours[name], key) == pytest.approx(theirs[name][key], rel=1e-6)  # other batches, other rounding
    assert 0 < ours[name].loss_error < 0.2
    assert ours[name].bits_per_byte_error / ours[name].bits_per_byte == pytest.approx(ours[name].loss_error / ours[name].loss)


def test_too_few_held_out_documents_are_made_up_for_by_excerpts(tiny):
  base, store = opened(tiny)
  held = measure.hold_out("a", 0, store, base, max_tokens=3000, heldout_frac=0.005, row_len=64)
  assert held.sample.startswith("excerpts of ") and 2000 < held.rows.num_tokens <= 3000
  drawn = excerpts.draw(store, max_tokens=3000, part_tokens=64)
  seen = sorted(int(t) for batch in held.rows.batches for t in batch.targets_BT[batch.weights_BT > 0])
  assert seen == sorted(int(t) for i in range(len(drawn)) for t in drawn.excerpt(i)[1:])
  texts = [base.tokenizer.decode(drawn.excerpt(i).tolist()) for i in range(len(drawn))]
  assert held.rows.num_bytes == sum(len(text.replace("\ufffd", "?").encode()) for text in texts)


def test_a_source_is_near_itself_and_far_from_another(tiny, tmp_path):
  base, store = opened(tiny)
  rng = np.random.default_rng(0)
  with StoreWriter(tmp_path / "noise", vocab_size=300, eos_id=2, tokenizer_fingerprint=base.tokenizer.fingerprint) as writer:
    for i in range(50):
      writer.add([*rng.integers(200, 300, 200), 2], text=f"{i}")
  problems = Problems()
  noise = measure.open_store("noise", str(tmp_path / "noise"), base, problems)
  samples = {"a": measure.describe(store, base), "noise": measure.describe(noise, base)}
  loss = verdict.Loss(3.0, 0.1, 1.0, 0.1, 100, 3, "")
  found = measure.gather(samples, dict.fromkeys(samples, loss), general="a", vocab_size=base.spec.vocab_size)
  assert found["a"].distance.bits == found["a"].distance.floor_bits < 0.2
  assert found["noise"].distance.bits > 0.4 and found["noise"].distance.sample_tokens <= 50 * 201
  assert found["a"].store.tokens_per_byte == store.num_tokens / store.num_bytes
  assert found["a"].lengths.over_context_frac == store.lengths[store.lengths > 128].sum() / store.num_tokens
  assert found["a"].vocabulary.used_frac == len(np.unique(np.concatenate(samples["a"].parts))) / base.tokenizer.vocab_size


# ---- the whole ----


def test_the_command_on_the_shipped_base_and_texts(root, tmp_path, capsys, one_device):
  corpora = root / "examples" / "corpora"
  texts = tmp_path / "poetry.jsonl"
  with gzip.open(corpora / "poetry_ci.jsonl.gz", "rt", encoding="utf-8") as f:
    texts.write_text("".join(itertools.islice(f, 400)), encoding="utf-8")
  code = app.main(
    ["diagnose", f"--hf={root / 'examples' / 'base'}", "--tokens=1500", "--row_len", "256", "--base_peak_lr=3e-3"]
    + [f"--sources=english={corpora / 'english.jsonl.gz'},poetry={texts}", "--budget=1M tokens", f"--output={tmp_path / 'out'}"]
  )
  said = capsys.readouterr()
  assert code == 0, said.err
  assert [line for line in said.err.splitlines() if line.startswith(("read", "evaluate"))] == [
    f"{what} {name} ..." for what in ("read", "evaluate the base on") for name in ("english", "poetry")
  ]
  record = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
  assert record["general"] == "english" and set(record["sources"]) == {"english", "poetry"}
  (judged,) = record["verdicts"]
  assert judged["kinds"] == ["language"] and judged["vocabulary"] == "choose another base"
  assert record["sources"]["poetry"]["text"]["unit"] == "character"
  assert judged["findings"]["far"]["met"] and not judged["findings"]["long"]["met"]
  for text in ("LANGUAGE", "CHOOSE ANOTHER BASE", "begin at 0.001", str(tmp_path / "out" / "diagnosis.json"), "next:"):
    assert text in said.out, text
  # The command that it ends with has keys that exist.
  command = shlex.split(judged["next_command"].replace("\\\n", " "))
  assert command[:2] == ["cpt", "train"] and "--config.train.length=1e+06 tokens" in command
  planned = config_lib.load(str(root / command[2].removeprefix("--config=")))
  config_lib.check_overrides(planned, command)
  assert planned.data.sources.language.role == "domain"


def test_the_example_of_the_domain_recipe_says_what_it_would_do(root, tmp_path, capsys, monkeypatch):
  docstring = ast.get_docstring(ast.parse((root / "configs" / "domain.py").read_text()))
  (line,) = [line for line in docstring.splitlines() if "start.hf=examples/base" in line]
  for name in ("english", "poetry_ci"):
    text = f"examples/corpora/{name}.jsonl.gz"
    assert text in line
    with gzip.open(root / text, "rt", encoding="utf-8") as f:
      (tmp_path / f"{name}.jsonl").write_text("".join(itertools.islice(f, 120)), encoding="utf-8")
    line = line.replace(text, str(tmp_path / f"{name}.jsonl"))  # a part of it is enough here
  line = line.replace("store/quickstart", str(tmp_path / "store"))
  monkeypatch.chdir(root)
  command = line.split(".main ")[1] if ".main " in line else line.split("train ")[1]
  assert app.main(["train", *shlex.split(command), "--dry_run"]) == 0
  said = capsys.readouterr().out
  assert "100 steps" in said and "prepare  domain: 1 file(s)" in said


def test_everything_wrong_is_said_at_once(root, tmp_path, fixtures, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  prepare.prepare(
    [str(fixtures / "corpus.jsonl")], tokenizer=str(fixtures / "tokenizer"), output=str(tmp_path / "other"), progress=False
  )
  base = root / "examples" / "base"
  sources = f"a={tmp_path / 'empty'},b={tmp_path / 'other'},c={tmp_path / 'nowhere'},a=again,broken,d={tmp_path / 'no.jsonl'}"
  wrong = ["--general=bb", "--budget=20%", "--base_peak_lr=3", "--heldout_frac=0"]
  assert app.main(["diagnose", f"--hf={base}", f"--sources={sources}", *wrong]) == 78
  said = capsys.readouterr().err
  ours, theirs = tokenization.load(base).fingerprint, tokenization.load(fixtures / "tokenizer").fingerprint
  for text in (
    "11 problems",
    "holds no token file",
    f"made with tokenizer {theirs}",
    ours,
    "there is no such token store",
    "'a=again': a is",
    "'broken': write NAME=STORE",
    "no file matches",
    "--general=bb: there is no such source. Did you mean b?",
    "--budget='20%'",
    "--base_peak_lr=3",
    "--heldout_frac=0",
  ):
    assert text in said, (text, said)
  assert not (tmp_path / "diagnosis").exists()


def test_a_text_of_one_document_is_to_be_split(tiny, tmp_path, fixtures, capsys, one_device):
  (tmp_path / "novel.txt").write_text("once upon a time there was a text of one document and no form feed in it\n" * 40)
  sources = {"general": tiny / "s", "novel": tmp_path / "novel.txt"}
  found = cpt_jax.diagnose(tiny / "hf", sources, tokens=500, row_len=64, output=tmp_path / "out")
  (note,) = found.notes
  assert note.startswith("novel: one document cannot be split") and "form feed" in note
  assert "heldout_frac" not in found.commands["novel"]
  assert found.tables["base"]["source"] == ["general", "novel"] and found.tables["base"]["loss"][0] == pytest.approx(5.8, abs=0.3)
  tables.show(found)
  assert f"note: {note}" in capsys.readouterr().out


@pytest.mark.parametrize(
  "path,message",
  [("", "--hf is empty"), ("nowhere", "no such directory"), ("examples/corpora", "config.json")]
  + [("meta/llama-1b", "get it with: hf download meta/llama-1b --local-dir models/llama-1b")],
)
def test_a_base_that_will_not_do(path, message, root, monkeypatch):
  monkeypatch.chdir(root)
  problems = Problems()
  assert measure.open_base(path, problems) is None and message in problems.lines[0]


def test_a_store_with_ids_that_the_base_has_not(tiny, tmp_path):
  base, _ = opened(tiny)
  with StoreWriter(tmp_path / "wide", vocab_size=1000, eos_id=2) as writer:
    writer.add([999, 2], text="wide")
  problems = Problems()
  assert measure.open_store("wide", str(tmp_path / "wide"), base, problems) is None
  assert "token id 999, the base has 320 rows" in problems.lines[0]
