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
    weights_BT=random.choice([0.0, 0.25, 1.0], size=(B, T)).astype(np.float32),
    segments_BT=integers,
    positions_BT=integers,
    source_B=np.array([2, 0, 2], np.int32),
  )
  hidden_BTD = random.normal(size=(B, T, D)).astype(np.float32)
  embedding_VD = random.normal(size=(V, D)).astype(np.float32)
  return batch, hidden_BTD, embedding_VD


def reference(batch, hidden_BTD, head_DV, *, z_weight):
  """Sums, and the gradients of loss + z_weight * z_loss, in float64."""
  logits_BTV = hidden_BTD.astype(np.float64) @ head_DV.astype(np.float64)
  log_partition_BT = np.log(np.exp(logits_BTV).sum(-1))
  rows, columns = np.indices((B, T))
  nll_BT = log_partition_BT - logits_BTV[rows, columns, batch.targets_BT]
  loss_B = (batch.weights_BT * nll_BT).sum(1)
  tokens_B = batch.weights_BT.astype(np.float64).sum(1)
  z_loss = (batch.weights_BT * log_partition_BT**2).sum()
  by_source = [[sums_B[batch.source_B == m].sum() for m in range(M)] for sums_B in (loss_B, tokens_B)]
  probs_BTV = np.exp(logits_BTV - log_partition_BT[..., None])
  d_logits_BTV = probs_BTV * (1 + 2 * z_weight * log_partition_BT[..., None])
  d_logits_BTV[rows, columns, batch.targets_BT] -= 1
  d_logits_BTV *= batch.weights_BT[..., None]
  d_hidden_BTD = d_logits_BTV @ head_DV.T
  d_head_DV = np.einsum("BTD,BTV->DV", hidden_BTD, d_logits_BTV)
  return loss.Sums(loss_B.sum(), z_loss, tokens_B.sum(), *by_source), d_hidden_BTD, d_head_DV


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, T, 3 * T])
def test_sums_and_gradients_equal_the_float64_reference(chunk, tied):
  batch, hidden_BTD, embedding_VD = case()
  params = {"embedding": embedding_VD} if tied else {"head": embedding_VD.T}

  def objective(params, hidden_BTD):
    sums = loss.sums(params, spec(tied=tied), hidden_BTD, batch, num_sources=M, chunk=chunk)
    return sums.loss + 0.3 * sums.z_loss, sums

  gradient = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
  (_, sums), (d_params, d_hidden_BTD) = gradient(params, hidden_BTD)
  expected, d_hidden_expected_BTD, d_head_expected_DV = reference(batch, hidden_BTD, embedding_VD.T, z_weight=0.3)
  for name in loss.Sums._fields:
    np.testing.assert_allclose(getattr(sums, name), getattr(expected, name), rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(d_hidden_BTD, d_hidden_expected_BTD, rtol=1e-4, atol=1e-5)
  d_head_DV = d_params["embedding"].T if tied else d_params["head"]
  np.testing.assert_allclose(d_head_DV, d_head_expected_DV, rtol=1e-4, atol=1e-5)


def test_sums_are_float32_whatever_the_hidden_states_are():
  batch, hidden_BTD, embedding_VD = case()
  sums = tied_sums(embedding_VD, hidden_BTD.astype(jnp.bfloat16), batch)
  assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}
  expected, _, _ = reference(batch, hidden_BTD, embedding_VD.T, z_weight=0.0)
  np.testing.assert_allclose(sums.loss, expected.loss, rtol=2e-2)


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
    return tied_sums(embedding_VD, hidden_BTD, batch, chunk=3).loss

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (variable.aval.size for variable in equation.outvars if V in variable.aval.shape)
      for inner in jaxprs_in_params(equation.params):
        yield from sizes(inner)

  found = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(embedding_VD, hidden_BTD)
  assert max(sizes(found.jaxpr)) == B * 3 * V > V * D
