"""The D-CPT law: the published crossing, its demands on the signs, its two uses, gradients and recovery."""

import law_checks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_jax.config import ConfigError
from cpt_jax.laws import dcpt

# 2406.01375, usage 1: chemistry, 1.8B, 10B tokens: domain share -> general loss; 3% over 2.8602 is the limit.
SHARES = np.array([0.90, 0.91, 0.92, 0.924, 0.93, 0.94, 1.0])
GENERAL = np.array([2.9052, 2.9193, 2.9376, 2.9445, 2.9644, 2.9848, 3.4667])

DOMAIN = [1.2, 1.0, 0.1, 0.3, 0.25, np.log(0.05), 0.6]  # E B C, eta beta ln_eps gamma
SIZES = dcpt.DCpt(role="replay", sizes=True, tokens0=2e5)


def test_the_published_crossing():
  limit = 2.8602 * 1.03
  assert round(limit, 4) == 2.9460
  assert 0.924 < dcpt.crossing(SHARES, GENERAL, limit=limit) < 0.93


@given(st.lists(st.floats(1, 4), min_size=2, max_size=12), st.floats(1, 4))
def test_crossing_is_the_first_time_the_loss_passes_the_limit(losses, limit):
  share_n = np.linspace(0, 1, len(losses))
  if losses[0] > limit:
    with pytest.raises(ConfigError, match="allow at least"):
      dcpt.crossing(share_n, np.array(losses), limit=limit)
    return
  found = dcpt.crossing(share_n[::-1], np.array(losses)[::-1], limit=limit)  # any order of the points
  fine = np.linspace(0, found, 4001)
  assert np.interp(fine, share_n, losses).max() <= limit + 1e-9
  if max(losses) > limit:
    assert np.interp(found, share_n, losses) == pytest.approx(limit)
    after = share_n[share_n > found + 1e-12]
    assert np.interp(min(found + 1e-6, 1), share_n, losses) >= limit - 1e-9 and after.size
  else:
    assert found == 1


def sizes_grid():
  inputs = law_checks.grid()
  inputs["params"] = np.tile([5e5, 1e6, 4e6], 20)
  return inputs


@pytest.mark.parametrize(
  "law,theta_P",
  [
    (dcpt.DCpt(role="domain", tokens0=2e5), DOMAIN),
    (dcpt.DCpt(role="replay", tokens0=2e5), DOMAIN),
    (SIZES, [1.2, 1.0, 0.1, 0.4, 0.3, 0.25, np.log(0.05), 0.6, 0.3]),
    (dcpt.DCptRate(role="replay", rate0=8e-4, tokens0=2e5), [*DOMAIN, 0.9]),
  ],
)
def test_gradient(law, theta_P):
  law_checks.assert_gradient(law, theta_P, sizes_grid())  # has cells without replay: r = 0


def test_recovery():
  law_checks.assert_recovers(
    dcpt.DCpt(role="domain", tokens0=2e5), DOMAIN, law_checks.grid(), law_checks.dense(), within=1.5, num_starts=3
  )
  with_rate = dcpt.DCptRate(role="replay", rate0=8e-4, tokens0=2e5)
  law_checks.assert_recovers(with_rate, [*DOMAIN, 0.9], law_checks.grid(), law_checks.dense(), within=1.5, num_starts=3)
  elsewhere = law_checks.dense() | {"params": np.full(144, 2e6)}
  law_checks.assert_recovers(
    SIZES, [1.2, 1.0, 0.1, 0.4, 0.3, 0.25, np.log(0.05), 0.6, 0.3], sizes_grid(), elsewhere, within=1.5, num_starts=3
  )


def test_signs_against_differences():
  """What `violations` finds is what finite differences of the law's own predictions find."""
  inputs = law_checks.grid()
  law = dcpt.DCpt(role="domain", tokens0=2e5)
  keeps = [1.2, 0.2, 0.5, 0.3, 0.25, np.log(0.05), 1.0]
  assert dcpt.violations(law, np.array(keeps), inputs) == {}
  breaks = [1.2, 2.0, 0.01, 0.8, 0.25, np.log(0.05), 0.5]  # B r^eta / D^beta outgrows C's fall
  found = dcpt.violations(law, np.array(breaks), inputs)
  r = np.linspace(0.5, 1.0, 21)
  tokens = np.geomspace(98304, 4 * 98304 * (1 + 1e-6), 21)
  share_n, tokens_n = (a.ravel() for a in np.meshgrid(r, tokens))

  def loss(share_n, tokens_n):
    return law.predict(np.array(breaks), {"replay": 1 - share_n, "tokens": tokens_n})

  step = 1e-5
  by_share = loss(share_n + step, tokens_n) - loss(share_n - step, tokens_n)
  by_tokens = loss(share_n, tokens_n * (1 + step)) - loss(share_n, tokens_n * (1 - step))
  assert found["dL/dr < 0"] == pytest.approx(np.mean(by_share >= 0))
  assert found["dL/dr < 0"] > 0.5 and (by_tokens < 0).all() and "dL/dD < 0" not in found


def test_usage_1_most_domain_within_a_limit():
  law = dcpt.DCpt(role="replay", tokens0=1e9)
  theta_P = np.array([1.2, 0.2, 0.5, 0.3, 0.25, np.log(0.05), 1.0])  # keeps the paper's signs
  at = {"replay": np.array([1 - 0.8]), "tokens": np.array([1e10])}
  limit = float(law.predict(theta_P, at)[0])
  assert dcpt.most_domain(law, theta_P, tokens=1e10, limit=limit, low=0.2, high=0.99) == pytest.approx(0.8, abs=1e-6)
  with pytest.raises(ConfigError, match="above the limit"):
    dcpt.most_domain(law, theta_P, tokens=1e10, limit=1.0, low=0.2, high=0.99)


def test_usage_2_some_replay_serves_limited_domain_text():
  law = dcpt.DCpt(role="domain", tokens0=1e9)
  theta_P = np.array([0.2, 0.9, 0.15, 0.35, 0.3, np.log(0.05), 0.9])
  share, loss = dcpt.limited_domain(law, theta_P, domain_tokens=5e9, low=0.05, high=1.0)
  shares = np.linspace(0.05, 1, 20001)
  losses = law.predict(theta_P, {"replay": 1 - shares, "tokens": 5e9 / shares})
  assert 0.1 < share < 0.95  # inside: neither all domain nor little
  assert share == pytest.approx(shares[np.argmin(losses)], abs=1e-3) and loss == pytest.approx(losses.min(), abs=1e-9)
  # At the edge where the best lies beyond.
  assert dcpt.limited_domain(law, theta_P, domain_tokens=5e9, low=0.05, high=0.1)[0] == pytest.approx(0.1, rel=1e-3)
