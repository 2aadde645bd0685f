"""A law of losses -> the same law for a fit whose errors are relative to the change from the base.

Invariant: u = asinh(change / SMALL), straight for changes below SMALL nats, logarithmic above; loss = base + SMALL sinh(u).

The runs of a grid are off by about a share of what they forgot: by thousandths of a nat at a low rate, by a tenth where a high
rate cost a nat. In nats, or in log losses, the harshest runs would decide the fit, the choice and the width of every interval,
and say little where a plan is made: at rises of some hundredths.
"""

import dataclasses

import numpy as np

from cpt_jax.laws.fit import Around
from cpt_jax.laws.separable import Inputs

# Nats; errors of smaller changes count alike. The rise that 2407.17467 allows, since about there plans are made.
SMALL = 0.05


def to_u(loss_n: np.ndarray, base_n: np.ndarray) -> np.ndarray:
  """The changes on the scale on which errors are alike."""
  return np.arcsinh((loss_n - base_n) / SMALL)


def to_loss(u_n: np.ndarray, base_n: np.ndarray) -> np.ndarray:
  """The way back."""
  return base_n + SMALL * np.sinh(u_n)


@dataclasses.dataclass(frozen=True)
class ByChange(Around):
  """Predicts exp(u), which the fitting core, since it compares logarithms, compares as u; `law` predicts the losses."""

  def predict(self, theta_P: np.ndarray, inputs: Inputs) -> np.ndarray:
    """exp(u), (n,)."""
    return np.exp(to_u(self.law.predict(theta_P, inputs), inputs["base"]))

  def gradient(self, theta_P: np.ndarray, inputs: Inputs) -> np.ndarray:
    """(n, P)."""
    change_n = self.law.predict(theta_P, inputs) - inputs["base"]
    slope_n = np.exp(np.arcsinh(change_n / SMALL)) / np.sqrt(SMALL**2 + change_n**2)
    return slope_n[:, None] * self.law.gradient(theta_P, inputs)

  def starts(self, inputs: Inputs, loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """The law's own for the losses that exp(u) stands for."""
    return self.law.starts(inputs, to_loss(np.log(loss_n), inputs["base"]), num=num, rng=rng)
