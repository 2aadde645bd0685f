"""Parameters and tokens of a model continued in a new language -> its loss there, by the cross-lingual law.

Invariant: E, A and alpha are those of models trained from scratch in that language; only the data's term is fitted.

Zheng et al. (2407.02118, sec. 3): L(N, D) = E + A / N^alpha + B' / (D^beta' N^gamma). Larger models need less data for
the same loss.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from cpt_jax.laws.separable import POSITIVE, Inputs, Separable


@dataclasses.dataclass(frozen=True)
class CrossLingual(Separable):
  """The law with the from-scratch constants; inputs `params` and `tokens`, relative to params0 and tokens0 in the data's term."""

  E: float = 1.55  # the three are the paper's, Chinese
  A: float = 420.0
  alpha: float = 0.40
  params0: float = 1.0
  tokens0: float = 1.0
  name: ClassVar[str] = "cross_lingual"
  linear: ClassVar = {"B": POSITIVE}
  shape: ClassVar = {"beta": (0.0, 1.0), "gamma": (-0.5, 0.5)}

  def offset(self, inputs: Inputs) -> np.ndarray:
    """E + A / N^alpha."""
    return self.E + self.A * inputs["params"] ** -self.alpha

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1 / (D^beta' N^gamma)."""
    return np.exp(-(self._logs(inputs) @ shape_Q))[:, None]

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The column times the logarithms."""
    return -self.columns(shape_Q, inputs)[:, :, None] * self._logs(inputs)[:, None, :]

  def _logs(self, inputs: Inputs) -> np.ndarray:
    return np.stack([np.log(inputs["tokens"] / self.tokens0), np.log(inputs["params"] / self.params0)], axis=1)


def compute_exponents(*, alpha: float, beta: float, gamma: float = 0.0) -> tuple[float, float]:
  """(a, 1 - a): the optimal parameters grow as compute^a, the optimal tokens as compute^(1-a), for compute ~ N D.

  >>> [round(x, 3) for x in compute_exponents(alpha=0.40, beta=0.20, gamma=0.08)]
  [0.385, 0.615]
  """
  a = beta / (alpha + beta - gamma)
  return a, 1.0 - a
