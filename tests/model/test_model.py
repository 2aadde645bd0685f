"""The decoder against logits of transformers, and what a packed causal model must and must not let through."""

import functools
import json
import pathlib

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cpt_jax import trees
from cpt_jax.model import pretrained, transformer
from cpt_jax.model.spec import ModelSpec, from_hf

GOLDEN = sorted((pathlib.Path(__file__).parent.parent / "golden").glob("*.npz"))
SPEC = ModelSpec("qwen3", 31, 16, 2, 4, 2, 6, 20, max_positions=64, qk_norm=True, qkv_bias=True, init_std=0.3)


@functools.partial(jax.jit, static_argnums=1, static_argnames=("remat", "attention", "dtype", "scan"))
def logits(params, spec, tokens_BT, positions_BT, segments_BT, *, remat="none", attention="auto", dtype=jnp.float32, scan=True):
  hidden_BTD = factory.hidden(
    params, spec, tokens_BT, positions_BT, segments_BT, compute_dtype=dtype, remat=remat, attention=attention, scan=scan
  )
  return transformer.logits(params, spec, hidden_BTD)


@pytest.fixture(scope="module")
def params():
  return random_params(SPEC)


def random_params(spec):
  """Every leaf random, norms and biases too."""
  random = np.random.default_rng(0)
  return trees.map_with_path(
    lambda path, leaf: jnp.asarray(("norm" in path) + 0.3 * random.normal(size=leaf.shape), jnp.float32),
    transformer.abstract_params(spec),
  )


def packed(*lengths: int, row_len: int = 12, seed: int = 0):
  """Tokens, positions and segments of one row that holds documents of these lengths, then padding."""
  random = np.random.default_rng(seed)
  tokens, positions, segments = np.zeros((3, 1, row_len), np.int32)
  start = 0
  for number, length in enumerate(lengths, start=1):
    part = slice(start, start + length)
    tokens[0, part] = random.integers(SPEC.vocab_size, size=length)
    positions[0, part] = np.arange(length)
    segments[0, part] = number
    start += length
  return tokens, positions, segments


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
@pytest.mark.parametrize("file", GOLDEN, ids=[file.stem for file in GOLDEN])
def test_logits_equal_those_of_transformers(file, attention, tmp_path):
  """Made by tools/fixtures/make_golden_logits.py, which is run again only when a case is added."""
  saved = np.load(file)
  config = json.loads(str(saved["config"]))
  (tmp_path / "config.json").write_text(json.dumps(config))
  weights = {key.removeprefix("weights/"): saved[key] for key in saved.files if key.startswith("weights/")}
  save_file(weights, tmp_path / "model.safetensors")
  spec = from_hf(config)
  params = pretrained.load_params(tmp_path, spec, transformer.abstract_params(spec))
  tokens_BT = saved["tokens"]
  positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
  found = logits(params, spec, tokens_BT, positions_BT, np.ones_like(tokens_BT), attention=attention)
  np.testing.assert_allclose(found, saved["logits"], rtol=1e-4, atol=1e-4 * np.abs(saved["logits"]).max())


def test_there_is_a_golden_file_for_every_family():
  assert {file.stem.split("_")[0].rstrip("3") for file in GOLDEN} >= {"llama", "mistral", "qwen2", "qwen"}


def test_a_position_depends_on_itself_and_the_past_alone(params):
  tokens, positions, segments = packed(12)
  table_VD = params["embedding"]

  def of_embeddings(inputs_TD):
    # Every position gets a table row of its own, so that the gradient of the table is by position.
    replaced = {**params, "embedding": jnp.concatenate([inputs_TD, table_VD])}
    return factory.hidden(replaced, SPEC, np.arange(12, dtype=np.int32)[None], positions, segments, compute_dtype=jnp.float32)[0]

  jacobian_TDTD = jax.jit(jax.jacrev(of_embeddings))(table_VD[tokens[0]])
  influence_TT = np.abs(jacobian_TDTD).sum(axis=(1, 3))
  assert (influence_TT[np.triu_indices(12, 1)] == 0).all()
  assert (influence_TT[np.tril_indices(12)] > 0).all()


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_a_document_does_not_see_the_others_in_its_row(params, attention):
  tokens, positions, segments = packed(5, 7)
  found = logits(params, SPEC, tokens, positions, segments, attention=attention)
  changed = tokens.copy()
  changed[:, :5] = (changed[:, :5] + 1) % SPEC.vocab_size
  np.testing.assert_array_equal(logits(params, SPEC, changed, positions, segments, attention=attention)[:, 5:], found[:, 5:])
  alone, positions, segments = packed(7)
  alone[:, :7] = tokens[:, 5:]
  np.testing.assert_allclose(
    logits(params, SPEC, alone, positions, segments, attention=attention)[:, :7], found[:, 5:], rtol=1e-4, atol=1e-4
  )


def test_what_stands_in_the_padding_changes_nothing_and_is_finite(params):
  tokens, positions, segments = packed(4, 5)
  found = logits(params, SPEC, tokens, positions, segments)
  tokens[:, 9:] = 7
  changed = logits(params, SPEC, tokens, positions, segments)
  np.testing.assert_array_equal(found[:, :9], changed[:, :9])
  assert np.isfinite(found).all()
  assert np.isfinite(changed).all()


def test_bfloat16_computes_near_float32_and_returns_float32_logits(params):
  batch = packed(12)
  full, low = (logits(params, SPEC, *batch, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
  assert low.dtype == jnp.float32
  assert 0 < np.abs(full - low).max() < 0.05 * np.abs(full).max()


def test_layers_are_scanned():
  def length(num_layers):
    spec = ModelSpec("llama", 31, 16, num_layers, 4, 2, 4, 20, max_positions=64)
    return len(str(jax.make_jaxpr(lambda p: logits(p, spec, *packed(12)))(transformer.abstract_params(spec))))

  assert length(12) < 1.02 * length(2)


def test_init_is_seeded_float32_and_as_wide_as_asked():
  spec = ModelSpec("qwen2", 500, 32, 3, 4, 2, 8, 64, max_positions=64, qkv_bias=True, init_std=0.1)
  first, again, other = (trees.paths(transformer.init(spec, jax.random.key(seed))) for seed in (0, 0, 1))
  abstract = trees.paths(transformer.abstract_params(spec))
  assert {path: (x.shape, x.dtype) for path, x in first.items()} == {path: (x.shape, x.dtype) for path, x in abstract.items()}
  for path, leaf in first.items():
    np.testing.assert_array_equal(leaf, again[path])
    if "norm" in path or path.startswith("layers.b"):
      np.testing.assert_array_equal(leaf, float("norm" in path))
      continue
    assert not np.array_equal(leaf, other[path])
    # The two products that end on the residual are smaller by the square root of their number.
    expected = 0.1 / np.sqrt(6) if path in ("layers.wo", "layers.w_down") else 0.1
    assert np.std(leaf) == pytest.approx(expected, rel=0.05)


def test_the_tree_is_the_contract():
  layers = """layers.attn_norm layers.bk layers.bq layers.bv layers.k_norm layers.mlp_norm layers.q_norm layers.w_down
    layers.w_gate layers.w_up layers.wk layers.wo layers.wq layers.wv"""
  expected = ["embedding", "final_norm", "head", *layers.split()]
  assert list(trees.paths(transformer.abstract_params(SPEC))) == expected


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_one_by_one_are_those_of_the_loop(params, remat):
  batch = packed(5, 6)

  def gradient(scan):
    return jax.jit(jax.grad(lambda p: jnp.sum(logits(p, SPEC, *batch, remat=remat, scan=scan) ** 2)))(params)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), gradient(False), gradient(True))
