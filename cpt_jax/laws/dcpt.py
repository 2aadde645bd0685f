"""Share of a corpus, tokens and parameters of a run -> its final loss on that corpus, by the D-CPT law.

Invariant: r is the share of the corpus whose loss is predicted: the replay share for role "replay", 1 - replay for role "domain".

Que et al. (2406.01375), their form L3: L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma, a fit for each
corpus. It demands dL/dD < 0, dL/dr < 0 and d2L/dDdr < 0; with free parameters none of these is certain, so `violations` looks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import scipy.optimize

from cpt_jax.config import ConfigError
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
  """The D-CPT law for one size of model (A / N^alpha is part of E), or for several with `sizes=True` and a column `params`."""

  role: str = "domain"
  sizes: bool = False
  tokens0: float = 1e6
  params0: float = 1e6
  name: ClassVar[str] = "dcpt"

  @property
  def linear(self) -> dict[str, tuple[float, float]]:
    """E, B and C; A for several sizes."""
    return {"E": ANY, "B": POSITIVE, "C": POSITIVE} | ({"A": POSITIVE} if self.sizes else {})

  @property
  def shape(self) -> dict[str, tuple[float, float]]:
    """The exponents, and eps by its logarithm."""
    shape = {"eta": (0.0, 3.0), "beta": (0.0, 2.0), "ln_eps": _LOG_EPS, "gamma": (0.02, 3.0)}
    return shape | ({"alpha": (0.02, 2.0)} if self.sizes else {})

  def offset(self, inputs: Inputs) -> np.ndarray:
    """The law does not know the base's loss."""
    return np.zeros_like(inputs["tokens"])

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """1, r^eta / D^beta, (r + eps)^-gamma, and N^-alpha for several sizes."""
    eta, beta, ln_eps, gamma = shape_Q[:4]
    r = _share(inputs, self.role)
    columns = [np.ones_like(r), _power(r, eta)[0] * (inputs["tokens"] / self.tokens0) ** -beta, (r + np.exp(ln_eps)) ** -gamma]
    if self.sizes:
      columns.append((inputs["params"] / self.params0) ** -shape_Q[4])
    return np.stack(columns, axis=1)

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """By eta and beta the second column's, by ln eps and gamma the third's, by alpha the last one's."""
    eta, beta, ln_eps, gamma = shape_Q[:4]
    r, columns = _share(inputs, self.role), self.columns(shape_Q, inputs)
    slopes = np.zeros((len(r), len(self.linear), len(self.shape)))
    tokens = inputs["tokens"] / self.tokens0
    slopes[:, 1, 0] = _power(r, eta)[1] * tokens**-beta
    slopes[:, 1, 1] = -columns[:, 1] * np.log(tokens)
    slopes[:, 2, 2] = -gamma * columns[:, 2] * np.exp(ln_eps) / (r + np.exp(ln_eps))
    slopes[:, 2, 3] = -columns[:, 2] * np.log(r + np.exp(ln_eps))
    if self.sizes:
      slopes[:, 3, 4] = -columns[:, 3] * np.log(inputs["params"] / self.params0)
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


def violations(law: DCpt, theta_P: np.ndarray, inputs: Inputs, *, num: int = 21) -> dict[str, float]:
  """Share of a grid over the fitted range where a property that the law demands fails: {} is a law of the paper's kind.

  Keys are the properties, "dL/dD < 0", "dL/dr < 0" and "d2L/dDdr < 0". The second fails where B eta r^(eta-1) / D^beta outgrows
  the last term's fall, at small r.
  """
  r_n = _share(inputs, law.role)
  share_n, tokens_n = (
    a.ravel()
    for a in np.meshgrid(
      np.linspace(max(float(r_n.min()), 1e-3), float(r_n.max()), num),
      np.geomspace(float(inputs["tokens"].min()), float(inputs["tokens"].max()) * (1 + 1e-6), num),
    )
  )
  _, B, C = theta_P[:3]
  eta, beta, ln_eps, gamma = theta_P[len(law.linear) : len(law.linear) + 4]
  D = tokens_n / law.tokens0
  learnt = B * share_n**eta * D**-beta
  slopes = {
    "dL/dD < 0": -beta * learnt / D,
    "dL/dr < 0": eta * learnt / share_n - gamma * C * (share_n + np.exp(ln_eps)) ** (-gamma - 1),
    "d2L/dDdr < 0": -beta * eta * learnt / (D * share_n),
  }
  return {name: float(np.mean(slope >= 0)) for name, slope in slopes.items() if (slope >= 0).any()}


def crossing(share_n: np.ndarray, loss_n: np.ndarray, *, limit: float) -> float:
  """The largest share up to which the loss stays at or under `limit`, straight between the measured or predicted points.

  Raises:
    ConfigError: the loss is above the limit at the smallest share already.
  """
  order = np.argsort(share_n)
  share_n, loss_n = np.asarray(share_n, np.float64)[order], np.asarray(loss_n, np.float64)[order]
  above = np.flatnonzero(loss_n > limit)
  if not above.size:
    return float(share_n[-1])
  i = int(above[0])
  if i == 0:
    raise ConfigError(
      f"the loss is {loss_n[0]:.4f} at share {share_n[0]:g}, above the limit {limit:.4f}; "
      f"allow at least {loss_n[0] - limit:.4f} more"
    )
  part = (limit - loss_n[i - 1]) / (loss_n[i] - loss_n[i - 1])
  return float(share_n[i - 1] + part * (share_n[i] - share_n[i - 1]))


def most_domain(
  law: DCpt, theta_P: np.ndarray, *, tokens: float, limit: float, low: float, high: float, params: float | None = None
) -> float:
  """Usage 1: the largest domain share in low..high whose general loss stays under `limit`; `law` has the role "replay"."""
  share_n = np.linspace(low, high, 2001)
  return crossing(share_n, law.predict(theta_P, _at(1.0 - share_n, tokens, params)), limit=limit)


def limited_domain(
  law: DCpt, theta_P: np.ndarray, *, domain_tokens: float, low: float, high: float, params: float | None = None
) -> tuple[float, float]:
  """Usage 2: domain text for `domain_tokens` and no more -> (domain share in low..high, domain loss) of the lowest loss.

  Less of the domain in the mix means a longer run on the same domain text, D = domain_tokens / share.
  """

  def loss(share: float) -> float:
    return float(law.predict(theta_P, _at(np.array([1.0 - share]), domain_tokens / share, params))[0])

  shares = np.geomspace(low, high, 65)
  i = int(np.argmin([loss(share) for share in shares]))
  bounds = (shares[max(i - 1, 0)], shares[min(i + 1, len(shares) - 1)])
  found: Any = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
  inside = float(found.x)
  best = min((inside, float(shares[i])), key=loss)
  return best, loss(best)


def _at(replay_n: np.ndarray, tokens: float, params: float | None) -> Mapping[str, np.ndarray]:
  inputs = {"replay": replay_n, "tokens": np.full_like(replay_n, tokens)}
  return inputs if params is None else inputs | {"params": np.full_like(replay_n, params)}
