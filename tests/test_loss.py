"""Chunked cross-entropy sums against float64 numpy, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cpt_jax.data.batch import Batch
from cpt_jax.model import loss
from cpt_jax.model.spec import ModelSpec

B, T, D, V, M = 3, 10, 6, 11, 4


def spec(*, tied: bool) -> ModelSpec:
  return ModelSpec("llama", V, D, 1, 1, 1, 6, 4, max_positions=T, tied=tied)


@functools.partial(jax.jit, static_argnames="chunk")
def tied_sums(embedding_VD, hidden_BTD, batch, *, chunk=4):
  return loss.sums({"embedding": embedding_VD}, spec(tied=True), hidden_BTD, batch, num_sources=M, chunk=chunk)


def case(*, seed: int = 0):
  random = np.random.default_rng(seed)
  integers = np.zeros((B, T), np.int32)
  batch = Batch(
    tokens_BT=integers,
    targets_BT=random.integers(V, size=(B, T)).astype(np.int32),
    weights_BT=random.integers(2, size=(B, T)).astype(np.float32),
    segments_BT=integers,
    positions_BT=integers,
    source_B=np.array([2, 0, 2], np.int32),
  )
  hidden_BTD = random.normal(size=(B, T, D)).astype(np.float32)
  embedding_VD = random.normal(size=(V, D)).astype(np.float32)
  return batch, hidden_BTD, embedding_VD


def reference(batch, hidden_BTD, head_DV, *, weights_M, z_weight):
  """Sums, and the gradients of sum_m weight_m * (loss_m + z_weight * z_loss_m), in float64."""
  logits_BTV = hidden_BTD.astype(np.float64) @ head_DV.astype(np.float64)
  log_partition_BT = np.log(np.exp(logits_BTV).sum(-1))
  rows, columns = np.indices((B, T))
  nll_BT = log_partition_BT - logits_BTV[rows, columns, batch.targets_BT]
  is_source_MBT = (batch.source_B == np.arange(M)[:, None])[..., None] * batch.weights_BT.astype(np.float64)
  sums = loss.Sums(*((is_source_MBT * x_BT).sum((1, 2)) for x_BT in (nll_BT, log_partition_BT**2, np.ones((B, T)))))
  probs_BTV = np.exp(logits_BTV - log_partition_BT[..., None])
  d_logits_BTV = probs_BTV * (1 + 2 * z_weight * log_partition_BT[..., None])
  d_logits_BTV[rows, columns, batch.targets_BT] -= 1
  d_logits_BTV *= np.einsum("M,MBT->BT", weights_M, is_source_MBT)[..., None]
  d_hidden_BTD = d_logits_BTV @ head_DV.T
  d_head_DV = np.einsum("BTD,BTV->DV", hidden_BTD, d_logits_BTV)
  return sums, d_hidden_BTD, d_head_DV


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, T, 3 * T])
def test_sums_and_gradients_equal_the_float64_reference(chunk, tied):
  batch, hidden_BTD, embedding_VD = case()
  params = {"embedding": embedding_VD} if tied else {"head": embedding_VD.T}
  weights_M = np.array([0.7, 1.0, 0.1, 0.0], np.float32)

  def objective(params, hidden_BTD):
    return loss.objective(params, spec(tied=tied), hidden_BTD, batch, source_weights=weights_M, z_loss=0.3, chunk=chunk)

  gradient = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
  (_, sums), (d_params, d_hidden_BTD) = gradient(params, hidden_BTD)
  expected, d_hidden_expected_BTD, d_head_expected_DV = reference(
    batch, hidden_BTD, embedding_VD.T, weights_M=weights_M, z_weight=0.3
  )
  for name in (*loss.Sums._fields, "loss", "z_loss", "tokens"):
    np.testing.assert_allclose(getattr(sums, name), getattr(expected, name), rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(d_hidden_BTD, d_hidden_expected_BTD, rtol=1e-4, atol=1e-5)
  d_head_DV = d_params["embedding"].T if tied else d_params["head"]
  np.testing.assert_allclose(d_head_DV, d_head_expected_DV, rtol=1e-4, atol=1e-5)


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


def test_rows_of_weight_zero_add_nothing():
  batch, hidden_BTD, embedding_VD = case()
  kept = tied_sums(embedding_VD, hidden_BTD[:2], Batch(*(x[:2] for x in batch)))
  batch.weights_BT[2] = 0
  padded = tied_sums(embedding_VD, hidden_BTD, batch)
  for a, b in zip(kept, padded, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_logits_of_the_whole_batch_never_exist():
  batch, hidden_BTD, embedding_VD = case()

  def objective(embedding_VD, hidden_BTD):
    params = {"embedding": embedding_VD}
    return loss.objective(params, spec(tied=True), hidden_BTD, batch, source_weights=(1.0,) * M, z_loss=0.1, chunk=7)[0]

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval.size for variable in equation.outvars if V in variable.aval.shape)
      for inner in jaxprs_in_params(equation.params):
        yield from sizes(inner)

  found = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(embedding_VD, hidden_BTD)
  assert max(sizes(found.jaxpr)) == 6 * V == V * D
