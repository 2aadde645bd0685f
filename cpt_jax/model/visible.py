"""Segments and positions -> what a query may see; what every implementation of attention agrees on.

Invariant: equal segment numbers are neighbours in their row; padding (segment 0) sees padding, so no query sees nothing.
"""

import jax
import jax.numpy as jnp

# What remat policies keep of attention (its output and log-sum-exp), so that the backward pass does not attend again.
KEPT = "attended"
# Finite, so that a block without a visible key gives numbers (that the next block's larger maximum wipes out), not NaN.
HIDDEN = -1e30


def visible(q_segments_BT, k_segments_BS, q_T, k_S, *, window) -> jax.Array:
  """Which keys a query may see: those of its segment, not after it, not `window` or more before it. Bool [B, T, S].

  `q_T` and `k_S` are positions in the row.
  """
  behind_TS = q_T[:, None] - k_S[None, :]
  near_TS = (behind_TS >= 0) & (behind_TS < window)
  return near_TS[None] & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])


def segment_starts(segments_BS: jax.Array) -> jax.Array:
  """The position at which each position's segment begins, [B, S].

  >>> segment_starts(jnp.array([[1, 1, 2, 2, 2, 0]])).tolist()
  [[0, 0, 2, 2, 2, 5]]
  """
  changes_BS = jnp.diff(segments_BS, axis=1, prepend=segments_BS[:, :1]) != 0
  return jax.lax.cummax(jnp.where(changes_BS, jnp.arange(segments_BS.shape[1])[None], 0), axis=1)


def segment_ends(segments_BS: jax.Array) -> jax.Array:
  """The position at which each position's segment ends, [B, S].

  >>> segment_ends(jnp.array([[1, 1, 2, 2, 2, 0]])).tolist()
  [[1, 1, 4, 4, 4, 5]]
  """
  return segments_BS.shape[1] - 1 - segment_starts(segments_BS[:, ::-1])[:, ::-1]
