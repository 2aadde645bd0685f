"""Queries, keys and values -> attended values by JAX's splash attention, the fused kernel for TPUs.

Invariant: documents stay apart by segments, grouped queries read their key head in place, and blocks that causality or the window
hides are never visited.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel, splash_attention_mask as mask

from cpt_jax.model.visible import KEPT


def block_size(row_len: int) -> int:
  """Positions in a block: 1,024 or the largest size below that divides the row.

  With 2,048 (MaxText's recipes for v5p and v6e, beside a larger limit) a kernel needs 17 to 23 MiB of the 16 that libtpu 0.0.42
  lets it have: on v5p none compiles, on v5e none inside a whole step. 1,024 does on v5e, v5p and v6e, in a third of the time.
  """
  return next(size for size in (1024, 512, 256, 128) if row_len % size == 0)


def splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, window: int | None, interpret: bool = False) -> jax.Array:
  """As attention.plain; row lengths are multiples of 128."""
  row_len, num_heads, head_dim = q_BTNH.shape[1:]
  size = block_size(row_len)
  causal = mask.CausalMask((row_len, row_len))
  if window is not None and window < row_len:
    causal = mask.LocalMask((row_len, row_len), window_size=(window - 1, 0), offset=0)
  sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), size)
  sizes |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(size, 512))
  attend_row = kernel.make_splash_mha(
    mask.MultiHeadMask([causal] * num_heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=kernel.BlockSizes(**sizes, use_fused_bwd_kernel=True),
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )

  def of_row(q_TNH, k_SKH, v_SKH, segments_T):
    q_NTH, k_KSH, v_KSH = (x.swapaxes(0, 1) for x in (q_TNH, k_SKH, v_SKH))
    out_NTH: Any = attend_row(q_NTH, k_KSH, v_KSH, segment_ids=kernel.SegmentIds(segments_T, segments_T))
    return out_NTH.swapaxes(0, 1)

  # The kernel does not scale, and the factor is a power of 2 for the usual head sizes: exact in any dtype, or nearly.
  scaled_BTNH = (q_BTNH.astype(jnp.float32) / math.sqrt(head_dim)).astype(q_BTNH.dtype)
  return jax.vmap(of_row)(scaled_BTNH, k_BSKH, v_BSKH, segments_BT)
