"""Hidden states and one parameter -> hidden states: the pieces that every decoder shares.

Invariant: norms are computed in float32 and return the dtype they were given. Called by model.transformer.
"""

import jax
import jax.numpy as jnp

from cpt_jax import mesh


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
  """Root mean square norm over the last dimension (1910.07467); `scale` is float32."""
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
  """Rows of the table, [B, T, D]. Cast after the look-up, so that the gradients of a frequent token add up in float32."""
  whole_VD = mesh.gathered(table_VD, "vocab", "embed")
  return whole_VD.at[tokens_BT].get(out_sharding=mesh.out("batch", "seq", None)).astype(dtype)


def swiglu(x_BTD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array) -> jax.Array:
  """Gated feed-forward with SiLU (2002.05202)."""
  gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, w_gate_DF)
  up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, w_up_DF)
  return mesh.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, w_down_FD, to=("batch", "seq", None))
