"""config.json -> ModelSpec: what transformers means by a file, and an error for everything that is not understood."""

import copy
import dataclasses
import json
import math

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from cpt_jax import trees
from cpt_jax.config import ConfigError
from cpt_jax.model import spec as spec_lib, transformer
from cpt_jax.model.spec import LinearScaling, Llama3Scaling, ModelSpec, YarnScaling, from_hf, load_hf_config

# As published, in the form of transformers 4.
LLAMA_31_8B = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 128000,
  "eos_token_id": 128001,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "initializer_range": 0.02,
  "intermediate_size": 14336,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.43.0.dev0",
  "use_cache": True,
  "vocab_size": 128256,
}
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def small(family: str = "llama", **changes) -> dict:
  return {**SMALL, "model_type": family, **changes}


def test_llama_31():
  spec = from_hf(LLAMA_31_8B)
  assert spec == ModelSpec(
    family="llama",
    vocab_size=128256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    max_positions=131072,
    rope_theta=500000.0,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192),
    norm_eps=1e-5,
  )
  assert spec_lib.num_parameters(spec) == 8_030_261_248  # the published count


def test_the_two_forms_of_rope_settings_mean_the_same():
  new = copy.deepcopy(LLAMA_31_8B)
  scaling = new.pop("rope_scaling")
  new["rope_parameters"] = {**scaling, "rope_theta": new.pop("rope_theta")}
  new["dtype"] = new.pop("torch_dtype")
  assert from_hf(new) == from_hf(LLAMA_31_8B)
  assert from_hf(small(rope_scaling=None, rope_theta=5.0)).rope_theta == 5.0
  assert from_hf(small(rope_parameters={"rope_type": "default", "rope_theta": 7.0})).rope_theta == 7.0
  assert from_hf(small()).rope_theta == 10_000.0


def test_yarn_settings_mean_what_they_mean_to_transformers():
  read = lambda **settings: from_hf(small(rope_scaling={"type": "yarn", "factor": 4.0, **settings})).rope_scaling  # noqa: E731
  plain = YarnScaling(4.0, 2048, attention_factor=0.1 * math.log(4) + 1)
  assert read() == read(beta_fast=None, beta_slow=32 / 32, mscale=2.0) == plain  # mscale counts with mscale_all_dim alone
  assert read(original_max_position_embeddings=512).original_positions == 512
  assert read(attention_factor=1.5, mscale=0.7, mscale_all_dim=1.0).attention_factor == 1.5
  both = read(mscale=0.707, mscale_all_dim=1.0)
  assert both.attention_factor == pytest.approx((0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
  assert read(factor=0.5).attention_factor == 1.0


@pytest.mark.parametrize(
  "scaling", [None, LinearScaling(4.0), YarnScaling(8.0, 32, 1.25, 24.0, 2.0, False), Llama3Scaling(8.0, 1.0, 4.0, 32)]
)
def test_scalings_come_back_from_the_form_of_a_file(scaling):
  assert from_hf(small(rope_scaling=spec_lib.scaling_to_hf(scaling))).rope_scaling == scaling


# What transformers takes for a key that is absent differs by family.
@pytest.mark.parametrize(
  ("family", "kv_heads", "head_dim", "windows", "positions"),
  [
    ("llama", 4, 4, (), 2048),
    ("qwen3", None, 128, (), 32768),
    ("qwen2", None, 4, (), 32768),
    ("mistral", None, 4, (4096,) * 2, 131072),
  ],
)
def test_absent_keys_mean_what_transformers_means(family, kv_heads, head_dim, windows, positions):
  given = {} if kv_heads else {"num_key_value_heads": 2}
  spec = from_hf(small(family, **given))
  found = (spec.num_kv_heads, spec.head_dim, spec.windows, spec.max_positions, spec.tied, spec.norm_eps)
  assert found == (kv_heads or 2, head_dim, windows, positions, False, 1e-6)


def test_mistral_without_kv_heads_has_8_and_with_null_as_many_as_queries():
  with pytest.raises(ConfigError, match="num_key_value_heads=8: must divide num_attention_heads=4"):
    from_hf(small("mistral"))
  assert from_hf(small("mistral", num_key_value_heads=None)).num_kv_heads == 4


def test_windows():
  assert from_hf(small("mistral", num_key_value_heads=2, sliding_window=None)).windows == ()
  qwen = small("qwen2", num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1)
  assert from_hf(qwen).windows == (0, 8)
  assert from_hf({**qwen, "layer_types": ["sliding_attention", "full_attention"]}).windows == (8, 0)
  assert from_hf({**qwen, "max_window_layers": 2}).windows == ()
  spec = from_hf(qwen)
  assert spec.windows_at(9) == (0, 8)
  assert spec.windows_at(8) == ()


def test_smollm2_in_its_published_form():
  extra = {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "initializer_range": 0.041666666666666664}
  assert from_hf(small(**extra)).init_std == 0.041666666666666664


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2"}, r"model_type='gpt2' is not supported; cpt_jax reads llama, mistral, qwen2, qwen3"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu': expected 'silu'"),
    ({"mlp_bias": True}, r"mlp_bias=True: not supported"),
    ({"auto_map": {"AutoModel": "x.py"}}, r"auto_map=.*code that comes with a model is never run"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config=.*not supported"),
    ({"logit_scale": 2.0}, r"logit_scale=2\.0: not known to cpt_jax"),
    ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=.*must be \['LlamaForCausalLM'\]"),
    ({"rope_scaling": {"rope_type": "longrope"}}, r"'longrope': not supported; cpt_jax reads default, linear, yarn, llama3"),
    ({"rope_scaling": {"type": "linear"}}, r"rope_scaling: factor: expected a number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 3}}, r"beta_fast=3: not known for rope_type 'linear'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 32}}, r"beta_slow=32: must be below beta_fast=32"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, r"truncate=1: expected true or false"),
    (
      {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "head_dim": 64, "max_position_embeddings": 2048},
      r"dynamic.*up to 2048 it is the default.*rope_theta=20452\.2 for rows up to 4096",  # 10000 * 2^(64/62)
    ),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, r"low_freq_factor: expected a number above 0"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"factor=2\.0: not known for rope_type 'default'"),
    (
      {"rope_scaling": LLAMA_31_8B["rope_scaling"], "original_max_position_embeddings": 4096},
      r"original_max_position_embeddings=8192: differs from the 4096 outside of it",
    ),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5: not supported"),
    ({"rope_theta": "big"}, r"rope_theta='big': expected a number above 0"),
    ({"head_dim": 5}, r"head_dim=5: rotary positions need an even head size"),
    ({"num_attention_heads": 3}, r"num_attention_heads=3: does not divide hidden_size=16; give head_dim"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads=3: must divide num_attention_heads=4"),
    ({"vocab_size": 0}, r"vocab_size=0: expected a whole number above 0"),
    ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes': expected true or false"),
    ({"sliding_window": 4}, r"sliding_window=4: a llama model has no sliding window"),
  ],
)
def test_what_is_not_supported_is_named(changes, message):
  with pytest.raises(ConfigError, match=message):
    from_hf(small(**changes), where="base/config.json")


def test_every_problem_is_reported_at_once():
  wrong = small(hidden_act="gelu", logit_scale=2.0, rms_norm_eps=-1)
  del wrong["vocab_size"]
  with pytest.raises(ConfigError) as error:
    from_hf(wrong, where="base/config.json")
  lines = str(error.value).splitlines()[1:]
  assert len(lines) == 4
  assert all(line.strip().startswith("base/config.json: ") for line in lines)


@hypothesis.given(st.text(min_size=1), st.one_of(st.booleans(), st.floats(allow_nan=False), st.text()))
def test_no_unknown_key_passes(key, value):
  hypothesis.assume(key not in spec_lib._PARSED | spec_lib._HARMLESS | set(spec_lib._NEUTRAL))
  with pytest.raises(ConfigError, match="not known to cpt_jax"):
    from_hf(small(**{key: value}))


def test_load_hf_config_reads_a_directory_or_a_file(tmp_path):
  file = tmp_path / "config.json"
  file.write_text(json.dumps(SMALL))
  assert load_hf_config(tmp_path) == load_hf_config(file) == SMALL


@pytest.mark.parametrize(("text", "message"), [(None, "no such file"), ("{", "no valid JSON"), ("[1]", "expected a JSON object")])
def test_load_hf_config_names_the_file_that_is_wrong(tmp_path, text, message):
  file = tmp_path / "config.json"
  if text is not None:
    file.write_text(text)
  with pytest.raises(ConfigError, match=message) as error:
    load_hf_config(file)
  assert str(file) in str(error.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_counts_the_tree(family, tied):
  spec = from_hf(small(family, num_key_value_heads=2, head_dim=6, tie_word_embeddings=tied))
  leaves = jax.tree.leaves(transformer.abstract_params(spec))
  assert spec_lib.num_parameters(spec) == sum(math.prod(leaf.shape) for leaf in leaves)


def test_flops_per_token():
  spec = from_hf(LLAMA_31_8B)
  products = 6 * (8_030_261_248 - 128256 * 4096 - 65 * 4096)  # all parameters but the embedding and the norms
  causal, palm = spec_lib.flops_per_token(spec, 8192, frozen=())
  assert causal == products + 6 * 32 * 4096 * 8192
  assert palm == products + 12 * 32 * 4096 * 8192
  windowed = from_hf(small("mistral", num_key_value_heads=2, sliding_window=4))
  products = 6 * sum(spec_lib.matmul_leaves(windowed).values())
  # 2 layers of width 16: in rows of 8 the window takes 4 of 8 keys, of which causality leaves 4 - 16/16 = 3.
  assert spec_lib.flops_per_token(windowed, 8, frozen=()) == (products + 12 * 2 * 16 * 3, products + 12 * 2 * 16 * 4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_matmul_leaves_are_leaves_of_the_tree(family, tied):
  spec = from_hf(small(family, num_key_value_heads=2, head_dim=6, tie_word_embeddings=tied))
  sizes = {path: math.prod(leaf.shape) for path, leaf in trees.paths(transformer.abstract_params(spec)).items()}
  matrices = {path for path in sizes if "norm" not in path and ".b" not in path} - ({"embedding"} if not tied else set())
  assert spec_lib.matmul_leaves(spec) == {path: sizes[path] for path in matrices}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_flops_of_what_is_trained(family):
  spec = from_hf(small(family, num_key_value_heads=2, head_dim=6, tie_word_embeddings=False))
  leaves, T = spec_lib.matmul_leaves(spec), 8
  layers, head = sum(n for path, n in leaves.items() if path != "head"), leaves["head"]
  square = 2 * spec.num_layers * spec.num_heads * spec.head_dim * T  # one product of T queries with all T keys, a query
  count = lambda *frozen: spec_lib.flops_per_token(spec, T, frozen=frozen)[1]  # noqa: E731
  assert count() == count("nothing") == 6 * (layers + head) + 6 * square
  assert count(r"layers\..*") == 4 * layers + 6 * head + 6 * square  # embeddings alone: back through all, no gradients of layers
  assert count(r"layers\..*", "head") == 4 * (layers + head) + 6 * square
  assert count(r"layers\..*", "embedding") == 2 * layers + 6 * head + 2 * square  # norm and head: no way back through layers
  assert count(r"layers\..*", "embedding", "final_norm") == 2 * layers + 4 * head + 2 * square
  assert count(".*norm", r"layers\.[wb].*", "embedding", "head") == 2 * (layers + head) + 2 * square
  assert count("head", "embedding", r"layers\.w.*") == 4 * (layers + head) + 6 * square  # norms of layers
  tied = dataclasses.replace(spec, tied=True)
  assert spec_lib.flops_per_token(tied, T, frozen=(r"layers\..*",))[1] == 4 * layers + 6 * head + 6 * square
