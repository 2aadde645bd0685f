"""What every law of final losses must pass: its gradient against differences, and recovery of predictions from noisy losses."""

import numpy as np

from cpt_jax.laws import fit as fit_lib
from cpt_jax.laws.separable import TOLERANCE

RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
REPLAYS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)


def grid(*, tokens: float = 98304.0, base: float = 3.9) -> dict[str, np.ndarray]:
  """4 rates x 6 replay shares x 2 seeds at one budget, and 12 cells at two and four times that."""
  rows = [(rate, replay, tokens) for rate in RATES for replay in REPLAYS for _ in range(2)]
  rows += [(rate, replay, tokens * k) for k in (2, 4) for rate in RATES[1:3] for replay in (0.01, 0.1, 0.25)]
  rate, replay, tokens_n = np.array(rows).T
  return {"rate": rate, "replay": replay, "tokens": tokens_n, "base": np.full(len(rate), base), "params": np.full(len(rate), 1e6)}


def dense(*, tokens: float = 98304.0, base: float = 3.9, num: int = 12) -> dict[str, np.ndarray]:
  """Settings between those of `grid`, at three times its tokens."""
  rate, replay = (a.ravel() for a in np.meshgrid(np.geomspace(RATES[0], RATES[-1], num), np.linspace(0.004, 0.5, num)))
  ones = np.ones_like(rate)
  return {"rate": rate, "replay": replay, "tokens": 3 * tokens * ones, "base": base * ones, "params": 1e6 * ones}


def assert_gradient(law, theta_P, inputs, *, atol: float = 1e-7) -> None:
  """Every column of the law's gradient equals a central difference."""
  theta_P = np.array(theta_P, np.float64)
  assert len(theta_P) == len(law.parameters) == len(law.bounds)
  gradient_nP = law.gradient(theta_P, inputs)
  for i, name in enumerate(law.parameters):
    step = 1e-5 * max(abs(theta_P[i]), 0.1)
    up, down = theta_P.copy(), theta_P.copy()
    up[i] += step
    down[i] -= step
    wanted_n = (law.predict(up, inputs) - law.predict(down, inputs)) / (2 * step)
    assert np.abs(wanted_n).max() > 0, f"{name} changes nothing here; the test would be vacuous"
    np.testing.assert_allclose(gradient_nP[:, i], wanted_n, rtol=1e-6, atol=atol * np.abs(wanted_n).max(), err_msg=name)


def assert_recovers(law, theta_P, inputs, elsewhere, *, noise: float = 0.005, within: float = 1.0, num_starts: int = 8) -> None:
  """From losses with noise, predictions at other settings lie within `within` times the noise on average, worst 5 times that."""
  true_n = law.predict(np.array(theta_P, np.float64), inputs)
  loss_n = true_n + noise * np.random.default_rng(0).normal(size=len(true_n))
  fitted = fit_lib.fit(law, inputs, loss_n, num_starts=num_starts, seed=0, delta=noise / true_n.mean(), tolerance=TOLERANCE)
  error = np.abs(fitted.predict(elsewhere) - law.predict(np.array(theta_P, np.float64), elsewhere))
  assert error.mean() < within * noise, error.mean()
  assert error.max() < 5 * within * noise, error.max()
