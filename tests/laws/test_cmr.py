"""The critical mixture ratio: the published table and curve, gradients, recovery, and the ratio from fitted runs."""

import law_checks
import numpy as np
import pytest

from cpt_jax.config import ConfigError
from cpt_jax.laws import cmr, transfer
from cpt_jax.laws import fit as fit_lib
from cpt_jax.laws.separable import TOLERANCE

# 2407.17467, finance: (a4, s4, b3) of R(T) = a4 T^s4 + b3, T in 0.2B tokens; and the ratio that the paper prints for 20B tokens.
TABLE = {
  "460M": ((0.22524761, 0.26944345, -0.48139982), 0.298),
  "940M": ((0.7520627, 0.13720245, -1.06581937), 0.349),
  "1.6B": ((-2.36384831, -0.15125569, 1.59223649), 0.414),
  "3.1B": ((-2.5368197, -0.42071423, 0.84375368), 0.478),
}
# Domain loss at domain shares 1, .75, .5, .333 and .25.
SHARES = np.array([1.0, 0.75, 0.5, 0.333, 0.25])
DOMAIN = {
  "460M": [1.4628, 1.4844, 1.5122, 1.5387, 1.5561],
  "940M": [1.3723, 1.3910, 1.4155, 1.4385, 1.4538],
  "1.6B": [1.3242, 1.3416, 1.3643, 1.3854, 1.3994],
  "3.1B": [1.2585, 1.2750, 1.2965, 1.3170, 1.3305],
}


@pytest.mark.parametrize("size", TABLE)
def test_the_published_ratios(size):
  (a, s, b), printed = TABLE[size]
  ratio = cmr.PowerCurve(column="tokens").predict(np.array([b, a, s]), {"tokens": np.array([100.0])})
  assert round(float(ratio[0]), 3) == printed


@pytest.mark.parametrize("size", DOMAIN)
def test_four_shares_predict_the_fifth(size):
  losses = np.array(DOMAIN[size])
  fitted = fit_lib.fit(
    cmr.PowerCurve(column="share"), {"share": SHARES[:4]}, losses[:4], num_starts=3, seed=0, tolerance=TOLERANCE
  )
  predicted = fitted.predict({"share": SHARES[4:]})
  assert abs(predicted[0] / losses[4] - 1) <= 5e-4


T = np.concatenate([np.arange(1.0, 20), np.arange(20.0, 101, 5)])
CURVES = [
  (cmr.PowerCurve(column="tokens"), [0.3, 0.2, 0.4]),
  (cmr.DomainChange(), [-0.9, 0.8, -0.3]),
  (cmr.GeneralChange(), [-0.05, -0.25, 0.3, -0.4, 0.15]),
]


@pytest.mark.parametrize("law,theta_P", CURVES, ids=[law.name for law, _ in CURVES])
def test_gradient_and_recovery(law, theta_P):
  inputs = {"tokens": T, "base": np.full_like(T, 2.2)}
  law_checks.assert_gradient(law, theta_P, inputs)
  law_checks.assert_recovers(
    law, theta_P, inputs, {"tokens": np.arange(2.5, 200), "base": np.full(198, 2.2)}, noise=0.002, within=2, num_starts=3
  )


def test_ratio_from_fitted_runs():
  """Runs whose true rise is known: 0.3 R^2 T^.1 - .02, so the ratio is sqrt((rise + .02) / (.3 T^.1))."""
  rng = np.random.default_rng(0)
  fits = {}
  inputs = {"tokens": T, "base": np.full_like(T, 2.2)}
  for share in (0.2, 0.35, 0.5, 0.65):
    loss_n = 2.2 + 0.3 * share**2 * T**0.1 - 0.02 + 0.001 * rng.normal(size=len(T))
    fits[share] = fit_lib.fit(cmr.GeneralChange(), inputs, loss_n, num_starts=2, seed=0, tolerance=TOLERANCE)
  for tokens in (20.0, 100.0):
    wanted = np.sqrt((cmr.RISE + 0.02) / (0.3 * tokens**0.1))
    assert cmr.critical_ratio(fits, base=2.2, tokens=tokens) == pytest.approx(wanted, abs=0.02)
  with pytest.raises(ConfigError, match="allow at least"):
    cmr.critical_ratio(fits, base=2.2, tokens=20.0, rise=-0.05)
  with pytest.raises(ConfigError, match="at least 2 needed"):
    cmr.critical_ratio({0.2: fits[0.2]}, base=2.2, tokens=20.0)


def test_cross_lingual_exponents():
  """2407.02118: parameters grow as compute^.385 and tokens as compute^.615, from scratch .429 and .571."""
  assert np.round(transfer.compute_exponents(alpha=0.40, beta=0.20, gamma=0.08), 3).tolist() == [0.385, 0.615]
  assert np.round(transfer.compute_exponents(alpha=0.40, beta=0.30), 3).tolist() == [0.429, 0.571]


def test_compute_exponents_are_those_of_the_law():
  """Against a search for the best size at two budgets."""
  law, theta_P = transfer.CrossLingual(), np.array([433.3, 0.20, 0.08])
  best = []
  for compute in (1e20, 1e22):
    params = np.geomspace(1e6, 1e14, 200001)
    losses = law.predict(theta_P, {"params": params, "tokens": compute / 6 / params})
    best.append(params[np.argmin(losses)])
  a = np.log(best[1] / best[0]) / np.log(100)
  assert a == pytest.approx(transfer.compute_exponents(alpha=0.40, beta=0.20, gamma=0.08)[0], abs=1e-3)


def test_cross_lingual_gradient_and_recovery():
  rng = np.random.default_rng(0)
  inputs = {"params": 10 ** rng.uniform(7.5, 9.7, 60), "tokens": 10 ** rng.uniform(9, 11, 60)}
  law, theta_P = transfer.CrossLingual(params0=1e9, tokens0=1e10), [433.3 / (1e10**0.20 * 1e9**0.08), 0.20, 0.08]
  law_checks.assert_gradient(law, theta_P, inputs)
  elsewhere = {"params": np.array([5e8, 5e9]), "tokens": np.array([7e10, 2e11])}
  law_checks.assert_recovers(law, theta_P, inputs, elsewhere, noise=0.01)
  # In the paper's own units the loss is the same.
  own = transfer.CrossLingual().predict(np.array([433.3, 0.20, 0.08]), inputs)
  np.testing.assert_allclose(law.predict(np.array(theta_P), inputs), own, rtol=1e-12)
