"""Positions -> the cosines and sines that rotate queries and keys.

Invariant: angles are exact to float32 rounding at every position below 2**20, whatever the compute dtype.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.model.spec import LinearScaling, ModelSpec, YarnScaling

_LOW = 1024  # positions are split into hi * 1024 + lo, so that a product with a 14-bit fraction fits float32's 24 bits
_BITS = 2.0**14  # parts of a turn


def frequencies(spec: ModelSpec) -> np.ndarray:
  """Radians per position of each pair of dimensions, float64 [H/2] (RoFormer 2104.09864), scaled where the spec says."""
  exponents = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
  plain = spec.rope_theta**-exponents
  scaling = spec.rope_scaling
  if scaling is None:
    return plain
  if isinstance(scaling, LinearScaling):
    return plain / scaling.factor
  if isinstance(scaling, YarnScaling):
    keep = 1 - _yarn_ramp(scaling, theta=spec.rope_theta, head_dim=spec.head_dim)
  else:
    # Turns that a pair makes within the original context: few turns = a long wavelength, which is stretched.
    turns = scaling.original_positions * plain / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
  return plain * (keep + (1 - keep) / scaling.factor)


def _yarn_ramp(scaling: YarnScaling, *, theta: float, head_dim: int) -> np.ndarray:
  """From 0 at the pair that makes beta_fast turns within the original context to 1 at the one that makes beta_slow."""
  places = [
    head_dim * math.log(scaling.original_positions / (2 * math.pi * turns)) / (2 * math.log(theta))
    for turns in (scaling.beta_fast, scaling.beta_slow)
  ]
  low, high = (math.floor(places[0]), math.ceil(places[1])) if scaling.truncate else places
  low, high = max(low, 0), min(high, head_dim - 1)  # of the dimensions, not of the pairs: so do the paper's code and transformers
  high = low + 0.001 if high == low else high  # transformers' too
  return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


def tables(spec: ModelSpec, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of position x frequency, float32 [B, T, H/2]; with YaRN times its attention factor.

  The plain float32 product is off by position x 6e-8 radians (0.06 at a million). Here whole turns are dropped while every
  product is still exact: fractions of a turn per position and per 1024 positions are split into a 14-bit part, whose
  product with a number below 1024 is exact, and a remainder too small to matter.
  """
  turns = frequencies(spec) / (2 * math.pi)
  coarse_lo, fine_lo = _split(turns)
  coarse_hi, fine_hi = _split(np.mod(turns * _LOW, 1.0))
  lo = (positions_BT % _LOW).astype(jnp.float32)[..., None]
  hi = (positions_BT // _LOW).astype(jnp.float32)[..., None]
  fraction = jnp.mod(lo * coarse_lo, 1.0) + jnp.mod(hi * coarse_hi, 1.0) + (lo * fine_lo + hi * fine_hi)
  angles = (2 * math.pi) * jnp.mod(fraction, 1.0)
  if isinstance(spec.rope_scaling, YarnScaling):
    # On queries and on keys, so the logits are multiplied by its square.
    return jnp.cos(angles) * spec.rope_scaling.attention_factor, jnp.sin(angles) * spec.rope_scaling.attention_factor
  return jnp.cos(angles), jnp.sin(angles)


def _split(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Fractions of a turn, float64 [H/2] -> their first 14 bits and the rest, float32 [1, 1, H/2] each."""
  coarse = np.floor(turns * _BITS) / _BITS
  return coarse.astype(np.float32)[None, None], (turns - coarse).astype(np.float32)[None, None]


def rotate(x_BTNH: jax.Array, cos_BTC: jax.Array, sin_BTC: jax.Array) -> jax.Array:
  """Rotates the pairs (h, h + H/2) of every head, in float32 (the layout of Hugging Face checkpoints); C = H/2."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BTC[:, :, None, :], sin_BTC[:, :, None, :]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
