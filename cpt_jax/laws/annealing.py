"""Rates of every step -> the loss at every step: laws of whole curves under any schedule of the learning rate.

Invariant: each law is a frozen object with its own gradient, for laws.fit; its inputs are a sequence of laws.curves.Curve.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import scipy.optimize

from cpt_jax.laws.curves import Curve
from cpt_jax.laws.fit import Prior

# Scale-free on purpose: parameters with a unit have no natural size. The search is in their logarithms.
ANY_SIZE = (1e-100, 1e100)
EXPONENT = (1e-3, 10.0)
DECAY_STEPS = (2.0, 1e6)
_LOWEST_RATE = 1e-8  # of the peak; a rate of 0 to a negative power has no value, and no update follows that could show it


def offset_and_factors(columns_nF: np.ndarray, loss_n: np.ndarray) -> np.ndarray:
  """Factors (none negative) of the columns that come closest to the losses, relatively; for starts.

  A law is linear in some of its parameters: given the others these need no guess.
  """
  scaled_nF = columns_nF / loss_n[:, None]
  size_F = np.maximum(np.linalg.norm(scaled_nF, axis=0), np.finfo(np.float64).tiny)
  factor_F, _ = scipy.optimize.nnls(scaled_nF / size_F, np.ones_like(loss_n))
  return factor_F / size_F


def log_uniform(rng: np.random.Generator, low: float, high: float, num: int) -> np.ndarray:
  """`num` values whose logarithms are uniform between those of `low` and `high`."""
  return np.exp(rng.uniform(np.log(low), np.log(high), num))


def over_curves(function: Callable[[Curve], np.ndarray], curves: Sequence[Curve]) -> np.ndarray:
  """What `function` says of each curve, one after the other."""
  return np.concatenate([function(curve) for curve in curves])


@dataclasses.dataclass(frozen=True)
class Forward:
  """L0 + A S1^-alpha: no annealing at all. The baseline that a law of schedules has to beat."""

  name: str = "forward"
  parameters: tuple[str, ...] = ("L0", "A", "alpha")
  bounds: tuple[tuple[float, float], ...] = ((0.0, np.inf), ANY_SIZE, EXPONENT)
  priors: ClassVar[Mapping[str, Prior]] = {}

  def predict(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """loss_n."""
    L0, A, alpha = theta_P
    return L0 + A * over_curves(lambda curve: curve.area_n, inputs) ** -alpha

  def gradient(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """(n, P)."""
    _, A, alpha = theta_P
    return forward_gradient(A, alpha, over_curves(lambda curve: curve.area_n, inputs))

  def starts(self, inputs: Sequence[Curve], loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P)."""
    area_n = over_curves(lambda curve: curve.area_n, inputs)
    alphas = log_uniform(rng, 0.1, 1.5, num)
    return np.stack([[*offset_and_factors(_forward_columns(area_n, alpha), loss_n), alpha] for alpha in alphas])


def _forward_columns(area_n: np.ndarray, alpha: float) -> np.ndarray:
  return np.stack([np.ones_like(area_n), area_n**-alpha], axis=1)


def forward_gradient(A: float, alpha: float, area_n: np.ndarray) -> np.ndarray:
  """(n, 3): the derivative of L0 + A area^-alpha."""
  power_n = area_n**-alpha
  return np.stack([np.ones_like(area_n), power_n, -A * power_n * np.log(area_n)], axis=1)


@dataclasses.dataclass(frozen=True)
class Tissue:
  """L0 + A S1^-alpha - C S2 (Tissue et al., 2408.11029, eq. 1).

  `decay_steps` = 1 / (1 - lambda) is the memory of S2: 1000 in the paper (lambda = 0.999), for runs of tens of thousands of
  steps. None fits it: in a run of a few thousand steps 1000 makes S2 little more than the time since the rate fell.
  """

  decay_steps: float | None = None
  priors: ClassVar[Mapping[str, Prior]] = {}

  @property
  def name(self) -> str:
    """With its memory where that is fixed."""
    return "tissue" if self.decay_steps is None else f"tissue_{self.decay_steps:g}"

  @property
  def parameters(self) -> tuple[str, ...]:
    """L0, A, alpha, C and decay_steps unless it is fixed."""
    return ("L0", "A", "alpha", "C", *(() if self.decay_steps else ("decay_steps",)))

  @property
  def bounds(self) -> tuple[tuple[float, float], ...]:
    """C from 0: annealing does not raise a loss."""
    return (*Forward.bounds, (0.0, np.inf), *(() if self.decay_steps else (DECAY_STEPS,)))

  def predict(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """loss_n."""
    decay = 1 - 1 / (self.decay_steps or theta_P[4])
    return Forward().predict(theta_P[:3], inputs) - theta_P[3] * over_curves(lambda curve: curve.annealing(decay)[0], inputs)

  def gradient(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """(n, P)."""
    steps = self.decay_steps or theta_P[4]
    annealing_n2 = over_curves(lambda curve: np.stack(curve.annealing(1 - 1 / steps), axis=1), inputs)
    columns = [Forward().gradient(theta_P[:3], inputs), -annealing_n2[:, :1]]
    if not self.decay_steps:
      columns.append(-theta_P[3] * annealing_n2[:, 1:] / steps**2)
    return np.concatenate(columns, axis=1)

  def starts(self, inputs: Sequence[Curve], loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P): the memory from a thousandth of the longest run to all of it."""
    area_n = over_curves(lambda curve: curve.area_n, inputs)
    longest = max(len(curve.rates_S) for curve in inputs)
    starts = []
    for alpha, memory in zip(log_uniform(rng, 0.1, 1.5, num), log_uniform(rng, 1e-3, 1.0, num), strict=True):
      steps = self.decay_steps or np.clip(memory * longest, *DECAY_STEPS)
      annealing_n = over_curves(lambda curve, decay=1 - 1 / steps: curve.annealing(decay)[0], inputs)
      columns_nF = np.concatenate([_forward_columns(area_n, alpha), -annealing_n[:, None]], axis=1)
      L0, A, C = offset_and_factors(columns_nF, loss_n)
      starts.append([L0, A, alpha, C, *(() if self.decay_steps else (steps,))])
    return np.array(starts)


@dataclasses.dataclass(frozen=True)
class MultiPower:
  """L0 + A S1^-alpha - B sum_k (rate_{k-1} - rate_k) G(rate_k^-gamma S_k), G(x) = 1 - (1 + C x)^-beta (Luo et al., 2503.12811).

  S_k is the sum of the rates since the fall at k. The warm-up stands in S1 as an offset and is no fall. Unlike Tissue's law
  it does not go on falling at a rate of 0.

  B, C, beta and gamma lie on a ridge that a few short curves cannot cut: left alone, the best fit to them has beta near 0,
  where a fall never ends to have effect, and misses runs that are longer. Hence the priors, chosen by hand on the curves
  that docs/guide/fit_laws.md scores: beta about 2 within a factor of 1.65, gamma about 1/2.
  """

  name: str = "multi_power"
  parameters: tuple[str, ...] = ("L0", "A", "alpha", "B", "C", "beta", "gamma")
  bounds: tuple[tuple[float, float], ...] = (*Forward.bounds, ANY_SIZE, ANY_SIZE, EXPONENT, (0.0, 5.0))
  priors: ClassVar[Mapping[str, Prior]] = {"beta": Prior(2.0, 0.5), "gamma": Prior(0.5, 0.25)}

  def predict(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """loss_n."""
    _, _, _, B, C, beta, gamma = theta_P
    fall_n = over_curves(lambda curve: self._fall(curve, C, beta, gamma), inputs)
    return Forward().predict(theta_P[:3], inputs) - B * fall_n

  def gradient(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """(n, P)."""
    _, _, _, B, C, beta, gamma = theta_P

    def of_curve(curve: Curve) -> np.ndarray:
      log_rate_F, x_F = self._argument(curve, C, gamma)
      log_F = np.log1p(x_F)
      power_F = np.exp(-beta * log_F)
      slope_F = beta * power_F * x_F / (1 + x_F)  # dG / d ln C
      columns = [1 - power_F, B / C * slope_F, B * power_F * log_F, -B * slope_F * log_rate_F]
      return -np.stack([_summed(curve, column_F) for column_F in columns], axis=1)

    return np.concatenate([Forward().gradient(theta_P[:3], inputs), over_curves(of_curve, inputs)], axis=1)

  def starts(self, inputs: Sequence[Curve], loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P): a fall of half the peak has had half its effect after 0.0001 to 0.3 of the run."""
    area_n = over_curves(lambda curve: curve.area_n, inputs)
    peak = max(curve.rates_S.max() for curve in inputs)
    alphas, betas, gammas = log_uniform(rng, 0.1, 1.5, num), log_uniform(rng, 0.1, 2.0, num), rng.uniform(0, 1.2, num)
    halves = log_uniform(rng, 1e-4, 0.3, num) * area_n.max()
    starts = []
    for alpha, beta, gamma, half in zip(alphas, betas, gammas, halves, strict=True):
      C = (2 ** (1 / beta) - 1) * (peak / 2) ** gamma / half
      fall_n = over_curves(lambda curve, shape=(C, beta, gamma): self._fall(curve, *shape), inputs)
      columns_nF = np.concatenate([_forward_columns(area_n, alpha), -fall_n[:, None]], axis=1)
      L0, A, B = offset_and_factors(columns_nF, loss_n)
      starts.append([L0, A, alpha, B, C, beta, gamma])
    return np.array(starts)

  def _fall(self, curve: Curve, C: float, beta: float, gamma: float) -> np.ndarray:
    return _summed(curve, -np.expm1(-beta * np.log1p(self._argument(curve, C, gamma)[1])))

  def _argument(self, curve: Curve, C: float, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Logs of the falls' rates, and what G is taken of, times C."""
    log_rate_F = np.log(np.maximum(curve.falls.rate_F, _LOWEST_RATE * curve.rates_S.max()))
    return log_rate_F, C * np.exp(-gamma * log_rate_F) * curve.falls.since_F


def _summed(curve: Curve, share_F: np.ndarray) -> np.ndarray:
  """Sum over the falls before each loss of their sizes times shares."""
  return np.bincount(curve.falls.row_F, curve.falls.size_F * share_F, minlength=len(curve.step_n))
