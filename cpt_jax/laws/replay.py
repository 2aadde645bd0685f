"""Rate, replay share and tokens of a run -> its final loss on text like the base's own.

Invariant: loss = base + F, the forgetting; e = rate / rate0, t = tokens / tokens0, and rho is the replay share.

F falls about by the logarithm of the replay share: on the runs of Ibrahim et al. (2403.08763, table 2) with up to 50% replay
F = f0 - b ln(rho) has R2 .998 for a strong shift and .977 for a weak one, where a power of rho has .961 and .845. rho0 > 0 keeps
rho = 0 finite. Rates and tokens enter in the ways below; which one serves is decided by held-out error (laws.choose), not here.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

_LOG_SHARE = (float(np.log(1e-6)), 0.0)  # of rho0: from one token in a million to all of them


class Additive(Separable):
  """F = f0 + a ln e + d ln t - b ln(rho + rho0): Sailor's log(share) - log(rate) (2404.03608) with free weights."""

  name: ClassVar[str] = "replay_additive"
  linear: ClassVar = {"f0": ANY, "a": ANY, "d": ANY, "b": POSITIVE}
  shape: ClassVar = {"ln_rho0": _LOG_SHARE}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    return 1.0, *self.logs(inputs), -np.log(inputs["replay"] + np.exp(shape_Q[0]))


class Multiplicative(Separable):
  """F = e^k t^m (c - b ln(rho + rho0)): each e-fold of replay saves the same part of what the rate and the length forget."""

  name: ClassVar[str] = "replay_multiplicative"
  linear: ClassVar = {"c": ANY, "b": POSITIVE}
  shape: ClassVar = {"k": (0.0, 4.0), "m": (-1.0, 2.0), "ln_rho0": _LOG_SHARE}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (ln_e, ln_t), (k, m, ln_rho0) = self.logs(inputs), shape_Q
    power = np.exp(k * ln_e + m * ln_t)
    return power, -power * np.log(inputs["replay"] + np.exp(ln_rho0))


class Metric(Separable):
  """F = f0 + f1 z + f2 z^2, z = ln(rho + rho0) - kappa ln e - mu ln t: one scalar tells all (2404.03608, kappa = 1)."""

  name: ClassVar[str] = "replay_metric"
  linear: ClassVar = {"f0": ANY, "f1": ANY, "f2": ANY}
  shape: ClassVar = {"kappa": (0.0, 8.0), "mu": (-4.0, 8.0), "ln_rho0": _LOG_SHARE}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (ln_e, ln_t), (kappa, mu, ln_rho0) = self.logs(inputs), shape_Q
    z = np.log(inputs["replay"] + np.exp(ln_rho0)) - kappa * ln_e - mu * ln_t
    return 1.0, z, z**2


class Power(Separable):
  """F = f0 + A e^k t^m (1 + rho / rho0)^-alpha: Bethune et al. (2502.06042) for one model size, with the rate added.

  Their law is A D^beta / ((1 + B p) N)^alpha + E with the replay share p: replay acts like a larger model. Where their constant E
  stands is not verified here; it is f0, an offset that neither rate nor tokens change.
  """

  name: ClassVar[str] = "replay_power"
  linear: ClassVar = {"f0": ANY, "A": POSITIVE}
  shape: ClassVar = {"k": (0.0, 4.0), "m": (-1.0, 2.0), "alpha": (0.02, 3.0), "ln_rho0": _LOG_SHARE}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (ln_e, ln_t), (k, m, alpha, ln_rho0) = self.logs(inputs), shape_Q
    return 1.0, np.exp(k * ln_e + m * ln_t - alpha * np.log1p(inputs["replay"] / np.exp(ln_rho0)))


class Balance(Separable):
  """F = f0 + A e^k t^m (1 + rho (e t)^j / rho0)^-alpha: `Power`, in which replay, too, is learnt by rate times tokens.

  The extension is ours, from runs of a small model: at a low rate only a large share helps, at a high one a few percent do.
  """

  name: ClassVar[str] = "replay_balance"
  linear: ClassVar = {"f0": ANY, "A": POSITIVE}
  shape: ClassVar = {"k": (0.0, 4.0), "m": (-1.0, 2.0), "alpha": (0.02, 3.0), "ln_rho0": (-7.0, 0.0), "j": (0.0, 2.0)}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (ln_e, ln_t), (k, m, alpha, ln_rho0, j) = self.logs(inputs), shape_Q
    x = inputs["replay"] * np.exp(j * (ln_e + ln_t) - ln_rho0)
    return 1.0, np.exp(k * ln_e + m * ln_t - alpha * np.log1p(x))


class Surface(Separable):
  """Quadratic in ln e and r = ln(rho + rho0), straight in ln t: no theory; what a law must beat to be worth having.

  A quadratic in rate and replay is what Sailor (2404.03608) fits to its losses. It serves sources of either role.
  """

  name: ClassVar[str] = "surface"
  linear: ClassVar = dict.fromkeys(("1", "e", "t", "r", "ee", "rr", "er"), ANY)
  shape: ClassVar = {"ln_rho0": _LOG_SHARE}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (e, t), r = self.logs(inputs), np.log(inputs["replay"] + np.exp(shape_Q[0]))
    return 1.0, e, t, r, e * e, r * r, e * r
