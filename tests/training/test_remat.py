"""What the forward pass keeps: the same gradients whatever it is, as many bytes as model.remat says, and no product too many."""

import itertools

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax import config as config_lib, trees
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.training import step

CHOICES = config_lib.KEYS["model.remat"].choices
LADDER = [name for name in CHOICES if not name.endswith("_offload")]
SPEC = ModelSpec("llama", 67, 64, 3, 4, 2, 16, 192, max_positions=512)
ROWS, ROW_LEN = 2, 128


def loss(params, tokens_BT, positions_BT, segments_BT, *, remat, dtype=jnp.float32, attention="blockwise", spec=SPEC):
  hidden_BTD = factory.hidden(
    params, spec, tokens_BT, positions_BT, segments_BT, compute_dtype=dtype, remat=remat, attention=attention
  )
  return jnp.mean(jnp.square(hidden_BTD.astype(jnp.float32)) * (1 + jnp.arange(hidden_BTD.shape[-1]) % 3)[None, None])


def batch(row_len=ROW_LEN):
  tokens_BT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (ROWS, row_len)).astype(np.int32)
  segments_BT = np.broadcast_to((np.arange(row_len) >= row_len // 3).astype(np.int32) + 1, tokens_BT.shape)
  return tokens_BT, np.broadcast_to(np.arange(row_len, dtype=np.int32), tokens_BT.shape), segments_BT


@pytest.mark.parametrize("attention", ["plain", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_down_the_ladder_memory_falls_work_rises_and_the_gradients_stay(attention):
  params, arrays = transformer.init(SPEC, jax.random.key(0)), batch()
  programs = {
    remat: jax.jit(jax.value_and_grad(lambda p, *arrays, remat=remat: loss(p, *arrays, remat=remat, attention=attention)))
    .lower(params, *arrays)
    .compile()
    for remat in [*LADDER, "dots_offload"]
  }
  memory = [programs[remat].memory_analysis().temp_size_in_bytes for remat in LADDER]
  assert all(a > b for a, b in itertools.pairwise(memory)), memory
  work = [programs[remat].cost_analysis()["flops"] for remat in LADDER[1:]]  # XLA counts a loop's body once: none differs by more
  assert all(a < b for a, b in itertools.pairwise(work)), work
  found = {remat: program(params, *arrays) for remat, program in programs.items()}
  for remat, (value, grads) in found.items():
    assert value == found["none"][0], remat
    for (path, a), b in zip(trees.paths(grads).items(), jax.tree.leaves(found["none"][1]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max(), err_msg=f"{remat} {path}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", LADDER)
def test_a_position_keeps_as_many_bytes_as_is_written_down(remat, dtype):
  params, rows = transformer.abstract_params(SPEC), [jax.ShapeDtypeStruct((ROWS, ROW_LEN), jnp.int32)] * 3

  def pullback(params, *arrays):
    return jax.vjp(lambda p: loss(p, *arrays, remat=remat, dtype=jnp.dtype(dtype)), params)[1]

  stacked = [x for x in jax.tree.leaves(jax.eval_shape(pullback, params, *rows)) if x.shape[:1] == (SPEC.num_layers,)]
  of_parameters = {leaf.shape for leaf in jax.tree.leaves(params)}
  # Parameters wait as they are, in float32; a cast of one would be among what is kept.
  kept = [x for x in stacked if not (x.shape in of_parameters and x.dtype == jnp.float32)]
  kept = [x for x in kept if x.size >= SPEC.num_layers * ROWS * ROW_LEN]
  found = sum(x.size * x.dtype.itemsize for x in kept) / (SPEC.num_layers * ROWS * ROW_LEN)
  assert found == transformer.kept_bytes(SPEC, remat, itemsize=jnp.dtype(dtype).itemsize, tensor=1)


def primitives(jaxpr, name):
  """How often a primitive stands in a program and all below it."""
  count = 0
  for equation in jaxpr.eqns:
    count += equation.primitive.name == name
    for value in equation.params.values():
      for inner in value if isinstance(value, (list, tuple)) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        count += primitives(inner, name) if hasattr(inner, "eqns") else 0
  return count


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("attention_dots", 1), ("attended", 1), ("full", 2)])
def test_attention_runs_once_where_its_result_is_kept(remat, times):
  # Blockwise attention takes two exponentials in its forward pass and one in its backward pass; nothing else here takes one.
  params = transformer.abstract_params(SPEC)
  jaxpr = jax.make_jaxpr(jax.grad(lambda p: loss(p, *batch(), remat=remat)))(params).jaxpr
  assert primitives(jaxpr, "exp") == 2 * times + 1


def test_gathered_parameters_are_not_kept():
  # 8 devices hold an eighth of the parameters each; a layer at a time is whole, and the step must not hold all of them.
  wide = ModelSpec("llama", 64, 256, 12, 4, 2, 64, 512, max_positions=64)
  mesh = mesh_lib.make_mesh(data=1, fsdp=8, context=1, tensor=1)
  with jax.set_mesh(mesh):
    abstract = transformer.abstract_params(wide)
    rows = [jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=mesh_lib.batch_shardings(mesh)[2])] * 3
    gradient = jax.jit(jax.grad(lambda *arguments: loss(*arguments, remat="none", spec=wide)))
    temporary = gradient.lower(abstract, *rows).compile().memory_analysis().temp_size_in_bytes
  whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract["layers"]))
  assert temporary < 0.75 * whole


def test_a_cpu_says_that_it_offloads_nothing():
  c = config_lib.default()
  c.model.remat = "dots_offload"
  assert step.settings_from_config(c).remat == "dots" and "as with dots" in step.remat_note(c)
  c.model.remat = "dots"
  assert step.remat_note(c) == ""
  assert [transformer.on_platform(name, "gpu") for name in CHOICES] == list(CHOICES)
