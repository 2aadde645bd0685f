"""Loss curves -> fitted laws, their errors on curves that they did not see, parameters with intervals; as tables, JSON and PNG.

Invariant: a law is scored only on curves that its fit has not seen; the same command gives the same figures.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cpt_jax.config import ConfigError, did_you_mean
from cpt_jax.laws import annealing, curves, fit as fit_lib
from cpt_jax.laws.cpt_law import REPLAY_FORMS, CptLaw
from cpt_jax.laws.curves import Curve, CurveLaw
from cpt_jax.laws.fit import Fit, Scores
from cpt_jax.progress import Progress
from cpt_jax.results.report import panels
from cpt_jax.results.runs import read_runs

SCHEDULE_LAWS = [annealing.Forward(), annealing.Tissue(decay_steps=1000.0), annealing.Tissue(), annealing.MultiPower()]
CPT_LAWS = [CptLaw(form) for form in REPLAY_FORMS.values()]
LAWS: dict[str, CurveLaw] = {law.name: law for law in [*SCHEDULE_LAWS, *CPT_LAWS]}


@dataclasses.dataclass
class Scored:
  """A curve as a law predicts it that has not seen it."""

  curve: Curve
  predicted_n: np.ndarray
  band_n: tuple[np.ndarray, np.ndarray] | None
  scores: Scores
  reach: float  # its summed rate over that of the longest fitted curve

  def figures(self) -> dict[str, float | None]:
    """For JSON."""
    inside = None
    if self.band_n:
      inside = float(np.mean((self.band_n[0] <= self.curve.loss_n) & (self.curve.loss_n <= self.band_n[1])))
    return {**dataclasses.asdict(self.scores), "inside_90": inside, "reach": self.reach}


@dataclasses.dataclass
class Result:
  """A law on all curves."""

  fitted: Fit  # on all that may be fitted
  scored: list[Scored]

  def mean(self) -> dict[str, float]:
    """Of the curves' scores."""
    keys = [field.name for field in dataclasses.fields(Scores)]
    return {key: float(np.mean([getattr(scored.scores, key) for scored in self.scored])) for key in keys}


@dataclasses.dataclass
class CurveFits:
  """Laws fitted to curves, and scored on others or on each of them in turn."""

  results: list[Result]
  failures: list[str]  # a line for each law that could not be fitted while others could
  how: str  # what was scored
  names: dict[str, str]  # of the curves, without the folders and endings that tell nothing
  written: list[str]  # files

  def as_json(self) -> dict[str, Any]:
    """Everything that the tables say, in full precision."""
    laws = []
    for result in self.results:
      fitted = result.fitted
      ends = parameter_figures(fitted).items()
      parameters = {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in ends}
      laws.append(
        {
          "law": fitted.law.name, "parameters": parameters, "objective": fitted.objective,
          "searches_agreeing": fitted.num_agreeing, "on_fitted": dataclasses.asdict(fitted.scores()),
          "scored": {scored.curve.name: scored.figures() for scored in result.scored},
          "mean": result.mean() if result.scored else None,
        }
      )  # fmt: skip
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
    fitted_on = [curve.name for curve in self.results[0].fitted.inputs]
    return {"fitted_on": fitted_on, "how": self.how, "laws": laws, "failures": self.failures, "versions": versions}


class _Search(NamedTuple):
  """How a fit is searched."""

  resamples: int
  starts: int
  seed: int


def fit_curves(
  fit: Sequence[str | os.PathLike], *, score: Sequence[str | os.PathLike] = (), runs: str | os.PathLike = "", source: str = "",
  law: str = "multi_power", warmup_steps: int = -1, resamples: int = 100, starts: int = 48, seed: int = 0,
  json_file: str | os.PathLike = "", plot: str | os.PathLike = "",
) -> CurveFits:  # fmt: skip
  """Fits laws to loss curves, scores them on others, and writes what is asked for.

  Args:
    fit: CSV files (step, lr, loss), runs or folders of runs.
    score: such to predict; without any, each fitted curve is predicted from the others.
    runs: a folder of runs to fit, beside those of `fit`.
    source: whose held-out losses are taken from runs.
    law: a name of LAWS, or "all" to compare those that fit the curves' kind.
    warmup_steps: of CSV files; -1 = until the first row, or while the rate rises.
    resamples: resampled data sets for the 90% intervals; 0 = no intervals.
    starts: points from which each fit is searched.
    seed: of starts and resamples.
    json_file: file to write the figures into; "" = none.
    plot: PNG of all curves with the laws' predictions; "" = none.

  Raises:
    ConfigError: all that is wrong with the settings and the files.
  """
  fit, score = [str(path) for path in fit], [str(path) for path in score]
  problems = _problems(fit, score, str(runs), resamples=resamples, starts=starts, plot=bool(plot))
  laws: list[CurveLaw] = []
  try:
    laws = _chosen(law, with_runs=bool(source))
  except ConfigError as error:
    problems.append(str(error))
  folder = [str(runs)] if runs and pathlib.Path(runs).is_dir() else []
  read = lambda paths: _read(paths, source=source, warmup_steps=warmup_steps, problems=problems)  # noqa: E731
  fit_on, score_on = read([*fit, *folder]), read(score)
  if problems:
    raise ConfigError("\n".join(dict.fromkeys(problems)))
  results, failures = fit_and_score(laws, fit_on, score_on, _Search(resamples, starts, seed))
  how = "curves that were not fitted" if score_on else "each curve predicted from the others"
  found = CurveFits(results, failures, how, _short_names([*fit_on, *score_on]), [str(file) for file in (json_file, plot) if file])
  for file in found.written:
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
  if json_file:
    pathlib.Path(json_file).write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
  if plot:
    _plot(found, str(plot))
  return found


def _problems(fit: list[str], score: list[str], runs: str, *, resamples: int, starts: int, plot: bool) -> list[str]:
  problems = []
  if not fit and not runs:
    problems.append("--fit and --runs missing: name the curves to fit, e.g. --fit a.csv b.csv, or --runs probe/ --source general")
  if runs and not pathlib.Path(runs).is_dir():
    problems.append(f"--runs={runs}: no such folder")
  if resamples < 0 or starts < 1:
    problems.append(f"--resamples={resamples} --starts={starts}: at least 0 and 1")
  both = sorted(set(fit) & set(score))
  if both:
    problems.append(f"{', '.join(both)}: both fitted and scored; a law is scored on what it has not seen")
  return problems


def _read(paths: Sequence[str], *, source: str, warmup_steps: int, problems: list[str]) -> list[Curve]:
  """The curves of files, runs and folders of runs; notes what is wrong with them."""
  made = []
  for path in paths:
    try:
      if pathlib.Path(path).is_dir():
        if not source:
          raise ConfigError(f"{path}: a run measures several sources; name one with --source")
        found = read_runs(path)
      else:
        made.append(curves.read_csv(path, warmup_steps=None if warmup_steps < 0 else warmup_steps))
        continue
    except ConfigError as error:
      problems.append(str(error))
      continue
    for run in found:
      try:
        made.append(curves.from_run(run, source=source))
      except ConfigError as error:
        problems.append(str(error))
  return made


def _chosen(name: str, *, with_runs: bool) -> list[CurveLaw]:
  """Those that --law names."""
  if name == "all":
    return [*SCHEDULE_LAWS, *CPT_LAWS] if with_runs else [*SCHEDULE_LAWS]
  if name not in LAWS:
    known = [*LAWS, "all"]
    raise ConfigError(f"--law={name}: choose one of {', '.join(known)}.{did_you_mean(name, known)}")
  return [LAWS[name]]


def _fit_one(law: CurveLaw, fit_on: list[Curve], search: _Search) -> Fit:
  """With resampled parameters if they were asked for."""
  fitted = curves.fit(law, fit_on, num_starts=search.starts, seed=search.seed)
  return curves.bootstrap(fitted, num=search.resamples, seed=search.seed) if search.resamples else fitted


def _predict_one(fitted: Fit, curve: Curve) -> Scored:
  """A curve that the fit has not seen."""
  predicted_n = fitted.predict([curve])
  longest = max(float(seen.area_n[-1]) for seen in fitted.inputs)
  band_n = fitted.interval([curve]) if len(fitted.thetas_KP) else None
  return Scored(curve, predicted_n, band_n, fit_lib.scores(predicted_n, curve.loss_n), float(curve.area_n[-1]) / longest)


def fit_and_score(
  laws: Sequence[CurveLaw], fit_on: list[Curve], score_on: list[Curve], search: _Search
) -> tuple[list[Result], list[str]]:
  """Every law's result, and a line for each that could not be fitted while others could."""
  # Without curves to predict each is left out of a fit once.
  folds = [] if score_on else [(fit_on[:i] + fit_on[i + 1 :], [curve]) for i, curve in enumerate(fit_on) if len(fit_on) > 1]
  results, failures = [], []
  with Progress() as progress:
    for law in laws:
      advance = progress.part(f"fit {law.name}", 1 + len(folds))
      try:
        whole = _fit_one(law, fit_on, search)
        advance(1)
        scored = [_predict_one(whole, curve) for curve in score_on]
        for seen, (left_out,) in folds:
          scored.append(_predict_one(_fit_one(law, seen, search), left_out))
          advance(1)
        results.append(Result(whole, scored))
      except ConfigError as error:
        failures.append(str(error))
  if not results:
    raise ConfigError("\n".join(failures))
  return results, failures


def _short_names(made: Sequence[Curve]) -> dict[str, str]:
  """The names of curves without the folders and endings that tell nothing."""
  paths = [pathlib.PurePath(curve.name) for curve in made]
  stems = [path.stem if path.suffix == ".csv" else path.name for path in paths]
  return {str(path): stem if stems.count(stem) == 1 else str(path) for path, stem in zip(paths, stems, strict=True)}


def parameter_figures(fitted: Fit, *, digits: bool = False) -> dict[str, Any]:
  """name -> (value, low, high), as numbers or as text; without resamples low and high are None."""
  low_P, high_P = fitted.parameter_intervals() if len(fitted.thetas_KP) else (None, None)
  made = {}
  for i, name in enumerate(fitted.law.parameters):
    values = [float(fitted.theta_P[i]), *(None if ends is None else float(ends[i]) for ends in (low_P, high_P))]
    made[name] = ["" if value is None else f"{value:.4g}" for value in values] if digits else values
  return made


def _plot(found: CurveFits, path: str) -> None:
  """All curves, measured and predicted, each in its own panel."""
  results, scored = found.results, found.results[0].scored
  shown = [curve for curve in results[0].fitted.inputs if curve.name not in {s.curve.name for s in scored}]
  shown += [s.curve for s in scored]
  num_columns = min(3, len(shown))
  num_rows = -(-len(shown) // num_columns)
  figure, axes = panels(num_rows, num_columns, size=(5 * num_columns, 3.4 * num_rows), layout="tight")
  for axis, curve in zip(axes.flat, shown, strict=False):
    axis.plot(curve.step_n, curve.loss_n, ".", color="0.6", markersize=3, label="measured")
    is_seen = True
    for color, result in enumerate(results):
      predictions = [s for s in result.scored if s.curve is curve]
      is_seen = not predictions
      predicted_n = predictions[0].predicted_n if predictions else result.fitted.predict([curve])
      axis.plot(curve.step_n, predicted_n, color=f"C{color}", linewidth=1, label=result.fitted.law.name)
      if len(results) == 1 and predictions and predictions[0].band_n:
        axis.fill_between(curve.step_n, *predictions[0].band_n, color=f"C{color}", alpha=0.2, label="90% interval")
    axis.set_title(f"{found.names[curve.name]} ({'fitted' if is_seen else 'predicted'})", fontsize=9)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats/token)")
    low, high = np.quantile(curve.loss_n, [0, 0.97])
    axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
  for axis in axes.flat[len(shown) :]:
    axis.set_axis_off()
  axes.flat[0].legend(fontsize=8)
  figure.savefig(path, dpi=110)
