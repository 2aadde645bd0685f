"""Randomly initialised transformers models -> small files of config, weights, tokens and logits in tests/golden/.

Invariant: every parameter is random (norms and biases too), so that a part left out or misread moves the logits.
Run by hand, with the extra [parity]: python tools/make_golden_logits.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
SMALL = dict(
  vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
LLAMA3 = dict(
  rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
# Each differs from the others in what it could get wrong: grouped queries, head sizes other than width / heads, tied heads,
# biases, query and key norms, windows that hide something, frequencies that are scaled.
CASES = {
  "llama_plain": (transformers.LlamaConfig, dict(rms_norm_eps=1e-5)),
  "llama_tied": (transformers.LlamaConfig, dict(num_key_value_heads=1, head_dim=10, tie_word_embeddings=True)),
  "llama3_scaled": (transformers.LlamaConfig, dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
  "mistral_full": (transformers.MistralConfig, dict(num_key_value_heads=2, head_dim=8, sliding_window=None)),
  "mistral_window": (transformers.MistralConfig, dict(num_key_value_heads=2, sliding_window=5)),
  "qwen2_tied": (transformers.Qwen2Config, dict(num_key_value_heads=2, tie_word_embeddings=True)),
  "qwen2_window": (
    transformers.Qwen2Config,
    dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=4, max_window_layers=1),
  ),
  "qwen3_untied": (transformers.Qwen3Config, dict(num_key_value_heads=2, head_dim=14)),
  "qwen3_tied": (transformers.Qwen3Config, dict(num_key_value_heads=1, head_dim=6, tie_word_embeddings=True)),
  "llama_linear": (transformers.LlamaConfig, dict(num_key_value_heads=2, rope_parameters=LINEAR)),
  "llama_yarn": (transformers.LlamaConfig, dict(num_key_value_heads=1, head_dim=16, rope_parameters=YARN)),
}
ROWS, ROW_LEN = 2, 16


def make(name: str) -> tuple[dict, dict[str, np.ndarray], np.ndarray, np.ndarray]:
  """Config, state dict, tokens and logits of a case."""
  config_class, changes = CASES[name]
  config = config_class(**{**SMALL, **changes}, attn_implementation="eager")
  seed = list(CASES).index(name)
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      if parameter_name.endswith("norm.weight"):
        parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5))
      else:
        parameter.normal_(std=0.3)
    tokens = torch.randint(config.vocab_size, (ROWS, ROW_LEN))
    logits = model(tokens).logits
  saved = {
    key: value.numpy()
    for key, value in model.state_dict().items()
    if not (config.tie_word_embeddings and key == "lm_head.weight")
  }
  return json.loads(config.to_json_string()), saved, tokens.numpy().astype(np.int32), logits.numpy()


def main() -> None:
  """Writes every case."""
  OUTPUT.mkdir(exist_ok=True)
  for name in CASES:
    config, saved, tokens, logits = make(name)
    weights = {f"weights/{key}": value for key, value in saved.items()}
    file = OUTPUT / f"{name}.npz"
    np.savez_compressed(file, config=np.array(json.dumps(config)), tokens=tokens, logits=logits, **weights)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
