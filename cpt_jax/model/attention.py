"""Queries, keys, values and segments -> attended values; the one place that chooses an implementation.

Invariant: every implementation computes causal attention inside a segment, softmax in float32; `plain` is what the others are
held to. A padded position (segment 0) attends to padding, so no row of the mask is empty.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import blockwise, cudnn
from cpt_jax.model.visible import HIDDEN, KEPT, visible

# What "auto" tries on each platform, the fastest first.
_MULTIPLE = 128  # of row lengths: the largest block of flash, and what a TPU has in its lanes
_PREFERRED = {"gpu": ("cudnn", "flash", "blockwise"), "tpu": ("splash", "blockwise"), "cpu": ("blockwise",)}


class Call(NamedTuple):
  """What the choice of an implementation depends on; numbers are those of one device."""

  platform: str
  dtype: str
  row_len: int
  head_dim: int
  windows: tuple[int, ...]  # different ones in this model that hide something; () = none
  max_documents: int | None  # in a row; None = not known
  num_elements: int  # of the queries
  is_whole: bool  # a device holds all queries of its heads


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  *,
  kind: str,
  windows: Sequence[int] = (),
  layer_window: jax.Array | int = 0,
  max_documents: int | None = None,
) -> jax.Array:
  """Causal attention inside segments, [B, T, N, H]; query head n reads key head n // (N / K).

  Equal segment numbers are neighbours in their row, and no row has more than `max_documents` beside its padding (None: no limit).
  With `windows` a position sees itself and the windows[layer_window] - 1 before it; with none, its whole segment so far.

  Where devices share a row (mesh.context) each gets whole rows of some of the heads by an all-to-all (DeepSpeed-Ulysses,
  2309.14509): all have the same work under causality, and every kernel can be used. Where they are too many for the heads, each
  keeps its queries and gathers all keys and values.
  """
  by_heads = _divides_heads(q_BTNH.shape[2], k_BSKH.shape[2])
  heads, seq = ("all_heads", None) if by_heads else ("heads", "seq")
  if by_heads:
    k_BSKH, v_BSKH = _repeat(k_BSKH), _repeat(v_BSKH)
  of_keys = ("batch", None, "all_heads" if by_heads else "kv_heads", None)
  row_len = k_BSKH.shape[1]
  windows = tuple(min(window, row_len) for window in windows)
  call = Call(
    platform=mesh_lib.platform(),
    dtype=q_BTNH.dtype.name,
    row_len=row_len,
    head_dim=q_BTNH.shape[3],
    windows=windows,
    max_documents=max_documents,
    num_elements=q_BTNH.size // (mesh_lib.num_parts("batch") * mesh_lib.num_parts("all_heads")),
    is_whole=by_heads,
  )
  run = mesh_lib.per_device(
    functools.partial(_local, call=call, implementation=choose(kind, call)),
    inputs=(("batch", seq, heads, None), of_keys, of_keys, ("batch", seq), ("batch", None), ()),
    output=("batch", seq, heads, None),
  )
  q_BTNH = mesh_lib.constrain(q_BTNH, "batch", seq, heads, None)
  k_BSKH, v_BSKH = mesh_lib.constrain(k_BSKH, *of_keys), mesh_lib.constrain(v_BSKH, *of_keys)
  segments = (mesh_lib.constrain(segments_BT, "batch", seq), mesh_lib.constrain(segments_BT, "batch", None))
  out_BTNH = run(q_BTNH, k_BSKH, v_BSKH, *segments, jnp.asarray(layer_window, jnp.int32))
  return mesh_lib.constrain(out_BTNH, "batch", "seq", "heads", None)


def _divides_heads(num_heads: int, num_kv_heads: int) -> bool:
  """Can the devices that share a row share its heads instead, each with the key heads that its queries read."""
  shares = mesh_lib.axis_size("tensor") * mesh_lib.axis_size("context")
  return num_heads % shares == 0 and (num_kv_heads % shares == 0 or shares % num_kv_heads == 0)


def _repeat(x_BSKH: jax.Array) -> jax.Array:
  """Each key head as often as devices need it."""
  times = max(1, mesh_lib.axis_size("tensor") * mesh_lib.axis_size("context") // x_BSKH.shape[2])
  if times == 1:
    return x_BSKH
  rows, row_len, num_kv_heads, head_dim = x_BSKH.shape
  repeated = jnp.broadcast_to(x_BSKH[:, :, :, None], (rows, row_len, num_kv_heads, times, head_dim))
  return mesh_lib.reshape(repeated, (rows, row_len, num_kv_heads * times, head_dim), to=("batch", "seq", "kv_heads", None))


def choose(kind: str, call: Call) -> str:
  """The implementation that runs: the one asked for, or else the first of "auto" that can, with a warning that says why.

  The order on GPUs is that of tools/bench/bench_gpu.py on an H200 (docs/results/gpu.md). On CPU (2 cores, B16 T256 N4 K2 H32,
  forward and backward) `plain` takes 96-128 ms, `jax.nn.dot_product_attention` 140 ms and `blockwise` 27 ms, since it skips what
  causality hides and its scores stay in the cache.
  """
  preferred = _PREFERRED[call.platform]
  reasons = []
  for name in preferred if kind == "auto" else (kind, *preferred):
    reason = why_not(name, call)
    if not reason:
      break
    reasons.append(f"{name} cannot run here: {reason}")
  # A choice among fused kernels is nobody's concern; one that was asked for and is not taken, and the lack of any, are.
  if reasons and (kind != "auto" or name == "blockwise"):
    _warn(f"model.attention={kind}: attention is computed by {name}, since {'; '.join(reasons)}")
  return name


def why_not(name: str, call: Call) -> str:
  """Why an implementation cannot do this; "" if it can."""
  if name in ("plain", "blockwise"):
    return ""
  wanted = "tpu" if name == "splash" else "gpu"
  if call.platform != wanted:
    return f"it is for {wanted.upper()}s and this is a {call.platform.upper()}"
  if name != "splash" and call.dtype not in ("bfloat16", "float16"):
    return f"it computes in bfloat16 and model.compute_dtype is {call.dtype}"
  if name != "flash" and not call.is_whole:
    return "mesh.tensor x mesh.context does not divide the model's heads, so no device holds whole rows"
  if name == "cudnn":
    return _why_not_cudnn(call)
  if call.row_len % _MULTIPLE:
    return f"data.row_len={call.row_len} is no multiple of {_MULTIPLE}"
  if name == "flash" and call.head_dim not in (16, 32, 64, 128, 256):
    return f"the head size {call.head_dim} is no power of 2 from 16 to 256"
  return ""


# cuDNN takes time for every document that a row might hold, flash for what the documents see: on an H200, rows of 4,096 with 4
# documents take cuDNN 1.9 ms and flash 2.3 (heads of 64; 2.6 and 3.6 of 128), with 16 documents 1.3 and 1.0 (2.0 and 1.8).
_CUDNN_DOCUMENTS = 8


def _why_not_cudnn(call: Call) -> str:
  if call.head_dim % 8 or call.head_dim > 128:
    return f"the head size {call.head_dim} is no multiple of 8 up to 128"
  if len(call.windows) > 1:
    return "layers with different windows are one program"
  if call.max_documents is None:
    return "how many documents a row may hold is not known"
  if call.max_documents > _CUDNN_DOCUMENTS:
    return f"a row may hold {call.max_documents} documents, and flash is faster above {_CUDNN_DOCUMENTS}"
  if call.max_documents > 1 and call.num_elements > np.iinfo(np.int32).max:
    return f"the {call.num_elements:,} elements of the queries on a device are more than its 32-bit offsets of documents reach"
  return cudnn.why_not()


@functools.cache  # once for each text
def _warn(text: str) -> None:
  warnings.warn(text, stacklevel=3)


def _local(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, layer_window, *, call: Call, implementation: str) -> jax.Array:
  segments = (q_segments_BT, k_segments_BS)
  if implementation == "cudnn":
    assert call.max_documents is not None  # or why_not had something to say
    window = call.windows[0] if call.windows else None
    return cudnn.attend(q_BTNH, k_BSKH, v_BSKH, k_segments_BS, window=window, max_documents=call.max_documents)
  if implementation == "splash":
    from cpt_jax.model import splash

    kernels = [functools.partial(splash.splash, window=window) for window in call.windows or (None,)]
    return jax.lax.switch(layer_window, kernels, q_BTNH, k_BSKH, v_BSKH, k_segments_BS)
  start = 0 if call.is_whole else mesh_lib.first_position(q_BTNH.shape[1])
  window = jnp.asarray(call.windows, jnp.int32)[layer_window] if call.windows else call.row_len
  function = {"plain": plain, "blockwise": blockwise.blockwise}.get(implementation)
  if function is None:
    from cpt_jax.model import flash

    function = flash.flash
  return function(q_BTNH, k_BSKH, v_BSKH, *segments, start=start, window=window)


def plain(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, *, start, window) -> jax.Array:
  """All scores at once. `start` is the position of the first query in the row."""
  num_kv_heads, head_dim = k_BSKH.shape[2:]
  q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], num_kv_heads, -1, head_dim)
  scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  q_T, k_S = start + jnp.arange(q_segments_BT.shape[1]), jnp.arange(k_segments_BS.shape[1])
  mask_BTS = visible(q_segments_BT, k_segments_BS, q_T, k_S, window=window)
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS / math.sqrt(head_dim), HIDDEN)
  probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return checkpoint_name(jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(q_BTNH.shape), KEPT)
