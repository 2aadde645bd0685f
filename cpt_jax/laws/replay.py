"""Rate, replay share and tokens of a run -> its final loss on text like the base's own.

Invariant: loss = base + F, the forgetting; e = rate / rate0, t = tokens / tokens0, and rho is the replay share.

F falls about by the logarithm of the replay share: on the runs of Ibrahim et al. (2403.08763, table 2) with up to 50% replay
F = f0 - b ln(rho) has R2 .998 for a strong shift and .977 for a weak one, where a power of rho has .961 and .845. rho0 > 0 keeps
rho = 0 finite. Rates and tokens enter in the ways below; which one serves is decided by held-out error (laws.choose), not here.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

_LOG_SHARE = (float(np.log(1e-6)), 0.0)  # of rho0: from one token in a million to all of them


@dataclasses.dataclass(frozen=True)
class _Replay(Separable):
  rate0: float = 1e-3
  tokens0: float = 1e6

  def logs(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln e, ln t and rho."""
    return np.log(inputs["rate"] / self.rate0), np.log(inputs["tokens"] / self.tokens0), inputs["replay"]


@dataclasses.dataclass(frozen=True)
class Additive(_Replay):
  """F = f0 + a ln e + d ln t - b ln(rho + rho0): Sailor's log(share) - log(rate) (2404.03608) with free weights."""

  name: ClassVar[str] = "replay_additive"
  linear: ClassVar = {"f0": ANY, "a": ANY, "d": ANY, "b": POSITIVE}
  shape: ClassVar = {"ln_rho0": _LOG_SHARE}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, ln e, ln t, -ln(rho + rho0)."""
    ln_e, ln_t, rho = self.logs(inputs)
    return np.stack([np.ones_like(ln_e), ln_e, ln_t, -np.log(rho + np.exp(shape_Q[0]))], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Only the last column depends on rho0."""
    rho, rho0 = inputs["replay"], np.exp(shape_Q[0])
    slopes = np.zeros((len(rho), 4, 1))
    slopes[:, 3, 0] = -rho0 / (rho + rho0)
    return slopes


@dataclasses.dataclass(frozen=True)
class Multiplicative(_Replay):
  """F = e^k t^m (c - b ln(rho + rho0)): each e-fold of replay saves the same part of what the rate and the length forget."""

  name: ClassVar[str] = "replay_multiplicative"
  linear: ClassVar = {"c": ANY, "b": POSITIVE}
  shape: ClassVar = {"k": (0.0, 4.0), "m": (-1.0, 2.0), "ln_rho0": _LOG_SHARE}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """e^k t^m times 1 and -ln(rho + rho0)."""
    ln_e, ln_t, rho = self.logs(inputs)
    k, m, ln_rho0 = shape_Q
    return np.exp(k * ln_e + m * ln_t)[:, None] * np.stack([np.ones_like(rho), -np.log(rho + np.exp(ln_rho0))], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """By k and m the columns times ln e and ln t; by ln rho0 the log's own."""
    ln_e, ln_t, rho = self.logs(inputs)
    columns = self.columns(shape_Q, inputs)
    rho0 = np.exp(shape_Q[2])
    by_rho0 = np.zeros_like(columns)
    by_rho0[:, 1] = -np.exp(shape_Q[0] * ln_e + shape_Q[1] * ln_t) * rho0 / (rho + rho0)
    return np.stack([columns * ln_e[:, None], columns * ln_t[:, None], by_rho0], axis=2)


@dataclasses.dataclass(frozen=True)
class Metric(_Replay):
  """F = f0 + f1 z + f2 z^2, z = ln(rho + rho0) - kappa ln e - mu ln t: one scalar tells all (2404.03608, kappa = 1)."""

  name: ClassVar[str] = "replay_metric"
  linear: ClassVar = {"f0": ANY, "f1": ANY, "f2": ANY}
  shape: ClassVar = {"kappa": (0.0, 8.0), "mu": (-4.0, 8.0), "ln_rho0": _LOG_SHARE}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, z, z^2."""
    z = self._z(shape_Q, inputs)
    return np.stack([np.ones_like(z), z, z**2], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Of (1, z, z^2) by z, times z's own."""
    z = self._z(shape_Q, inputs)
    ln_e, ln_t, rho = self.logs(inputs)
    rho0 = np.exp(shape_Q[2])
    by_shape_nQ = np.stack([-ln_e, -ln_t, rho0 / (rho + rho0)], axis=1)
    return np.stack([np.zeros_like(z), np.ones_like(z), 2 * z], axis=1)[:, :, None] * by_shape_nQ[:, None, :]

  def _z(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    ln_e, ln_t, rho = self.logs(inputs)
    kappa, mu, ln_rho0 = shape_Q
    return np.log(rho + np.exp(ln_rho0)) - kappa * ln_e - mu * ln_t


@dataclasses.dataclass(frozen=True)
class Power(_Replay):
  """F = f0 + A e^k t^m (1 + rho / rho0)^-alpha: Bethune et al. (2502.06042) for one model size, with the rate added.

  Their law is A D^beta / ((1 + B p) N)^alpha + E with the replay share p: replay acts like a larger model. Where their constant E
  stands is not verified here; it is f0, an offset that neither rate nor tokens change.
  """

  name: ClassVar[str] = "replay_power"
  linear: ClassVar = {"f0": ANY, "A": POSITIVE}
  shape: ClassVar = {"k": (0.0, 4.0), "m": (-1.0, 2.0), "alpha": (0.02, 3.0), "ln_rho0": _LOG_SHARE}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1 and the power."""
    power = self._power(shape_Q, inputs)
    return np.stack([np.ones_like(power), power], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The power times the derivatives of its logarithm."""
    ln_e, ln_t, rho = self.logs(inputs)
    alpha, rho0 = shape_Q[2], np.exp(shape_Q[3])
    of_log_nQ = np.stack([ln_e, ln_t, -np.log1p(rho / rho0), alpha * rho / (rho + rho0)], axis=1)
    slopes = np.zeros((len(rho), 2, 4))
    slopes[:, 1] = self._power(shape_Q, inputs)[:, None] * of_log_nQ
    return slopes

  def _power(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    ln_e, ln_t, rho = self.logs(inputs)
    k, m, alpha, ln_rho0 = shape_Q
    return np.exp(k * ln_e + m * ln_t - alpha * np.log1p(rho / np.exp(ln_rho0)))


@dataclasses.dataclass(frozen=True)
class Balance(_Replay):
  """F = f0 + A e^k t^m (1 + rho (e t)^j / rho0)^-alpha: `Power`, in which replay, too, is learnt by rate times tokens.

  The extension is ours, from runs of a small model: at a low rate only a large share helps, at a high one a few percent do.
  """

  name: ClassVar[str] = "replay_balance"
  linear: ClassVar = {"f0": ANY, "A": POSITIVE}
  shape: ClassVar = {"k": (0.0, 4.0), "m": (-1.0, 2.0), "alpha": (0.02, 3.0), "ln_rho0": (-7.0, 0.0), "j": (0.0, 2.0)}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1 and the power."""
    ln_e, ln_t, _ = self.logs(inputs)
    k, m, alpha, _, _ = shape_Q
    power = np.exp(k * ln_e + m * ln_t - alpha * np.log1p(self._x(shape_Q, inputs)))
    return np.stack([np.ones_like(power), power], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The power times the derivatives of its logarithm."""
    ln_e, ln_t, _ = self.logs(inputs)
    x = self._x(shape_Q, inputs)
    by_ln_x = -shape_Q[2] * x / (1.0 + x)
    of_log_nQ = np.stack([ln_e, ln_t, -np.log1p(x), -by_ln_x, by_ln_x * (ln_e + ln_t)], axis=1)
    slopes = np.zeros((len(x), 2, 5))
    slopes[:, 1] = self.columns(shape_Q, inputs)[:, 1:] * of_log_nQ
    return slopes

  def _x(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    ln_e, ln_t, rho = self.logs(inputs)
    return rho * np.exp(shape_Q[4] * (ln_e + ln_t) - shape_Q[3])


@dataclasses.dataclass(frozen=True)
class Surface(_Replay):
  """Quadratic in ln e and r = ln(rho + rho0), straight in ln t: no theory; what a law must beat to be worth having.

  A quadratic in rate and replay is what Sailor (2404.03608) fits to its losses. It serves sources of either role.
  """

  name: ClassVar[str] = "surface"
  linear: ClassVar = dict.fromkeys(("1", "e", "t", "r", "ee", "rr", "er"), ANY)
  shape: ClassVar = {"ln_rho0": _LOG_SHARE}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, the three logarithms, two squares and a product."""
    e, t, rho = self.logs(inputs)
    r = np.log(rho + np.exp(shape_Q[0]))
    return np.stack([np.ones_like(e), e, t, r, e * e, r * r, e * r], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Those with r, by r, times r's own."""
    e, _, rho = self.logs(inputs)
    rho0 = np.exp(shape_Q[0])
    r, zero = np.log(rho + rho0), np.zeros_like(e)
    by_r_nK = np.stack([zero, zero, zero, np.ones_like(e), zero, 2 * r, e], axis=1)
    return (by_r_nK * (rho0 / (rho + rho0))[:, None])[:, :, None]
