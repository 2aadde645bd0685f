"""Shares of many sources -> the final loss of one, by the data mixing law.

Invariant: shares sum to 1, so the last source has no exponent of its own: k holds it.

Ye et al. (2403.16952): L_i(r) = c_i + k_i exp(sum_j t_ij r_j), a fit for each source i; t_ij < 0 where source j helps source i.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable

_EXPONENT = (-12.0, 12.0)


@dataclasses.dataclass(frozen=True)
class Mixing(Separable):
  """The law over the input columns `names` (all sources but one), at one rate and one length."""

  names: tuple[str, ...] = ("replay",)
  name: ClassVar[str] = "mixing"
  linear: ClassVar = {"c": ANY, "k": POSITIVE}

  @property
  def shape(self) -> dict[str, tuple[float, float]]:
    """An exponent for each column."""
    return {f"t_{name}": _EXPONENT for name in self.names}

  def offset(self, inputs: Inputs) -> np.ndarray:
    """The law does not know the base's loss."""
    return np.zeros_like(inputs[self.names[0]])

  def exponents(self, inputs: Inputs) -> np.ndarray:
    """(n, Q): what the exponents multiply."""
    return np.stack([inputs[name] for name in self.names], axis=1)

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1 and the exponential."""
    power_n = np.exp(self.exponents(inputs) @ shape_Q)
    return np.stack([np.ones_like(power_n), power_n], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The exponential times what its exponent multiplies."""
    exponents_nQ = self.exponents(inputs)
    slopes = np.zeros((len(exponents_nQ), 2, len(shape_Q)))
    slopes[:, 1] = np.exp(exponents_nQ @ shape_Q)[:, None] * exponents_nQ
    return slopes


@dataclasses.dataclass(frozen=True)
class MixingRate(Mixing):
  """The law for grids in which rate and tokens vary: c + k e^u t^v exp(sum_j t_j r_j); the two powers are ours."""

  rate0: float = 1e-3
  tokens0: float = 1e6
  name: ClassVar[str] = "mixing_rate"

  @property
  def shape(self) -> dict[str, tuple[float, float]]:
    """An exponent for each column, for the rate and for the tokens."""
    return super().shape | {"u": (-2.0, 4.0), "v": (-2.0, 2.0)}

  def exponents(self, inputs: Inputs) -> np.ndarray:
    """The shares, ln e and ln t."""
    logs_nQ = np.stack([np.log(inputs["rate"] / self.rate0), np.log(inputs["tokens"] / self.tokens0)], axis=1)
    return np.concatenate([super().exponents(inputs), logs_nQ], axis=1)
