"""Queries, keys and values -> attended values by cuDNN's fused attention on NVIDIA GPUs.

Invariant: documents stay apart by packed offsets, without a mask in memory; rows of one document by causality alone, so that what
the padding at their end attends to is of no meaning.

`jax.nn.dot_product_attention` takes no offsets, so the primitives beneath it are called here, and nowhere else; `why_not` finds
out whether they are as they were in the releases that this was tried with (jax 0.10.2, 0.11.2).
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpt_jax.model.visible import KEPT

_PARAMETERS = {
  "fwd": ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length", "is_training"),
  "bwd": ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"),
}
_ARRAYS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v")
_OF_BACKWARD = ("activation", "fwd_output", "grad_output")


@functools.cache
def why_not() -> str:
  """Why this jax's cuDNN attention cannot be called; "" if it can."""
  try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
  except ImportError as error:
    return f"jax {jax.__version__} has moved its cuDNN attention ({error})"
  for way, names in _PARAMETERS.items():
    lowering = getattr(fused, f"_dot_product_attention_{way}_cuda_lowering", None)
    found = () if lowering is None else tuple(inspect.signature(lowering).parameters)
    wanted = ("ctx", *_ARRAYS, *(_OF_BACKWARD if way == "bwd" else ()), *names)
    if found != wanted or not hasattr(fused, f"_dot_product_attention_{way}_p"):
      return f"jax {jax.__version__} calls cuDNN's attention in another way than those that this was written for"
  return ""


def attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, window: int | None, max_documents: int) -> jax.Array:
  """As attention.plain where no row of `segments_BT` has more than `max_documents` segments beside its padding.

  With max_documents=1 the segments are not looked at: a row is one document, and perhaps padding behind it.
  """
  packed = () if max_documents == 1 else _packed(segments_BT, places=max_documents + 1)
  return _attend((window, max_documents > 1), q_BTNH, k_BSKH, v_BSKH, packed)


def _packed(segments_BT, *, places: int) -> tuple[jax.Array, jax.Array]:
  """Lengths of all segments of the batch and where they begin, a list each, filled up at its end to [B, places]."""
  rows, row_len = segments_BT.shape
  changes_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
  size = rows * places
  (starts,) = jnp.nonzero(changes_BT.reshape(-1), size=size, fill_value=rows * row_len)
  lengths = jnp.diff(starts, append=rows * row_len)
  return lengths.astype(jnp.int32).reshape(rows, -1), starts.astype(jnp.int32).reshape(rows, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: tuple[int | None, bool], q_BTNH, k_BSKH, v_BSKH, packed) -> jax.Array:
  return _forward(static, q_BTNH, k_BSKH, v_BSKH, packed)[0]


def _forward(static, q_BTNH, k_BSKH, v_BSKH, packed):
  out_BTNH, log_total = _bind("fwd", static, q_BTNH, k_BSKH, v_BSKH, packed, is_training=True)
  out_BTNH, log_total = checkpoint_name(out_BTNH, KEPT), checkpoint_name(log_total, KEPT)
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, packed, out_BTNH, log_total)


def _backward(static, saved, d_out_BTNH):
  q_BTNH, k_BSKH, v_BSKH, packed, out_BTNH, log_total = saved
  return (*_bind("bwd", static, q_BTNH, k_BSKH, v_BSKH, packed, log_total, out_BTNH, d_out_BTNH), None)


def _bind(way: str, static: tuple[int | None, bool], q_BTNH, k_BSKH, v_BSKH, packed, *of_backward, **of_forward) -> Any:
  from jax._src.cudnn import fused_attention_stablehlo as fused

  (window, is_packed), (rows, row_len, _, head_dim) = static, q_BTNH.shape
  nothing = jnp.zeros(0, q_BTNH.dtype)
  lengths = offsets = (nothing, nothing)
  if is_packed:
    # In elements, a last column behind the last segment; keys have fewer heads than queries, so their offsets differ.
    lengths_BM, starts_BM = packed
    starts = jnp.concatenate([starts_BM.reshape(-1), jnp.full(rows, rows * row_len, jnp.int32)]).reshape(starts_BM.shape[0], -1)
    lengths = (lengths_BM, lengths_BM)
    offsets = tuple(starts * (x.shape[2] * head_dim) for x in (q_BTNH, k_BSKH))
  primitive = getattr(fused, f"_dot_product_attention_{way}_p")
  return primitive.bind(
    q_BTNH, k_BSKH, v_BSKH, nothing, *lengths, *offsets, nothing, nothing, *of_backward,
    scale=1 / math.sqrt(head_dim),
    seed=42,
    dropout_rate=0.0,
    variadic_args=(False, False),  # no bias and no gradient of one
    mask_type=fused.MaskType.PADDING_CAUSAL if is_packed else fused.MaskType.CAUSAL,
    layout=fused.AttentionLayout.BTNH.value,
    sliding_window_length=window,
    **of_forward,
  )  # fmt: skip


_attend.defvjp(_forward, _backward)
