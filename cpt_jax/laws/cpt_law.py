"""Rates, replay and the base's past -> old-domain or new-domain loss at every step of continual pretraining (2505.07796).

Invariant: the same law for both losses, the sign of B telling them apart; how replay damps the shift is a part that can be
exchanged, since no published form of it holds everywhere.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.laws import annealing
from cpt_jax.laws.curves import Curve
from cpt_jax.laws.fit import Prior

_SMALL = 1e-3  # below it the exponential form is taken as its series
_TINY = 1e-30  # an imaginary step, as in laws.separable


class Replay(NamedTuple):
  """What is left of the shift at a share of replay: 1 without any, 0 with nothing but replay."""

  name: str
  parameter: str  # "" for none
  bounds: tuple[float, float]
  prior: Prior  # for runs whose shares fix it badly
  left: Callable[[Any, float], Any]  # of the parameter, which may be complex, and the share
  starts: Callable[[np.random.Generator, int], np.ndarray]  # (num,) values of the parameter

  def factor(self, value: float, replay_frac: float) -> tuple[float, float]:
    """What is left, and its derivative in the parameter."""
    return float(self.left(value, replay_frac)), float(np.imag(self.left(value + 1j * _TINY, replay_frac))) / _TINY


def _exponential(a: Any, replay_frac: float) -> Any:
  """(e^(a r) - 1) / (e^a - 1) in the share r of new data: both forms of 2505.07796, eq. 8, scaled to 1 at r = 1.

  With a above 0 it is the convex one, e^(a r) - 1; below 0 the concave one, 1 - e^(-|a| r); at 0 it is r. The paper prints
  the concave one for the old domain and the convex one for the new; its own fits for single ratios (fig. 12) look as if it
  were the other way round. Here the data say the sign.
  """
  new = 1.0 - replay_frac
  if abs(a) < _SMALL:
    return new + a / 2 * (new**2 - new) + a**2 / 12 * (2 * new**3 - 3 * new**2 + new)
  return np.expm1(a * new) / np.expm1(a)


def _power(p: Any, replay_frac: float) -> Any:
  """r^p in the share r of new data."""
  return np.exp(p * np.log(max(1.0 - replay_frac, np.finfo(np.float64).tiny)))


def _log(rho0: Any, replay_frac: float) -> Any:
  """1 - ln(1 + replay / rho0) / ln(1 + 1 / rho0): each e-fold of replay above rho0 removes the same.

  Steep enough for the first percent of replay, which removes half of the forgetting (2403.08763) and more than either
  exponential can.
  """
  return 1 - np.log1p(replay_frac / rho0) / np.log1p(1 / rho0)


def _log_uniform(low: float, high: float) -> Callable[[np.random.Generator, int], np.ndarray]:
  return lambda rng, num: annealing.log_uniform(rng, low, high, num)


REPLAY_FORMS = {
  form.name: form
  for form in (
    # For runs that all have the same share.
    Replay("none", "", (0.0, 0.0), Prior(0.0, 1.0), lambda _, replay_frac: 1.0, lambda rng, num: np.zeros(num)),
    Replay("exponential", "replay_a", (-50.0, 50.0), Prior(0.0, 5.0), _exponential, lambda rng, num: rng.uniform(-8.0, 8.0, num)),
    Replay("power", "replay_p", (1e-2, 1e2), Prior(1.0, 1.5), _power, _log_uniform(0.1, 10.0)),
    Replay("log", "replay_rho0", (1e-8, 1e2), Prior(1e-2, 3.0), _log, _log_uniform(1e-5, 1.0)),
  )
}


@dataclasses.dataclass(frozen=True)
class CptLaw:
  """L0 + A (S1_pt + S1)^-alpha - C2 S2 + B f(replay) (1 - (1 + E S1)^-beta)  (2505.07796, eq. 5 and 8).

  S1 and S2 are those of this run, S1_pt that of the base's training, whose past is taken to be unknown: S1_pt is fitted, and the
  paper's C1 S2_pt is part of L0. B is above 0 for the old domain's loss and below 0 for the new one's.
  """

  replay: Replay = REPLAY_FORMS["none"]

  @property
  def name(self) -> str:
    """With its form of replay."""
    return "cpt" if self.replay.name == "none" else f"cpt_{self.replay.name}"

  @property
  def _table(self) -> dict[str, tuple[float, float]]:
    table = {"L0": (0.0, np.inf), "A": annealing.ANY_SIZE, "alpha": annealing.EXPONENT, "S1_pt": annealing.ANY_SIZE}
    table |= {"C2": (0.0, np.inf), "B": (-np.inf, np.inf), "E": annealing.ANY_SIZE, "beta": annealing.EXPONENT}
    table["decay_steps"] = annealing.DECAY_STEPS
    return table | ({self.replay.parameter: self.replay.bounds} if self.replay.parameter else {})

  @property
  def parameters(self) -> tuple[str, ...]:
    """In the order of theta_P, that of the replay form last."""
    return tuple(self._table)

  @property
  def bounds(self) -> tuple[tuple[float, float], ...]:
    """B of either sign."""
    return tuple(self._table.values())

  @property
  def priors(self) -> Mapping[str, Prior]:
    """(B, E, beta) lie on a ridge: the paper has beta from 0.001 to 0.37 for like curves (0.15 to 0.37 where it is not tiny)."""
    return {"beta": Prior(0.25, 1.0)} | ({self.replay.parameter: self.replay.prior} if self.replay.parameter else {})

  def predict(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """loss_n."""

    def of_curve(curve: Curve) -> np.ndarray:
      L0, A, alpha, S1_pt, C2, B, E, beta, steps, *of_replay = theta_P
      shift_n = -np.expm1(-beta * np.log1p(E * curve.area_n))
      left, _ = self.replay.factor(of_replay[0] if of_replay else 0.0, curve.replay_frac)
      return L0 + A * (S1_pt + curve.area_n) ** -alpha - C2 * curve.annealing(1 - 1 / steps)[0] + B * left * shift_n

    return annealing.over_curves(of_curve, inputs)

  def gradient(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """(n, P)."""
    return annealing.over_curves(lambda curve: self._slopes(theta_P, curve), inputs)

  def _slopes(self, theta_P: np.ndarray, curve: Curve) -> np.ndarray:
    """(n, P) of one curve."""
    _, A, alpha, S1_pt, C2, B, E, beta, steps, *of_replay = theta_P
    whole_n = S1_pt + curve.area_n
    annealed_n, annealed_slope_n = curve.annealing(1 - 1 / steps)
    log_n = np.log1p(E * curve.area_n)
    shift_n = -np.expm1(-beta * log_n)
    left, left_slope = self.replay.factor(of_replay[0] if of_replay else 0.0, curve.replay_frac)
    slopes = [-alpha * A * whole_n ** (-alpha - 1), -annealed_n, left * shift_n]
    slopes += [B * left * beta * (1 - shift_n) * curve.area_n / (1 + E * curve.area_n), B * left * (1 - shift_n) * log_n]
    slopes += [-C2 * annealed_slope_n / steps**2, B * shift_n * left_slope]
    return np.concatenate([annealing.forward_gradient(A, alpha, whole_n), np.stack(slopes[: len(theta_P) - 3], axis=1)], axis=1)

  def starts(self, inputs: Sequence[Curve], loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P): a base that was trained 0.1 to 1000 times as long, a shift that is half done after 1e-5 to 0.5 of the run."""
    area = max(float(curve.area_n.max()) for curve in inputs)
    longest = max(len(curve.rates_S) for curve in inputs)
    draws = {
      "alpha": annealing.log_uniform(rng, 0.1, 1.5, num),
      "S1_pt": area * annealing.log_uniform(rng, 0.1, 1e3, num),
      "beta": annealing.log_uniform(rng, 0.05, 1.0, num),
      "decay_steps": np.clip(longest * annealing.log_uniform(rng, 1e-3, 1.0, num), *annealing.DECAY_STEPS),
    }
    rng.random(num)  # drawn for nothing: a seed gives the starts with which the figures of docs/guide/fit_laws.md were measured
    draws["E"] = (2 ** (1 / draws["beta"]) - 1) / (area * annealing.log_uniform(rng, 1e-5, 0.5, num))
    draws[self.replay.parameter] = self.replay.starts(rng, num)
    linear = ["L0", "A", "C2", "B"]
    places = [self.parameters.index(name) for name in linear]
    starts = []
    for i in range(num):
      # With the linear ones at 1 each of their slopes is the column that they multiply.
      drawn = {name: 1.0 if name in linear else draws[name][i] for name in self.parameters}
      columns_nK = self.gradient(np.array(list(drawn.values())), inputs)[:, places]
      *factors, below = annealing.offset_and_factors(np.stack([*columns_nK.T, -columns_nK[:, -1]], axis=1), loss_n)
      factors[-1] -= below  # B may have either sign
      drawn |= dict(zip(linear, factors, strict=True))
      starts.append(list(drawn.values()))
    return np.array(starts)
