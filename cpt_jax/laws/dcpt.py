"""Share of a corpus and tokens of a run -> its final loss on that corpus, by the D-CPT law.

Invariant: r is the share of the corpus whose loss is predicted: the replay share for role "replay", 1 - replay for role "domain".

Que et al. (2406.01375), their form L3: L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma, a fit for each
corpus. It demands dL/dD < 0, dL/dr < 0 and d2L/dDdr < 0; with free parameters none of these is certain.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

_LOG_EPS = (float(np.log(1e-4)), 0.0)


def _share(inputs: Inputs, role: str) -> np.ndarray:
  return inputs["replay"] if role == "replay" else 1.0 - inputs["replay"]


def _power(base_n: np.ndarray, exponent: float) -> tuple[np.ndarray, np.ndarray]:
  """base^exponent and its derivative by the exponent, both 0 at base 0."""
  log_n = np.log(np.maximum(base_n, 1e-300))
  value_n = np.where(base_n > 0, np.exp(exponent * log_n), 0.0)
  return value_n, np.where(base_n > 0, value_n * log_n, 0.0)


@dataclasses.dataclass(frozen=True)
class DCpt(Separable):
  """The D-CPT law for one size of model: A / N^alpha is part of E."""

  role: str = "domain"
  tokens0: float = 1e6
  name: ClassVar[str] = "dcpt"
  linear: ClassVar = {"E": ANY, "B": POSITIVE, "C": POSITIVE}
  shape: ClassVar = {"eta": (0.0, 3.0), "beta": (0.0, 2.0), "ln_eps": _LOG_EPS, "gamma": (0.02, 3.0)}

  def offset(self, inputs: Inputs) -> np.ndarray:
    """The law does not know the base's loss."""
    return np.zeros_like(inputs["tokens"])

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, r^eta / D^beta, (r + eps)^-gamma."""
    eta, beta, ln_eps, gamma = shape_Q
    r = _share(inputs, self.role)
    learnt = _power(r, eta)[0] * (inputs["tokens"] / self.tokens0) ** -beta
    return np.stack([np.ones_like(r), learnt, (r + np.exp(ln_eps)) ** -gamma], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """By eta and beta the second column's, by ln eps and gamma the third's."""
    eta, beta, ln_eps, gamma = shape_Q
    r, columns = _share(inputs, self.role), self.columns(shape_Q, inputs)
    slopes = np.zeros((len(r), 3, 4))
    tokens = inputs["tokens"] / self.tokens0
    slopes[:, 1, 0] = _power(r, eta)[1] * tokens**-beta
    slopes[:, 1, 1] = -columns[:, 1] * np.log(tokens)
    slopes[:, 2, 2] = -gamma * columns[:, 2] * np.exp(ln_eps) / (r + np.exp(ln_eps))
    slopes[:, 2, 3] = -columns[:, 2] * np.log(r + np.exp(ln_eps))
    return slopes


@dataclasses.dataclass(frozen=True)
class DCptRate(Separable):
  """The D-CPT law with a learning rate, which the paper keeps fixed: E + B r^eta / (D e)^beta + C e^k / (r + eps)^gamma.

  The extension is ours: the rate counts like tokens where a corpus is learnt, and has a power of its own where it is forgotten.
  """

  role: str = "domain"
  rate0: float = 1e-3
  tokens0: float = 1e6
  name: ClassVar[str] = "dcpt_rate"
  linear: ClassVar = {"E": ANY, "B": POSITIVE, "C": POSITIVE}
  shape: ClassVar = {"eta": (0.0, 3.0), "beta": (0.0, 2.0), "ln_eps": _LOG_EPS, "gamma": (0.02, 3.0), "k": (-1.0, 4.0)}

  def offset(self, inputs: Inputs) -> np.ndarray:
    """The law does not know the base's loss."""
    return np.zeros_like(inputs["tokens"])

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The plain law's, with the rate in the tokens and before the last column."""
    e = inputs["rate"] / self.rate0
    columns = self._plain().columns(shape_Q[:4], self._as_tokens(inputs))
    columns[:, 2] *= e ** shape_Q[4]
    return columns

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The plain law's, and the last column times ln e for k."""
    e = inputs["rate"] / self.rate0
    slopes = np.zeros((len(e), 3, 5))
    slopes[:, :, :4] = self._plain().slopes(shape_Q[:4], self._as_tokens(inputs))
    slopes[:, 2] *= (e ** shape_Q[4])[:, None]
    slopes[:, 2, 4] = self.columns(shape_Q, inputs)[:, 2] * np.log(e)
    return slopes

  def _plain(self) -> DCpt:
    return DCpt(role=self.role, tokens0=self.tokens0)

  def _as_tokens(self, inputs: Inputs) -> dict[str, np.ndarray]:
    return {"replay": inputs["replay"], "tokens": inputs["tokens"] * inputs["rate"] / self.rate0}
