"""Laws of the final losses over rate, replay and tokens: the published replay runs, exact gradients, recovery from noise."""

import law_checks
import numpy as np
import pytest
from hypothesis import given, strategies as st

from cpt_jax.laws import domain, fit as fit_lib, replay
from cpt_jax.laws.separable import TOLERANCE

# Ibrahim et al. 2403.08763, tables 2, 4 and 12, 405M: replay share -> final loss on the Pile, whose base loss is 2.17.
GERMAN = {0.0: 3.56, 0.01: 2.83, 0.05: 2.57, 0.10: 2.46, 0.25: 2.33, 0.50: 2.24}
SLIMPAJAMA = {0.0: 2.44, 0.005: 2.27, 0.01: 2.26, 0.05: 2.23, 0.10: 2.21, 0.50: 2.16}

UNITS = {"rate0": 8e-4, "tokens0": 2e5}
TRUE = [
  (replay.Additive(**UNITS), [0.25, 0.08, 0.05, 0.06, np.log(0.004)]),
  (replay.Multiplicative(**UNITS), [0.05, 0.15, 0.9, 0.3, np.log(0.003)]),
  (replay.Metric(**UNITS), [0.1, -0.05, 0.01, 0.8, 0.3, np.log(0.005)]),
  (replay.Power(**UNITS), [0.01, 0.9, 0.8, 0.3, 0.5, np.log(0.01)]),
  (replay.Balance(**UNITS), [0.01, 0.6, 0.8, 0.3, 0.6, np.log(0.05), 0.4]),
  (replay.Surface(**UNITS), [0.1, 0.1, 0.03, -0.08, 0.02, 0.01, -0.02, np.log(0.01)]),
  (domain.LogGain(**UNITS), [-0.6, 0.2, 0.05, 0.15, 0.2]),
  (domain.Shift(**UNITS), [1.8, 0.03, 1.0, 0.9, 0.6, 0.5]),
  (domain.PowerGain(**UNITS), [-1.5, 0.8, 0.02, 0.5, 0.4, 0.5]),
]
ids = [law.name for law, _ in TRUE]


def runs(table: dict[float, float]) -> tuple[dict[str, np.ndarray], np.ndarray]:
  share = np.array(list(table))
  ones = np.ones_like(share)
  return {"rate": 3e-4 * ones, "tokens": 2e11 * ones, "replay": share, "base": 2.17 * ones}, np.array(list(table.values()))


@pytest.mark.parametrize("table,lowest,r2,worst", [(GERMAN, 0.01, 0.998, 0.012), (SLIMPAJAMA, 0.005, 0.977, 0.008)])
def test_published_forgetting_is_straight_in_the_logarithm_of_replay(table, lowest, r2, worst):
  inputs, loss_n = runs({share: loss for share, loss in table.items() if share >= lowest})
  # rho0 = 0: the plain logarithm; rate and tokens are those of all runs, so their columns are 0.
  columns = replay.Additive(rate0=3e-4, tokens0=2e11).columns(np.array([-np.inf]), inputs)[:, [0, 3]]
  weights = np.linalg.lstsq(columns, loss_n - inputs["base"], rcond=None)[0]
  scores = fit_lib.scores(inputs["base"] + columns @ weights, loss_n)
  assert round(scores.r2, 3) == r2
  assert np.abs(columns @ weights + 2.17 - loss_n).max() <= worst + 5e-4


@pytest.mark.parametrize("table,error", [(GERMAN, 0.02), (SLIMPAJAMA, 0.01)])
def test_one_curve_holds_no_replay_and_half_of_it(table, error):
  """With rho0 the logarithm reaches the run without replay as well; a law without such a bend cannot."""
  inputs, loss_n = runs(table)
  fitted = fit_lib.fit(
    replay.Additive(rate0=3e-4, tokens0=2e11), inputs, loss_n, num_starts=8, seed=0, delta=0.01, tolerance=TOLERANCE
  )
  assert np.abs(fitted.predict(inputs) - loss_n).max() < error
  assert fitted.scores().r2 > 0.99


@pytest.mark.parametrize("law,theta_P", TRUE, ids=ids)
def test_gradient(law, theta_P):
  law_checks.assert_gradient(law, theta_P, law_checks.grid())


@pytest.mark.parametrize("law,theta_P", TRUE, ids=ids)
def test_recovery(law, theta_P):
  law_checks.assert_recovers(law, theta_P, law_checks.grid(), law_checks.dense(), num_starts=4)


def test_forgetting_by_hand():
  one = {name: np.array([value]) for name, value in (("rate", 2e-3), ("tokens", 4e6), ("replay", 0.09), ("base", 3.0))}
  additive = replay.Additive().predict(np.array([0.5, 0.1, 0.2, 0.3, np.log(0.01)]), one)
  assert additive[0] == pytest.approx(3 + 0.5 + 0.1 * np.log(2) + 0.2 * np.log(4) - 0.3 * np.log(0.1))
  product = replay.Multiplicative().predict(np.array([0.5, 0.3, 1.0, 0.5, np.log(0.01)]), one)
  assert product[0] == pytest.approx(3 + 2 * 2 * (0.5 - 0.3 * np.log(0.1)))
  bethune = replay.Power().predict(np.array([0.1, 0.5, 1.0, 0.5, 2.0, np.log(0.01)]), one)
  assert bethune[0] == pytest.approx(3 + 0.1 + 0.5 * 2 * 2 / 10**2)
  shift = domain.Shift().predict(np.array([1.5, 0.1, 0.0, 1.0, 0.0, 1.0]), one)
  assert shift[0] == pytest.approx(3 - 1.5 * (1 - 1 / 9) + 0.2)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_units_do_not_matter(rate_unit, tokens_unit):
  """Least squares over the linear parameters reaches the same predictions whatever the units; shape parameters are kept."""
  inputs = law_checks.grid()
  loss_n = TRUE[1][0].predict(np.array(TRUE[1][1]), inputs) + 0.01 * np.sin(np.arange(60))
  shape = np.array([0.9, 0.3, np.log(0.003)])
  predicted = []
  for law in (replay.Multiplicative(**UNITS), replay.Multiplicative(rate0=8e-4 * rate_unit, tokens0=2e5 * tokens_unit)):
    columns = law.columns(shape, inputs)
    predicted.append(columns @ np.linalg.lstsq(columns, loss_n - inputs["base"], rcond=None)[0])
  np.testing.assert_allclose(*predicted, atol=1e-9)


def test_a_rate_that_is_too_high_shows():
  """The domain's laws have a lowest loss in the rate, so that twice the best rate is predicted to be worse."""
  rate = np.geomspace(1e-4, 1e-1, 200)
  inputs = {"rate": rate, "tokens": np.full(200, 2e5), "replay": np.full(200, 0.1), "base": np.full(200, 6.0)}
  for law, theta_P in TRUE[6:]:
    loss_n = law.predict(np.array(theta_P), inputs)
    assert 0 < int(np.argmin(loss_n)) < 199, law.name
