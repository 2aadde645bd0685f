"""Loss changes of runs with several domain shares -> the critical mixture ratio, the largest share the general loss allows.

Invariant: tokens in any one unit throughout; a ratio is a domain share, 0..1.

Gu et al. (2407.17467): over tokens T the domain loss changes by a1 T^s1 + b1, the general loss by a2 T^s2 + a3 T^s3 + b2 (it
rises, then falls); at a fixed T the domain loss is a R^s + b in the share R; and the critical ratio grows as a4 T^s4 + b3. Their
limit, .05 nats, is a choice. Parameters of different sizes have different signs: these are curves, and predictions are compared.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.laws import dcpt
from cpt_jax.laws import fit as fit_lib
from cpt_jax.laws.separable import ANY, Inputs, Separable

RISE = 0.05  # nats; the limit of 2407.17467


@dataclasses.dataclass(frozen=True)
class PowerCurve(Separable):
  """y = b + a x^s of one input column: the domain loss over the share, the critical ratio over the tokens."""

  column: str = "tokens"
  name: ClassVar[str] = "cmr_curve"
  linear: ClassVar = {"b": ANY, "a": ANY}
  shape: ClassVar = {"s": (-3.0, 3.0)}

  def offset(self, inputs: Inputs) -> np.ndarray:
    """Nothing is known beforehand."""
    return np.zeros_like(inputs[self.column])

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1 and x^s."""
    x = inputs[self.column]
    return np.stack([np.ones_like(x), x ** shape_Q[0]], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """x^s ln x."""
    x = inputs[self.column]
    return np.stack([np.zeros_like(x), x ** shape_Q[0] * np.log(x)], axis=1)[:, :, None]


@dataclasses.dataclass(frozen=True)
class DomainChange(PowerCurve):
  """loss = base + b1 + a1 T^s1 of the text that is to be learnt, at one domain share."""

  name: ClassVar[str] = "cmr_domain"

  def offset(self, inputs: Inputs) -> np.ndarray:
    """The base's loss."""
    return inputs["base"]


@dataclasses.dataclass(frozen=True)
class GeneralChange(Separable):
  """loss = base + b2 + a2 T^s2 + a3 T^s3 of text like the base's own, at one domain share; T = tokens / tokens0."""

  tokens0: float = 1.0
  name: ClassVar[str] = "cmr_general"
  linear: ClassVar = {"b2": ANY, "a2": ANY, "a3": ANY}
  shape: ClassVar = {"s2": (-2.0, -0.02), "s3": (0.02, 2.0)}  # apart, or the two powers could stand for each other

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1 and two powers."""
    T = inputs["tokens"] / self.tokens0
    return np.stack([np.ones_like(T), T ** shape_Q[0], T ** shape_Q[1]], axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Each power by its own exponent."""
    T = inputs["tokens"] / self.tokens0
    slopes = np.zeros((len(T), 3, 2))
    slopes[:, 1, 0] = T ** shape_Q[0] * np.log(T)
    slopes[:, 2, 1] = T ** shape_Q[1] * np.log(T)
    return slopes


def critical_ratio(fits: Mapping[float, fit_lib.Fit], *, base: float, tokens: float, rise: float = RISE) -> float:
  """The largest domain share whose general loss is at most `rise` nats above the base's after `tokens`.

  Args:
    fits: domain share -> a fit of GeneralChange to the run with that share; between the shares the rise is taken as straight.
    base: the base's general loss.
    tokens: in the unit of the fits.
    rise: in nats.

  Raises:
    ConfigError: fewer than two shares, or the smallest one rises too much already.
  """
  if len(fits) < 2:
    raise ConfigError(f"a critical ratio lies between runs of different domain shares; {len(fits)} given, at least 2 needed")
  at = {"tokens": np.array([tokens], np.float64), "base": np.array([base], np.float64)}
  shares = sorted(fits)
  return dcpt.crossing(np.array(shares), np.array([fits[share].predict(at)[0] for share in shares]), limit=base + rise)
