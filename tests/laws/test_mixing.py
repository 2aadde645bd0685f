"""The data mixing law: its form, gradients and recovery over three sources."""

import law_checks
import numpy as np
import pytest

from cpt_jax.laws import mixing

NAMES = ("share:en", "share:zh")  # code takes the rest


def mixtures(num: int, seed: int) -> dict[str, np.ndarray]:
  shares = np.random.default_rng(seed).dirichlet([1.5, 1.5, 1.5], num)
  return {"share:en": shares[:, 0], "share:zh": shares[:, 1]}


def test_by_hand():
  law = mixing.Mixing(names=NAMES)
  inputs = {"share:en": np.array([0.5]), "share:zh": np.array([0.25])}
  assert law.predict(np.array([2.0, 1.5, -2.0, 0.4]), inputs)[0] == pytest.approx(2 + 1.5 * np.exp(-1.0 + 0.1))
  assert law.parameters == ("c", "k", "t_share:en", "t_share:zh")


@pytest.mark.parametrize(
  "law,theta_P",
  [
    (mixing.Mixing(names=NAMES), [2.0, 1.5, -2.0, 0.4]),
    (mixing.MixingRate(names=NAMES, rate0=8e-4, tokens0=2e5), [2.0, 1.5, -2.0, 0.4, 0.5, -0.2]),
    (mixing.MixingRate(rate0=8e-4, tokens0=2e5), [2.0, 1.5, -2.0, 0.5, -0.2]),
  ],
)
def test_gradient_and_recovery(law, theta_P):
  inputs = law_checks.grid() | mixtures(60, 2)
  law_checks.assert_gradient(law, theta_P, inputs)
  law_checks.assert_recovers(law, theta_P, inputs, law_checks.dense() | mixtures(144, 3), noise=0.004, within=2, num_starts=4)
