"""What was measured for docs/results/experiments.md, section 2, and the tools that make and read it; nothing is trained."""

import json

import factory
import numpy as np
import pytest
from scipy import stats

from cpt_jax.config import ConfigError
from cpt_jax.store import prepare, token_store
from tools.experiments import vocab_experiment, vocab_results, vocab_where
from tools.experiments.vocab_experiment import Arm


def of_committed(root):
  return sorted((root / "tools" / "experiments" / "measured" / "vocabulary").glob("*.jsonl"))


def test_the_documented_tables_are_those_of_the_committed_files(root):
  text = set((root / "docs" / "results" / "experiments.md").read_text(encoding="utf-8").splitlines())
  files = of_committed(root)
  assert [path.stem for path in files] == ["tech", "zh"]
  lines = [line for path in files for line in vocab_results.report(vocab_results.Experiment(path)) if line]
  assert len(lines) > 80 and not [line for line in lines if line not in text]


def test_the_committed_runs_are_whole(root):
  """Every band with three seeds or six, on the same documents and steps as the base as it is."""
  for path in of_committed(root):
    data = vocab_results.Experiment(path)
    for arm in ("none", *vocab_results.bands_of(data)):
      runs = data.runs(arm)
      assert sorted(runs) == list(range(3 if data.name == "zh" else 6)), arm
      assert all(r["steps"] == data.steps and len(r["eval_steps"]) == data.steps // 6 + 1 for r in runs.values())
      assert len({json.dumps(r["growth"]) for r in runs.values()}) == 1  # one base for all seeds
      assert all(r["nats"]["domain"][0] == runs[0]["nats"]["domain"][0] for r in runs.values())


def test_parts_of_a_shock_add_up_to_what_the_runs_measured(root):
  """Two ways to the same number: the evaluation of a run before its first step, and the scores of vocab_where.py."""
  for path in of_committed(root):
    data = vocab_results.Experiment(path)
    assert len(data.where) >= 2 * len(vocab_results.bands_of(data))
    for (arm, source), record in data.where.items():
      assert record["total"] == pytest.approx(sum(record[part] for part in ("softmax", "context", "changed")), abs=3e-5)
      shock = data.effects([(arm, "none")], source=source, at=0)[arm, "none"].mean
      assert record["total"] == pytest.approx(shock, abs=0.02), (path, arm, source)


def test_effects_of_one_arm_are_students_interval():
  values = [0.3, -0.1, 0.25]
  [effect] = vocab_results.effects({"a": values}).values()
  low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
  np.testing.assert_allclose([effect.mean - effect.margin, effect.mean + effect.margin], [low, high])


def test_effects_pool_the_scatter_of_all_arms():
  found = vocab_results.effects({"a": [1.0, 3.0], "b": [0.0, 2.0], "once": [9.0]})
  assert found["a"].mean == 2 and found["b"].mean == 1
  np.testing.assert_allclose([found[arm].margin for arm in found], [4.302653, 4.302653, 4.302653 * 2**0.5], rtol=1e-6)
  assert str(found["once"]) == "+9.0000*" and str(found["b"]) == "+1.0000"
  assert not str(vocab_results.effects({"once": [9.0]})["once"]).endswith("*")  # one seed tells nothing


def test_other_documents_are_refused(root, tmp_path):
  lines = of_committed(root)[0].read_text(encoding="utf-8").splitlines()
  other = json.loads(lines[1])
  other["heldout"]["domain"]["bytes"] += 1
  (tmp_path / "x.jsonl").write_text("\n".join([lines[0], json.dumps(other)]), encoding="utf-8")
  with pytest.raises(ConfigError, match="different documents"):
    vocab_results.Experiment(tmp_path / "x.jsonl")


@pytest.fixture
def folder(root, tmp_path):
  """Texts and stores as a run of the base finds them."""
  for name in ("general", "domain"):
    texts = [f"{name} {i}: " + "of the sea and of the land " * (i % 7) for i in range(300)]
    vocab_experiment.write(tmp_path / f"{name}.jsonl.gz", texts)
    prepare.prepare(
      [str(tmp_path / f"{name}.jsonl.gz")],
      tokenizer=str(root / "examples" / "base"),
      output=str(tmp_path / "stores" / "none" / name),
      num_workers=1,
    )
  return tmp_path


def test_what_is_held_out_is_what_a_run_holds_out(folder):
  texts = list(vocab_experiment.read(folder / "domain.jsonl.gz"))
  opened = token_store.open_store(folder / "stores" / "none" / "domain")
  source = factory.source("domain", opened, heldout_frac=vocab_experiment.HELDOUT_FRAC)
  expected = [texts[i] for i in source.heldout_documents]
  assert 2 < len(expected) < 20
  training, heldout = vocab_experiment.split([*texts, texts[0]], heldout_bytes=10**6)
  assert heldout == expected and training == [texts[i] for i in source.train_documents]  # in the order of their places
  size = len(expected[0].encode()) + 1
  assert vocab_experiment.split(texts, heldout_bytes=size) == (training, expected[:2])


def test_a_run_becomes_a_record(folder, root):
  held = {
    name: [t for t in vocab_experiment.read(folder / f"{name}.jsonl.gz") if vocab_experiment.is_heldout(t)]
    for name in ("general", "domain")
  }
  sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in held.items()}
  evals = {name: {"loss": 3.0, "tokens": 50, "bytes": sizes[name], "documents": len(texts)} for name, texts in held.items()}
  path = folder / "runs" / "none-seed1"
  path.mkdir(parents=True)
  records = [{"step": step, "kind": "eval", "sources": evals} for step in (0, 48)]
  ledger = [
    {"step": step, "sources": [{"source": name, "tokens": 100 * step, "epochs": 0.5} for name in evals]} for step in (0, 48)
  ]
  (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, {"step": 48, "kind": "train"}]))
  (path / "ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ledger))
  assert vocab_experiment.collect(folder) == []  # not complete
  (path / "summary.json").write_text("{}")
  assert vocab_experiment.main(["--collect", str(folder), "--output", str(folder / "out" / "x.jsonl")]) == 0
  [record] = map(json.loads, (folder / "out" / "x.jsonl").read_text().splitlines())
  assert (record["arm"], record["seed"], record["steps"], record["ids"]) == ("none", 1, 48, 4096)
  assert record["tokens"] == [0, 9600] and record["nats"] == {"general": [150.0, 150.0], "domain": [150.0, 150.0]}
  opened = [token_store.open_store(folder / "stores" / "none" / name) for name in evals]
  assert record["bytes"][1] == pytest.approx(4800 * sum(one.num_bytes / one.num_tokens for one in opened), abs=1)
  found = record["heldout"]["domain"]
  assert (found["documents"], found["bytes"], found["changed"]) == (len(held["domain"]), sizes["domain"], 0)
  assert found["bytes"] - found["target_bytes"] == sum(len(first_piece(root, text)) for text in held["domain"])
  (path / "metrics.jsonl").write_text(json.dumps(records[1]) + "\n")  # a run that lost its beginning
  with pytest.raises(ConfigError, match="evaluations are missing; remove the run"):
    vocab_experiment.collect(folder)


def first_piece(root, text):
  """Of the base's, as bytes."""
  import tokenizers

  base = tokenizers.Tokenizer.from_file(str(root / "examples" / "base" / "tokenizer.json"))
  start, end = base.encode(text).offsets[0]
  return text[start:end].encode()


def test_names_of_runs_come_back():
  for arm in (Arm("count_high", 2), Arm("rows_random", 0, 24), Arm("none", 1, 192)):
    assert vocab_experiment.arm_of(arm.run) == arm
  assert Arm("rows_random", 2).base == "rows_random-2" and Arm("staged_rows", 2).base == "count_high"


def test_kept_tokens_stand_in_both_at_one_place():
  lengths_W = np.array([1, 1, 2, 3, 2])
  old, new = np.array([0, 2, 0, 2, 1]), np.array([0, 2, 3, 1])  # a bc a bc d; a bc abc d
  kept_old, kept_new = vocab_where.kept(old, new, lengths_W=lengths_W)
  assert kept_old.tolist() == [True, True, False, False, True] and kept_new.tolist() == [True, True, False, True]
  same, _ = vocab_where.kept(old, old, lengths_W=lengths_W)
  assert same.all()


def test_parts_of_a_difference():
  """Of four bytes that targets spell: kept tokens lose 2 nats, 0.5 of them to new ids; the changed one gains 3."""
  lengths_W = np.array([1, 1, 1, 2])
  before = vocab_where.Scored(np.array([0, 1, 0, 0, 2]), np.array([0.0, 1.0, 4.0, 2.0, 1.0]), np.array([0.0, 1.0, 4.0, 2.0, 1.0]))
  after = vocab_where.Scored(np.array([0, 1, 3, 2]), np.array([0.0, 2.0, 3.0, 2.0]), np.array([0.0, 1.7, 9.0, 1.8]))
  found = vocab_where.where([before], [after], lengths_W=lengths_W)
  bits = {name: nats / np.log(2) / 4 for name, nats in dict(total=-1.0, softmax=0.5, context=1.5, changed=-3.0).items()}
  assert found == pytest.approx(bits | {"kept": 3}, abs=1e-5)


def test_scores_are_those_of_each_text_alone(root):
  """Also of one that is longer than a row."""
  base = vocab_where.kinds.load(str(vocab_experiment.BASE))
  texts = vocab_where.encode(base, ["a word", "The sea was calm. " * 80, "and one more"])
  assert len(texts[1]) > vocab_where.ROW_LEN
  together = vocab_where.score(vocab_experiment.BASE, texts, num_old=4000)
  for one, ids in zip(together, texts, strict=True):
    [alone] = vocab_where.score(vocab_experiment.BASE, [ids], num_old=4000)
    np.testing.assert_allclose(one.nats, alone.nats, atol=1e-4)
    assert one.nats[0] == 0 and (one.nats[1:] > 0).all()
    assert (one.old_nats <= one.nats + 1e-5).all() and (one.old_nats[1:] < one.nats[1:]).any()
  # What follows a token does not change its loss; it itself is what the row before it predicted.
  other = texts[1].copy()
  other[300] = 7
  [changed] = vocab_where.score(vocab_experiment.BASE, [other], num_old=4000)
  np.testing.assert_allclose(changed.nats[:300], together[1].nats[:300], atol=1e-4)
  assert abs(changed.nats[300] - together[1].nats[300]) > 0.1


def test_the_legend_names_every_curve_of_every_panel(root, tmp_path, monkeypatch):
  import matplotlib.figure

  seen = []
  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: seen.append(self))
  vocab_results.draw([vocab_results.Experiment(path) for path in of_committed(root)], tmp_path / "figure.png")
  [made] = seen
  curves = {label for ax in made.axes for label in ax.get_legend_handles_labels()[1]}
  assert [text.get_text() for text in made.legends[0].get_texts()] == list(vocab_results.BANDS) and curves == set(
    vocab_results.BANDS
  )
