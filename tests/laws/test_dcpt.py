"""The D-CPT law: gradients and recovery."""

import law_checks
import numpy as np
import pytest

from cpt_jax.laws import dcpt

DOMAIN = [1.2, 1.0, 0.1, 0.3, 0.25, np.log(0.05), 0.6]  # E B C, eta beta ln_eps gamma


@pytest.mark.parametrize(
  "law,theta_P",
  [
    (dcpt.DCpt(role="domain", tokens0=2e5), DOMAIN),
    (dcpt.DCpt(role="replay", tokens0=2e5), DOMAIN),
    (dcpt.DCptRate(role="replay", rate0=8e-4, tokens0=2e5), [*DOMAIN, 0.9]),
  ],
)
def test_gradient(law, theta_P):
  law_checks.assert_gradient(law, theta_P, law_checks.grid())  # has cells without replay: r = 0


def test_recovery():
  law_checks.assert_recovers(
    dcpt.DCpt(role="domain", tokens0=2e5), DOMAIN, law_checks.grid(), law_checks.dense(), within=1.5, num_starts=3
  )
  with_rate = dcpt.DCptRate(role="replay", rate0=8e-4, tokens0=2e5)
  law_checks.assert_recovers(with_rate, [*DOMAIN, 0.9], law_checks.grid(), law_checks.dense(), within=1.5, num_starts=3)
