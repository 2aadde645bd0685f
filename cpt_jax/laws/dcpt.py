"""Share of a corpus and tokens of a run -> its final loss on that corpus, by the D-CPT law or the data mixing law.

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


@dataclasses.dataclass(frozen=True)
class Mixing(Separable):
  """The data mixing law over the input columns `names` (all sources but one): c + k e^u t^v exp(sum_j t_j r_j).

  Ye et al. (2403.16952): L_i(r) = c_i + k_i exp(sum_j t_ij r_j), a fit for each source i; t_ij < 0 where source j helps source i.
  Shares sum to 1, so the last source has no exponent of its own: k holds it. Both powers are ours, for rate and tokens.
  """

  names: tuple[str, ...] = ("replay",)
  name: ClassVar[str] = "mixing_rate"
  linear: ClassVar = {"c": ANY, "k": POSITIVE}
  knows_base: ClassVar = False

  @property
  def shape(self) -> dict[str, tuple[float, float]]:
    """An exponent for each column, for the rate and for the tokens."""
    return {f"t_{name}": (-12.0, 12.0) for name in self.names} | {"u": (-2.0, 4.0), "v": (-2.0, 2.0)}

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    columns = [*(inputs[name] for name in self.names), *self.logs(inputs)]
    return 1.0, np.exp(sum(weight * column for weight, column in zip(shape_Q, columns, strict=True)))
