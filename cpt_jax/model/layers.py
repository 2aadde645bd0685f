"""Hidden states and one parameter -> hidden states: the pieces that every decoder shares.

Invariant: norms are computed in float32 and return the dtype they were given. Called by model.transformer.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpt_jax import mesh


# The backward pass computes it again from its input, which is kept anyway: float32 copies of it would be the largest part of what
# a layer keeps, and as slow to write and read.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
  """Root mean square norm over the last dimension (1910.07467); `scale` is float32."""
  return _rms_norm(x, scale, eps)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
  """Rows of the table, [B, T, D]. Cast after the look-up, so that the gradients of a frequent token add up in float32."""
  whole_VD = mesh.gathered(table_VD, "vocab", "embed")
  return whole_VD.at[tokens_BT].get(out_sharding=mesh.out("batch", "seq", None)).astype(dtype)


def project(
  equation: str, x: jax.Array, parameter: jax.Array, axes: tuple[str, ...], *, to: tuple[str | None, ...] | None = None
) -> jax.Array:
  """`einsum` of `x` and a parameter of these logical axes, which is cast like `x` and gathered; `to` as in mesh.einsum.

  The backward pass casts and gathers once more: what all layers had kept until then would be a second, whole model.
  """
  out = None if to is None else mesh.out(*to)

  def product(x, parameter):
    return jnp.einsum(equation, x, mesh.gathered(parameter.astype(x.dtype), *axes), out_sharding=out)

  return jax.checkpoint(product, prevent_cse=False)(x, parameter)


def swiglu(x_BTD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array) -> jax.Array:
  """Gated feed-forward with SiLU (2002.05202)."""
  x = mesh.merge_positions(x_BTD)
  gate = checkpoint_name(project("...D,DF->...F", x, w_gate_DF, ("embed", "mlp")), "gate")
  up = checkpoint_name(project("...D,DF->...F", x, w_up_DF, ("embed", "mlp")), "up")
  where = ("batch", "seq")[: x.ndim - 1]
  out = project("...F,FD->...D", _gate(gate, up), w_down_FD, ("mlp", "embed"), to=(*where, None))
  return mesh.reshape(out, x_BTD.shape, to=("batch", "seq", None))


# The backward pass computes the gate again from its two inputs: cheaper than writing and reading what lies between.
_gate = jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up, prevent_cse=False)
