"""Rotary angles against float64, at positions where a float32 product has lost them, and Llama 3.1's scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.model import rope
from cpt_jax.model.spec import LinearScaling, Llama3Scaling, ModelSpec, YarnScaling, ntk_theta


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


def test_interpolation_stretches_all_wavelengths_alike_and_ntk_only_the_long_ones():
  plain = rope.frequencies(spec())
  np.testing.assert_allclose(rope.frequencies(spec(rope_scaling=LinearScaling(4.0))), plain / 4)
  ntk = rope.frequencies(spec(rope_theta=ntk_theta(500_000.0, factor=4.0, head_dim=16)))
  assert ntk[0] == plain[0] and ntk[-1] == pytest.approx(plain[-1] / 4)
  assert (np.diff(plain / ntk) > 0).all()


# inv_freq of transformers 5.24 (modeling_rope_utils), every fourth of 32 pairs: head_dim 64, base 1e4, factor 8, 4096 original
# positions; test_parity.py computes them anew.
YARN = {
  "as published": (
    YarnScaling(8.0, 4096, 0.1 * math.log(8) + 1),
    [1.0, 0.31622776, 0.1, 0.027365865, 0.0059615388, 0.0010338216, 0.00012500001, 3.9528473e-05],
  ),
  "other bounds": (
    YarnScaling(8.0, 4096, 1.0, 16.0, 2.0, truncate=False),
    [1.0, 0.31622776, 0.1, 0.031622779, 0.0062218891, 0.00043557558, 0.00012500001, 3.9528473e-05],
  ),
}


@pytest.mark.parametrize("which", YARN)
def test_yarn_frequencies_are_those_of_transformers(which):
  scaling, expected = YARN[which]
  found = rope.frequencies(spec(head_dim=64, rope_theta=10_000.0, rope_scaling=scaling))
  np.testing.assert_allclose(found[::4], expected, rtol=2e-6)


def test_yarn_keeps_pairs_that_turn_often_and_multiplies_logits_by_the_square_of_its_factor():
  scaling = YarnScaling(8.0, 4096, attention_factor=0.1 * math.log(8) + 1)
  long = spec(head_dim=64, rope_theta=10_000.0, rope_scaling=scaling)
  plain, scaled = rope.frequencies(spec(head_dim=64, rope_theta=10_000.0)), rope.frequencies(long)
  turns = 4096 * plain / (2 * math.pi)
  assert (scaled == plain)[turns > 64].all()  # the line begins a pair before 32 turns
  np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 8)
  assert ((scaled < plain) & (scaled > plain / 8)).sum() >= 5
  random = np.random.default_rng(0)
  q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))
  at_zero = jnp.zeros((1, 1), jnp.int32)
  rotated = [rope.rotate(x, *rope.tables(long, at_zero)) for x in (q, k)]
  np.testing.assert_allclose(jnp.sum(rotated[0] * rotated[1]), (0.1 * math.log(8) + 1) ** 2 * jnp.sum(q * k), rtol=1e-5)


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
