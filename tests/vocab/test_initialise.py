"""Rows of new pieces, and the model's files with them: each initialiser against numpy, old rows and old logits exactly."""

import json
import pathlib
import tracemalloc

import factory
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from cpt_jax.config import ConfigError
from cpt_jax.model import expansion, hf_files, pretrained, spec as spec_lib, transformer
from cpt_jax.vocab import initialise, similarity
from cpt_jax.vocab.bases import Piece
from cpt_jax.vocab.initialise import OldRows, replaced

OLD = np.random.default_rng(0).normal(0.3, 1.0, (50, 6)).astype(np.float32)
PIECES = [[3, 4], [7, 7, 9], [1], [49, 0, 2, 5]]


def rows(name, old_VD=OLD, pieces=PIECES, **more):
  return np.concatenate(list(initialise.blocks(initialise.INITIALISERS[name], OldRows(old_VD, replaced(pieces), **more))))


# ---- each initialiser ----


def test_means_and_copies():
  np.testing.assert_allclose(rows("mean"), [OLD[p].mean(axis=0) for p in PIECES], rtol=1e-6)
  counts_V = np.arange(50) * 10
  expected = [np.average(OLD[p], axis=0, weights=counts_V[p] + 1) for p in PIECES]
  np.testing.assert_allclose(rows("weighted", counts_V=counts_V), expected, rtol=1e-5)
  np.testing.assert_array_equal(rows("first"), OLD[[3, 7, 1, 49]])
  np.testing.assert_array_equal(rows("overlap", overlap=np.array([9, 8, 7, 6])), OLD[[9, 8, 7, 6]])
  assert not rows("zero").any() and rows("zero").shape == (4, 6)


def test_blocks_do_not_depend_on_where_they_are_cut(monkeypatch):
  pieces = [[i % 50, (3 * i) % 50] for i in range(37)]
  whole = {name: rows(name, pieces=pieces) for name in ("mean", "gaussian", "random", "first")}
  monkeypatch.setattr(initialise, "_BLOCK_ROWS", 5)
  for name, expected in whole.items():
    np.testing.assert_array_equal(rows(name, pieces=pieces), expected)


def test_gaussian_rows_have_mean_and_covariance_of_the_old(monkeypatch):
  monkeypatch.setattr(initialise, "_READ_ROWS", 7)
  mixed = (OLD @ np.random.default_rng(1).normal(size=(6, 6))).astype(np.float32)
  drawn = rows("gaussian", mixed, [[0]] * 20_000)
  np.testing.assert_allclose(drawn.mean(axis=0), mixed.mean(axis=0), atol=0.1)
  np.testing.assert_allclose(np.cov(drawn.T, bias=True), np.cov(mixed.T, bias=True), rtol=0.1, atol=0.4)
  np.testing.assert_allclose(rows("gaussian", mixed, scale=0.0), np.tile(mixed.mean(axis=0), (4, 1)), rtol=1e-5)
  assert (rows("gaussian", seed=1) != rows("gaussian", seed=2)).all()
  plain = rows("random", mixed, [[0]] * 5000)
  assert plain.std() == pytest.approx(np.sqrt((mixed**2).mean()), rel=0.05) and abs(plain.mean()) < 0.1


def test_few_rows_of_many_columns_have_a_covariance_too():
  wide = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
  assert np.isfinite(rows("gaussian", wide, [[0]] * 9)).all()


def test_similar_rows_are_weighted_old_rows_and_else_the_mean():
  found = similarity.Neighbours(np.array([5, 8, 2]), np.array([0.25, 0.75, 1.0], np.float32), np.array([0, 2, 2, 3, 3]))
  expected = [0.25 * OLD[5] + 0.75 * OLD[8], OLD[[7, 7, 9]].mean(axis=0), OLD[2], OLD[[49, 0, 2, 5]].mean(axis=0)]
  np.testing.assert_allclose(rows("similar", neighbours=found), expected, rtol=1e-6)


def test_padding_is_the_mean_and_adds_at_most_its_share():
  """The softmax gives m padding rows at most m/(n+m): exp of a mean is at most the mean of exps (Hewitt)."""
  padded = initialise.padding(OldRows(OLD, replaced(PIECES)), num_rows=5)
  np.testing.assert_allclose(padded, np.tile(OLD.mean(axis=0), (5, 1)), rtol=1e-6)
  weights_NV = np.exp(np.random.default_rng(4).normal(size=(100, 6)).astype(np.float32) @ np.concatenate([OLD, padded]).T)
  assert (weights_NV[:, 50:].sum(axis=1) / weights_NV.sum(axis=1) <= 5 / 55 + 1e-6).all()


def test_the_piece_that_is_spelt_alike():
  texts = {0: "\u0120the", 1: "n", 2: "ew", 3: "\u0120New", 4: "t", 5: "he"}
  pieces = [Piece(t, (), old, 1, 1, 0) for t, old in (("The", (4, 5)), ("new", (1, 2)), ("newhe", (1, 2, 5)))]
  assert initialise.overlapping(texts, pieces).tolist() == [0, 3, 2]


def test_what_an_initialiser_lacks_is_named():
  with pytest.raises(ConfigError, match=r"--input_rows='maen': no such initialiser. Did you mean mean"):
    initialise.find("maen", flag="--input_rows")
  with pytest.raises(ConfigError, match="needs how often"):
    rows("weighted")
  with pytest.raises(ConfigError, match="needs domain text"):
    rows("similar")
  with pytest.raises(ConfigError, match="replaces no old one"):
    replaced([[1], []])


# ---- similarity ----


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.floats(-3, 3)))
def test_sparsemax_is_the_nearest_point_of_the_simplex(scores_NK):
  shares_NK = similarity.sparsemax(scores_NK)
  assert (shares_NK >= 0).all()
  np.testing.assert_allclose(shares_NK.sum(axis=1), 1)
  # Optimality: what has a share lies at one distance from its score, what has none no nearer.
  for score_K, share_K in zip(scores_NK, shares_NK, strict=True):
    taken = share_K > 1e-9
    gaps_K = score_K - share_K
    assert np.ptp(gaps_K[taken]) < 1e-9 and (score_K[~taken] <= gaps_K[taken].max() + 1e-9).all()


def test_tokens_that_are_used_alike_are_neighbours():
  """Token 20 is new and stands where 1 stands, never where 2 does."""
  rng = np.random.default_rng(0)
  texts = []
  for _ in range(400):
    one, other = rng.choice([1, 20]), 2
    texts += [[10, int(one), 11, 10, int(one), 12], [13, other, 14, 15, other, 14]]
  vectors = similarity.embed(texts, vocab_size=22, width=8, window=2)
  found = similarity.neighbours(vectors, num_old=20)
  ids, weights = found.of(0)
  assert ids[weights.argmax()] == 1 and weights.sum() == pytest.approx(1)
  assert 2 not in ids and len(found.of(1)[0]) == 0  # token 21 is never seen
  again = similarity.embed(texts, vocab_size=22, width=8, window=2)
  np.testing.assert_allclose(again @ again.T, vectors @ vectors.T, atol=1e-5)


# ---- the model's files ----


@pytest.fixture(params=["tied", "untied", "untied, sharded, bfloat16"])
def base(request, tmp_path, tiny_hf_config, fixtures):
  """A base of 320 rows, of which the last 20 are padding."""
  config = tiny_hf_config | {"tie_word_embeddings": request.param == "tied"}
  spec = spec_lib.from_hf(config)
  params = transformer.init(spec, jax.random.key(1))
  more = dict(max_shard_bytes=22_000, dtype="bfloat16") if "sharded" in request.param else {}
  pretrained.save_params(params, spec, tmp_path / "base", source_dir=fixtures / "tokenizer", hf_config=config, **more)
  return tmp_path / "base"


def expand(directory, output, *, name="mean", vocab_size=330, rows=384, **more):
  model = expansion.open_model(directory, vocab_size=300)
  pieces = [[10 + i, 11 + i] for i in range(vocab_size - 300)]

  def old_rows(old_VD):
    return OldRows(old_VD, replaced(pieces), **more)

  new = expansion.make_rows(initialise.INITIALISERS[name], old_rows, num_padding=rows - vocab_size)
  output.mkdir()
  expansion.write(model, output, num_old=300, vocab_size=vocab_size, rows=rows, new=dict.fromkeys(model.tables, new))
  return model, hf_files.TensorFiles(output)


def test_old_rows_and_other_tensors_are_written_as_they_were(base, tmp_path):
  model, wider = expand(base, tmp_path / "out")
  num_linked = 0
  assert set(wider.entries) == set(model.files.entries)
  for name, entry in model.files.entries.items():
    before, after = model.files.view(name), wider.view(name)
    assert after.dtype == before.dtype
    if name in model.tables:
      assert after.shape == (384, 32) and before.shape == (320, 32)
      assert after[:300].tobytes() == before[:300].tobytes()
      expected = np.stack([before[[10 + i, 11 + i]].astype(np.float32).mean(axis=0) for i in range(30)]).astype(before.dtype)
      np.testing.assert_array_equal(after[300:330], expected)
      mean_D = before[:300].astype(np.float64).mean(axis=0)
      np.testing.assert_allclose(after[330:].astype(np.float64), np.tile(mean_D, (54, 1)), rtol=0.01, atol=1e-6)
    else:
      assert after.tobytes() == before.tobytes()
    if not set(model.tables) & {n for n, e in model.files.entries.items() if e.file == entry.file}:
      assert (tmp_path / "out" / entry.file.name).stat().st_ino == entry.file.stat().st_ino
      num_linked += 1
  assert num_linked or not (base / hf_files.INDEX).exists()
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (config["vocab_size"], config["true_vocab_size"]) == (384, 330)
  index = tmp_path / "out" / hf_files.INDEX
  if index.exists():
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(e.num_bytes for e in wider.entries.values())


def test_old_tokens_have_the_logits_they_had(base, tmp_path, random_batch):
  expand(base, tmp_path / "out", name="gaussian")
  logits, batch = [], random_batch(0, rows=2, vocab_size=300)
  for directory in (base, tmp_path / "out"):
    spec = spec_lib.from_hf(spec_lib.load_hf_config(directory))
    params = pretrained.load_params(directory, spec, transformer.abstract_params(spec))
    hidden_BTD = factory.hidden(
      params, spec, batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, compute_dtype=jnp.float32
    )
    head_DV = np.asarray(transformer.head(params, spec, dtype=jnp.float32))
    # Column by column: what a whole product rounds depends on its width.
    logits.append(np.stack([np.asarray(hidden_BTD).reshape(-1, 32) @ head_DV[:, i] for i in range(300)]))
  np.testing.assert_array_equal(logits[0], logits[1])


def test_memory_holds_blocks_not_tables(tmp_path):
  rng, width, num_rows = np.random.default_rng(0), 128, 40_000
  entries = {expansion.EMBEDDING: ("BF16", (num_rows, width)), expansion.HEAD: ("BF16", (num_rows, width))}
  chunks = [rng.normal(size=(num_rows // 4, width)).astype(ml_dtypes.bfloat16)] * 8
  (tmp_path / "base").mkdir()
  hf_files.write_safetensors(tmp_path / "base" / hf_files.SINGLE, entries, iter(chunks))
  (tmp_path / "base" / "config.json").write_text(json.dumps({"vocab_size": num_rows, "tie_word_embeddings": False}))
  model = expansion.open_model(tmp_path / "base", vocab_size=num_rows)
  pieces = replaced([[i, i + 1, i + 2] for i in range(4000)])
  new = expansion.make_rows(initialise.mean, lambda old_VD: OldRows(old_VD, pieces), num_padding=64)
  (tmp_path / "out").mkdir()
  tracemalloc.start()
  expansion.write(model, tmp_path / "out", num_old=num_rows, vocab_size=44_000, rows=44_064, new=dict.fromkeys(model.tables, new))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < expansion.num_bytes(model, rows=44_064) / 2  # 22.6 MB in two tables


def test_models_that_do_not_fit(base, tmp_path):
  with pytest.raises(
    ConfigError, match=r"ids up to 399, the model has 320 rows: a grown tokenizer with a model that was not grown"
  ):
    expansion.open_model(base, vocab_size=400)
  config = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
  with pytest.raises(ConfigError, match=r"vocab_size=300, found model.embed_tokens.weight \[320, 32\]"):
    expansion.open_model(base, vocab_size=300)
  assert pathlib.Path(base).exists()


def test_new_rows_must_be_finite(base, tmp_path):
  model = expansion.open_model(base, vocab_size=300)
  (tmp_path / "out").mkdir()
  new = dict.fromkeys(model.tables, lambda old_VD: iter([np.full((84, 32), np.inf, np.float32)]))
  with pytest.raises(ConfigError, match="a new row is not finite"):
    expansion.write(model, tmp_path / "out", num_old=300, vocab_size=330, rows=384, new=new)
