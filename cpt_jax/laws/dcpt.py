"""Share of a corpus and tokens of a run -> its final loss on that corpus, by the D-CPT law.

Invariant: r is the share of the corpus whose loss is predicted: the replay share for role "replay", 1 - replay for role "domain".

Que et al. (2406.01375), their form L3: L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma, a fit for each
corpus. It demands dL/dD < 0, dL/dr < 0 and d2L/dDdr < 0; with free parameters none of these is certain.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

_LOG_EPS = (float(np.log(1e-4)), 0.0)


@dataclasses.dataclass(frozen=True)
class DCpt(Separable):
  """The D-CPT law for one size of model: A / N^alpha is part of E."""

  role: str = "domain"
  name: ClassVar[str] = "dcpt"
  linear: ClassVar = {"E": ANY, "B": POSITIVE, "C": POSITIVE}
  shape: ClassVar = {"eta": (0.0, 3.0), "beta": (0.0, 2.0), "ln_eps": _LOG_EPS, "gamma": (0.02, 3.0)}
  knows_base: ClassVar = False

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    eta, beta, ln_eps, gamma = shape_Q
    r = inputs["replay"] if self.role == "replay" else 1.0 - inputs["replay"]
    powers = np.exp(eta * np.log(np.maximum(r, 1e-300)) - beta * np.log(inputs["tokens"] / self.tokens0))
    return 1.0, np.where(r > 0, powers, 0.0), np.exp(-gamma * np.log(r + np.exp(ln_eps)))


class DCptRate(DCpt):
  """The D-CPT law with a learning rate, which the paper keeps fixed: E + B r^eta / (D e)^beta + C e^k / (r + eps)^gamma.

  The extension is ours: the rate counts like tokens where a corpus is learnt, and has a power of its own where it is forgotten.
  """

  name: ClassVar[str] = "dcpt_rate"
  shape: ClassVar = DCpt.shape | {"k": (-1.0, 4.0)}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    e = inputs["rate"] / self.rate0
    one, learnt, forgotten = super()._terms(shape_Q[:4], {**inputs, "tokens": inputs["tokens"] * e})
    return one, learnt, np.exp(shape_Q[4] * np.log(e)) * forgotten
