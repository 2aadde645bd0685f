"""Preparation by datatrove: the same bytes as the local tool's, by every executor, with filters and deduplication on the way."""

import gzip
import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from cpt_jax.config import ConfigError
from cpt_jax.store import decontaminate, documents, prepare, token_files, token_store, work
from cpt_jax.store.records import Rules

UNIT_BYTES = 20_000
# datatrove forks. JAX warns of that where a test before has started its threads; the children never use it.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


@pytest.fixture(scope="module")
def cluster():
  pytest.importorskip("datatrove")
  from cpt_jax.store import cluster

  return cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, texts):
  """Several kinds of file, bad records, and a unit with nothing else; returns the globs."""
  path = tmp_path_factory.mktemp("inputs")
  lines = [json.dumps({"text": t}) for t in texts]
  lines[17:17] = ['{"text": ', "", "[]"]
  (path / "a.jsonl").write_text("\n".join(lines[:100]))
  (path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:150]).encode(), mtime=0))
  (path / "c.jsonl").write_text('{"text": ""}\n' * 2000)
  (path / "d.txt").write_bytes("\n\f\n".join(texts[:30]).encode() + b"\n\f\n\xff")
  pyarrow.parquet.write_table(pyarrow.table({"text": [*texts[:20], None]}), path / "f.parquet", row_group_size=9)
  return [str(path / "*.jsonl*"), str(path / "*.txt"), str(path / "f.parquet")]


def task(output, fixtures):
  tokenizer = str(fixtures / "tokenizer")
  return work.Task(str(output), tokenizer, Rules())


def asked(**changes):
  made = work.Asked(num_workers=1, partition="cpu", time="01:00:00", qos="low", sbatch=("account=me",))
  return made._replace(**changes)


def run(cluster, inputs, output, fixtures, *, contamination=None, **changes):
  this = task(output, fixtures)
  return cluster.prepare_on(asked(**changes), inputs, task=this, contamination=contamination, unit_bytes=UNIT_BYTES)


def content(path):
  """Every file of a directory."""
  return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, inputs, fixtures):
  """The local tool's store."""
  path = tmp_path_factory.mktemp("reference") / "store"
  tokenizer = str(fixtures / "tokenizer")
  prepare.prepare(inputs, tokenizer=tokenizer, output=str(path), num_workers=1, unit_bytes=UNIT_BYTES, progress=False)
  return path


@pytest.mark.parity
@pytest.mark.parametrize("workers", [1, 2])
def test_store_is_the_local_tools_byte_for_byte(tmp_path, cluster, inputs, fixtures, reference, workers):
  report = run(cluster, inputs, tmp_path / "s", fixtures, num_workers=workers)
  assert content(tmp_path / "s") == content(reference)
  assert report.num_documents == token_store.open_store(reference).num_documents > 150 and report.num_bad > 2000
  assert len(token_store.open_store(tmp_path / "s").manifest["files"]) > 4
  completions = tmp_path / "s.work" / "tokens" / "completions"
  assert len(list(completions.iterdir())) > len(token_store.open_store(reference).manifest["files"])  # one unit has no document


@pytest.mark.parity
def test_interrupted_it_goes_on_and_finished_it_does_nothing(tmp_path, cluster, inputs, fixtures, reference, monkeypatch):
  done, run_unit = [], work.run_unit

  def counted(job, number, select):
    if len(done) == 3:
      done.append(None)
      raise KeyboardInterrupt
    run_unit(job, number, select)
    done.append(number)

  monkeypatch.setattr(work, "run_unit", counted)
  with pytest.raises(KeyboardInterrupt):
    run(cluster, inputs, tmp_path / "s", fixtures)
  with pytest.raises(ConfigError, match="not finished"):
    token_store.open_store(tmp_path / "s")
  with pytest.raises(ConfigError, match=r"unfinished store with other settings(.|\n)*selection"):
    run(cluster, inputs, tmp_path / "s", fixtures, dedup=True)
  os.remove(tmp_path / "s" / "in_progress" / "00001.json")  # a mark of a finished task without its result
  run(cluster, inputs, tmp_path / "s", fixtures)
  assert content(tmp_path / "s") == content(reference)
  numbers = [n for n in done if n is not None]
  assert sorted(numbers) == sorted([*range(len(set(numbers))), 1])
  assert run(cluster, inputs, tmp_path / "s", fixtures).was_finished
  shutil.rmtree(tmp_path / "s.work")
  assert run(cluster, inputs, tmp_path / "s", fixtures).was_finished and len(done) == len(numbers) + 1
  with pytest.raises(ConfigError, match=r"holds a finished store of something else(.|\n)*selection"):
    run(cluster, inputs, tmp_path / "s", fixtures, filters=("c4",))


@pytest.mark.parity
def test_near_duplicates_are_looked_for_again_when_texts_change(tmp_path, cluster, fixtures, texts, monkeypatch):
  for i in range(4):
    (tmp_path / f"{i}.txt").write_text("\n\f\n".join([*texts[40 * i : 40 * i + 40], " ".join(texts[170:185])]))
  inputs, run_unit = [str(tmp_path / "*.txt")], work.run_unit

  def fail_at_2(job, number, select):
    if number == 2:
      raise KeyboardInterrupt
    run_unit(job, number, select)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(work, "run_unit", fail_at_2)
    run(cluster, inputs, tmp_path / "s", fixtures, dedup=True)
  for i in range(1, 4):
    text = (tmp_path / f"{i}.txt").read_text()
    (tmp_path / f"{i}.txt").write_text(text[:-2000] + text[:-2001:-1])  # of the same size
  report = run(cluster, inputs, tmp_path / "s", fixtures, dedup=True)
  again = run(cluster, inputs, tmp_path / "again", fixtures, dedup=True)
  assert content(tmp_path / "s") == content(tmp_path / "again")
  assert report.left_out == again.left_out


@pytest.mark.parity
def test_units_that_are_not_done_and_too_many_bad_records(tmp_path, cluster, inputs, fixtures, monkeypatch):
  with (
    monkeypatch.context() as patch,
    pytest.raises(ConfigError, match=r"units are not done \(the first: 0\).*s\.work/tokens/logs"),
  ):
    patch.setattr(work, "run_unit", lambda *arguments: None)  # as when the disk is not shared
    run(cluster, inputs, tmp_path / "s", fixtures)
  limited = task(tmp_path / "s", fixtures)._replace(rules=Rules(max_bad=2001))
  arguments = {"contamination": None, "unit_bytes": UNIT_BYTES}
  with pytest.raises(documents.DataError, match=r"2004 bad records, more than --max_bad=2001"):
    cluster.prepare_on(asked(), inputs, task=limited, **arguments)


@pytest.mark.parity
def test_masked_conversations_are_the_local_tools_too(tmp_path, cluster, fixtures, texts):
  chatty = shutil.copytree(fixtures / "tokenizer", tmp_path / "chatty")
  (chatty / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}")
  talks = [[{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(texts[i : i + 4])] for i in range(90)]
  lines = [json.dumps({"messages": t}) for t in talks]
  lines[30:30] = ["[]", json.dumps({"messages": [{"role": "user", "content": "alone"}]})]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  evals = tmp_path / "evals.txt"
  evals.write_text(texts[50])
  contamination, inputs = decontaminate.build([str(evals)], fields=["text"]), [str(tmp_path / "a.jsonl")]
  rules, same = Rules(records="messages", train_on="answers"), {"contamination": contamination, "unit_bytes": UNIT_BYTES}
  arguments = {"tokenizer": str(chatty), "output": str(tmp_path / "l"), "rules": rules, "num_workers": 1, "progress": False}
  local = prepare.prepare(inputs, **arguments, **same)
  chats = work.Task(str(tmp_path / "s"), str(chatty), rules)
  report = cluster.prepare_on(asked(), inputs, task=chats, **same)
  assert content(tmp_path / "s") == content(tmp_path / "l")
  assert any(name.endswith(".loss") for name in content(tmp_path / "s"))
  assert report.num_targets < report.num_tokens and report.left_out == {"contaminated": 4} == local.left_out
  assert report.num_bad == local.num_bad == 2


# Filters, near-duplicates, contamination.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, texts):
  """Long documents, near-duplicates of some, short ones, and a contaminated one; returns (glob, evaluations, by kind)."""
  path = tmp_path_factory.mktemp("mixed")
  generator = random.Random(0)
  words = sorted({w for t in texts for w in t.split() if w.isalpha()})
  singles = [" ".join(generator.choices(words, k=150)) + " and the end of that." for _ in range(40)]
  alike = [[t, t.replace("end", "finish"), "Well, " + t] for t in singles[:6]]
  short = [f"Too short, the number {i} of that." for i in range(5)]
  evals = "In the year of the great flood, nobody had counted the boats that were left in harbours"
  dirty = [singles[20] + " " + evals.upper() + " " + " ".join(generator.choices(words, k=100))]
  chosen = [*singles, *(t for group in alike for t in group[1:]), *short, *dirty]
  generator.shuffle(chosen)
  for i in range(3):
    (path / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in chosen[i::3]))
  (path / "evals.txt").write_text(evals)
  return [str(path / "?.jsonl")], str(path / "evals.txt"), {"chosen": chosen, "alike": alike, "short": short, "dirty": dirty}


def check_mixed(path, report, mixed):
  kinds = mixed[2]
  hashes = token_store.open_store(path).doc_hashes().tolist()
  kept = [t for t in kinds["chosen"] if token_files.text_hash(t) in hashes]
  assert len(kept) == len(hashes)
  assert not set(kept) & {*kinds["short"], *kinds["dirty"]}
  for group in kinds["alike"]:
    assert len(set(group) & set(kept)) == 1
  assert report.left_out["gopher_quality: gopher_short_doc"] == 5
  assert (report.left_out["near-duplicate"], report.left_out["contaminated"]) == (12, 1)
  assert len(kept) == 40


@pytest.fixture(scope="module")
def selected(tmp_path_factory, cluster, mixed, fixtures):
  """The local executor's store of `mixed`, and its report."""
  path = tmp_path_factory.mktemp("selected") / "store"
  contamination = decontaminate.build([mixed[1]], fields=["text"])
  kept = {"filters": ("gopher_quality",), "dedup": True}
  return path, run(cluster, mixed[0], path, fixtures, contamination=contamination, **kept)


@pytest.mark.parity
def test_filters_duplicates_and_contamination(selected, mixed, cluster):
  path, report = selected
  check_mixed(path, report, mixed)
  kept = token_store.open_store(path).doc_hashes().tolist()
  order = [token_files.text_hash(t) for i in range(3) for t in mixed[2]["chosen"][i::3]]
  assert kept == [h for h in order if h in kept]
  step = dict(cluster.filters(work.Asked(filters=("gopher_quality",))))["gopher_quality"]
  from datatrove.data import Document

  passes = [t for t in mixed[2]["chosen"] if step.filter(Document(t, id="")) is True]
  assert set(mixed[2]["chosen"]) - set(passes) == set(mixed[2]["short"])


@pytest.mark.parity
def test_a_filter_that_edits(tmp_path, cluster, fixtures):
  line = "This is a plain sentence with quite a few words in it."
  (tmp_path / "a.txt").write_text("\n".join([*[line] * 6, "a line without its full stop"]))
  run(cluster, [str(tmp_path / "a.txt")], tmp_path / "s", fixtures, filters=("c4",))
  opened = token_store.open_store(tmp_path / "s")
  expected = "\n".join([line] * 6)
  assert opened.doc_hashes().tolist() == [token_files.text_hash(expected)]
  assert opened.doc_bytes().tolist() == [len(expected)]


@pytest.mark.parity
@hypothesis.given(st.text(st.sampled_from("ab \u00e9.!\u3002?\n\u4e2d\u6587\u0e01\"'"), max_size=30))
def test_words(cluster, text):
  words = cluster.WORDS.word_tokenize(text)
  assert "".join(words) == "".join(text.split())
  assert all(len(w) == 1 or w.isalpha() for w in words)
  sentences = cluster.WORDS.sent_tokenize(text)
  assert "".join("".join(sentences).split()) == "".join(text.split())
  assert sentences == [text[a:b].strip() for a, b in cluster.WORDS.span_tokenize(text)] and all(sentences)
  assert all(s[-1] in ".!?\u3002\"'" for s in sentences[:-1])


@pytest.mark.parity
def test_sentences(cluster):
  text = 'It is 3.14 at most. "So?" Yes... \u4e2d\u6587\u3002\u6587\uff01 end'
  expected = ["It is 3.14 at most.", '"So?"', "Yes...", "\u4e2d\u6587\u3002", "\u6587\uff01", "end"]
  assert cluster.WORDS.sent_tokenize(text) == expected


# Slurm, by programs that stand in for it and run the jobs at once.

SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
with open({log!r}, "a") as log:
  log.write(" ".join(sys.argv[1:-1]) + "\\n" + text + "\\n")
  number = sum(line.startswith("--export") or line == "" for line in open({log!r}).read().splitlines())
last = int(re.search(r"--array=0-(\\d+)", text).group(1))
for i in range(last + 1):
  environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), RUN_OFFSET="0", SLURM_NODELIST="here")
  subprocess.run(["bash", script], env=environment, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
print("Submitted batch job", number)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Puts sbatch, srun and scontrol on the PATH; returns the file that holds what sbatch was given."""
  programs, log = tmp_path / "bin", tmp_path / "sbatch.log"
  programs.mkdir()
  (programs / "sbatch").write_text(SBATCH.format(python=sys.executable, log=str(log)))
  (programs / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n')
  (programs / "scontrol").write_text("#!/bin/bash\necho here\n")
  for program in programs.iterdir():
    program.chmod(0o755)
  own = pathlib.Path(sys.executable).parent  # launch_pickled_pipeline
  monkeypatch.setenv("PATH", f"{programs}:{own}:{os.environ['PATH']}")
  return log


@pytest.mark.parity
@pytest.mark.slow
def test_slurm(tmp_path, cluster, slurm, mixed, selected, fixtures):
  contamination = decontaminate.build([mixed[1]], fields=["text"])
  kept = {"filters": ("gopher_quality",), "dedup": True}
  kwargs = {**kept, "contamination": contamination, "executor": "slurm", "num_workers": 2}
  assert run(cluster, mixed[0], tmp_path / "s", fixtures, **kwargs) is None
  assert content(tmp_path / "s") == content(selected[0])
  log = slurm.read_text()
  jobs = [f"s-{phase}" for phase in ("signatures", "buckets", "clusters", "tokens", "store")]
  assert [line.removeprefix("#SBATCH --job-name=") for line in log.splitlines() if "--job-name=" in line][::2] == jobs
  for option in "partition=cpu", "time=01:00:00", "qos=low", "account=me", "cpus-per-task=1", "mem-per-cpu=4G":
    assert f"#SBATCH --{option}\n" in log
  assert "#SBATCH --array=0-13%2\n" in log and log.count("--dependency=afterok:") >= 4
  assert run(cluster, mixed[0], tmp_path / "s", fixtures, **kwargs).was_finished


# The command.


def command(root, *arguments):
  call = [sys.executable, "-m", "cpt_jax.cli", "prepare"]
  return subprocess.run([*call, *map(str, arguments)], cwd=root, capture_output=True, text=True)


@pytest.mark.parity
def test_command(tmp_path, root, fixtures, mixed):
  arguments = ["--input", mixed[0][0], "--tokenizer", fixtures / "tokenizer", "--output", tmp_path / "s"]
  arguments += ["--filters", "gopher_quality", "--dedup", "--decontaminate", mixed[1], "--num_workers", "2"]
  done = command(root, *arguments)
  assert done.returncode == 0, done
  for words in "near-duplicate", "gopher_quality: gopher_short_doc", "contaminated", "documents                  40":
    assert words in done.stdout
  done = command(root, *arguments)
  assert "already finished" in done.stdout and "datatrove" not in done.stderr
  assert "whole; 40 documents" in command(root, "--verify", tmp_path / "s").stdout


@pytest.mark.parity
def test_dry_run_writes_nothing(tmp_path, root, fixtures, mixed):
  arguments = ["--input", mixed[0][0], "--tokenizer", fixtures / "tokenizer", "--output", tmp_path / "out" / "s", "--dry_run"]
  arguments += ["--executor", "slurm", "--partition", "big", "--time", "2:00:00", "--sbatch", "account=us", "--dedup"]
  done = command(root, *arguments, "--filters", "c4,gopher_quality", "--env_command", "module load python")
  assert done.returncode == 0, done
  assert "phase 4  tokens         1 tasks through c4, gopher_quality, near-duplicate" in done.stdout
  assert "phase 2  buckets       14 tasks\n" in done.stdout
  assert done.stdout.count("#SBATCH --partition=big\n") == 5 and "#SBATCH --account=us\n" in done.stdout
  assert f"{tmp_path}/out/s.work/tokens/executor.pik" in done.stdout and "\nmodule load python; export PYTHONPATH=" in done.stdout
  assert list(tmp_path.iterdir()) == []


def test_wrong_flags_are_told_at_once(cpt, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("datatrove", "ray") else find(name, *a))
  done = cpt("prepare", "--filters", "c4,gopher", "--executor", "ray", "--max_tasks", "0")
  assert done.returncode == 78
  for words in (
    "--input and --tokenizer and --output missing",
    "'gopher' is none of",
    "--max_tasks=0",
    "pip install 'cpt_jax[prep]'",
    "pip install ray",
  ):
    assert words in done.stderr, done.stderr
  done = cpt("prepare", "--executor", "slurm", "--sbatch", "x")
  for words in "--partition missing", "--time missing", "--sbatch='x'", "no sbatch on the PATH":
    assert words in done.stderr, done.stderr
