"""A law, inputs and measured losses -> fitted parameters, predictions with intervals, and scores.

Invariant: deterministic given the seed; a law is compared by what it predicts, never by its parameters (they lie on ridges).

The objective is the one of the papers whose laws stand here: the Huber loss of the difference between predicted and measured
log loss, with delta = 1e-3 (printed in 2407.02118 sec. 3 and 2503.12811; 2408.11029 and 2505.07796 use the same form), and
the best of many starts. Three things make it quick and keep it off the ridges of badly scaled parameters:

  - every law brings its own gradient, so that a trust-region least-squares method can be used: it needs tens of evaluations
    where a quasi-Newton method on the scalar needs thousands;
  - a parameter whose lower bound is above 0 is searched in its logarithm; the rest is scaled by the Jacobian's columns;
  - starts are first fitted by plain least squares, which has a wide basin; the best of them go on with the Huber loss.

Two things may be added to it: weights of the observations, and a prior for parameters that data of this kind cannot fix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.optimize
import scipy.stats

from cpt_jax.config import ConfigError

DELTA = 1e-3  # 2407.02118, sec. 3: differences of log losses above it (0.1%) count linearly
_NUM_POLISHED = 6  # starts that go on with the Huber loss, after plain least squares
_GRADIENT_TOLERANCE = 1e-8  # of the cost of an observation that is missed by delta
_SETTLED = 1e-3  # a round that lowers the objective by a smaller share has arrived: a curved valley without a sharp floor
_AGREES = 0.01  # a start found the same optimum when its objective is within this share of the best


class _Effort(NamedTuple):
  """When a search ends: after so many evaluations, or when a step changes less than this share."""

  evaluations: int
  tolerance: float


_SCREEN = _Effort(80, 1e-5)
_POLISH = _Effort(150, 1e-10)
_MAX_ROUNDS = 6  # of polishing
_RESAMPLE = _Effort(80, 1e-6)  # from the optimum of all data to a near one


class Law(Protocol):
  """A formula with parameters; a frozen object. `inputs` is whatever the law reads: the core hands it through."""

  @property
  def name(self) -> str:
    """What people call it."""
    ...

  @property
  def parameters(self) -> tuple[str, ...]:
    """The names of theta_P."""
    ...

  @property
  def bounds(self) -> tuple[tuple[float, float], ...]:
    """(low, high) of each parameter, infinities allowed; with low above 0 the search is in the logarithm."""
    ...

  def predict(self, theta_P: np.ndarray, inputs: Any) -> np.ndarray:
    """loss_n of every observation."""
    ...

  def gradient(self, theta_P: np.ndarray, inputs: Any) -> np.ndarray:
    """(n, P): the derivative of `predict`."""
    ...

  def starts(self, inputs: Any, loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P): where to begin, from the data and wide ranges, whatever the units of the rates and the size of the model."""
    ...


@dataclasses.dataclass(frozen=True)
class Around:
  """A law that changes another one: what it does not say itself is the other's."""

  law: Any

  @property
  def name(self) -> str:
    """The law's."""
    return self.law.name

  @property
  def parameters(self) -> tuple[str, ...]:
    """The law's."""
    return self.law.parameters

  @property
  def bounds(self) -> tuple[tuple[float, float], ...]:
    """The law's."""
    return self.law.bounds

  def predict(self, theta_P: np.ndarray, inputs: Any) -> np.ndarray:
    """The law's, (n,)."""
    return self.law.predict(theta_P, inputs)

  def gradient(self, theta_P: np.ndarray, inputs: Any) -> np.ndarray:
    """The law's, (n, P)."""
    return self.law.gradient(theta_P, inputs)


class Prior(NamedTuple):
  """Where a parameter lies when data say nothing, and within what: in logarithms (sd 0.5 is a factor of 1.65) where its lower
  bound is above 0.
  """

  centre: float
  sd: float


@dataclasses.dataclass(frozen=True)
class Scores:
  """How far predictions lie from measurements, in the losses' own unit; the relative ones as shares of the measured loss."""

  r2: float
  mae: float
  rmse: float
  mean_relative: float
  worst_relative: float


def scores(predicted_n: np.ndarray, loss_n: np.ndarray) -> Scores:
  """The scores; r2 is nan where all measured losses are equal."""
  predicted_n, loss_n = np.asarray(predicted_n, np.float64), np.asarray(loss_n, np.float64)
  if predicted_n.shape != loss_n.shape or not loss_n.size:
    raise ValueError(f"{predicted_n.shape} predictions for {loss_n.shape} losses; one of each, and at least one")
  error_n = predicted_n - loss_n
  spread = np.sum((loss_n - loss_n.mean()) ** 2)
  relative_n = np.abs(error_n) / loss_n
  return Scores(
    r2=float(1 - np.sum(error_n**2) / spread) if spread > 0 else float("nan"), mae=float(np.mean(np.abs(error_n))),
    rmse=float(np.sqrt(np.mean(error_n**2))), mean_relative=float(relative_n.mean()), worst_relative=float(relative_n.max()),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
  """A law with the parameters that fit `loss_n` best; with those of resampled data too once `bootstrap` has made them."""

  law: Law
  inputs: Any
  loss_n: np.ndarray
  weights_n: np.ndarray  # their mean is 1
  priors: Mapping[str, Prior]
  num_independent: float
  theta_P: np.ndarray
  objective: float  # weighted mean Huber loss of the log losses, and what the priors add
  delta: float
  num_agreeing: int  # polished starts that ended at the same objective; 1 = nothing confirms this optimum
  thetas_KP: np.ndarray  # of resampled data; K = 0 before bootstrap

  def predict(self, inputs: Any) -> np.ndarray:
    """loss_n at other inputs."""
    return self.law.predict(self.theta_P, inputs)

  def scores(self) -> Scores:
    """On the data that were fitted."""
    return scores(self.predict(self.inputs), self.loss_n)

  def noise(self) -> float:
    """Standard deviation of a measured log loss about the law, the parameters' freedom counted."""
    free = len(self.loss_n) - len(self.theta_P)
    if free < 1:
      raise ValueError(
        f"{self.law.name}: {len(self.loss_n)} losses fix {len(self.theta_P)} parameters exactly, so nothing says how far "
        "predictions may be off; add measurements"
      )
    apart_n = np.log(self.predict(self.inputs) / self.loss_n)
    return float(np.sqrt(np.sum(self.weights_n * apart_n**2) / free))

  def interval(self, inputs: Any, *, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """(low_n, high_n) between which a new measurement lies with probability `level`.

    The law's spread over resampled data and the noise of one measurement, added as independent in log loss. What it cannot
    cover is a law that is wrong where it was not fitted.
    """
    self._check_resampled(level)
    noise, free = self.noise(), len(self.loss_n) - len(self.theta_P)
    with np.errstate(all="ignore"):
      predicted_Kn = np.stack([self.law.predict(theta_P, inputs) for theta_P in self.thetas_KP])
    # The noise as 41 equally likely values of Student's distribution: deterministic, and wider where few data fix it.
    noise_R = noise * scipy.stats.t.ppf((np.arange(41) + 0.5) / 41, free)
    log_Kn = np.log(np.maximum(predicted_Kn, np.finfo(np.float64).tiny))
    log_Sn = (log_Kn[:, None] + noise_R[None, :, None]).reshape(-1, log_Kn.shape[1])
    low_n, high_n = np.quantile(log_Sn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.exp(low_n), np.exp(high_n)

  def parameter_intervals(self, *, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """(low_P, high_P) over resampled data. Wide and correlated: to be printed, not to be compared."""
    self._check_resampled(level)
    low_P, high_P = np.quantile(self.thetas_KP, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low_P, high_P

  def _check_resampled(self, level: float) -> None:
    if not len(self.thetas_KP):
      raise ValueError(f"{self.law.name}: intervals come from resampled data; call bootstrap(fit, num=200) first")
    if not 0 < level < 1:
      raise ValueError(f"level={level}: a probability between 0 and 1, e.g. 0.9")


def fit(
  law: Law, inputs: Any, loss_n: np.ndarray, *, weights_n: np.ndarray | None = None, priors: Mapping[str, Prior] | None = None,
  num_independent: float | None = None, num_starts: int = 48, seed: int = 0, delta: float = DELTA,
  tolerance: float = _POLISH.tolerance,
) -> Fit:  # fmt: skip
  """The parameters that fit best, of `num_starts` starts.

  A prior that is missed by its sd counts as much as one independent observation that is missed by delta; `num_independent`
  says how many of those the losses are worth (None = as many as there are; neighbours on a curve are wrong together).

  A search ends where a step changes the objective or the parameters by less than `tolerance` of themselves. The default suits
  thousands of smooth losses; few noisy ones leave ridges on which only a larger one ends.
  Raises ConfigError: too few or non-finite or non-positive losses, or no start from which the search converged.
  """
  loss_n = np.asarray(loss_n, np.float64)
  weights_n = np.asarray(np.ones(loss_n.shape) if weights_n is None else weights_n, np.float64)
  priors = dict(priors or {})
  _check(law, loss_n, weights_n, num_starts=num_starts)
  rng = np.random.default_rng(seed)
  starts_QP = np.asarray(law.starts(inputs, loss_n, num=num_starts, rng=rng), np.float64)
  weights_n = np.asarray(weights_n / weights_n.mean())
  independent = float(len(loss_n) if num_independent is None else num_independent)
  search = _Search(law, inputs, loss_n, priors=priors, prior_weight=1 / independent, delta=delta)
  screened = [search.run(start_P, weights_n, delta=None, effort=_SCREEN) for start_P in starts_QP]
  usable = sorted((end for end in screened if end is not None), key=lambda end: end.objective)
  if not usable:
    raise ConfigError(
      f"{law.name}: its value is not a finite number at any of {num_starts} starts; look for zero rates, shares outside 0..1 "
      "or other inputs for which the law has no value"
    )
  effort = _POLISH._replace(tolerance=tolerance)
  polished = [search.settle(end.theta_P, weights_n, delta=delta, effort=effort) for end in usable[:_NUM_POLISHED]]
  ends = [end for end in polished if end is not None]
  if not ends:
    raise ConfigError(
      f"{law.name}: the search did not converge from any of {num_starts} starts; the data may not fix its parameters "
      "(too few distinct inputs), or hold losses that no setting can follow"
    )
  best = min(ends, key=lambda end: end.objective)
  agreeing = sum(end.objective <= best.objective * (1 + _AGREES) for end in ends)
  return Fit(
    law=law, inputs=inputs, loss_n=loss_n, weights_n=weights_n, priors=priors, num_independent=independent,
    theta_P=best.theta_P, objective=best.objective, delta=delta, num_agreeing=agreeing,
    thetas_KP=np.zeros((0, len(best.theta_P))),
  )  # fmt: skip


def _check(law: Law, loss_n: np.ndarray, weights_n: np.ndarray, *, num_starts: int) -> None:
  problems = []
  if loss_n.ndim != 1:
    problems.append(f"{law.name}: losses have shape {loss_n.shape}; give one number for each observation")
  elif len(loss_n) < len(law.parameters):
    problems.append(
      f"{law.name}: {len(loss_n)} losses cannot fix {len(law.parameters)} parameters ({', '.join(law.parameters)}); "
      "add measurements or take a law with fewer"
    )
  if not (np.isfinite(loss_n).all() and (loss_n > 0).all()):
    problems.append(
      f"{law.name}: losses must be finite and above 0 (the fit is of their logarithm); remove the rows that are not"
    )
  if weights_n.shape != loss_n.shape or not (np.isfinite(weights_n).all() and (weights_n >= 0).all() and weights_n.any()):
    problems.append(f"{law.name}: weights must be finite, not below 0, not all 0, and one for each of {loss_n.size} losses")
  if num_starts < 1:
    problems.append(f"{law.name}: num_starts={num_starts}; at least 1")
  if problems:
    raise ConfigError("\n".join(problems))


def bootstrap(fitted: Fit, *, num: int = 200, groups_n: np.ndarray | None = None, seed: int = 0) -> Fit:
  """`fitted` with the parameters of `num` resampled data sets, each searched from the fitted ones.

  What is drawn, with replacement, are groups: all observations with the same entry of `groups_n` come together or not at all.
  Name the same group for observations whose errors are alike (a run, a seed, a stretch of a curve); None = each its own.
  """
  n, num_parameters = len(fitted.loss_n), len(fitted.theta_P)
  _, group_n = np.unique(np.arange(n) if groups_n is None else np.asarray(groups_n), return_inverse=True)
  num_groups = int(group_n.max()) + 1
  if len(group_n) != n or num_groups < 2:
    raise ConfigError(
      f"{fitted.law.name}: {len(group_n)} entries in {num_groups} group(s) for {n} losses; resampling needs 2 groups"
    )
  if num < 1:
    raise ConfigError(f"{fitted.law.name}: {num} resampled data sets; at least 1")
  rng = np.random.default_rng(seed)
  search = _Search(
    fitted.law, fitted.inputs, fitted.loss_n, priors=fitted.priors, prior_weight=1 / fitted.num_independent, delta=fitted.delta
  )
  thetas = []
  for _ in range(num):
    # Drawing with replacement is a count for each group, so the inputs are never copied or cut.
    for _ in range(100):
      counts_n = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups))[group_n]
      weights_n = counts_n * fitted.weights_n
      if np.count_nonzero(weights_n) >= num_parameters:
        break
    end = search.run(fitted.theta_P, weights_n, delta=fitted.delta, effort=_RESAMPLE)
    assert end is not None, "the law has a value at its own optimum"
    thetas.append(end.theta_P)
  return dataclasses.replace(fitted, thetas_KP=np.stack(thetas))


@dataclasses.dataclass(frozen=True)
class _End:
  theta_P: np.ndarray
  objective: float
  is_converged: bool


class _Search:
  """Least squares on log losses, in scaled parameters; a prior is one more residual."""

  def __init__(
    self, law: Law, inputs: Any, loss_n: np.ndarray, *, priors: Mapping[str, Prior], prior_weight: float, delta: float
  ):
    self.law, self.inputs = law, inputs
    self.log_n = np.log(loss_n)
    # Below the floor the logarithm goes on as its tangent: no start is lost to a prediction under 0.
    self.floor = 0.05 * float(loss_n.min())
    low_P, high_P = np.array(law.bounds, np.float64).T
    self.is_log_P = low_P > 0
    self.low_P, self.high_P = self._inward(low_P), self._inward(high_P)
    self.prior_weight = prior_weight
    places = [law.parameters.index(name) for name in priors]
    centre_P = np.ones(len(low_P))
    centre_P[places] = [prior.centre for prior in priors.values()]
    self.centre_P = self._inward(centre_P)
    self.pull_RP = np.eye(len(low_P))[places] * np.array([delta / prior.sd for prior in priors.values()])[:, None]
    self._seen: tuple[np.ndarray, np.ndarray] | None = None

  def _inward(self, theta_P: np.ndarray) -> np.ndarray:
    return np.where(self.is_log_P, np.log(np.where(self.is_log_P, theta_P, 1.0)), theta_P)

  def _outward(self, x_P: np.ndarray) -> np.ndarray:
    return np.where(self.is_log_P, np.exp(np.where(self.is_log_P, x_P, 0.0)), x_P)

  def _predict(self, x_P: np.ndarray) -> np.ndarray:
    # The Jacobian is asked for where the residuals were.
    if self._seen is None or not np.array_equal(self._seen[0], x_P):
      self._seen = (x_P.copy(), self.law.predict(self._outward(x_P), self.inputs))
    return self._seen[1]

  def residuals(self, x_P: np.ndarray) -> np.ndarray:
    predicted_n = self._predict(x_P)
    above_n = np.maximum(predicted_n, self.floor)
    apart_n = np.log(above_n) + (predicted_n - above_n) / self.floor - self.log_n
    return np.concatenate([apart_n, self.pull_RP @ (x_P - self.centre_P)])

  def jacobian(self, x_P: np.ndarray) -> np.ndarray:
    theta_P = self._outward(x_P)
    gradient_nP = self.law.gradient(theta_P, self.inputs) * np.where(self.is_log_P, theta_P, 1.0)[None, :]
    return np.concatenate([gradient_nP / np.maximum(self._predict(x_P), self.floor)[:, None], self.pull_RP])

  def settle(self, theta_P: np.ndarray, weights_n: np.ndarray, *, delta: float, effort: _Effort) -> _End | None:
    """Where the Huber loss falls no more, by the solver's tests or for a whole round; None when it still does at the end."""
    end = None
    for _ in range(_MAX_ROUNDS):
      before, end = end, self.run(theta_P if end is None else end.theta_P, weights_n, delta=delta, effort=effort)
      if end is None or end.is_converged or (before and end.objective > (1 - _SETTLED) * before.objective):
        return end
    return None

  def run(self, theta_P: np.ndarray, weights_n: np.ndarray, *, delta: float | None, effort: _Effort) -> _End | None:
    """Where the search ends; None when the law has no finite value at the start. No delta: plain least squares."""
    x_P = np.clip(
      self._inward(np.maximum(theta_P, np.where(self.is_log_P, np.exp(self.low_P), -np.inf))), self.low_P, self.high_P
    )
    scale = 1.0 if delta is None else delta
    # Shares of the observations, so that the cost is a mean; a prior weighs as one of the independent ones.
    weights_m = np.concatenate([weights_n / weights_n.sum(), np.full(len(self.pull_RP), self.prior_weight)])

    def loss(z_m: np.ndarray) -> np.ndarray:
      far_m = np.maximum(z_m, 1.0) if delta is not None else np.ones_like(z_m)
      far_m[len(weights_n) :] = 1.0
      rho_m = np.where(far_m > 1, 2 * np.sqrt(far_m) - 1, z_m)
      # The second derivative is left out: Gauss-Newton on the quadratic above the Huber loss, which never overshoots.
      return np.stack([rho_m, far_m**-0.5, np.zeros_like(z_m)]) * weights_m

    with np.errstate(all="ignore"):
      if not (np.isfinite(self.residuals(x_P)).all() and np.isfinite(self.jacobian(x_P)).all()):
        return None
      settings: dict[str, Any] = dict(jac=self.jacobian, loss=loss, f_scale=scale, x_scale="jac", max_nfev=effort.evaluations)
      # Not "trf": it scales steps by the distance to the bounds, which says nothing here, and creeps.
      settings["method"] = "dogbox"
      settings |= dict(ftol=effort.tolerance, xtol=effort.tolerance, gtol=_GRADIENT_TOLERANCE * scale**2)
      end = scipy.optimize.least_squares(self.residuals, x_P, bounds=(self.low_P, self.high_P), **settings)
    return _End(self._outward(end.x), float(end.cost), end.status > 0)
