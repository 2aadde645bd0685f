"""A law that is linear in some parameters -> its prediction, exact gradient and good starting points.

Invariant: loss_n = offset_n + columns_nK(shape_Q) @ linear_K, the offset being the base's loss; theta_P = linear_K, shape_Q.

Where the shape parameters are given, the best linear ones follow by least squares (variable projection, Golub and Pereyra 1973).
So starting points are drawn for the few shape parameters only, and a fit rarely needs more than a handful of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import scipy.optimize

Inputs = Mapping[str, np.ndarray]
# Of fits to final losses (fit.fit): their noise, some thousandths, drowns what a smaller one would gain along a ridge.
TOLERANCE = 1e-4
ANY = (-np.inf, np.inf)
POSITIVE = (0.0, np.inf)


@dataclasses.dataclass(frozen=True)
class Separable:
  """What laws build on that give `columns` and `slopes`; parameters are name -> (low, high), of shapes and their starts."""

  linear: ClassVar[dict[str, tuple[float, float]]] = {}
  shape: ClassVar[dict[str, tuple[float, float]]] = {}

  def offset(self, inputs: Inputs) -> np.ndarray:
    """(n,) what is known beforehand: the base's loss, or 0 for the laws that do not know it."""
    return inputs["base"]

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """(n, K) columns that the linear parameters weigh."""
    raise NotImplementedError

  def slopes(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """(n, K, Q) derivatives of the columns with respect to the shape parameters."""
    raise NotImplementedError

  @property
  def parameters(self) -> tuple[str, ...]:
    """Names of theta_P."""
    return (*self.linear, *self.shape)

  @property
  def bounds(self) -> tuple[tuple[float, float], ...]:
    """(low, high) of each parameter; shape parameters start inside theirs at random."""
    return (*self.linear.values(), *self.shape.values())

  def predict(self, theta_P: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Loss of every row of the inputs, (n,)."""
    num_linear = len(self.linear)
    return self.offset(inputs) + self.columns(theta_P[num_linear:], inputs) @ theta_P[:num_linear]

  def gradient(self, theta_P: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Derivatives of the loss with respect to the parameters, (n, P)."""
    num_linear = len(self.linear)
    columns_nK = self.columns(theta_P[num_linear:], inputs)
    if not self.shape:
      return columns_nK
    by_shape_nQ = np.einsum("nkq,k->nq", self.slopes(theta_P[num_linear:], inputs), theta_P[:num_linear])
    return np.concatenate([columns_nK, by_shape_nQ], axis=1)

  def starts(self, inputs: Inputs, loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P): shapes drawn evenly from their ranges, the rest by bounded least squares; without shapes one suffices."""
    target_n = loss_n - self.offset(inputs)
    low_K, high_K = np.array(list(self.linear.values())).T
    starts = []
    for _ in range(num if self.shape else 1):
      shape_Q = np.array([rng.uniform(low, high) for low, high in self.shape.values()])
      columns_nK = self.columns(shape_Q, inputs)
      norm_K = np.linalg.norm(columns_nK, axis=0)
      scale_K = np.where(norm_K > 0, norm_K, 1.0)  # a column of zeros (an input that never varied) gets 0
      solved = scipy.optimize.lsq_linear(columns_nK / scale_K, target_n, bounds=(low_K * scale_K, high_K * scale_K))
      starts.append(np.concatenate([solved.x / scale_K, shape_Q]))
    return np.array(starts)
