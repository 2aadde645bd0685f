"""Rate, replay share and tokens of a run -> its final loss on the text that is to be learnt.

Invariant: loss = base - gain; e = rate / rate0, t = tokens / tokens0, and the domain's share is 1 - rho, rho being the replay's.

The gain grows with the rate, the tokens and the domain's share, by a logarithm or a saturating power; too high a rate takes
some of it back. Which form serves is decided by held-out error (laws.choose), not here.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

# Added to the domain's share, so that a run of replay alone stays finite. Chosen by hand; of no weight up to 90% replay.
SHARE0 = 0.01


class LogGain(Separable):
  """loss = base + g0 - a ln e + q (ln e)^2 - d ln t - s ln(1 - rho): Sailor's quadratic (2404.03608) for new text."""

  name: ClassVar[str] = "domain_log"
  linear: ClassVar = {"g0": ANY, "a": ANY, "q": ANY, "d": ANY, "s": ANY}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    ln_e, ln_t = self.logs(inputs)
    return 1.0, -ln_e, ln_e**2, -ln_t, -_log_share(inputs)


class Shift(Separable):
  """loss = base - B (1 - (1 + x)^-beta) + h e, x = E (e t)^k (1 - rho)^s: the CPT law's shift at the end of a run.

  The CPT law (2505.07796) has x = E S1, the sum of the rates; e t is that sum for runs of one schedule, and k lets it bend.
  Replay as a power of the domain's share is ours, for the paper's own fits per ratio contradict its printed factor. h e is the
  loss that a rate leaves unlearnt.
  """

  name: ClassVar[str] = "domain_shift"
  linear: ClassVar = {"B": POSITIVE, "h": POSITIVE}
  shape: ClassVar = {"ln_E": (-4.0, 8.0), "k": (0.2, 2.0), "s": (0.0, 2.0), "beta": (0.05, 3.0)}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (ln_e, ln_t), (ln_E, k, s, beta) = self.logs(inputs), shape_Q
    x = np.exp(ln_E + k * (ln_e + ln_t) + s * _log_share(inputs))
    return np.exp(-beta * np.log1p(x)) - 1.0, inputs["rate"] / self.rate0


class PowerGain(Separable):
  """loss = base + g0 + A x^-1 + h e, x = e^k t^m (1 - rho)^s: a power law in rate, tokens and share."""

  name: ClassVar[str] = "domain_power"
  linear: ClassVar = {"g0": ANY, "A": POSITIVE, "h": POSITIVE}
  shape: ClassVar = {"k": (0.0, 2.0), "m": (0.0, 2.0), "s": (0.0, 2.0)}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    (ln_e, ln_t), (k, m, s) = self.logs(inputs), shape_Q
    return 1.0, np.exp(-k * ln_e - m * ln_t - s * _log_share(inputs)), inputs["rate"] / self.rate0


def _log_share(inputs: Inputs) -> np.ndarray:
  return np.log(1.0 - inputs["replay"] + SHARE0)
