"""Tokens -> hidden states -> logits: the decoder, its parameters and their logical axes.

Invariant: parameters are a plain nested dict in float32, layers stacked along their first dimension and scanned; NNX modules
only declare them. Letters of dimensions: cpt_jax/stream/batch.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import layers, rope
from cpt_jax.model.attention import attend
from cpt_jax.model.spec import ModelSpec
from cpt_jax.model.visible import KEPT


class Settings(NamedTuple):
  """How a model is computed; none of it changes what is computed, but for rounding."""

  compute_dtype: Any  # of products and activations; norms, softmax and rotations are float32
  remat: str  # what of each layer is kept for the backward pass, as the config lists it
  attention: str  # the implementation that is asked for, or "auto"
  loss_chunk: int  # positions of each device whose logits exist at once; 0 = all
  max_documents: int | None  # in a row, beside its padding; None = not known
  scan: bool  # the layers are one loop


# What the backward pass finds kept of each layer, by the names that the layer gives; the rest is computed again from its input.
_MLP = ("gate", "up")
_ATTENTION = ("q", "k", "v", KEPT, "out")
_KEPT = {"dots": _ATTENTION + _MLP, "attention_dots": _ATTENTION, "attended": (KEPT,), "full": ()}
_OFFLOAD = "_offload"


def _policy(remat: str) -> Callable[..., Any]:
  """What jax.checkpoint keeps, for a choice of model.remat."""
  policies = jax.checkpoint_policies
  kept = _KEPT[remat.removesuffix(_OFFLOAD)]
  if not remat.endswith(_OFFLOAD):
    return policies.save_only_these_names(*kept)
  return policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=["input", *kept], offload_src="device", offload_dst="pinned_host"
  )


def kept_bytes(spec: ModelSpec, remat: str, *, itemsize: int, tensor: int) -> float:
  """Bytes that a position keeps of each layer on each of `tensor` devices; `itemsize` is that of the compute dtype.

  "none" keeps a little more where queries and keys have norms or biases.
  """
  D, F = spec.width, spec.mlp_width / tensor
  NH, KH = (heads * spec.head_dim / tensor for heads in (spec.num_heads, spec.num_kv_heads))
  log_sums = 4 * spec.num_heads / tensor
  if remat == "none":
    return itemsize * (4 * D + 3 * NH + 2 * KH + 3 * F) + log_sums
  if remat.endswith(_OFFLOAD):
    return 0.0
  widths = {"q": NH, "k": KH, "v": KH, "out": D, "gate": F, "up": F, KEPT: NH}
  kept = _KEPT[remat]
  return itemsize * (D + sum(widths[name] for name in kept)) + (log_sums if KEPT in kept else 0)


def on_platform(remat: str, platform: str) -> str:
  """The same choice of model.remat where it can be had: a CPU's memory is the host's, so there is nowhere else to keep things."""
  return remat.removesuffix(_OFFLOAD) if platform == "cpu" else remat


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, *axes: str) -> nnx.Param:
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=mesh_lib.out(*axes)), axes=axes)


def _constant(value: float, shape: tuple[int, ...], *axes: str) -> nnx.Param:
  return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=mesh_lib.out(*axes)), axes=axes)


class Layers(nnx.Module):
  """The parameters of all layers, each stacked along its first dimension."""

  def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
    L, D, F = spec.num_layers, spec.width, spec.mlp_width
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
    std = spec.init_std
    # 2L branches add to the residual; without this their sum grows with depth (GPT-2, sec. 2.3).
    out_std = std / math.sqrt(2 * L)
    self.attn_norm = _constant(1.0, (L, D), "layers", "embed")
    self.wq = _normal(rngs, (L, D, N, H), std, "layers", "embed", "heads", "head_dim")
    self.wk = _normal(rngs, (L, D, K, H), std, "layers", "embed", "kv_heads", "head_dim")
    self.wv = _normal(rngs, (L, D, K, H), std, "layers", "embed", "kv_heads", "head_dim")
    self.wo = _normal(rngs, (L, N, H, D), out_std, "layers", "heads", "head_dim", "embed")
    if spec.qkv_bias:
      self.bq = _constant(0.0, (L, N, H), "layers", "heads", "head_dim")
      self.bk = _constant(0.0, (L, K, H), "layers", "kv_heads", "head_dim")
      self.bv = _constant(0.0, (L, K, H), "layers", "kv_heads", "head_dim")
    if spec.qk_norm:
      self.q_norm = _constant(1.0, (L, H), "layers", "head_dim")
      self.k_norm = _constant(1.0, (L, H), "layers", "head_dim")
    self.mlp_norm = _constant(1.0, (L, D), "layers", "embed")
    self.w_gate = _normal(rngs, (L, D, F), std, "layers", "embed", "mlp")
    self.w_up = _normal(rngs, (L, D, F), std, "layers", "embed", "mlp")
    self.w_down = _normal(rngs, (L, F, D), out_std, "layers", "mlp", "embed")


class Decoder(nnx.Module):
  """All parameters of the model."""

  def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
    self.embedding = _normal(rngs, (spec.vocab_size, spec.width), spec.init_std, "vocab", "embed")
    self.layers = Layers(spec, rngs=rngs)
    self.final_norm = _constant(1.0, (spec.width,), "embed")
    if not spec.tied:
      self.head = _normal(rngs, (spec.width, spec.vocab_size), spec.init_std, "embed", "vocab")


@functools.partial(jax.jit, static_argnums=0)
def init(spec: ModelSpec, key: jax.Array) -> dict[str, Any]:
  """Random float32 parameters, each device making its own part when a mesh is set. The same key gives the same values to
  rounding on any mesh."""
  return nnx.to_pure_dict(nnx.state(Decoder(spec, rngs=nnx.Rngs(params=key)), nnx.Param))


def abstract_params(spec: ModelSpec) -> dict[str, Any]:
  """Shapes, dtypes and, on the mesh that is set, shardings of the parameters: a tree of ShapeDtypeStruct."""

  def describe(shape_and_axes):
    shape, axes = shape_and_axes
    return mesh_lib.abstract(shape, jnp.float32, *axes)

  return jax.tree.map(describe, declared(spec), is_leaf=lambda x: isinstance(x, tuple))


@functools.lru_cache(maxsize=64)
def declared(spec: ModelSpec) -> dict[str, Any]:
  """(shape, names of its logical axes) of each parameter: a tree of such pairs."""
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    state = nnx.state(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))), nnx.Param)
  tree: dict[str, Any] = {}
  for path, param in nnx.to_flat_state(state):
    branch = tree
    for name in path[:-1]:
      branch = branch.setdefault(str(name), {})
    branch[str(path[-1])] = (param.get_value().shape, param.get_metadata()["axes"])
  return tree


def apply(
  params: dict[str, Any],
  spec: ModelSpec,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  *,
  settings: Settings,
) -> jax.Array:
  """Hidden states after the final norm, [B, T, D] in the compute dtype."""
  tokens_BT, positions_BT, segments_BT = (mesh_lib.constrain(x, "batch", "seq") for x in (tokens_BT, positions_BT, segments_BT))
  rotation = rope.tables(spec, positions_BT)
  # Programs are made for the different windows, and each layer says which is its own.
  windows = [window or tokens_BT.shape[1] for window in spec.windows_at(tokens_BT.shape[1])]
  different = tuple(sorted(set(windows)))
  in_window = functools.partial(
    attend, segments_BT=segments_BT, kind=settings.attention, windows=different, max_documents=settings.max_documents
  )

  def layer(x_BTD, stacked):
    weights, layer_window = stacked
    x_BTD = checkpoint_name(x_BTD, "input")
    x_BTD = x_BTD + _attention(weights, spec, x_BTD, rotation, functools.partial(in_window, layer_window=layer_window))
    normed_BTD = layers.rms_norm(x_BTD, weights["mlp_norm"], eps=spec.norm_eps)
    return x_BTD + layers.swiglu(normed_BTD, weights["w_gate"], weights["w_up"], weights["w_down"]), None

  if settings.remat != "none":
    layer = jax.checkpoint(layer, policy=_policy(settings.remat), prevent_cse=False)
  hidden_BTD = layers.embed(params["embedding"], tokens_BT, dtype=settings.compute_dtype)
  layer_windows = [different.index(w) for w in windows] or [0] * spec.num_layers
  if settings.scan:
    hidden_BTD, _ = jax.lax.scan(layer, hidden_BTD, (params["layers"], jnp.asarray(layer_windows, jnp.int32)))
  else:
    for stacked in zip(_unstacked(params["layers"], spec.num_layers), layer_windows, strict=True):
      hidden_BTD, _ = layer(hidden_BTD, stacked)
  return layers.rms_norm(hidden_BTD, params["final_norm"], eps=spec.norm_eps)


def _unstacked(stacked: dict[str, jax.Array], num_layers: int) -> list[dict[str, jax.Array]]:
  """[L, ...] each -> the parameters of each layer, [...].

  A split, whose gradient is one concatenation; that of an index is a whole stack of zeros.
  """
  parts = {name: jax.lax.split(x, (1,) * num_layers) for name, x in stacked.items()}
  return [{name: parts[name][index].squeeze(0) for name in stacked} for index in range(num_layers)]


def _attention(weights, spec: ModelSpec, x_BTD, rotation, attend: Callable[..., jax.Array]) -> jax.Array:
  normed_BTD = layers.rms_norm(x_BTD, weights["attn_norm"], eps=spec.norm_eps)
  q_BTNH = layers.project("BTD,DNH->BTNH", ("embed", "heads", "head_dim"), None, normed_BTD, weights["wq"])
  k_BTKH = layers.project("BTD,DKH->BTKH", ("embed", "kv_heads", "head_dim"), None, normed_BTD, weights["wk"])
  v_BTKH = layers.project("BTD,DKH->BTKH", ("embed", "kv_heads", "head_dim"), None, normed_BTD, weights["wv"])
  if spec.qkv_bias:
    bq_NH, bk_KH, bv_KH = (weights[name].astype(x_BTD.dtype) for name in ("bq", "bk", "bv"))
    q_BTNH, k_BTKH, v_BTKH = q_BTNH + bq_NH[None, None], k_BTKH + bk_KH[None, None], v_BTKH + bv_KH[None, None]
  q_BTNH, k_BTKH, v_BTKH = checkpoint_name(q_BTNH, "q"), checkpoint_name(k_BTKH, "k"), checkpoint_name(v_BTKH, "v")
  if spec.qk_norm:
    q_BTNH = layers.rms_norm(q_BTNH, weights["q_norm"], eps=spec.norm_eps)
    k_BTKH = layers.rms_norm(k_BTKH, weights["k_norm"], eps=spec.norm_eps)
  q_BTNH, k_BTKH = rope.rotate(q_BTNH, *rotation), rope.rotate(k_BTKH, *rotation)
  out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
  out_BTD = layers.project("BTNH,NHD->BTD", ("heads", "head_dim", "embed"), ("batch", "seq", None), out_BTNH, weights["wo"])
  return checkpoint_name(out_BTD, "out")


def head(params: dict[str, Any], spec: ModelSpec, *, dtype: Any) -> jax.Array:
  """The matrix that turns hidden states into logits, [D, V], gathered and in `dtype`; the embedding where tied."""
  if spec.tied:
    return mesh_lib.gathered(params["embedding"].astype(dtype), "vocab", "embed").T
  return mesh_lib.gathered(params["head"].astype(dtype), "embed", "vocab")


def logits(params: dict[str, Any], spec: ModelSpec, hidden_BTD: jax.Array) -> jax.Array:
  """Scores of the next token, float32 [B, T, V], -inf for padding rows; products in the dtype of the hidden states."""
  head_DV = head(params, spec, dtype=hidden_BTD.dtype)
  logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
  return jnp.where(jnp.arange(spec.vocab_size) < spec.num_ids, logits_BTV, -jnp.inf)
