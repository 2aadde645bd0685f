"""Parameters and the base's parameters -> how far each layer has moved.

Invariant: relative, |p - p0| / |p0| by Frobenius norm over a layer's leaves, so that layers of any size compare.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def keep_base(params: Any) -> Any:
  """A copy of the parameters to measure from, in bfloat16 where that loses nothing (a base stored in bfloat16)."""

  @jax.jit
  def is_lossless(leaf):
    return jnp.all(leaf.astype(jnp.bfloat16).astype(leaf.dtype) == leaf)

  # A jitted copy: the training step donates its state, and a donated buffer may not be read again.
  copy = jax.jit(lambda leaf, dtype: leaf.astype(dtype) + jnp.zeros((), dtype), static_argnums=1)
  return jax.tree.map(lambda leaf: copy(leaf, jnp.bfloat16 if is_lossless(leaf) else leaf.dtype), params)


@jax.jit
def _norms(params: Any, base: Any) -> dict[str, Any]:
  def squares(leaf, base_leaf, axes):
    base_leaf = base_leaf.astype(jnp.float32)
    return jnp.sum(jnp.square(leaf - base_leaf), axes), jnp.sum(jnp.square(base_leaf), axes)

  top = {name: squares(leaf, base[name], None) for name, leaf in params.items() if name != "layers"}
  layers = [squares(leaf, base["layers"][name], tuple(range(1, leaf.ndim))) for name, leaf in params["layers"].items()]
  moved, size = (sum(part) for part in zip(*layers, strict=True))
  return top | {"layers": (moved, size)}


def by_layer(params: Any, base: Any) -> dict[str, float | list[float]]:
  """`{"embedding": 0.01, "layers": [one per layer, lowest first], "final_norm": ..., "head": ...}`."""
  result: dict[str, float | list[float]] = {}
  for name, (moved, size) in jax.device_get(_norms(params, base)).items():
    ratio = np.sqrt(np.asarray(moved, np.float64) / np.maximum(np.asarray(size, np.float64), 1e-30))
    result[name] = [float(r) for r in ratio] if name == "layers" else float(ratio)
  return result
