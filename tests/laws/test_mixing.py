"""The data mixing law: its form, gradients and recovery over three sources."""

import law_checks
import numpy as np
import pytest

from cpt_jax.laws import dcpt

NAMES = ("share:en", "share:zh")  # code takes the rest


def mixtures(num: int, seed: int) -> dict[str, np.ndarray]:
  shares = np.random.default_rng(seed).dirichlet([1.5, 1.5, 1.5], num)
  return {"share:en": shares[:, 0], "share:zh": shares[:, 1]}


def test_by_hand():
  law = dcpt.Mixing(names=NAMES, rate0=1e-3, tokens0=1e6)
  inputs = {"share:en": 0.5, "share:zh": 0.25, "rate": 2e-3, "tokens": 3e6, "base": 9.0}
  inputs = {name: np.array([value]) for name, value in inputs.items()}
  expected = 2 + 1.5 * np.exp(-1.0 + 0.1) * 2**0.5 * 3**-0.2
  assert law.predict(np.array([2.0, 1.5, -2.0, 0.4, 0.5, -0.2]), inputs)[0] == pytest.approx(expected)
  assert law.parameters == ("c", "k", "t_share:en", "t_share:zh", "u", "v")


@pytest.mark.parametrize(
  "law,theta_P",
  [
    (dcpt.Mixing(names=NAMES, rate0=8e-4, tokens0=2e5), [2.0, 1.5, -2.0, 0.4, 0.5, -0.2]),
    (dcpt.Mixing(rate0=8e-4, tokens0=2e5), [2.0, 1.5, -2.0, 0.5, -0.2]),
  ],
)
def test_gradient_and_recovery(law, theta_P):
  inputs = law_checks.grid() | mixtures(60, 2)
  law_checks.assert_gradient(law, theta_P, inputs)
  law_checks.assert_recovers(law, theta_P, inputs, law_checks.dense() | mixtures(144, 3), noise=0.004, within=2, num_starts=4)
