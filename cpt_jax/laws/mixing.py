"""Shares of many sources -> the final loss of one, by the data mixing law, and the shares that serve best.

Invariant: shares sum to 1, so the last source has no exponent of its own: k holds it. The best shares lie among the measured.

Ye et al. (2403.16952): L_i(r) = c_i + k_i exp(sum_j t_ij r_j), a fit for each source i; t_ij < 0 where source j helps source i.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.laws import fit as fit_lib
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


def best_shares(
  fits: Mapping[str, fit_lib.Fit],
  *,
  weights: Mapping[str, float],
  limits: Mapping[str, float] | None = None,
  at: Mapping[str, float] | None = None,
  seed: int = 0,
) -> tuple[dict[str, float], dict[str, float]]:
  """Shares (of `names`; the source that has no column takes the rest) of the lowest weighted loss, and the losses there.

  A random search inside the measured range of every share that narrows around the best mixture so far.

  Args:
    fits: source -> a fit of Mixing or MixingRate, all over the same columns and mixtures.
    weights: source -> its weight in the sum to be made small.
    limits: source -> the highest loss that is allowed.
    at: rate and tokens for MixingRate.
    seed: of the search.

  Raises:
    ConfigError: no mixture in the measured range keeps the limits.
  """
  limits = limits or {}
  one = next(iter(fits.values()))
  assert isinstance(one.law, Mixing)
  names = one.law.names
  measured_nM = np.stack([one.inputs[name] for name in names], axis=1)
  rest_n = 1.0 - measured_nM.sum(axis=1)
  low_M, high_M = measured_nM.min(axis=0), measured_nM.max(axis=0)

  def losses(shares_cM: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {name: shares_cM[:, i] for i, name in enumerate(names)}
    inputs |= {name: np.full(len(shares_cM), value) for name, value in (at or {}).items()}
    return {source: fitted.predict(inputs) for source, fitted in fits.items()}

  rng = np.random.default_rng(seed)
  best_M, over = (low_M + high_M) / 2, np.inf
  for width in 0.6 ** np.arange(12):
    drawn_cM = best_M + width * (high_M - low_M) * rng.uniform(-0.5, 0.5, (4000, len(names)))
    candidates_cM = np.concatenate([np.clip(drawn_cM, low_M, high_M), measured_nM, best_M[None]])
    rest_c = 1.0 - candidates_cM.sum(axis=1)
    candidates_cM = candidates_cM[(rest_c >= rest_n.min() - 1e-9) & (rest_c <= rest_n.max() + 1e-9)]
    found = losses(candidates_cM)
    cost_c = np.sum([weight * found[source] for source, weight in weights.items()], axis=0)
    over_c = np.max([np.zeros_like(cost_c), *(found[source] - limit for source, limit in limits.items())], axis=0)
    i = np.lexsort((cost_c, over_c))[0]  # within the limits first, then the lowest sum
    best_M, over = candidates_cM[i], float(over_c[i])
  if over > 0:
    wanted = ", ".join(f"{source} <= {limit:.4f}" for source, limit in limits.items())
    raise ConfigError(
      f"no mixture in the measured range keeps {wanted}; the nearest is {over:.4f} nats over, allow that much more"
    )
  return (
    {name: float(share) for name, share in zip(names, best_M, strict=True)},
    {source: float(loss[0]) for source, loss in losses(best_M[None]).items()},
  )
