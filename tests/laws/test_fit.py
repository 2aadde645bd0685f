"""The fitting core on laws of three lines: recovery, robustness, determinism, coverage, refusals."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cpt_jax.config import ConfigError
from cpt_jax.laws import fit as fit_lib


@dataclasses.dataclass(frozen=True)
class Power:
  """E + A x^-a."""

  name: str = "power"
  parameters: tuple = ("E", "A", "a")
  bounds: tuple = ((0.0, np.inf), (1e-12, 1e12), (1e-3, 5.0))

  def predict(self, theta_P, inputs):
    return theta_P[0] + theta_P[1] * inputs["x"] ** -theta_P[2]

  def gradient(self, theta_P, inputs):
    power = inputs["x"] ** -theta_P[2]
    return np.stack([np.ones_like(power), power, -theta_P[1] * power * np.log(inputs["x"])], axis=1)

  def starts(self, inputs, loss_n, *, num, rng):
    a = np.exp(rng.uniform(np.log(0.05), np.log(2), num))
    low = loss_n.min() * rng.uniform(0.2, 1, num)
    return np.stack([low, (loss_n.max() - low) * inputs["x"].min() ** a, a], axis=1)


def data(theta, *, num=40, noise=0.0, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  inputs = {"x": scale * np.geomspace(1, 300, num)}
  clean = Power().predict(np.array(theta), inputs)
  return inputs, clean * np.exp(noise * rng.standard_normal(num))


def huber(predicted_n, loss_n):
  apart_n = np.abs(np.log(predicted_n) - np.log(loss_n))
  return np.where(apart_n <= 1e-3, apart_n**2 / 2, 1e-3 * (apart_n - 5e-4))


@hypothesis.given(
  low=st.floats(0.5, 4), a=st.floats(0.2, 1.2), drop=st.floats(0.2, 4), scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e4])
)
def test_curves_without_noise_are_found_whatever_their_units(low, a, drop, scale):
  inputs, loss_n = data((low, drop * scale**a, a), scale=scale)
  fitted = fit_lib.fit(Power(), inputs, loss_n, num_starts=6)
  assert fitted.scores().worst_relative < 1e-6
  # Outside what was fitted too.
  far = {"x": scale * np.array([1e3, 1e4])}
  np.testing.assert_allclose(fitted.predict(far), low + drop * (far["x"] / scale) ** -a, rtol=1e-4)


def test_a_tenth_of_wild_losses_changes_nothing():
  inputs, loss_n = data((2.0, 3.0, 0.5), noise=1e-4)
  wild_n = loss_n.copy()
  wild_n[::10] *= 1.2
  fitted = fit_lib.fit(Power(), inputs, wild_n)
  assert fit_lib.scores(fitted.predict(inputs), loss_n).worst_relative < 1e-3
  # Without the robust loss it would.
  squares = fit_lib.fit(Power(), inputs, wild_n, delta=1e3)
  assert fit_lib.scores(squares.predict(inputs), loss_n).worst_relative > 1e-2


def test_the_objective_is_the_mean_huber_loss_of_the_log_losses():
  inputs, loss_n = data((2.0, 3.0, 0.5), noise=3e-3)
  fitted = fit_lib.fit(Power(), inputs, loss_n)
  assert fitted.objective == pytest.approx(huber(fitted.predict(inputs), loss_n).mean(), rel=1e-9)
  # A minimum of it: no neighbour is better.
  for step in 1e-3 * np.concatenate([np.eye(3), -np.eye(3)]):
    assert huber(Power().predict(fitted.theta_P * (1 + step), inputs), loss_n).mean() > fitted.objective


def test_the_same_seed_gives_the_same_bits():
  inputs, loss_n = data((2.0, 3.0, 0.5), noise=3e-3)
  first, second = (fit_lib.bootstrap(fit_lib.fit(Power(), inputs, loss_n, seed=4), num=5, seed=7) for _ in range(2))
  np.testing.assert_array_equal(first.theta_P, second.theta_P)
  np.testing.assert_array_equal(first.thetas_KP, second.thetas_KP)
  assert len(np.unique(first.thetas_KP[:, 0])) == 5


def coverage(*, groups, levels, noise, shared):
  """Shares of new measurements inside the intervals, over fresh data sets; groups share a part of their error."""
  inside = []
  for seed in range(16):
    rng = np.random.default_rng(seed)
    inputs, clean_n = data((2.0, 3.0, 0.5), num=24)
    group_n = np.arange(24) // (24 // groups)
    errors = lambda: noise * rng.standard_normal(24) + shared * rng.standard_normal(groups)[group_n]  # noqa: B023, E731
    fitted = fit_lib.fit(Power(), inputs, clean_n * np.exp(errors()), num_starts=2)
    fitted = fit_lib.bootstrap(fitted, num=20, groups_n=group_n, seed=seed)
    new_n = clean_n * np.exp(errors())
    bands = [fitted.interval(inputs, level=level) for level in levels]
    inside.append([np.mean((low_n <= new_n) & (new_n <= high_n)) for low_n, high_n in bands])
  return np.mean(inside, axis=0)


def test_intervals_hold_new_measurements_as_often_as_they_say():
  assert coverage(groups=24, levels=(0.5, 0.9), noise=5e-3, shared=0.0) == pytest.approx([0.5, 0.9], abs=0.05)


def test_intervals_widen_with_what_groups_share():
  assert coverage(groups=8, levels=(0.9,), noise=2e-3, shared=5e-3) == pytest.approx([0.9], abs=0.07)
  inputs, loss_n = data((2.0, 3.0, 0.5), num=24)
  group_n = np.arange(24) // 3
  fitted = fit_lib.fit(Power(), inputs, loss_n * np.exp(5e-3 * np.random.default_rng(0).standard_normal(8)[group_n]))
  alone, together = (fit_lib.bootstrap(fitted, num=40, groups_n=groups) for groups in (None, group_n))
  far = {"x": np.array([1e4])}
  width = lambda fitted: np.ptp(np.log(fitted.interval(far)))  # noqa: E731
  assert width(together) > 1.1 * width(alone)


def test_weights_count_as_repetitions():
  inputs, loss_n = data((2.0, 3.0, 0.5), noise=3e-3)
  times_n = np.where(np.arange(40) < 10, 3, 1)
  weighted = fit_lib.fit(Power(), inputs, loss_n, weights_n=times_n)
  repeated = fit_lib.fit(Power(), {"x": np.repeat(inputs["x"], times_n)}, np.repeat(loss_n, times_n))
  np.testing.assert_allclose(weighted.predict(inputs), repeated.predict(inputs), rtol=1e-6)
  assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)
  with pytest.raises(ConfigError, match="weights must be finite"):
    fit_lib.fit(Power(), inputs, loss_n, weights_n=-times_n)


def test_a_prior_decides_where_data_do_not_and_yields_where_they_do():
  flat = {"x": np.full(12, 5.0)}  # any exponent fits
  loss_n = 2.5 * np.exp(1e-3 * np.random.default_rng(0).standard_normal(12))
  for centre in (0.3, 1.2):
    fitted = fit_lib.fit(Power(), flat, loss_n, priors={"a": fit_lib.Prior(centre, 0.3)}, num_starts=8)
    assert fitted.theta_P[2] == pytest.approx(centre, rel=0.01)
  inputs, loss_n = data((2.0, 3.0, 0.5), noise=1e-4)
  fitted = fit_lib.fit(Power(), inputs, loss_n, priors={"a": fit_lib.Prior(1.2, 0.3)})
  assert fitted.theta_P[2] == pytest.approx(0.5, rel=0.05)
  miss = 1e-3 * np.log(fitted.theta_P[2] / 1.2) / 0.3  # counted by its square however far, as one of 40 losses
  assert fitted.objective == pytest.approx(huber(fitted.predict(inputs), loss_n).mean() + miss**2 / 2 / 40, rel=1e-6)
  # Fewer independent observations leave it more to say.
  few = fit_lib.fit(Power(), inputs, loss_n, priors={"a": fit_lib.Prior(1.2, 0.3)}, num_independent=1)
  assert few.theta_P[2] > fitted.theta_P[2]


def test_scores_by_hand():
  scores = fit_lib.scores(np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 4.0]))
  assert scores.mae == pytest.approx(1 / 3) and scores.rmse == pytest.approx(np.sqrt(1 / 3))
  assert scores.worst_relative == pytest.approx(0.25) and scores.mean_relative == pytest.approx(0.25 / 3)
  assert scores.r2 == pytest.approx(1 - 1 / (14 / 3))
  assert np.isnan(fit_lib.scores(np.array([1.0, 1.1]), np.array([1.0, 1.0])).r2)
  with pytest.raises(ValueError, match="one of each"):
    fit_lib.scores(np.ones(2), np.ones(3))


@pytest.mark.parametrize(
  ("loss_n", "message"),
  [
    ([3.0, 2.0], "2 losses cannot fix 3 parameters"),
    ([3.0, 2.0, np.nan, 1.0], "finite and above 0"),
    ([3.0, 2.0, -1.0, 1.0], "finite and above 0"),
    ([[3.0, 2.0, 1.0]], "one number for each"),
  ],
)
def test_bad_losses_are_named(loss_n, message):
  with pytest.raises(ConfigError, match=message):
    fit_lib.fit(Power(), {"x": np.arange(1.0, 5.0)}, np.array(loss_n))


def test_inputs_without_a_value_and_searches_without_an_end_are_named():
  with pytest.raises(ConfigError, match="not a finite number at any of 48 starts"):
    fit_lib.fit(Power(), {"x": np.array([0.0, 1.0, 2.0, 3.0])}, np.array([3.0, 2.0, 1.5, 1.2]))

  class Wild(Power):
    def gradient(self, theta_P, inputs):  # leads nowhere
      return np.sin(1e9 * super().gradient(theta_P, inputs))

  inputs, loss_n = data((2.0, 3.0, 0.5), noise=3e-3)
  with pytest.raises((ConfigError, AssertionError)):
    fitted = fit_lib.fit(Wild(), inputs, loss_n)
    assert fitted.objective < 1e-6


def test_intervals_need_resampled_data_and_freedom():
  inputs, loss_n = data((2.0, 3.0, 0.5), num=3)
  fitted = fit_lib.fit(Power(), inputs, loss_n)
  with pytest.raises(ValueError, match="call bootstrap"):
    fitted.interval(inputs)
  with pytest.raises(ValueError, match="add measurements"):
    fit_lib.bootstrap(fitted, num=2, groups_n=np.arange(3)).interval(inputs)
  with pytest.raises(ConfigError, match="needs 2 groups"):
    fit_lib.bootstrap(fitted, groups_n=np.zeros(3))
