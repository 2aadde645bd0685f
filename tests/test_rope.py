"""Rotary angles against float64, at positions where a float32 product has lost them, and Llama 3.1's scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.model import rope
from cpt_jax.model.spec import Llama3Scaling, ModelSpec


def spec(**changes) -> ModelSpec:
  settings = {"head_dim": 16, "rope_theta": 500_000.0, **changes}
  return ModelSpec("llama", 8, 16, 1, 1, 1, mlp_width=8, max_positions=64, **settings)


@pytest.mark.parametrize("theta", [10_000.0, 5_000_000.0])
def test_angles_are_exact_to_float32_rounding_at_large_positions(theta):
  positions = np.array([[0, 1, 1023, 1024, 8191, 131_071, 1_048_575]], np.int32)
  cos, sin = jax.jit(lambda p: rope.tables(spec(rope_theta=theta), p))(positions)
  exact = positions[..., None] * theta ** (-np.arange(0, 16, 2) / 16)
  np.testing.assert_allclose(cos, np.cos(exact), atol=1e-6)
  np.testing.assert_allclose(sin, np.sin(exact), atol=1e-6)
  # The test can fail: the product in float32 is off by more at these positions.
  assert np.abs(np.cos(exact.astype(np.float32)) - np.cos(exact)).max() > 3e-4


def test_llama3_scaling_keeps_short_wavelengths_stretches_long_ones_and_blends_between():
  scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
  plain = rope.frequencies(spec(head_dim=128))
  scaled = rope.frequencies(spec(head_dim=128, rope_scaling=scaling))
  wavelengths = 2 * math.pi / plain
  for frequency, found, wavelength in zip(plain, scaled, wavelengths, strict=True):
    if wavelength < 8192 / 4:
      assert found == pytest.approx(frequency)
    elif wavelength > 8192:
      assert found == pytest.approx(frequency / 8)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      assert found == pytest.approx((1 - smooth) * frequency / 8 + smooth * frequency)
  assert ((scaled < plain) & (scaled > plain / 8)).any()


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
  random = np.random.default_rng(0)
  q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

  def product(q_position, k_position):
    q_rotated, k_rotated = (
      rope.rotate(x, *rope.tables(spec(), jnp.array([[p]], jnp.int32))) for x, p in ((q, q_position), (k, k_position))
    )
    np.testing.assert_allclose(jnp.linalg.norm(q_rotated), jnp.linalg.norm(q), rtol=1e-6)
    return jnp.sum(q_rotated * k_rotated)

  np.testing.assert_allclose(product(70_007, 70_000), product(7, 0), rtol=1e-4)
  assert abs(product(7, 0) - product(6, 0)) > 1e-3
