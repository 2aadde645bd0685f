"""Rate, replay share and tokens of a run -> its final loss on the text that is to be learnt.

Invariant: loss = base - gain; e = rate / rate0, t = tokens / tokens0, and the domain's share is 1 - rho, rho being the replay's.

The gain grows with the rate, the tokens and the domain's share, by a logarithm or a saturating power; too high a rate takes
some of it back. Which form serves is decided by held-out error (laws.choose), not here.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

# Added to the domain's share, so that a run of replay alone stays finite. Chosen by hand; of no weight up to 90% replay.
SHARE0 = 0.01


@dataclasses.dataclass(frozen=True)
class _Domain(Separable):
  rate0: float = 1e-3
  tokens0: float = 1e6

  def logs(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln e, ln t and ln(1 - rho + SHARE0)."""
    ln_share = np.log(1.0 - inputs["replay"] + SHARE0)
    return np.log(inputs["rate"] / self.rate0), np.log(inputs["tokens"] / self.tokens0), ln_share


@dataclasses.dataclass(frozen=True)
class LogGain(_Domain):
  """loss = base + g0 - a ln e + q (ln e)^2 - d ln t - s ln(1 - rho): Sailor's quadratic (2404.03608) for new text."""

  name: ClassVar[str] = "domain_log"
  linear: ClassVar = {"g0": ANY, "a": ANY, "q": ANY, "d": ANY, "s": ANY}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, -ln e, (ln e)^2, -ln t, -ln(1 - rho)."""
    ln_e, ln_t, ln_share = self.logs(inputs)
    return np.stack([np.ones_like(ln_e), -ln_e, ln_e**2, -ln_t, -ln_share], axis=1)


@dataclasses.dataclass(frozen=True)
class Shift(_Domain):
  """loss = base - B (1 - (1 + x)^-beta) + h e, x = E (e t)^k (1 - rho)^s: the CPT law's shift at the end of a run.

  The CPT law (2505.07796) has x = E S1, the sum of the rates; e t is that sum for runs of one schedule, and k lets it bend.
  Replay as a power of the domain's share is ours, for the paper's own fits per ratio contradict its printed factor. h e is the
  loss that a rate leaves unlearnt.
  """

  name: ClassVar[str] = "domain_shift"
  linear: ClassVar = {"B": POSITIVE, "h": POSITIVE}
  shape: ClassVar = {"ln_E": (-4.0, 8.0), "k": (0.2, 2.0), "s": (0.0, 2.0), "beta": (0.05, 3.0)}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """-(1 - (1 + x)^-beta) and e."""
    left = np.exp(-shape_Q[3] * np.log1p(self._x(shape_Q, inputs)))
    return np.stack([left - 1.0, inputs["rate"] / self.rate0], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Of (1 + x)^-beta by ln x times ln x's own, and by beta."""
    ln_e, ln_t, ln_share = self.logs(inputs)
    beta, x = shape_Q[3], self._x(shape_Q, inputs)
    left = np.exp(-beta * np.log1p(x))
    by_ln_x = -beta * left * x / (1.0 + x)
    slopes = np.zeros((len(x), 2, 4))
    slopes[:, 0] = np.stack([by_ln_x, by_ln_x * (ln_e + ln_t), by_ln_x * ln_share, -np.log1p(x) * left], axis=1)
    return slopes

  def _x(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    ln_e, ln_t, ln_share = self.logs(inputs)
    ln_E, k, s, _ = shape_Q
    return np.exp(ln_E + k * (ln_e + ln_t) + s * ln_share)


@dataclasses.dataclass(frozen=True)
class PowerGain(_Domain):
  """loss = base + g0 + A x^-1 + h e, x = e^k t^m (1 - rho)^s: a power law in rate, tokens and share."""

  name: ClassVar[str] = "domain_power"
  linear: ClassVar = {"g0": ANY, "A": POSITIVE, "h": POSITIVE}
  shape: ClassVar = {"k": (0.0, 2.0), "m": (0.0, 2.0), "s": (0.0, 2.0)}

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, the power, e."""
    power = self._power(shape_Q, inputs)
    return np.stack([np.ones_like(power), power, inputs["rate"] / self.rate0], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The power times the derivatives of its logarithm."""
    slopes = np.zeros((len(inputs["rate"]), 3, 3))
    slopes[:, 1] = -self._power(shape_Q, inputs)[:, None] * np.stack(self.logs(inputs), axis=1)
    return slopes

  def _power(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    return np.exp(-(np.stack(self.logs(inputs), axis=1) @ shape_Q))
