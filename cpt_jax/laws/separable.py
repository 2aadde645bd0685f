"""A law that is linear in some parameters -> its prediction, exact gradient and good starting points.

Invariant: loss_n = offset_n + columns_nK(shape_Q) @ linear_K, the offset being the base's loss; theta_P = linear_K, shape_Q;
e = rate / rate0 and t = tokens / tokens0.

Where the shape parameters are given, the best linear ones follow by least squares (variable projection, Golub and Pereyra 1973).
So starting points are drawn for the few shape parameters only, and a fit rarely needs more than a handful of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy.optimize

Inputs = Mapping[str, np.ndarray]
# Of fits to final losses (fit.fit): their noise, some thousandths, drowns what a smaller one would gain along a ridge.
TOLERANCE = 1e-4
ANY = (-np.inf, np.inf)
POSITIVE = (0.0, np.inf)


_TINY = 1e-30  # an imaginary step whose square is nothing beside 1


@dataclasses.dataclass(frozen=True)
class Separable:
  """What laws build on that give `_terms`; parameters are name -> (low, high), of shapes and their starts.

  `_terms` are the K columns, of numpy functions that take complex numbers too: the imaginary part of a column at shape + i h
  is h times its derivative, to the last digit (Squire and Trapp 1998).
  """

  rate0: float = 1e-3
  tokens0: float = 1e6
  linear: ClassVar[dict[str, tuple[float, float]]] = {}
  shape: ClassVar[dict[str, tuple[float, float]]] = {}
  knows_base: ClassVar[bool] = True

  def _terms(self, shape_Q: np.ndarray, inputs: Inputs) -> Sequence[Any]:
    raise NotImplementedError

  def logs(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """ln e and ln t of every row."""
    return np.log(inputs["rate"] / self.rate0), np.log(inputs["tokens"] / self.tokens0)

  def offset(self, inputs: Inputs) -> np.ndarray:
    """(n,) what is known beforehand: the base's loss, or 0 for the laws that do not know it."""
    return inputs["base"] * self.knows_base

  def columns(self, shape_Q: np.ndarray, inputs: Inputs) -> np.ndarray:
    """(n, K) columns that the linear parameters weigh."""
    return np.stack(np.broadcast_arrays(*self._terms(shape_Q, inputs), inputs["base"])[:-1], axis=-1)

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
    shape_Q, num_shapes = theta_P[num_linear:], len(self.shape)
    columns_nK = self.columns(shape_Q, inputs)
    if not num_shapes:
      return columns_nK
    moved_QQ1 = (shape_Q[:, None] + 1j * _TINY * np.eye(num_shapes))[:, :, None]  # column q has only parameter q moved
    slopes_QnK = np.imag(self.columns(moved_QQ1, inputs)) / _TINY
    return np.concatenate([columns_nK, (slopes_QnK @ theta_P[:num_linear]).T], axis=1)

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
