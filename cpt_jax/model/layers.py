"""Hidden states and one parameter -> hidden states: the pieces that every decoder shares.

Invariant: norms are computed in float32 and return the dtype they were given.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpt_jax.devices import mesh as mesh_lib


# The backward pass computes it again from its input, which is kept anyway: float32 copies of it would be the largest part of what
# a layer keeps, and as slow to write and read.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
  """Root mean square norm of `x` [..., D] over its last dimension (1910.07467); `scale` is float32 [D]."""
  return _rms_norm(x, mesh_lib.constrain(scale, None), eps)  # whole on every device


def embed(table_VD: jax.Array, tokens_BT: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
  """Rows of the table, [B, T, D]. Cast after the look-up, so that the gradients of a frequent token add up in float32."""
  whole_VD = mesh_lib.gathered(table_VD, "vocab", "embed")
  return whole_VD.at[tokens_BT].get(out_sharding=mesh_lib.out("batch", "seq", None)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def project(
  equation: str, axes: tuple[str, ...], to: tuple[str | None, ...] | None, x: jax.Array, parameter: jax.Array
) -> jax.Array:
  """`einsum` of `x` and a parameter of these logical axes, which is cast like `x` and gathered; the result lies where `to` says.

  The backward pass casts and gathers once more: what all layers had kept until then would be a second, whole model. The
  parameter's gradient is told where it will lie: found out, it is added up whole on every device of data x fsdp, and then cut.
  """
  out = None if to is None else mesh_lib.out(*to)
  return jnp.einsum(equation, x, mesh_lib.gathered(parameter.astype(x.dtype), *axes), out_sharding=out)


def _project_forward(equation, axes, to, x, parameter):
  return project(equation, axes, to, x, parameter), (x, parameter)


def _project_backward(equation, axes, to, saved, d_out):
  x, parameter = saved
  inputs, out_dims = equation.split("->")
  x_dims, parameter_dims = inputs.split(",")
  weight = mesh_lib.gathered(parameter.astype(x.dtype), *axes)
  (d_x,) = jax.linear_transpose(
    lambda x: jnp.einsum(equation, x, weight, out_sharding=None if to is None else mesh_lib.out(*to)), x
  )(d_out)
  d_parameter = jnp.einsum(f"{x_dims},{out_dims}->{parameter_dims}", x, d_out, out_sharding=mesh_lib.out(*axes))
  return d_x, d_parameter.astype(parameter.dtype)


project.defvjp(_project_forward, _project_backward)


def swiglu(x_BTD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array) -> jax.Array:
  """Gated feed-forward with SiLU (2002.05202)."""
  x = mesh_lib.merge_positions(x_BTD)
  # P: positions of all rows, where no devices share a row.
  where, dims = (("batch",), "P") if x.ndim == 2 else (("batch", "seq"), "BT")
  gate = checkpoint_name(project(f"{dims}D,DF->{dims}F", ("embed", "mlp"), None, x, w_gate_DF), "gate")
  up = checkpoint_name(project(f"{dims}D,DF->{dims}F", ("embed", "mlp"), None, x, w_up_DF), "up")
  out: Any = project(f"{dims}F,FD->{dims}D", ("mlp", "embed"), (*where, None), _gate(gate, up), w_down_FD)
  return mesh_lib.reshape(out, x_BTD.shape, to=("batch", "seq", None))


# The backward pass computes the gate again from its two inputs: cheaper than writing and reading what lies between.
_gate = jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up, prevent_cse=False)
