"""A Hugging Face config.json of a Llama -> seconds of a training step of the same mathematics in PyTorch.

Invariant: float32 weights and moments, products in bfloat16 (autocast), fused AdamW, scaled_dot_product_attention, all
under torch.compile: what a careful person would write.
"""

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, c: dict[str, Any]):
    super().__init__()
    self.heads, self.kv_heads, self.head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    self.qkv = nn.Linear(c["hidden_size"], (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
    self.out = nn.Linear(self.heads * self.head_dim, c["hidden_size"], bias=False)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [B, T, D]."""
    rows, row_len, _ = x.shape
    qkv = self.qkv(x).view(rows, row_len, -1, self.head_dim).transpose(1, 2)
    q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.out(out.transpose(1, 2).reshape(rows, row_len, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  """Rotary positions in float32."""
  first, second = x.float().chunk(2, dim=-1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Layer(nn.Module):
  """One decoder layer."""

  def __init__(self, c: dict[str, Any]):
    super().__init__()
    width, inner, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
    self.attn_norm, self.attn, self.mlp_norm = nn.RMSNorm(width, eps=eps), Attention(c), nn.RMSNorm(width, eps=eps)
    self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
    self.down = nn.Linear(inner, width, bias=False)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [B, T, D]."""
    x = x + self.attn(self.attn_norm(x), cos, sin)
    normed = self.mlp_norm(x)
    return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
  """Tokens and targets -> mean cross-entropy."""

  def __init__(self, c: dict[str, Any]):
    super().__init__()
    self.embedding = nn.Embedding(c["vocab_size"], c["hidden_size"])
    self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
    self.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
    self.head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
    for parameter in self.parameters():
      if parameter.ndim > 1:
        nn.init.normal_(parameter, std=0.02)
    if c["tie_word_embeddings"]:
      self.head.weight = self.embedding.weight
    self.theta, self.head_dim = c["rope_theta"], c["head_dim"]

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[B, T] twice -> []."""
    steps = torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim
    angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device).float(), self.theta**-steps)
    cos, sin = angles.cos(), angles.sin()
    x = self.embedding(tokens).to(torch.bfloat16)
    for layer in self.layers:
      x = layer(x, cos, sin)
    logits = self.head(self.norm(x))
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train(
  c: dict[str, Any], *, rows: int, row_len: int, warm_steps: int, blocks: int, block_steps: int, quick: bool
) -> tuple[list[float], list[float], int]:
  """Mean seconds of a step in each block, first and last loss, and peak bytes of device memory."""
  torch.manual_seed(0)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = Llama(c).to(device)
  decayed = [p for p in model.parameters() if p.ndim > 1]
  groups = [dict(params=decayed, weight_decay=0.1), dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)]
  optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
  loss_of = model if quick else torch.compile(model)
  tokens = torch.randint(c["vocab_size"], (rows, row_len), device=device)
  targets = tokens.roll(-1, dims=1)

  def step() -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
      loss = loss_of(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

  losses = [float(step()) for _ in range(warm_steps)]
  samples = []
  for _ in range(blocks):
    begin = time.perf_counter()
    for _ in range(block_steps):
      loss = step()
    losses.append(float(loss))  # waits for the device
    samples.append((time.perf_counter() - begin) / block_steps)
  return samples, losses, torch.cuda.max_memory_allocated() if device == "cuda" else 0
