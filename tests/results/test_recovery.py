"""Runs with another vocabulary beside one without: where curves meet, against a search; what is refused; the command."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cpt_jax.cli import app
from cpt_jax.config import ConfigError
from cpt_jax.results import recovery

BYTES = 4_000


def write_run(path, bits, *, scale=1.0, documents=10, num_bytes=BYTES, target_bytes=3_900, flops=True, has_bytes=True):
  """A run directory with these bits per byte of source zh at steps 0, 10, ..; `scale` times the bytes and FLOPs of a step."""
  path.mkdir(parents=True)
  (path / "config.json").write_text("{}")
  evals, ledger = [], []
  for step, value in zip(range(0, 1000, 10), bits, strict=False):
    source = {"loss": value * math.log(2) * target_bytes / 1000, "bits_per_byte": value, "tokens": 1000}
    source |= {"bytes": num_bytes, "documents": documents, "target_bytes": target_bytes}
    evals.append({"step": step, "kind": "eval", "sources": {"zh": source}, "flops": 1e9 * scale * step})
    ledger.append({"step": step, "sources": [{"source": "zh", "tokens": 100 * step, "bytes": int(300 * scale * step)}]})
    if not flops:
      del evals[-1]["flops"], source["target_bytes"]
    if not has_bytes:
      del ledger[-1]["sources"][0]["bytes"]
  lines = [{"step": 0, "kind": "train", "loss": 3.0}, *evals]
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 999, "ki')
  (path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
  return path


def both(tmp_path, base, grown, base_options=None, **options):
  return [
    recovery.read_evaluated(write_run(tmp_path / "plain", base, **(base_options or {}))),
    recovery.read_evaluated(write_run(tmp_path / "grown", grown, **options)),
  ]


# ---- curves ----

values = st.lists(st.integers(-8, 8), min_size=1, max_size=7)


@st.composite
def curves(draw):
  y = draw(values)
  x = sorted(draw(st.lists(st.integers(0, 30), min_size=len(y), max_size=len(y), unique=True)))
  return np.array(x, float), np.array(y, float)


@given(curves(), curves(), st.integers(0, 3))
def test_curves_meet_where_a_search_finds_it(base, grown, within):
  low, high = max(base[0][0], grown[0][0]), min(base[0][-1], grown[0][-1])
  if low > high:
    return
  found = recovery.met_from(*base, *grown, within=within)
  assert (found.start, found.end) == (low, high)
  # Every crossing of two straight pieces is a fraction of whole numbers: look just before, at and behind all of them.
  grid = np.unique(np.concatenate([np.linspace(low, high, 4001), base[0], grown[0]]))
  grid = grid[(grid >= low) & (grid <= high)]
  is_over = np.interp(grid, *grown) - np.interp(grid, *base) > within + 1e-9
  if not is_over.any():
    assert found.at is not None and found.at - low <= (high - low) / 2000
  elif is_over[-1]:
    assert found.at is None or found.at >= grid[-2]
  else:
    last = int(np.flatnonzero(is_over)[-1])
    assert grid[last] - 1e-9 <= found.at <= grid[min(last + 2, len(grid) - 1)]


# ---- runs ----


def test_the_shock_the_ends_and_the_recovery_on_each_axis(tmp_path):
  base, grown = both(tmp_path, [2.0, 1.5, 1.0, 0.8, 0.7], [3.0, 2.0, 1.0, 0.5, 0.4], scale=2.0)
  (one,) = recovery.compare(base, grown)
  assert one.source == "zh" and one.is_by_targets
  assert (one.before, one.after, one.shock) == pytest.approx((2.0, 3.0, 1.0))
  assert one.finals == pytest.approx((0.7, 0.4))
  # By tokens they meet at step 20 = 2,000 tokens. By bytes the grown run spends twice as many a step: at 6,000 it has 2.0, the
  # other 1.0; where that ends, at 12,000, it has 1.0 and the other 0.7.
  assert one.met("tokens").at == pytest.approx(2000) and one.met("tokens").end == 4000
  assert one.met("bytes") == (None, 0, 12_000) and one.met("flops") == (None, 0, 4e10)
  assert one.at_end("tokens") == pytest.approx(-0.3) and one.at_end("bytes") == pytest.approx(1.0 - 0.7)
  assert one.met("bytes", within=0.3 + 1e-9).at == pytest.approx(12_000, rel=1e-3)
  np.testing.assert_allclose(one.differences("tokens"), [1.0, 0.5, 0.0, -0.3, -0.3], atol=1e-12)
  np.testing.assert_allclose(one.differences("bytes"), [1.0, 1.0, 0.3, np.nan, np.nan], atol=1e-12)


def test_a_run_is_read_as_far_as_it_is(tmp_path):
  run = write_run(tmp_path / "run", [2.0, 1.5, 1.0])
  lines = (run / "ledger.jsonl").read_text().splitlines()
  (run / "ledger.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])
  assert recovery.read_evaluated(run).steps_E.tolist() == [0, 10]


def test_older_records_are_compared_by_all_bytes_and_said_to_be(tmp_path):
  base, grown = both(tmp_path, [2.0, 1.0], [2.0, 1.0], {"flops": False}, has_bytes=False, target_bytes=3_800)
  (one,) = recovery.compare(base, grown)
  assert (
    not one.is_by_targets and one.before == pytest.approx(2.0 * 3_900 / BYTES) and one.after == pytest.approx(2.0 * 3_800 / BYTES)
  )
  assert list(one.base_curves) == ["tokens", "bytes"]
  # Tokens times the held-out documents' 4 bytes a token.
  assert one.grown_curves["bytes"][0].tolist() == [0, 4000] and one.base_curves["bytes"][0].tolist() == [0, 3000]
  assert ["FLOPs" in note for note in base.notes] == [True] and ["bytes of zh" in note for note in grown.notes] == [True]


@pytest.mark.parametrize("change", [{"documents": 9}, {"num_bytes": BYTES - 1}])
def test_evaluations_of_other_text_are_refused(tmp_path, change):
  base, grown = both(tmp_path, [2.0, 1.0], [2.0, 1.0], **change)
  with pytest.raises(ConfigError, match=r"source zh: .*plain evaluated 10 documents of 4,000 bytes, .*grown[^$]*eval\.bytes"):
    recovery.compare(base, grown)


def test_what_cannot_be_compared_is_refused_by_name(tmp_path):
  base, grown = both(tmp_path, [2.0, 1.0], [2.0, 1.0])
  with pytest.raises(ConfigError, match="plain: is compared with itself"):
    recovery.compare(base, base._replace(path=tmp_path / "grown" / ".." / "plain"))
  with pytest.raises(ConfigError, match=r"plain evaluated zh, .*grown en: no source in common"):
    recovery.compare(base, grown._replace(sources={"en": grown.sources["zh"]}))
  with pytest.raises(ConfigError, match="not a run"):
    recovery.read_evaluated(tmp_path)
  with pytest.raises(ConfigError, match="no evaluation before the first step"):
    recovery.read_evaluated(write_run(tmp_path / "new", []))
  changed = write_run(tmp_path / "changed", [2.0])
  line = json.loads((changed / "metrics.jsonl").read_text().splitlines()[1])
  line["sources"]["zh"]["bytes"] += 1
  (changed / "metrics.jsonl").write_text((grown.path / "metrics.jsonl").read_text().replace("999", "998").split('{"step": 10')[0])
  with open(changed / "metrics.jsonl", "a") as file:
    file.write(json.dumps({**line, "step": 10}) + "\n")
  (changed / "ledger.jsonl").write_text((grown.path / "ledger.jsonl").read_text())
  with pytest.raises(ConfigError, match="changed: source zh was evaluated on other documents"):
    recovery.read_evaluated(changed)


# ---- the command ----


def test_the_command_prints_the_tables_and_draws_the_figure(tmp_path, capsys):
  base = write_run(tmp_path / "plain", [2.0, 1.5, 1.0])
  grown = write_run(tmp_path / "a" / "grown", [3.0, 1.2, 0.9], scale=1.5)
  other = write_run(tmp_path / "b" / "grown", [2.5, 2.4, 2.3])
  command = ["vocab", "compare", f"--base={base}"]
  assert app.main([*command, f"--grown={grown},{other}"]) == 0
  said = capsys.readouterr().out
  for words in ("+1.0000", "a/grown", "b/grown", "not within 2,000", "769", "within 0.01", "-0.1000"):
    assert words in said, words
  assert (grown / "vocabulary.png").read_bytes().startswith(b"\x89PNG")
  for wrong, message in (
    (str(base), "compared with itself"),
    (f"{grown},{grown}", "names a run twice"),
    ("", "--base and --grown"),
  ):
    assert app.main([*command, f"--grown={wrong}"]) == 78
    assert message in capsys.readouterr().err
