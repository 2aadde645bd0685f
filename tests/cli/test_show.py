"""`cpt show`: the rows that a run read, from its record alone, also of a past that was mixed otherwise."""

import json
import subprocess
import sys

import factory
import pytest

from cpt_jax.store import prepare
from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.store.store import open_store


@pytest.fixture(scope="module")
def run(tmp_path_factory, fixtures):
  """A run directory as training.loop keeps it, whose shares changed at step 3, and its loader after the change."""
  directory = tmp_path_factory.mktemp("shown")
  prepare.prepare(
    [str(fixtures / "corpus.jsonl")], tokenizer=str(fixtures / "tokenizer"), output=str(directory / "s"), progress=False
  )
  store = open_store(directory / "s")

  def loader(share, **options):
    found = [
      factory.source("a", store, share=share, heldout_frac=0.1),
      factory.source("b", store, role="replay", heldout_frac=0.1),
    ]
    return factory.loader(found, num_steps=9, batch_rows=4, row_len=64, packing_policy="best_fit", **options)

  first = loader(1.0)
  second = loader(3.0, past=json.loads(json.dumps(first.state(3))), start_step=3)
  (directory / "run").mkdir()
  (directory / "run" / "segments.json").write_text(json.dumps(second.record()))
  (directory / "run" / "config.json").write_text(json.dumps({"data": {"tokenizer": str(fixtures / "tokenizer")}}))
  return directory / "run", first, second


@pytest.mark.parametrize("step", [1, 6])
def test_it_shows_what_the_run_read(run, cpt, fixtures, step):
  run_dir, first, second = run
  reader = first if step < 3 else second
  shown = cpt("show", f"--run={run_dir}", f"--step={step}", "--json")
  assert shown.returncode == 0, shown.stderr
  rows = [json.loads(line) for line in shown.stdout.splitlines()]
  assert [row["row"] for row in rows] == [0, 1, 2, 3]
  tokenizer = tokenizer_lib.load(fixtures / "tokenizer")
  for row in rows:
    batch = reader.row(4 * step + row["row"])
    assert row["source"] == reader.names[int(batch.source_B[0])]
    assert row["targets"] == int((batch.weights_BT > 0).sum())
    for segment, document in enumerate(row["documents"], 1):
      inside = batch.segments_BT[0] == segment
      ids = [*batch.tokens_BT[0][inside].tolist(), int(batch.targets_BT[0][inside][-1])]
      assert document["text"] == tokenizer.decode(ids) and document["to"] - document["from"] == len(ids)
  people = cpt("show", f"--run={run_dir}", f"--step={step}", "--rows=2", "--chars=20")
  assert people.returncode == 0 and f"row 2: {rows[2]['source']}" in people.stdout and "row 1:" not in people.stdout
  assert f"epoch {rows[2]['epoch']}" in people.stdout and f"document {rows[2]['documents'][0]['document']}" in people.stdout


def test_it_needs_no_device(run, root):
  code = (
    "import sys\nfrom cpt_jax.cli import app\nassert app.main(['show', '--run', sys.argv[1], '--step=1']) == 0\n"
    "from jax._src import xla_bridge\nassert not xla_bridge._backends"
  )
  done = subprocess.run([sys.executable, "-c", code, str(run[0])], capture_output=True, text=True, timeout=120, cwd=root)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "flags,message",
  [
    (["--step=9"], "the run has the steps 0 to 8"),
    (["--step=1", "--rows=7"], "rows 0 to 3"),
    ([], "required: --step"),
    (["--step=1", "--run=nowhere"], "segments.json is missing"),
  ],
)
def test_what_cannot_be_shown_is_said(run, cpt, flags, message):
  shown = cpt("show", f"--run={run[0]}", *flags)
  assert shown.returncode == 78 and message in shown.stderr and "Traceback" not in shown.stderr
