"""Rates, replay and the base's past -> old-domain or new-domain loss at every step of continual pretraining (2505.07796).

Invariant: the same law for both losses, the sign of B telling them apart; how replay damps the shift is a part that can be
exchanged, since no published form of it holds everywhere.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cpt_jax.laws import annealing
from cpt_jax.laws.curves import Curve
from cpt_jax.laws.fit import Parametric, Prior

_SMALL = 1e-3  # below it the exponential form is taken as its series


class Replay(Parametric, Protocol):
  """What is left of the shift at a share of replay: 1 without any, 0 with nothing but replay."""

  @property
  def priors(self) -> Mapping[str, Prior]:
    """For runs whose shares fix them badly."""
    ...

  def factor(self, theta_R: np.ndarray, replay_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(factor_n, its derivative (n, R))."""
    ...

  def starts(self, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, R)."""
    ...


@dataclasses.dataclass(frozen=True)
class NoReplay:
  """1 whatever the share: for runs that all have the same."""

  name: str = "none"
  parameters: tuple[str, ...] = ()
  bounds: tuple[tuple[float, float], ...] = ()
  priors: Mapping[str, Prior] = dataclasses.field(default_factory=dict)

  def factor(self, theta_R: np.ndarray, replay_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1, and no derivative."""
    return np.ones_like(replay_n), np.zeros((len(replay_n), 0))

  def starts(self, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """Nothing to start."""
    return np.zeros((num, 0))


@dataclasses.dataclass(frozen=True)
class Exponential:
  """(e^(a r) - 1) / (e^a - 1) in the share r of new data: both forms of 2505.07796, eq. 8, scaled to 1 at r = 1.

  With a above 0 it is the convex one, e^(a r) - 1; below 0 the concave one, 1 - e^(-|a| r); at 0 it is r. The paper prints
  the concave one for the old domain and the convex one for the new; its own fits for single ratios (fig. 12) look as if it
  were the other way round. Here the data say the sign.
  """

  name: str = "exponential"
  parameters: tuple[str, ...] = ("replay_a",)
  bounds: tuple[tuple[float, float], ...] = ((-50.0, 50.0),)
  priors: Mapping[str, Prior] = dataclasses.field(default_factory=lambda: {"replay_a": Prior(0.0, 5.0)})

  def factor(self, theta_R: np.ndarray, replay_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(factor_n, its derivative (n, 1))."""
    a, new_n = theta_R[0], 1.0 - replay_n
    if abs(a) < _SMALL:
      square_n = new_n**2 - new_n
      cube_n = 2 * new_n**3 - 3 * new_n**2 + new_n
      return new_n + a / 2 * square_n + a**2 / 12 * cube_n, (square_n / 2 + a / 6 * cube_n)[:, None]
    factor_n = np.expm1(a * new_n) / np.expm1(a)
    return factor_n, ((new_n * np.exp(a * new_n) - factor_n * np.exp(a)) / np.expm1(a))[:, None]

  def starts(self, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """Of both signs."""
    return rng.uniform(-8.0, 8.0, (num, 1))


@dataclasses.dataclass(frozen=True)
class Power:
  """r^p in the share r of new data."""

  name: str = "power"
  parameters: tuple[str, ...] = ("replay_p",)
  bounds: tuple[tuple[float, float], ...] = ((1e-2, 1e2),)
  priors: Mapping[str, Prior] = dataclasses.field(default_factory=lambda: {"replay_p": Prior(1.0, 1.5)})

  def factor(self, theta_R: np.ndarray, replay_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(factor_n, its derivative (n, 1))."""
    new_n = np.maximum(1.0 - replay_n, np.finfo(np.float64).tiny)
    factor_n = new_n ** theta_R[0]
    return factor_n, (factor_n * np.log(new_n))[:, None]

  def starts(self, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """About r itself, within a factor of 10."""
    return annealing.log_uniform(rng, 0.1, 10.0, num)[:, None]


@dataclasses.dataclass(frozen=True)
class Log:
  """1 - ln(1 + replay / rho0) / ln(1 + 1 / rho0): each e-fold of replay above rho0 removes the same.

  Steep enough for the first percent of replay, which removes half of the forgetting (2403.08763) and more than either
  exponential can.
  """

  name: str = "log"
  parameters: tuple[str, ...] = ("replay_rho0",)
  bounds: tuple[tuple[float, float], ...] = ((1e-8, 1e2),)
  priors: Mapping[str, Prior] = dataclasses.field(default_factory=lambda: {"replay_rho0": Prior(1e-2, 3.0)})

  def factor(self, theta_R: np.ndarray, replay_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(factor_n, its derivative (n, 1))."""
    rho0 = theta_R[0]
    removed_n, all_of_it = np.log1p(replay_n / rho0), np.log1p(1 / rho0)
    removed_slope_n, all_slope = -replay_n / (rho0 * (rho0 + replay_n)), -1 / (rho0 * (rho0 + 1))
    slope_n = -(removed_slope_n * all_of_it - removed_n * all_slope) / all_of_it**2
    return 1 - removed_n / all_of_it, slope_n[:, None]

  def starts(self, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """From a thousandth of a percent to all."""
    return annealing.log_uniform(rng, 1e-5, 1.0, num)[:, None]


REPLAY_FORMS = {form.name: form for form in (NoReplay(), Exponential(), Power(), Log())}


@dataclasses.dataclass(frozen=True)
class CptLaw:
  """L0 + A (S1_pt + S1)^-alpha - C1 S2_pt - C2 S2 + B f(replay) (1 - (1 + E S1)^-beta)  (2505.07796, eq. 5 and 8).

  S1 and S2 are those of this run, S1_pt and S2_pt those of the base's training. B is above 0 for the old domain's loss and
  below 0 for the new one's. Where the base's past is unknown, S1_pt is fitted and C1 S2_pt is part of L0.
  """

  replay: Replay = REPLAY_FORMS["none"]
  is_base_known: bool = False  # the curves tell base_area and base_annealing
  decay_steps: float | None = 1000.0  # of S2, as in annealing.Tissue; None fits it
  has_replay_annealing: bool = False  # S2 counts e^(a replay) times (eq. 8)

  @property
  def name(self) -> str:
    """With its form of replay."""
    return "cpt" if self.replay.name == "none" else f"cpt_{self.replay.name}"

  @property
  def _table(self) -> dict[str, tuple[float, float]]:
    table = {"L0": (0.0, np.inf), "A": annealing.ANY_SIZE, "alpha": annealing.EXPONENT}
    table |= {"C1": (0.0, np.inf)} if self.is_base_known else {"S1_pt": annealing.ANY_SIZE}
    table |= {"C2": (0.0, np.inf), "B": (-np.inf, np.inf), "E": annealing.ANY_SIZE, "beta": annealing.EXPONENT}
    if self.decay_steps is None:
      table["decay_steps"] = annealing.DECAY_STEPS
    if self.has_replay_annealing:
      table["annealing_a"] = (-50.0, 50.0)
    return table | dict(zip(self.replay.parameters, self.replay.bounds, strict=True))

  @property
  def parameters(self) -> tuple[str, ...]:
    """In the order of theta_P, those of the replay form last."""
    return tuple(self._table)

  @property
  def bounds(self) -> tuple[tuple[float, float], ...]:
    """B of either sign."""
    return tuple(self._table.values())

  @property
  def priors(self) -> Mapping[str, Prior]:
    """(B, E, beta) lie on a ridge: the paper has beta from 0.001 to 0.37 for like curves (0.15 to 0.37 where it is not tiny)."""
    priors = {"beta": Prior(0.25, 1.0)}
    if self.has_replay_annealing:
      priors["annealing_a"] = Prior(0.0, 1.0)
    return priors | dict(self.replay.priors)

  def predict(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """loss_n."""
    return annealing.over_curves(lambda curve: self._columns(theta_P, curve, with_slopes=False)["loss"], inputs)

  def gradient(self, theta_P: np.ndarray, inputs: Sequence[Curve]) -> np.ndarray:
    """(n, P)."""

    def of_curve(curve: Curve) -> np.ndarray:
      columns = self._columns(theta_P, curve, with_slopes=True)
      return np.stack([columns[name] for name in self.parameters], axis=1)

    return annealing.over_curves(of_curve, inputs)

  def _columns(self, theta_P: np.ndarray, curve: Curve, *, with_slopes: bool) -> dict[str, np.ndarray]:
    """The loss, or its derivative in every parameter by name."""
    p = dict(zip(self.parameters, theta_P, strict=True))
    theta_R = np.array([p[name] for name in self.replay.parameters])
    area_n, replay_n = curve.area_n, np.full(len(curve.area_n), curve.replay_frac)
    whole_n = area_n + (curve.base_area if self.is_base_known else p["S1_pt"])
    steps = self.decay_steps or p["decay_steps"]
    annealed_n, annealed_slope_n = curve.annealing(1 - 1 / steps)
    replayed = np.exp(p["annealing_a"] * curve.replay_frac) if self.has_replay_annealing else 1.0
    log_n = np.log1p(p["E"] * area_n)
    shift_n = -np.expm1(-p["beta"] * log_n)
    factor_n, factor_slope_nR = self.replay.factor(theta_R, replay_n)
    base = p["C1"] * curve.base_annealing if self.is_base_known else 0.0
    if not with_slopes:
      power_n = whole_n ** -p["alpha"]
      loss_n = p["L0"] + p["A"] * power_n - base - p["C2"] * replayed * annealed_n + p["B"] * factor_n * shift_n
      return {"loss": loss_n}
    forward_n3 = annealing.forward_gradient(p["A"], p["alpha"], whole_n)
    slopes: dict[str, np.ndarray] = dict(zip(self.parameters, forward_n3.T, strict=False))  # L0, A, alpha come first
    if self.is_base_known:
      slopes["C1"] = np.full(len(area_n), -curve.base_annealing)
    else:
      slopes["S1_pt"] = -p["alpha"] * p["A"] * whole_n ** (-p["alpha"] - 1)
    slopes["C2"] = -replayed * annealed_n
    slopes["B"] = factor_n * shift_n
    slopes["E"] = p["B"] * factor_n * p["beta"] * (1 - shift_n) * area_n / (1 + p["E"] * area_n)
    slopes["beta"] = p["B"] * factor_n * (1 - shift_n) * log_n
    if self.decay_steps is None:
      slopes["decay_steps"] = -p["C2"] * replayed * annealed_slope_n / steps**2
    if self.has_replay_annealing:
      slopes["annealing_a"] = -p["C2"] * replayed * annealed_n * curve.replay_frac
    for name, slope_n in zip(self.replay.parameters, factor_slope_nR.T, strict=True):
      slopes[name] = p["B"] * shift_n * slope_n
    return slopes

  def starts(self, inputs: Sequence[Curve], loss_n: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, P): a base that was trained 0.1 to 1000 times as long, a shift that is half done after 1e-5 to 0.5 of the run."""
    area = max(float(curve.area_n.max()) for curve in inputs)
    longest = max(len(curve.rates_S) for curve in inputs)
    draws = {
      "alpha": annealing.log_uniform(rng, 0.1, 1.5, num),
      "S1_pt": area * annealing.log_uniform(rng, 0.1, 1e3, num),
      "beta": annealing.log_uniform(rng, 0.05, 1.0, num),
      "decay_steps": np.clip(longest * annealing.log_uniform(rng, 1e-3, 1.0, num), *annealing.DECAY_STEPS),
      "annealing_a": rng.uniform(-0.5, 0.5, num),
    }
    draws["E"] = (2 ** (1 / draws["beta"]) - 1) / (area * annealing.log_uniform(rng, 1e-5, 0.5, num))
    draws |= dict(zip(self.replay.parameters, self.replay.starts(num=num, rng=rng).T, strict=True))
    linear = [name for name in ("L0", "A", "C1", "C2", "B") if name in self.parameters]
    starts = []
    for i in range(num):
      # With the linear ones at 1 each of their slopes is the column that they multiply.
      drawn = {name: 1.0 if name in linear else draws[name][i] for name in self.parameters}
      slopes = [self._columns(np.array(list(drawn.values())), curve, with_slopes=True) for curve in inputs]
      columns = [np.concatenate([of_curve[name] for of_curve in slopes]) for name in linear]
      *factors, below = annealing.offset_and_factors(np.stack([*columns, -columns[-1]], axis=1), loss_n)
      factors[-1] -= below  # B may have either sign
      drawn |= dict(zip(linear, factors, strict=True))
      starts.append(list(drawn.values()))
    return np.array(starts)
