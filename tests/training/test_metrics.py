"""The metric files, the meter and the evaluation's sums."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax import journal
from cpt_jax.model.loss import Sums
from cpt_jax.stream.batch import Batch
from cpt_jax.stream.heldout import HeldOut
from cpt_jax.training import console, drift, metrics, perplexity
from cpt_jax.training.step import StepMetrics


def measured(losses, tokens, *, rate=0.5, grad_norm=1.0):
  sums = Sums(jnp.asarray(losses, jnp.float32), jnp.zeros(len(losses)), jnp.asarray(tokens, jnp.int32))
  return jax.device_get(StepMetrics(sums, jnp.float32(grad_norm), jnp.float32(rate)))


def meter(log_every=2):
  return metrics.Meter(("a", "b"), log_every=log_every, flops_per_token=(10.0, 12.0), peak_flops=1e6)


def test_a_record_is_the_token_weighted_mean_over_its_steps():
  m = meter()
  m.dispatched(num_positions=8)
  assert m.read(1, measured([10.0, 0.0], [4, 0])).values is None
  m.dispatched(num_positions=8)
  values = m.read(2, measured([2.0, 6.0], [4, 3], rate=0.25)).values
  assert values["loss"] == pytest.approx(18 / 11) and values["source_loss"] == {"a": 12 / 8, "b": 2.0}
  assert values["tokens"] == 11 and values["rate"] == 0.25


def test_the_tokens_of_a_record_are_exact_past_what_a_step_can_count():
  m = meter(log_every=40)
  for count in range(1, 41):
    m.dispatched(num_positions=8)
    values = m.read(count, measured([1e8, 0.5], [2**26 + 1, 1])).values
  assert values["tokens"] == 40 * (2**26 + 2) > 2**31
  assert values["source_loss"] == {"a": 1e8 / (2**26 + 1), "b": 0.5}
  assert values["loss"] == (1e8 + 0.5) / (2**26 + 2)


def test_speed_leaves_out_the_first_step_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  m = meter(log_every=2)
  m.dispatched(num_positions=8)
  now[0] = 100.0  # the first step compiles
  m.read(1, measured([1.0, 0.0], [4, 0]))
  m.dispatched(num_positions=8)
  now[0] = 102.0
  reading = m.read(2, measured([1.0, 0.0], [4, 0]))
  assert reading.tokens_per_sec == pytest.approx(4.0)
  assert reading.mfu == {"causal": pytest.approx(4e-5), "palm": pytest.approx(4.8e-5)}
  m.pause()
  now[0] = 500.0  # an evaluation
  m.dispatched(num_positions=8)
  now[0] = 502.0
  m.read(3, measured([1.0, 0.0], [4, 0]))
  m.dispatched(num_positions=8)
  now[0] = 504.0
  assert m.read(4, measured([1.0, 0.0], [4, 0])).tokens_per_sec == pytest.approx(4.0)


def test_a_stage_has_its_own_operations_and_its_compilation_is_not_timed(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  m = meter(log_every=4)
  for step, secs in enumerate((50.0, 1.0, 50.0, 2.0), start=1):  # the first steps of two stages are compiled
    if step == 3:
      m.enters_stage((20.0, 24.0))
    m.dispatched(num_positions=30)
    now[0] += secs
    reading = m.read(step, measured([1.0, 0.0], [4, 0]))
  assert reading.tokens_per_sec == pytest.approx(20.0)
  assert reading.mfu == {"causal": pytest.approx(4e-4), "palm": pytest.approx(4.8e-4)}


@pytest.mark.parametrize("bad", [dict(losses=[math.nan, 0.0]), dict(grad_norm=math.inf)])
def test_a_step_that_is_not_finite_is_counted_and_left_out_of_the_means(bad):
  m = meter(log_every=3)
  m.dispatched(num_positions=8)
  assert m.read(1, measured([1.0, 0.0], [1, 0], grad_norm=0.25)).not_finite is None
  m.dispatched(num_positions=8)
  found = m.read(2, measured(**{"losses": [1.0, 1.0], "tokens": [1, 1], **bad})).not_finite
  assert not all(map(math.isfinite, found.values())) and found.keys() == {"loss", "grad_norm"}
  m.dispatched(num_positions=8)
  values = m.read(3, measured(**{"losses": [1.0, 1.0], "tokens": [1, 1], **bad})).values
  assert values == {"loss": 1.0, "source_loss": {"a": 1.0}, "tokens": 1, "rate": 0.5, "grad_norm": 0.25, "skipped": 2}
  m.dispatched(num_positions=8)
  m.read(4, measured([2.0, 0.0], [1, 0]))
  assert json.loads(json.dumps(m.state())) == {"sums": {"a": [2.0, 0.0, 1], "b": [0.0, 0.0, 0]}, "grad_norm": 1.0, "skipped": 0}


def test_a_record_goes_on_after_a_restart_also_when_the_sources_are_others():
  whole, first = meter(), meter()
  for m in (whole, first):
    m.dispatched(num_positions=8)
    m.read(1, measured([0.1, 0.7], [3, 5], grad_norm=math.inf))
  kept = json.loads(json.dumps(first.state()))
  second = metrics.Meter(("b", "a"), log_every=2, flops_per_token=(10.0, 12.0), peak_flops=1e6, state=kept)
  whole.dispatched(num_positions=8)
  second.dispatched(num_positions=8)
  assert second.read(2, measured([0.3, 0.2], [4, 3])).values == whole.read(2, measured([0.2, 0.3], [3, 4])).values


def test_after_a_resume_no_line_of_the_lost_future_is_left(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [{"step": 0, "kind": "eval"}, {"step": 5, "kind": "train"}, {"step": 10, "kind": "train"}, {"step": 10, "kind": "eval"}]
  path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 15, "kind": "train"}]) + '{"step": 20, "ki')
  metrics.drop_after(path, 10, evaluates_first=False)
  assert journal.read(path) == lines
  metrics.drop_after(path, 10, evaluates_first=True)
  assert journal.read(path) == lines[:3]  # the evaluation at 10 is made again
  metrics.drop_after(path, 0, evaluates_first=True)
  assert journal.read(path) == []
  metrics.drop_after(tmp_path / "none.jsonl", 3, evaluates_first=True)


def test_the_windows_of_the_ledger_add_up_to_its_totals(tmp_path):
  def entry(rows):
    return {
      "source": "a",
      "role": "domain",
      "rows": rows,
      "tokens": 10 * rows,
      "documents": rows,
      "epochs": rows / 8,
      "bytes": 40 * rows,
    }

  for start_step, steps in ((0, (0, 4, 8)), (8, (12, 16))):  # the second time after a resume
    writer = metrics.Writer(tmp_path, start_step=start_step, evaluates_first=False, tensorboard=False)
    for step in steps:
      writer.ledger(step, [entry(step * 2)] + ([{**entry(1), "source": "b"}] if step == 16 else []))
    writer.close()
  records = journal.read(tmp_path / "ledger.jsonl")
  assert [record["step"] for record in records] == [0, 4, 8, 12, 16]
  assert [record["sources"][0]["window"]["rows"] for record in records] == [0, 8, 8, 8, 8]
  assert sum(record["sources"][0]["window"]["tokens"] for record in records) == records[-1]["sources"][0]["tokens"]
  assert records[-1]["sources"][1]["window"] == {"rows": 1, "tokens": 10, "documents": 1, "epochs": 1 / 8, "bytes": 40}


def test_peaks_are_found_by_the_names_that_jax_gives():
  assert metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert metrics.peak_flops("TPU v5 lite") == 197e12 and metrics.peak_flops("TPU v5p") == 459e12
  assert metrics.peak_flops("cpu") is None


def test_evaluation_divides_exact_sums_once():
  rng = np.random.default_rng(0)
  losses, tokens = rng.uniform(1e3, 1e5, 50).astype(np.float32), rng.integers(1, 999, 50)
  batches = [Batch(*[np.full(1, i, np.int32)] * 6) for i in range(50)]
  counts = {"num_bytes": 12_345, "num_target_bytes": 12_340, "num_documents": 3, "max_documents": 2}
  held = HeldOut(batches, num_tokens=int(tokens.sum()), **counts)

  def eval_step(params, batch):
    i = int(batch.tokens_BT[0])
    return Sums(jnp.zeros(2).at[0].set(losses[i]), jnp.zeros(2), jnp.array([int(tokens[i]), 0]))

  found = perplexity.evaluate(None, {"a": held}, eval_step=eval_step, to_device=lambda b: b)[0]["a"]
  total = float(losses.astype(np.float64).sum())
  assert found.loss == pytest.approx(total / tokens.sum(), rel=1e-12)
  assert found.bits_per_byte == pytest.approx(total / math.log(2) / 12_340, rel=1e-12)
  assert (found.tokens, found.bytes, found.documents, found.target_bytes) == (tokens.sum(), 12_345, 3, 12_340)


def test_losses_that_an_older_version_kept_are_divided_anew():
  values = {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 10, "bytes": 100, "documents": 4}
  held = HeldOut([], num_tokens=10, num_bytes=100, num_target_bytes=80, num_documents=4, max_documents=1)
  assert perplexity.recorded(values, held) == perplexity.SourceLoss(2.0, 1.25, 10, 100, 4, 80)
  for unlike in (None, dataclasses.replace(held, num_bytes=99)):  # a source that was given up, or other documents
    assert perplexity.recorded(values, unlike) == perplexity.SourceLoss(2.0, 1.0, 10, 100, 4, None)
  now = perplexity.SourceLoss(2.0, 1.25, 10, 100, 4, 80)
  assert perplexity.recorded(now._asdict(), dataclasses.replace(held, num_target_bytes=1)) == now


def test_a_window_after_a_record_that_counts_no_bytes_says_so(tmp_path):
  entry = {"source": "a", "rows": 2, "tokens": 20, "documents": 2, "epochs": 0.5}
  (tmp_path / "ledger.jsonl").write_text(json.dumps({"step": 4, "sources": [entry]}) + "\n")
  writer = metrics.Writer(tmp_path, start_step=4, evaluates_first=False, tensorboard=False)
  for step, num_bytes in ((8, 90), (12, 130), (16, None)):
    writer.ledger(step, [{**entry, "bytes": num_bytes}])
  writer.close()
  windows = [record["sources"][0]["window"]["bytes"] for record in journal.read(tmp_path / "ledger.jsonl")[1:]]
  assert windows == [None, 40, None]


def test_a_change_in_a_word():
  found = [console.meaning(change, role) for role in ("replay", "domain") for change in (-0.1, 0.0, 0.1)]
  assert found == ["learning", "", "forgetting", "learning", "", "loss rose"]


def test_drift_is_relative_and_by_layer():
  rng = np.random.default_rng(0)
  base = {
    "embedding": rng.normal(size=(5, 4)),
    "layers": {"w": rng.normal(size=(3, 4, 2)), "norm": np.ones((3, 4))},
    "final_norm": np.ones(4),
  }
  moved = {
    "embedding": base["embedding"] * 1.5,
    "layers": {
      "w": base["layers"]["w"] * np.array([1, 1.1, 1.2]).reshape(3, 1, 1),
      "norm": base["layers"]["norm"] * np.array([[1], [1.1], [1.2]]),
    },
    "final_norm": base["final_norm"],
  }
  as_float = lambda tree: {k: as_float(v) if isinstance(v, dict) else jnp.asarray(v, jnp.float32) for k, v in tree.items()}  # noqa: E731
  found = drift.by_layer(as_float(moved), drift.keep_base(as_float(base)))
  assert found["embedding"] == pytest.approx(0.5, rel=1e-5) and found["final_norm"] == 0
  assert found["layers"] == pytest.approx([0, 0.1, 0.2], rel=1e-4, abs=1e-7)


def test_the_base_is_kept_in_bfloat16_only_where_nothing_is_lost():
  coarse, fine = jnp.asarray([1.0, 0.5]), jnp.asarray([1.0, 1 / 3])
  kept = drift.keep_base({"coarse": coarse, "fine": fine})
  assert kept["coarse"].dtype == jnp.bfloat16 and kept["fine"].dtype == jnp.float32
  np.testing.assert_array_equal(kept["fine"], fine)


def test_tensorboard_gets_every_figure_of_a_record(tmp_path):
  writer = metrics.Writer(tmp_path, start_step=0, evaluates_first=True, tensorboard=True)
  losses = {"domain": perplexity.SourceLoss(2.0, 1.0, 10, 20, 1)}
  writer.eval(3, losses, losses, {"layers": [0.1, 0.2], "embedding": 0.3}, flops=1e9)
  writer.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  content = events.read_bytes()
  for tag in (b"eval/sources/domain/bits_per_byte", b"eval/drift/layers/001", b"eval/drift/embedding"):
    assert tag in content
