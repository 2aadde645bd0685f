"""A Hugging Face config.json -> ModelSpec: the numbers that define one decoder.

Invariant: a key is parsed, known to be without effect on the mathematics, or an error that names it; so a spec never stands
for a model other than the one the file describes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_jax import hub
from cpt_jax.config import ConfigError, Problems


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """RoPE scaling of Llama 3.1: long wavelengths divided by `factor`, short ones kept, linear between."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_positions: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Position interpolation (2306.15595): every wavelength times `factor`."""

  factor: float


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (2309.00071, sec. 3): by the turns that a pair makes within the original context, and all logits times a constant."""

  factor: float
  original_positions: int
  attention_factor: float  # of cosines and sines, so its square of the logits; the paper's is 0.1 ln factor + 1
  beta_fast: float = 32.0  # with more turns a wavelength is kept
  beta_slow: float = 1.0  # with fewer it is multiplied by factor; a straight line over the pairs between
  truncate: bool = True  # the line begins and ends at whole pairs


Scaling = Llama3Scaling | LinearScaling | YarnScaling


def ntk_theta(theta: float, *, factor: float, head_dim: int) -> float:
  """The base that stretches the longest wavelength by `factor` and the shortest not at all (NTK-aware; 2309.00071 sec. 3.1)."""
  return theta * factor ** (head_dim / (head_dim - 2))


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """One decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

  family: str  # llama, mistral, qwen2, qwen3
  vocab_size: int  # V, rows of the embedding
  width: int  # D
  num_layers: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K, divides N
  head_dim: int  # H, even; not always width / num_heads
  mlp_width: int  # F
  max_positions: int  # longest row that the base was made for
  rope_theta: float = 10_000.0
  rope_scaling: Scaling | None = None
  norm_eps: float = 1e-6
  tied: bool = False  # the head is the embedding
  qkv_bias: bool = False
  qk_norm: bool = False  # RMSNorm over each query's and key's H
  # Sliding window of each layer: a position sees itself and the window - 1 before it; 0 = all. () = all layers see all.
  windows: tuple[int, ...] = ()
  init_std: float = 0.02
  # Ids from here on are padding rows, which no softmax may count; 0 = none. Written by cpt vocab grow.
  true_vocab_size: int = 0
  # Ids from here on belong to pieces that were added; 0 = none was. Written by cpt vocab grow.
  base_vocab_size: int = 0

  @property
  def num_ids(self) -> int:
    """Ids in use: the rows of the embedding without padding."""
    return self.true_vocab_size or self.vocab_size

  @property
  def new_rows(self) -> range | None:
    """The rows of pieces that were added to the base's vocabulary; None without any."""
    return range(self.base_vocab_size, self.num_ids) if self.base_vocab_size else None

  def windows_at(self, row_len: int) -> tuple[int, ...]:
    """The windows that hide something in a row of `row_len`: () if none does."""
    return self.windows if any(0 < window < row_len for window in self.windows) else ()


# What transformers takes when the key is absent (its config classes, 5.23).
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
  "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131_072, "sliding_window": 4096},
  "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32_768, "sliding_window": 4096},
  "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768, "sliding_window": 4096},
}
# The same, of all families.
_COMMON_DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "initializer_range": 0.02,
  "hidden_act": "silu",
  "use_sliding_window": False,
  "max_window_layers": 28,
  "true_vocab_size": 0,  # unknown to transformers, which takes all rows for ids
  "base_vocab_size": 0,  # unknown to it, too
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_OTHERS = ("model_type", "architectures", "num_key_value_heads", "head_dim", "max_position_embeddings", "attention_bias")
_PARSED = {*_REQUIRED, *_COMMON_DEFAULTS, *_ROPE, *_WINDOWS, *_OTHERS}
# Keys that would change the mathematics: accepted only with the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  **dict.fromkeys(("mlp_bias", "rope_interleaved", "use_mrope", "is_encoder_decoder", "add_cross_attention"), (False,)),
  **dict.fromkeys(("attention_dropout", "hidden_dropout", "residual_dropout"), (0, None)),
  **dict.fromkeys(("pruned_heads", "per_layer_config", "auto_map"), ({}, None)),
  **dict.fromkeys(("cross_attention_hidden_size", "quantization_config"), (None,)),
}
# Keys that say how a model is stored, described or sampled from.
_HARMLESS = frozenset(
  """
  _name_or_path name_or_path transformers_version torch_dtype dtype use_cache pretraining_tp is_llama_config is_decoder
  transformers.js_config unsloth_fixed unsloth_version bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
  cls_token_id decoder_start_token_id id2label label2id num_labels problem_type finetuning_task output_attentions
  output_hidden_states return_dict return_dict_in_generate output_scores chunk_size_feed_forward tie_encoder_decoder
  tie_last_hidden_states torchscript use_bfloat16 tf_legacy_loss tokenizer_class prefix task_specific_params
  max_sequence_length _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
  _flash_attn_2_enabled max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
  temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
  bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
  exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
  """.split()  # noqa: SIM905
)
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def load_hf_config(path: str | Path) -> dict[str, Any]:
  """Reads config.json from a Hugging Face directory or from the file itself.
  Raises ConfigError: no such file, or one that is no JSON object."""
  file = Path(path)
  file = file / "config.json" if file.is_dir() else file
  if not file.is_file():
    expected = "give a Hugging Face directory that holds config.json, or that file"
    raise ConfigError(f"{file}: no such file; {expected}{hub.how_to_get(path)}")
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
    raise ConfigError(f"{file}: no valid JSON: {error}") from None
  if not isinstance(found, dict):
    raise ConfigError(f"{file}: expected a JSON object, found {type(found).__name__}")
  return found


def from_hf(hf_config: Mapping[str, Any], *, where: str = "config.json") -> ModelSpec:
  """The spec of a Hugging Face configuration; `where` opens every line of an error.
  Raises ConfigError: a line for each key that is missing, wrong, unsupported or unknown."""
  problems = Problems()
  family = hf_config.get("model_type")
  if family not in _DEFAULTS:
    known = ", ".join(_DEFAULTS)
    raise ConfigError(f"{where}: model_type={family!r} is not supported; cpt_jax reads {known}")
  read = _Reader({**_COMMON_DEFAULTS, **_DEFAULTS[family], **hf_config}, where, problems)
  _check_keys(hf_config, family, read)
  width, num_heads = read.count("hidden_size"), read.count("num_attention_heads")
  num_kv_heads = num_heads if read.value("num_key_value_heads") is None else read.count("num_key_value_heads")
  head_dim = _head_dim(read, family, width=width, num_heads=num_heads)
  if num_heads % num_kv_heads:
    read.problem("num_key_value_heads", f"must divide num_attention_heads={num_heads}")
  if head_dim % 2:
    read.problem("head_dim", f"rotary positions need an even head size, found {head_dim}")
  num_layers, max_positions = read.count("num_hidden_layers"), read.count("max_position_embeddings")
  rope_theta, rope_scaling = _rope(read, max_positions, head_dim)
  windows = _windows(read, family, num_layers)
  sizes = {"width": width, "num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
  places = {"max_positions": max_positions, "rope_theta": rope_theta, "rope_scaling": rope_scaling, "windows": windows}
  spec = ModelSpec(
    **{"family": family, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3", **sizes, **places},
    vocab_size=read.count("vocab_size"),
    mlp_width=read.count("intermediate_size"),
    norm_eps=read.number("rms_norm_eps"),
    tied=read.flag("tie_word_embeddings"),
    init_std=read.number("initializer_range"),
    true_vocab_size=read.count("true_vocab_size") if read.value("true_vocab_size") else 0,
    base_vocab_size=read.count("base_vocab_size") if read.value("base_vocab_size") else 0,
  )
  if spec.num_ids > spec.vocab_size:
    read.problem("true_vocab_size", f"must not be above vocab_size={spec.vocab_size}, the rows that there are")
  if spec.base_vocab_size >= spec.num_ids:
    read.problem("base_vocab_size", f"must be below the {spec.num_ids} ids that there are; 0 where no piece was added")
  problems.raise_if_any()
  return spec


def num_parameters(spec: ModelSpec) -> int:
  """Parameters of the model; a tied head counts once."""
  heads = spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
  layer = spec.width * (heads + 3 * spec.mlp_width + 2)
  layer += spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads) if spec.qkv_bias else 0
  layer += 2 * spec.head_dim if spec.qk_norm else 0
  return spec.num_layers * layer + spec.width * (spec.vocab_size * (1 if spec.tied else 2) + 1)


def matmul_leaves(spec: ModelSpec) -> dict[str, int]:
  """Parameters that a token is multiplied with, by the leaf's path: matrices and head, not the embedding's look-up or biases."""
  of_queries, of_keys = (heads * spec.head_dim for heads in (spec.num_heads, spec.num_kv_heads))
  widths = {"wq": of_queries, "wk": of_keys, "wv": of_keys, "wo": of_queries}
  widths |= dict.fromkeys(("w_gate", "w_up", "w_down"), spec.mlp_width)
  leaves = {f"layers.{name}": spec.num_layers * spec.width * width for name, width in widths.items()}
  return leaves | {"embedding" if spec.tied else "head": spec.width * spec.vocab_size}


def flops_per_token(spec: ModelSpec, row_len: int, *, frozen: Sequence[str]) -> tuple[float, float]:
  """Floating point operations of one training step per token, forward and backward, without recomputation: (causal, palm).

  Both are 6 x matmul parameters + attention. `palm` counts the whole attention square (PaLM 2204.02311, appendix B:
  12 x heads x head size x row length per layer), `causal` the half of it that is not masked. A sliding window w counts w keys
  in `palm` and w - w^2 / 2T in `causal`. Documents in a row are not considered.

  Of the 6, 2 are the products forward, 2 the gradients of what goes in, 2 those of the weights. Leaves whose path one of the
  patterns `frozen` matches, as training.step has them, lack the last, and where nothing below is trained the second too: where
  all but the head is frozen, layers are only gone through forward. Leaves that are trained in part count whole.
  """

  def is_trained(path: str) -> bool:
    return not any(re.fullmatch(pattern, path) for pattern in frozen)

  leaves, vectors = matmul_leaves(spec), ["attn_norm", "mlp_norm"]
  vectors += (["bq", "bk", "bv"] if spec.qkv_bias else []) + (["q_norm", "k_norm"] if spec.qk_norm else [])
  in_layers = {path: size for path, size in leaves.items() if path.startswith("layers.")}
  reaches_layers = any(map(is_trained, ("embedding", *in_layers, *(f"layers.{name}" for name in vectors))))
  reaches_head = reaches_layers or is_trained("final_norm")
  forward, of_layers = sum(leaves.values()), sum(in_layers.values())
  products = 2.0 * (forward + sum(size for path, size in leaves.items() if is_trained(path)))
  products += 2.0 * (of_layers * reaches_layers + (forward - of_layers) * reaches_head)
  per_key = (12.0 if reaches_layers else 4.0) * spec.num_heads * spec.head_dim
  keys_causal = keys_palm = 0.0
  for window in spec.windows or (0,) * spec.num_layers:
    keys_palm += min(window or row_len, row_len)
    keys_causal += visible_keys(window, row_len)
  return products + per_key * keys_causal, products + per_key * keys_palm


def visible_keys(window: int, row_len: int) -> float:
  """Keys that a position sees, on average over a row that is one document; window 0 = all before it."""
  keys = min(window or row_len, row_len)
  return keys - keys * keys / (2 * row_len)


class _Reader:
  """Typed access to the keys; a wrong value is noted and replaced by one that lets reading go on."""

  def __init__(self, values: Mapping[str, Any], where: str, problems: Problems):
    self.values, self.where, self.problems = values, where, problems

  def problem(self, key: str, text: str) -> None:
    found = f"{key}={self.values[key]!r}" if key in self.values else key
    self.problems.add(f"{self.where}: {found}: {text}")

  def value(self, key: str) -> Any:
    return self.values.get(key, None)

  def count(self, key: str) -> int:
    value = self.value(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
      return value
    self.problem(key, "missing" if key not in self.values else "expected a whole number above 0")
    return 1

  def number(self, key: str) -> float:
    value = self.value(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
      return float(value)
    self.problem(key, "expected a number above 0")
    return 1.0

  def flag(self, key: str) -> bool:
    value = self.value(key)
    if not isinstance(value, bool):
      self.problem(key, "expected true or false")
    return bool(value)


def _check_keys(hf_config: Mapping[str, Any], family: str, read: _Reader) -> None:
  for key in _REQUIRED:
    if key not in hf_config:
      read.problem(key, "missing")
  for key, value in hf_config.items():
    if key in _NEUTRAL:
      if value not in _NEUTRAL[key]:
        reason = "code that comes with a model is never run" if key == "auto_map" else "not supported"
        read.problem(key, f"{reason}; cpt_jax reads this key only as {' or '.join(map(repr, _NEUTRAL[key]))}")
    elif key not in _PARSED | _HARMLESS:
      read.problem(key, f"not known to cpt_jax, so it might change what a {family} model computes; remove it if it does not")
  expected = ARCHITECTURES[family] + "ForCausalLM"
  if hf_config.get("architectures") not in (None, [], [expected]):
    read.problem("architectures", f"a {family} model must be [{expected!r}]")
  if read.value("hidden_act") not in ("silu", "swish"):
    read.problem("hidden_act", "expected 'silu'")
  # Qwen2 has biases on queries, keys and values whatever this key says; in the others it would add one to the output too.
  biased = family == "qwen2"
  if hf_config.get("attention_bias") not in (None, biased):
    read.problem("attention_bias", f"not supported; a {family} model has {str(biased).lower()} here")


def _head_dim(read: _Reader, family: str, *, width: int, num_heads: int) -> int:
  if read.value("head_dim") is not None or family == "qwen3":
    return read.count("head_dim")
  if width % num_heads:
    read.problem("num_attention_heads", f"does not divide hidden_size={width}; give head_dim")
    return 2
  return width // num_heads


# What transformers reads for each rope_type, beside what it reads for all.
_ROPE_KEYS = {
  "default": set(),
  "linear": {"factor"},
  "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
  "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}


def _rope(read: _Reader, max_positions: int, head_dim: int) -> tuple[float, Scaling | None]:
  # transformers 5 writes rope_parameters; before it, rope_theta and rope_scaling. If both are there, rope_scaling wins, and a
  # theta inside the dict wins over one outside (its convert_rope_params_to_dict).
  key = "rope_scaling" if read.value("rope_scaling") else "rope_parameters"
  found = read.value(key) or {}
  if not isinstance(found, dict):
    read.problem(key, "expected an object")
    return 1.0, None
  inner = _Reader({"rope_theta": 10_000.0, **_outer_rope(read), **found}, f"{read.where}: {key}", read.problems)
  kind_key = "rope_type" if inner.value("rope_type") else "type"
  kind = inner.value(kind_key) or "default"
  theta = inner.number("rope_theta")
  if kind == "dynamic":
    doubled = ntk_theta(theta, factor=2.0, head_dim=max(head_dim, 4))
    inner.problem(
      kind_key,
      f"not supported: its base grows with the length of each text. For rows up to {max_positions} it is the default; "
      f"write that. For longer ones fix the base, e.g. rope_theta={doubled:.6g} for rows up to {2 * max_positions} (NTK)",
    )
    return 1.0, None
  if kind not in _ROPE_KEYS:
    inner.problem(kind_key, f"not supported; cpt_jax reads {', '.join(_ROPE_KEYS)}")
    return 1.0, None
  allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
  for name in found:
    if name not in allowed | _ROPE_KEYS[kind]:
      inner.problem(name, f"not known for rope_type {kind!r}")
  if inner.value("partial_rotary_factor") not in (None, 1):
    inner.problem("partial_rotary_factor", "not supported; expected 1")
  if kind == "default":
    return theta, None
  if kind == "linear":
    return theta, LinearScaling(inner.number("factor"))
  outer = read.value("original_max_position_embeddings")
  if outer is not None and inner.value("original_max_position_embeddings") != outer:
    # Here transformers prefers the outer one, unlike with theta; two different values are a mistake in any case.
    inner.problem("original_max_position_embeddings", f"differs from the {outer} outside of it; keep one of them")
  if inner.value("original_max_position_embeddings") is None:
    original = max_positions
  else:
    original = inner.count("original_max_position_embeddings")
  if kind == "yarn":
    return theta, _yarn(inner, original)
  scaling = Llama3Scaling(
    factor=inner.number("factor"),
    low_freq_factor=inner.number("low_freq_factor"),
    high_freq_factor=inner.number("high_freq_factor"),
    original_positions=original,
  )
  if scaling.low_freq_factor >= scaling.high_freq_factor and not read.problems.lines:
    inner.problem("low_freq_factor", "must be below high_freq_factor")
  return theta, scaling


def _yarn(inner: _Reader, original: int) -> YarnScaling:
  optional = lambda name, otherwise: otherwise if inner.value(name) is None else inner.number(name)  # noqa: E731
  factor = inner.number("factor")
  of_scale = lambda mscale: 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
  # mscale and mscale_all_dim (DeepSeek's) count only together, and only if no attention_factor is given.
  inferred = of_scale(1.0)
  if inner.value("mscale") and inner.value("mscale_all_dim"):
    inferred = of_scale(inner.number("mscale")) / of_scale(inner.number("mscale_all_dim"))
  scaling = YarnScaling(
    factor=factor,
    original_positions=original,
    attention_factor=optional("attention_factor", inferred),
    beta_fast=optional("beta_fast", 32.0),
    beta_slow=optional("beta_slow", 1.0),
    truncate=True if inner.value("truncate") is None else inner.flag("truncate"),
  )
  if scaling.beta_slow >= scaling.beta_fast:
    inner.problem("beta_slow", f"must be below beta_fast={scaling.beta_fast:g}")
  return scaling


def scaling_to_hf(scaling: Scaling | None) -> dict[str, Any] | None:
  """The `rope_scaling` of a Hugging Face configuration; `from_hf` reads it back."""
  if scaling is None:
    return None
  if isinstance(scaling, LinearScaling):
    return {"rope_type": "linear", "factor": scaling.factor}
  made = {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_positions}
  names = ("attention_factor", "beta_fast", "beta_slow", "truncate") if isinstance(scaling, YarnScaling) else ()
  names = names or ("low_freq_factor", "high_freq_factor")
  kind = "yarn" if isinstance(scaling, YarnScaling) else "llama3"
  return {"rope_type": kind, **made, **{name: getattr(scaling, name) for name in names}}


def _outer_rope(read: _Reader) -> dict[str, Any]:
  names = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
  return {name: read.value(name) for name in names if read.value(name) is not None}


def _windows(read: _Reader, family: str, num_layers: int) -> tuple[int, ...]:
  layer_types = read.value("layer_types")
  if family == "llama":
    for key in ("sliding_window", "layer_types"):
      if read.value(key) is not None and set(layer_types or ()) != {"full_attention"}:
        read.problem(key, "a llama model has no sliding window; expected null")
    return ()
  if read.value("sliding_window") is None or (family != "mistral" and not read.flag("use_sliding_window")):
    if "sliding_attention" in (layer_types or ()):
      read.problem("layer_types", "names sliding_attention, but no sliding window is in use")
    return ()
  window = read.count("sliding_window")
  if family == "mistral":
    if layer_types is not None and set(layer_types) != {"sliding_attention"}:
      read.problem("layer_types", "a mistral model with a sliding window has it in every layer")
    return (window,) * num_layers
  if layer_types is None:
    from_layer = read.value("max_window_layers")
    if not isinstance(from_layer, int) or isinstance(from_layer, bool):
      read.problem("max_window_layers", "expected a whole number")
      return ()
    windows = tuple(window if layer >= from_layer else 0 for layer in range(num_layers))
  elif len(layer_types) != num_layers or not set(layer_types) <= {"sliding_attention", "full_attention"}:
    read.problem("layer_types", f"expected {num_layers} of 'full_attention' or 'sliding_attention'")
    return ()
  else:
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
  return windows if any(windows) else ()
