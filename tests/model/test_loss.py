"""Chunked cross-entropy sums and the gradient of the objective against float64 numpy; what is computed and what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.extend.core import jaxprs_in_params

from cpt_jax.model import loss, transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.stream.batch import Batch

B, T, D, V, M = 3, 10, 6, 11, 4
WEIGHTS_M = np.array([0.7, 1.0, 0.1, 0.0], np.float32)


def spec(*, tied: bool) -> ModelSpec:
  return ModelSpec("llama", V, D, 1, 1, 1, 6, 4, max_positions=T, tied=tied)


@functools.partial(jax.jit, static_argnames="chunk")
def tied_sums(embedding_VD, hidden_BTD, batch, *, chunk=4):
  return loss.sums({"embedding": embedding_VD}, spec(tied=True), hidden_BTD, batch, num_sources=M, chunk=chunk)


def case(*, seed: int = 0, B: int = B, T: int = T, D: int = D, V: int = V):
  random = np.random.default_rng(seed)
  integers = np.zeros((B, T), np.int32)
  batch = Batch(
    tokens_BT=integers,
    targets_BT=random.integers(V, size=(B, T)).astype(np.int32),
    weights_BT=random.integers(2, size=(B, T)).astype(np.float32),
    segments_BT=integers,
    positions_BT=integers,
    source_B=np.resize(np.array([2, 0, 2], np.int32), B),
  )
  hidden_BTD = random.normal(size=(B, T, D)).astype(np.float32)
  embedding_VD = random.normal(size=(V, D)).astype(np.float32)
  return batch, hidden_BTD, embedding_VD


def reference(batch, hidden_BTD, head_DV, *, weights_M, z_weight):
  """Sums, and the gradients of sum_m weight_m * (loss_m + z_weight * z_loss_m), in float64."""
  logits_BTV = hidden_BTD.astype(np.float64) @ head_DV.astype(np.float64)
  log_partition_BT = np.log(np.exp(logits_BTV).sum(-1))
  rows, columns = np.indices(batch.targets_BT.shape)
  nll_BT = log_partition_BT - logits_BTV[rows, columns, batch.targets_BT]
  is_source_MBT = (batch.source_B == np.arange(M)[:, None])[..., None] * batch.weights_BT.astype(np.float64)
  sums = loss.Sums(*((is_source_MBT * x_BT).sum((1, 2)) for x_BT in (nll_BT, log_partition_BT**2, np.ones(nll_BT.shape))))
  probs_BTV = np.exp(logits_BTV - log_partition_BT[..., None])
  d_logits_BTV = probs_BTV * (1 + 2 * z_weight * log_partition_BT[..., None])
  d_logits_BTV[rows, columns, batch.targets_BT] -= 1
  d_logits_BTV *= np.einsum("M,MBT->BT", weights_M, is_source_MBT)[..., None]
  d_hidden_BTD = d_logits_BTV @ head_DV.T
  d_head_DV = np.einsum("BTD,BTV->DV", hidden_BTD, d_logits_BTV)
  return sums, d_hidden_BTD, d_head_DV


@functools.partial(jax.jit, static_argnames=("tied", "z_loss", "chunk"))
def value_and_gradient(stored, hidden_BTD, batch, *, tied, chunk, z_loss=0.3):
  """Value, sums, and gradients with respect to the head's parameter and the hidden states."""

  def objective(stored, hidden_BTD):
    params = {"embedding" if tied else "head": stored}
    of_case = ModelSpec("llama", max(stored.shape), hidden_BTD.shape[-1], 1, 1, 1, 6, 4, max_positions=T, tied=tied)
    return loss.objective(params, of_case, hidden_BTD, batch, source_weights=WEIGHTS_M, z_loss=z_loss, chunk=chunk)

  (value, sums), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(stored, hidden_BTD)
  return value, sums, *gradients


def assert_near(found, expected, *, rel):
  """The whole array's error against its size: entries near zero are differences of large numbers."""
  assert found.shape == expected.shape
  assert np.linalg.norm(np.asarray(found, np.float64) - expected) <= rel * np.linalg.norm(expected)


@settings(max_examples=12)
@given(
  seed=st.integers(0, 99),
  rows=st.integers(1, 3),
  row_len=st.sampled_from([1, 7, 10]),
  chunk=st.sampled_from([0, 1, 4, 10, 1000]),
  tied=st.booleans(),
  z_loss=st.sampled_from([0.0, 0.3]),
)
def test_sums_and_gradients_equal_the_float64_reference(seed, rows, row_len, chunk, tied, z_loss):
  batch, hidden_BTD, embedding_VD = case(seed=seed, B=rows, T=row_len)
  stored = embedding_VD if tied else embedding_VD.T
  value, sums, d_stored, d_hidden_BTD = value_and_gradient(stored, hidden_BTD, batch, tied=tied, chunk=chunk, z_loss=z_loss)
  expected, d_hidden_expected_BTD, d_head_expected_DV = reference(
    batch, hidden_BTD, embedding_VD.T, weights_M=WEIGHTS_M, z_weight=z_loss
  )
  for name in (*loss.Sums._fields, "loss", "z_loss", "tokens"):
    np.testing.assert_allclose(getattr(sums, name), getattr(expected, name), rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(value, np.sum(WEIGHTS_M * (expected.loss_M + z_loss * expected.z_loss_M)), rtol=1e-5)
  assert_near(d_hidden_BTD, d_hidden_expected_BTD, rel=1e-6)
  assert_near(d_stored.T if tied else d_stored, d_head_expected_DV, rel=1e-6)


def test_in_bfloat16_the_heads_gradient_is_still_added_up_in_float32():
  batch, hidden_BTD, embedding_VD = case(B=4, T=512)
  hidden_BTD = hidden_BTD.astype(jnp.bfloat16)
  _, _, d_stored, d_hidden_BTD = value_and_gradient(embedding_VD, hidden_BTD, batch, tied=True, chunk=8)
  rounded_VD = embedding_VD.astype(jnp.bfloat16).astype(np.float64)
  _, d_hidden_expected_BTD, d_head_expected_DV = reference(
    batch, hidden_BTD.astype(np.float64), rounded_VD.T, weights_M=WEIGHTS_M, z_weight=0.3
  )
  assert (d_stored.dtype, d_hidden_BTD.dtype) == (jnp.float32, jnp.bfloat16)
  assert_near(d_hidden_BTD, d_hidden_expected_BTD, rel=2.8e-3)
  # Rounded before it is added to the chunks before, it would be wrong by 9e-4; added up in bfloat16, by far more.
  assert_near(d_stored.T, d_head_expected_DV, rel=5e-4)


def test_the_gradient_is_scaled_by_what_comes_after_and_mapped_over_trials():
  batch, hidden_BTD, embedding_VD = case()

  def half(stored, hidden_BTD):
    args = dict(source_weights=WEIGHTS_M, z_loss=0.3, chunk=4)
    return 0.5 * loss.objective({"embedding": stored}, spec(tied=True), hidden_BTD, batch, **args)[0] ** 2

  gradient = jax.jit(jax.grad(half, argnums=(0, 1)))
  scaled = gradient(embedding_VD, hidden_BTD)
  value, _, *unscaled = value_and_gradient(embedding_VD, hidden_BTD, batch, tied=True, chunk=4)
  mapped = jax.jit(jax.vmap(gradient))(np.stack([embedding_VD, 2 * embedding_VD]), np.stack([hidden_BTD, 0.5 * hidden_BTD]))
  for one, expected, both in zip(scaled, unscaled, mapped, strict=True):
    np.testing.assert_allclose(one, value * expected, rtol=1e-6)
    np.testing.assert_allclose(both[0], one, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(2 * mapped[0][1], mapped[0][0], rtol=1e-5, atol=1e-4)  # the same logits


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


@pytest.mark.parametrize(("frozen", "products"), [((), 3), (("head",), 2), (("hidden",), 2), (("head", "hidden"), 1)])
def test_a_gradient_that_is_not_asked_for_is_not_computed(frozen, products):
  batch, hidden_BTD, embedding_VD = case()

  def objective(given):
    given = {name: jax.lax.stop_gradient(x) if name in frozen else x for name, x in given.items()}
    return loss.objective(given, spec(tied=False), given["hidden"], batch, source_weights=WEIGHTS_M, z_loss=0.0, chunk=4)

  given = {"head": embedding_VD.T, "hidden": hidden_BTD}
  found = jax.make_jaxpr(jax.grad(objective, has_aux=True))(given)
  assert sum(equation.primitive.name == "dot_general" for equation in equations(found.jaxpr)) == products


def test_a_gradient_through_the_sums_is_an_error():
  batch, hidden_BTD, embedding_VD = case()
  with pytest.raises(TypeError, match=r"measured only; differentiate the value of loss\.objective"):
    jax.grad(lambda h: tied_sums(embedding_VD, h, batch).loss)(hidden_BTD)


def test_with_128k_pieces_the_peak_is_a_quarter_of_the_plain_ones_at_most():
  B, T, D, V = 2, 2048, 256, 128_256
  array = jax.ShapeDtypeStruct
  batch = Batch(*(array((B, T), jnp.float32 if name == "weights_BT" else jnp.int32) for name in Batch._fields))
  batch = batch._replace(source_B=array((B,), jnp.int32))

  @jax.jit
  def plain(embedding_VD, hidden_BTD, batch):
    def objective(embedding_VD, hidden_BTD):
      logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, embedding_VD)
      return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT).sum()

    return jax.grad(objective, argnums=(0, 1))(embedding_VD, hidden_BTD)

  given = array((V, D), jnp.float32), array((B, T, D), jnp.float32), batch
  ours = value_and_gradient.lower(*given, tied=True, chunk=256).compile().memory_analysis()
  theirs = plain.lower(*given).compile().memory_analysis()
  assert theirs.temp_size_in_bytes > 4 * B * T * V
  assert ours.temp_size_in_bytes <= theirs.temp_size_in_bytes / 4


def test_sums_are_float32_and_counts_whole_whatever_the_hidden_states_are():
  batch, hidden_BTD, embedding_VD = case()
  sums = tied_sums(embedding_VD, hidden_BTD.astype(jnp.bfloat16), batch)
  assert [x.dtype for x in sums] == [jnp.float32, jnp.float32, jnp.int32]
  expected, _, _ = reference(batch, hidden_BTD, embedding_VD.T, weights_M=np.zeros(M), z_weight=0.0)
  np.testing.assert_allclose(sums.loss, expected.loss, rtol=2e-2)


def test_counts_stay_exact_where_float32_leaves_out_whole_numbers():
  one = tied_sums(*reversed(case()[1:]), case()[0])
  many = one._replace(tokens_M=jnp.full_like(one.tokens_M, 2**25 + 1))  # of as many microbatches, say
  added = jax.tree.map(jnp.add, many, one)
  assert one.tokens > 0
  np.testing.assert_array_equal(added.tokens_M, 2**25 + 1 + np.asarray(one.tokens_M, np.int64))
  assert added.tokens == M * (2**25 + 1) + int(one.tokens)


def test_the_rows_of_a_source_are_added_in_full_precision():
  # Products of float32 are rounded to fewer bits on GPUs and TPUs, so rows are added to their sources without one.
  batch, hidden_BTD, embedding_VD = case()
  jaxpr = jax.make_jaxpr(functools.partial(tied_sums, chunk=0))(embedding_VD, hidden_BTD, batch)
  assert str(jaxpr).count("dot_general") == 1  # the logits


def test_large_logits_stay_finite():
  batch, hidden_BTD, embedding_VD = case()
  sums = tied_sums(embedding_VD, 1e4 * hidden_BTD, batch)
  assert np.isfinite(sums.loss)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_fill_the_vocabulary_up_are_in_no_softmax(tied):
  batch, hidden_BTD, embedding_VD = case()
  filled = np.concatenate([embedding_VD, np.full((5, D), 9.0, np.float32)])
  found = {}
  for name, table_VD, true_size in (("grown", filled, V), ("plain", embedding_VD, 0)):
    shape = dataclasses.replace(spec(tied=tied), vocab_size=len(table_VD), true_vocab_size=true_size)

    def value(hidden_BTD, stored, shape=shape):
      params = {"embedding": stored} if tied else {"head": stored}
      return loss.objective(params, shape, hidden_BTD, batch, source_weights=WEIGHTS_M, z_loss=0.1, chunk=4)

    stored = jnp.asarray(table_VD if tied else table_VD.T)
    (total, sums), (d_hidden, d_stored) = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(hidden_BTD, stored)
    found[name] = (total, sums, d_hidden, d_stored if tied else d_stored.T)
  grown, plain = found["grown"], found["plain"]
  assert not np.asarray(grown[3][V:]).any()
  shape = dataclasses.replace(spec(tied=tied), vocab_size=V + 5, true_vocab_size=V)
  logits_BTV = transformer.logits({"embedding": filled, "head": filled.T}, shape, hidden_BTD)
  assert np.isneginf(logits_BTV[..., V:]).all() and np.isfinite(logits_BTV[..., :V]).all()
  grown = (*grown[:3], grown[3][:V])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grown, plain)
