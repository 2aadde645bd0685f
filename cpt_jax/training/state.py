"""What a run changes as it trains: step, parameters, optimizer state.

Invariant: a plain pytree, its sharding known from `abstract` before anything is computed; `step` = updates finished.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec


class TrainState(NamedTuple):
  """All that a checkpoint must hold to go on."""

  step: Any  # int32 scalar, updates finished
  params: Any  # float32 master weights, the tree of model.transformer
  opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation, *, opt_state: Any = None) -> TrainState:
  """A state at step 0 with this `opt_state`, or fresh moments, sharded as the parameters are."""
  # Under jit each moment inherits the sharding of its parameter (explicit axes) and nothing is made twice.
  step = jax.jit(lambda: jnp.zeros((), jnp.int32))()
  return TrainState(step, params, jax.jit(optimizer.init)(params) if opt_state is None else opt_state)


def abstract(spec: ModelSpec, optimizer: optax.GradientTransformation) -> TrainState:
  """Shapes, dtypes and shardings of the state; needs a mesh to be set (abstract or real), computes nothing."""
  params = transformer.abstract_params(spec)
  opt_state = jax.eval_shape(optimizer.init, params)
  mesh = mesh_lib.current()
  assert mesh is not None, "set a mesh first"

  def placed(leaf):
    # eval_shape leaves scalars without a place and the others on an abstract mesh.
    spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(placed, TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state))
