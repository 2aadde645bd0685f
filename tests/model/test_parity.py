"""The same model in transformers: random ones of every architecture, and a real one, by logits, loss and round trip.

`pytest -m parity` with the extra [parity]; with `-m 'parity and materials'` CPT_MATERIALS names a directory that holds smollm2/.
"""

import json
import os
import pathlib
import sys

import factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.model import pretrained, rope, transformer
from cpt_jax.model.spec import from_hf, load_hf_config, ntk_theta

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # torch and transformers have warnings of their own

_COMMON = {"vocab_size": 96, "num_hidden_layers": 3, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0}
# name -> (model_type, config): odd head sizes, one and many key/value heads, tied and untied.
MODELS = {
  "llama": ("llama", {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}),
  "llama_mha": ("llama", {"hidden_size": 36, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 6}),
  "llama31": (
    "llama",
    {
      **{"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 10},
      **{"tie_word_embeddings": True, "max_position_embeddings": 256, "rms_norm_eps": 1e-5},
      "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 500_000.0},
    },
  ),
  "llama_linear": (
    "llama",
    {
      **{"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2},
      "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    },
  ),
  "qwen2_yarn": (
    "qwen2",
    {
      **{"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 2, "num_key_value_heads": 1},
      "rope_parameters": {**_YARN, "original_max_position_embeddings": 16, "rope_theta": 1000.0},
    },
  ),
  "mistral": (
    "mistral",
    {
      **{"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
      "sliding_window": None,
    },
  ),
  "mistral_window": (
    "mistral",
    {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 7},
  ),
  "qwen2": ("qwen2", {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}),
  "qwen2_tied": (
    "qwen2",
    {
      **{"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 1},
      **{"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    },
  ),
  "qwen3": (
    "qwen3",
    {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14},
  ),
  "qwen3_tied": (
    "qwen3",
    {
      **{"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
      "tie_word_embeddings": True,
    },
  ),
}


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
  return pytest.importorskip("transformers")


def random_model(torch, transformers, name):
  """A model whose every parameter is random, biases and norms too: constants would hide a mix-up."""
  model_type, config = MODELS[name]
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **{**_COMMON, **config}))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return model.eval()


def their_logits(torch, model, tokens_BT):
  with torch.no_grad():
    return model(torch.from_numpy(tokens_BT)).logits.float().numpy()


def read_float32(torch, transformers, directory):
  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def load(directory):
  spec = from_hf(load_hf_config(directory))
  return pretrained.load_params(directory, spec, transformer.abstract_params(spec)), spec


def our_logits(params, spec, tokens_BT):
  tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
  B, T = tokens_BT.shape
  positions_BT, segments_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T)), jnp.ones((B, T), jnp.int32)

  @jax.jit
  def run(params):
    hidden_BTD = factory.hidden(params, spec, tokens_BT, positions_BT, segments_BT, compute_dtype=jnp.float32)
    return transformer.logits(params, spec, hidden_BTD)

  return np.asarray(run(params), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_random_models_agree_and_come_back(tmp_path, torch, transformers, name, dtype):
  model = random_model(torch, transformers, name).to(getattr(torch, dtype))
  model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
  assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
  params, spec = load(tmp_path / "theirs")
  tokens_BT = np.random.default_rng(0).integers(0, _COMMON["vocab_size"], (2, 23))
  # Read again: `model.to(bfloat16)` rounds the rotary frequencies too, which belong to no file.
  expected_BTV = their_logits(torch, read_float32(torch, transformers, tmp_path / "theirs"), tokens_BT)
  found_BTV = our_logits(params, spec, tokens_BT)
  # 1e-4 of the largest logit: a logit that happens to be near 0 is a difference of larger ones.
  scale = np.abs(expected_BTV).max()
  assert np.abs(found_BTV - expected_BTV).max() <= 1e-4 * scale
  assert np.abs(expected_BTV).std() > 1e-3  # the comparison is of something

  pretrained.save_params(params, spec, tmp_path / "ours", source_dir=tmp_path / "theirs", max_shard_bytes=20_000)
  again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values()), info
  assert str(again.dtype) == f"torch.{dtype}"
  original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").state_dict()
  found = again.state_dict()
  assert found.keys() == original.keys()
  assert all(torch.equal(found[key], original[key]) and found[key].dtype == original[key].dtype for key in original)
  found_BTV = their_logits(torch, read_float32(torch, transformers, tmp_path / "ours"), tokens_BT)
  np.testing.assert_array_equal(found_BTV, expected_BTV)
  made = again.generate(torch.from_numpy(tokens_BT[:, :5]), max_new_tokens=4, do_sample=False, pad_token_id=0)
  assert made.shape[0] == 2 and made.shape[1] > 5


@pytest.mark.parametrize("name", MODELS)
def test_a_config_made_from_the_spec_means_the_same_to_transformers(tmp_path, torch, transformers, name):
  model = random_model(torch, transformers, name)
  model.save_pretrained(tmp_path / "theirs")
  params, spec = load(tmp_path / "theirs")
  pretrained.save_params(params, spec, tmp_path / "ours")  # as from scratch
  again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values()), info
  tokens_BT = np.random.default_rng(1).integers(0, _COMMON["vocab_size"], (2, 23))
  np.testing.assert_allclose(their_logits(torch, again, tokens_BT), their_logits(torch, model, tokens_BT), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  "scaling",
  [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {**_LLAMA3, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    {
      "rope_type": "yarn",
      "factor": 8.0,
      "original_max_position_embeddings": 512,
      "beta_fast": 16,
      "beta_slow": 2,
      "truncate": False,
    },
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
  ],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_are_those_of_transformers(transformers, scaling, head_dim):
  config = transformers.LlamaConfig(
    hidden_size=2 * head_dim,
    num_attention_heads=2,
    max_position_embeddings=32_768,
    rope_parameters={**scaling, "rope_theta": 5e4},
  )
  theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
  spec = from_hf(config.to_dict())
  np.testing.assert_allclose(rope.frequencies(spec), theirs.inv_freq.numpy(), rtol=2e-6)
  cos_BTC, _ = rope.tables(spec, jnp.zeros((1, 1), jnp.int32))
  np.testing.assert_allclose(cos_BTC, theirs.attention_scaling, rtol=1e-6)


def test_a_base_for_longer_rows_is_the_dynamic_scaling_at_that_length(transformers):
  settings = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e4}
  config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=2048, rope_parameters=settings)
  scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=8192)
  ours = ntk_theta(1e4, factor=4.0, head_dim=64) ** -(np.arange(0, 64, 2) / 64)
  np.testing.assert_allclose(ours, scaled.numpy(), rtol=2e-6)


def test_a_head_beside_tied_embeddings_is_read_as_transformers_reads_it(tmp_path, torch, transformers):
  model = random_model(torch, transformers, "qwen3_tied")
  tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
  assert "lm_head.weight" in tensors
  from safetensors.numpy import save_file

  model.config.save_pretrained(tmp_path)
  tokens_BT = np.random.default_rng(2).integers(0, _COMMON["vocab_size"], (1, 9))
  for left_out in ((), ("model.embed_tokens.weight",), ("lm_head.weight",)):
    save_file({n: v for n, v in tensors.items() if n not in left_out}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = their_logits(torch, transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens_BT)
    ours = our_logits(*load(tmp_path), tokens_BT)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.materials
def test_smollm2_has_the_loss_that_transformers_gives_it(tmp_path, torch, transformers):
  from tokenizers import Tokenizer

  from cpt_jax.model import loss
  from cpt_jax.stream.batch import Batch

  materials = pathlib.Path(os.environ["CPT_MATERIALS"])
  directory, T = materials / "smollm2", 512
  text = sorted((materials / "corpora" / "en").glob("*austen*"))[0].read_text(encoding="utf-8")
  tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text[:20_000]).ids[: 2 * T + 1]
  windows_BT = np.asarray([tokens[:T], tokens[T : 2 * T]], np.int64)
  targets_BT = np.asarray([tokens[1 : T + 1], tokens[T + 1 : 2 * T + 1]], np.int64)
  params, spec = load(directory)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
  theirs_BTV = their_logits(torch, model, windows_BT)
  their_loss = torch.nn.functional.cross_entropy(
    torch.from_numpy(theirs_BTV).double().flatten(0, 1), torch.from_numpy(targets_BT).flatten()
  ).item()

  ours_BTV = our_logits(params, spec, windows_BT)
  assert np.abs(ours_BTV - theirs_BTV).max() <= 1e-4 * np.abs(theirs_BTV).max()
  positions_BT = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  batch = Batch(
    tokens_BT=jnp.asarray(windows_BT, jnp.int32),
    targets_BT=jnp.asarray(targets_BT, jnp.int32),
    weights_BT=jnp.ones((2, T), jnp.float32),
    segments_BT=jnp.ones((2, T), jnp.int32),
    positions_BT=jnp.asarray(positions_BT),
    source_B=jnp.zeros(2, jnp.int32),
  )

  @jax.jit
  def run(params, batch):
    hidden_BTD = factory.hidden(params, spec, batch.tokens_BT, batch.positions_BT, batch.segments_BT, compute_dtype=jnp.float32)
    return loss.sums(params, spec, hidden_BTD, batch, num_sources=1, chunk=128)

  sums = run(params, batch)
  our_loss = float(sums.loss) / float(sums.tokens)
  print(f"SmolLM2-135M on {2 * T} tokens of {text[:40]!r}: ours {our_loss:.6f}, transformers {their_loss:.6f}", file=sys.stderr)
  assert abs(our_loss - their_loss) <= 1e-4 * their_loss

  pretrained.save_params(params, spec, tmp_path / "out", source_dir=directory)
  again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(info.values()), info
  found, expected = again.state_dict(), model.state_dict()
  assert all(torch.equal(found[key], expected[key]) for key in expected)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
  made = again.generate(torch.from_numpy(windows_BT[:1, :16]), max_new_tokens=8, do_sample=False)
  assert made.shape == (1, 24)
