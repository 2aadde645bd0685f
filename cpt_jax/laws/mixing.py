"""Shares of many sources -> the final loss of one, by the data mixing law.

Invariant: shares sum to 1, so the last source has no exponent of its own: k holds it.

Ye et al. (2403.16952): L_i(r) = c_i + k_i exp(sum_j t_ij r_j), a fit for each source i; t_ij < 0 where source j helps source i.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from cpt_jax.laws.separable import ANY, POSITIVE, Inputs, Separable


@dataclasses.dataclass(frozen=True)
class Mixing(Separable):
  """The law over the input columns `names` (all sources but one): c + k e^u t^v exp(sum_j t_j r_j).

  The two powers are ours, for grids in which rate and tokens vary.
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
