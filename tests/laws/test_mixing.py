"""The data mixing law: its form, gradients, recovery over three sources, and the best mixture against a search of the truth."""

import functools

import law_checks
import numpy as np
import pytest

from cpt_jax.config import ConfigError
from cpt_jax.laws import fit as fit_lib
from cpt_jax.laws import mixing
from cpt_jax.laws.separable import TOLERANCE

NAMES = ("share:en", "share:zh")  # code takes the rest
TRUE = {"en": [2.0, 1.5, -2.0, 0.3], "zh": [1.8, 3.0, 0.2, -3.0], "code": [1.0, 0.6, 1.2, 1.0]}  # c k t_en t_zh


def mixtures(num: int, seed: int) -> dict[str, np.ndarray]:
  shares = np.random.default_rng(seed).dirichlet([1.5, 1.5, 1.5], num)
  return {"share:en": shares[:, 0], "share:zh": shares[:, 1]}


@functools.cache
def fits() -> dict[str, fit_lib.Fit]:
  inputs, rng = mixtures(24, 0), np.random.default_rng(1)  # 24 mixtures, as many as the paper fits three domains to
  law = mixing.Mixing(names=NAMES)
  losses = {source: law.predict(np.array(theta_P), inputs) + 0.004 * rng.normal(size=24) for source, theta_P in TRUE.items()}
  return {
    source: fit_lib.fit(law, inputs, loss_n, num_starts=4, seed=0, delta=2e-3, tolerance=TOLERANCE)
    for source, loss_n in losses.items()
  }


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


@pytest.mark.parametrize("limits", [{}, {"en": 2.85}])
def test_best_mixture(limits):
  weights = {"zh": 0.6, "code": 0.4}
  fitted = fits()
  shares, losses = mixing.best_shares(fitted, weights=weights, limits=limits)
  assert list(shares) == list(NAMES)

  def true(source, en, zh):
    c, k, t_en, t_zh = TRUE[source]
    return c + k * np.exp(t_en * en + t_zh * zh)

  inputs = next(iter(fitted.values())).inputs
  en, zh = (a.ravel() for a in np.meshgrid(*(np.linspace(inputs[n].min(), inputs[n].max(), 301) for n in NAMES)))
  rest = 1 - en - zh
  measured_rest = 1 - inputs["share:en"] - inputs["share:zh"]
  is_inside = (rest >= measured_rest.min()) & (rest <= measured_rest.max())
  for source, limit in limits.items():
    is_inside &= true(source, en, zh) <= limit
  goal = sum(weight * true(source, en, zh) for source, weight in weights.items())
  mine = sum(weight * true(source, shares["share:en"], shares["share:zh"]) for source, weight in weights.items())
  assert mine < goal[is_inside].min() + 0.005  # regret about the noise
  assert losses["zh"] == pytest.approx(true("zh", *shares.values()), abs=0.02)
  if limits:
    assert losses["en"] <= 2.85 and losses["en"] > 2.84  # the limit decides


def test_no_mixture_keeps_the_limit():
  with pytest.raises(ConfigError, match="nats over"):
    mixing.best_shares(fits(), weights={"zh": 1.0}, limits={"en": 1.0})
