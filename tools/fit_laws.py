"""Loss curves -> fitted laws, their errors on curves that they did not see, parameters with intervals; as tables, JSON and PNG.

Invariant: a law is scored only on curves that its fit has not seen; the same command gives the same figures.

Exit codes: 0 done, 74 disk or file error, 78 wrong settings or files.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are small: threads would only wait for each other

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

import numpy as np
import rich.console
import rich.progress

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.laws import annealing, curves
from cpt_jax.laws import fit as fit_lib
from cpt_jax.laws.cpt_law import REPLAY_FORMS, CptLaw
from cpt_jax.laws.curves import Curve, CurveLaw
from cpt_jax.laws.fit import Fit, Scores
from cpt_jax.results import runs
from cpt_jax.training import console

SCHEDULE_LAWS = [annealing.Forward(), annealing.Tissue(decay_steps=1000.0), annealing.Tissue(), annealing.MultiPower()]
CPT_LAWS = [CptLaw(replay=form, decay_steps=None) for form in REPLAY_FORMS.values()]
LAWS: dict[str, CurveLaw] = {law.name: law for law in [*SCHEDULE_LAWS, *CPT_LAWS]}

_EXTRAPOLATED = 1.05  # reach from which it is said

_FIT = flags.DEFINE_multi_string("fit", [], "CSV files (step, lr, loss), runs or folders of runs to fit: one or more.")
_SCORE = flags.DEFINE_multi_string("score", [], "Such to predict; without any, each fitted curve is predicted from the others.")
_RUNS = flags.DEFINE_string("runs", "", "A folder of runs to fit, beside those of --fit.")
_SOURCE = flags.DEFINE_string("source", "", "Whose held-out losses are taken from runs, e.g. general.")
_LAW = flags.DEFINE_string("law", "multi_power", f"{', '.join(LAWS)}; or all, to compare those that fit the curves' kind.")
_JSON = flags.DEFINE_string("json", "", "File to write the figures into.")
_PLOT = flags.DEFINE_string("plot", "", "PNG of all curves with the laws' predictions.")
_WARMUP_STEPS = flags.DEFINE_integer("warmup_steps", -1, "Of the CSV files; -1 = until the first row, or while the rate rises.")
_RESAMPLES = flags.DEFINE_integer("resamples", 100, "Resampled data sets for the 90% intervals; 0 = no intervals.")
_STARTS = flags.DEFINE_integer("starts", 48, "Points from which each fit is searched.")
_SEED = flags.DEFINE_integer("seed", 0, "Of starts and resamples.")


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


def spread(argv: Sequence[str]) -> list[str]:
  """--fit a b -> --fit=a --fit=b: absl takes one value at a time, and a shell's a*.csv is many."""
  spread_out, name = [], ""
  for argument in argv:
    if argument.lstrip("-") in ("fit", "score") and argument.startswith("-"):
      name = argument
    elif name and not argument.startswith("-"):
      spread_out.append(f"{name}={argument}")
    else:
      name = ""
      spread_out.append(argument)
  return spread_out


def read(paths: Sequence[str], *, problems: list[str]) -> list[Curve]:
  """The curves of files, runs and folders of runs; notes what is wrong with them."""
  warmup_steps = None if _WARMUP_STEPS.value < 0 else _WARMUP_STEPS.value
  made = []
  for path in paths:
    try:
      if pathlib.Path(path).is_dir():
        if not _SOURCE.value:
          raise ConfigError(f"{path}: a run measures several sources; name one with --source")
        found = runs.read_runs(path)
      else:
        made.append(curves.read_csv(path, warmup_steps=warmup_steps))
        continue
    except ConfigError as error:
      problems.append(str(error))
      continue
    for run in found:
      try:
        made.append(curves.from_run(run, source=_SOURCE.value))
      except ConfigError as error:
        problems.append(str(error))
  return made


def chosen_laws(*, with_runs: bool) -> list[CurveLaw]:
  """Those that --law names."""
  if _LAW.value == "all":
    return [*SCHEDULE_LAWS, *CPT_LAWS] if with_runs else [*SCHEDULE_LAWS]
  if _LAW.value not in LAWS:
    known = [*LAWS, "all"]
    raise ConfigError(f"--law={_LAW.value}: choose one of {', '.join(known)}.{config_lib.did_you_mean(_LAW.value, known)}")
  return [LAWS[_LAW.value]]


def fit_one(law: CurveLaw, fit_on: list[Curve]) -> Fit:
  """With resampled parameters if they were asked for."""
  fitted = curves.fit(law, fit_on, num_starts=_STARTS.value, seed=_SEED.value)
  return curves.bootstrap(fitted, num=_RESAMPLES.value, seed=_SEED.value) if _RESAMPLES.value else fitted


def predict_one(fitted: Fit, curve: Curve) -> Scored:
  """A curve that the fit has not seen."""
  predicted_n = fitted.predict([curve])
  longest = max(float(seen.area_n[-1]) for seen in fitted.inputs)
  band_n = fitted.interval([curve]) if len(fitted.thetas_KP) else None
  return Scored(curve, predicted_n, band_n, fit_lib.scores(predicted_n, curve.loss_n), float(curve.area_n[-1]) / longest)


def fit_and_score(laws: list[CurveLaw], fit_on: list[Curve], score_on: list[Curve]) -> tuple[list[Result], list[str]]:
  """Every law's result, and a line for each that could not be fitted while others could."""
  # Without curves to predict each is left out of a fit once.
  folds = [] if score_on else [(fit_on[:i] + fit_on[i + 1 :], [curve]) for i, curve in enumerate(fit_on) if len(fit_on) > 1]
  results, failures = [], []
  bar = rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
  with bar:
    task = bar.add_task("fitting", total=len(laws) * (1 + len(folds)))
    for law in laws:
      try:
        bar.update(task, description=law.name)
        whole = fit_one(law, fit_on)
        bar.advance(task)
        scored = [predict_one(whole, curve) for curve in score_on]
        for seen, (left_out,) in folds:
          scored.append(predict_one(fit_one(law, seen), left_out))
          bar.advance(task)
        results.append(Result(whole, scored))
      except ConfigError as error:
        failures.append(str(error))
  if not results:
    raise ConfigError("\n".join(failures))
  return results, failures


def short_names(made: Sequence[Curve]) -> dict[str, str]:
  """The names of curves without the folders and endings that tell nothing."""
  paths = [pathlib.PurePath(curve.name) for curve in made]
  stems = [path.stem if path.suffix == ".csv" else path.name for path in paths]
  return {str(path): stem if stems.count(stem) == 1 else str(path) for path, stem in zip(paths, stems, strict=True)}


def show(results: list[Result], failures: list[str], names: dict[str, str], *, title: str) -> None:
  """The tables."""
  columns = {"r2": "R2", "mae": "MAE", "rmse": "RMSE", "mean_relative": "mean relative", "worst_relative": "worst relative"}
  numbers = lambda figures: [f"{figures[key]:.4f}" if key == "r2" else f"{figures[key]:.5f}" for key in columns]  # noqa: E731
  for result in results:
    if result.scored:
      rows = []
      for scored in result.scored:
        figures = scored.figures()
        inside = "" if figures["inside_90"] is None else f"{figures['inside_90']:.0%}"
        rows.append([names[scored.curve.name], *numbers(figures), inside, f"{scored.reach:.2f}"])
      rows.append(["mean", *numbers(result.mean()), "", ""])
      console.table(f"{result.fitted.law.name}: {title}", ["curve", *columns.values(), "inside 90% interval", "reach"], rows)
    fitted = result.fitted
    own = dataclasses.asdict(fitted.scores())
    rows = [[name, *values] for name, values in parameter_figures(fitted, digits=True).items()]
    console.table(f"{fitted.law.name}: parameters", ["parameter", "value", "5%", "95%"], rows)
    console.say(
      f"{fitted.law.name} on the {len(fitted.inputs)} curves that were fitted: R2 {own['r2']:.4f}, MAE {own['mae']:.5f}; "
      f"{fitted.num_agreeing} searches ended there"
    )
  if len(results) > 1 and results[0].scored:
    ranked = sorted(results, key=lambda result: result.mean()["mae"])
    rows = [[result.fitted.law.name, *numbers(result.mean())] for result in ranked]
    console.table(f"laws by mean absolute error, {title}", ["law", *columns.values()], rows)
  for scored in results[0].scored:
    if scored.reach > _EXTRAPOLATED:
      name = names[scored.curve.name]
      console.say(f"{name}: extrapolated, to {scored.reach:.1f} times the summed rates of the longest fitted curve")
  for failure in failures:
    console.say(failure)


def parameter_figures(fitted: Fit, *, digits: bool = False) -> dict[str, Any]:
  """name -> (value, low, high), as numbers or as text; without resamples low and high are None."""
  low_P, high_P = fitted.parameter_intervals() if len(fitted.thetas_KP) else (None, None)
  made = {}
  for i, name in enumerate(fitted.law.parameters):
    values = [float(fitted.theta_P[i]), *(None if ends is None else float(ends[i]) for ends in (low_P, high_P))]
    made[name] = ["" if value is None else f"{value:.4g}" for value in values] if digits else values
  return made


def as_json(results: list[Result], failures: list[str], *, how: str) -> dict[str, Any]:
  """Everything that the tables say, in full precision."""
  laws = []
  for result in results:
    fitted = result.fitted
    ends = parameter_figures(fitted).items()
    parameters = {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in ends}
    laws.append(
      {
        "law": fitted.law.name,
        "parameters": parameters,
        "objective": fitted.objective,
        "searches_agreeing": fitted.num_agreeing,
        "on_fitted": dataclasses.asdict(fitted.scores()),
        "scored": {scored.curve.name: scored.figures() for scored in result.scored},
        "mean": result.mean() if result.scored else None,
      }
    )
  versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
  fitted_on = [curve.name for curve in results[0].fitted.inputs]
  return {"fitted_on": fitted_on, "how": how, "laws": laws, "failures": failures, "versions": versions}


def plot(results: list[Result], names: dict[str, str], path: str) -> None:
  """All curves, measured and predicted, each in its own panel."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  scored = results[0].scored
  panels = [curve for curve in results[0].fitted.inputs if curve.name not in {s.curve.name for s in scored}]
  panels += [s.curve for s in scored]
  num_columns = min(3, len(panels))
  num_rows = -(-len(panels) // num_columns)
  figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(5 * num_columns, 3.4 * num_rows), squeeze=False)
  for axis, curve in zip(axes.flat, panels, strict=False):
    axis.plot(curve.step_n, curve.loss_n, ".", color="0.6", markersize=3, label="measured")
    is_seen = True
    for color, result in enumerate(results):
      predictions = [s for s in result.scored if s.curve is curve]
      is_seen = not predictions
      predicted_n = predictions[0].predicted_n if predictions else result.fitted.predict([curve])
      axis.plot(curve.step_n, predicted_n, color=f"C{color}", linewidth=1, label=result.fitted.law.name)
      if len(results) == 1 and predictions and predictions[0].band_n:
        axis.fill_between(curve.step_n, *predictions[0].band_n, color=f"C{color}", alpha=0.2, label="90% interval")
    axis.set_title(f"{names[curve.name]} ({'fitted' if is_seen else 'predicted'})", fontsize=9)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats/token)")
    low, high = np.quantile(curve.loss_n, [0, 0.97])
    axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
  for axis in axes.flat[len(panels) :]:
    axis.set_axis_off()
  axes.flat[0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def check_flags() -> list[str]:
  """What is wrong with them."""
  problems = []
  if not _FIT.value and not _RUNS.value:
    problems.append("--fit and --runs missing: name the curves to fit, e.g. --fit a.csv b.csv, or --runs probe/ --source general")
  if _RUNS.value and not pathlib.Path(_RUNS.value).is_dir():
    problems.append(f"--runs={_RUNS.value}: no such folder")
  if _RESAMPLES.value < 0 or _STARTS.value < 1:
    problems.append(f"--resamples={_RESAMPLES.value} --starts={_STARTS.value}: at least 0 and 1")
  both = sorted(set(_FIT.value) & set(_SCORE.value))
  if both:
    problems.append(f"{', '.join(both)}: both fitted and scored; a law is scored on what it has not seen")
  if _PLOT.value and not importlib.util.find_spec("matplotlib"):
    problems.append("--plot needs matplotlib: pip install 'cpt_jax[plots]', or leave --plot out")
  return problems


def run() -> list[str]:
  """Does what the flags ask for; returns the lines to print at the end."""
  problems = check_flags()
  try:
    laws = chosen_laws(with_runs=bool(_SOURCE.value))
  except ConfigError as error:
    problems.append(str(error))
    laws = []
  runs_dir = [_RUNS.value] if _RUNS.value and pathlib.Path(_RUNS.value).is_dir() else []
  fit_on, score_on = (read(paths, problems=problems) for paths in ([*_FIT.value, *runs_dir], _SCORE.value))
  if problems:
    raise ConfigError("\n".join(dict.fromkeys(problems)))
  results, failures = fit_and_score(laws, fit_on, score_on)
  names = short_names([*fit_on, *score_on])
  how = "curves that were not fitted" if score_on else "each curve predicted from the others"
  show(results, failures, names, title=how)
  lines = []
  for path in (_JSON.value, _PLOT.value):
    if path:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
      lines.append(f"wrote {path}")
  if _JSON.value:
    text = json.dumps(as_json(results, failures, how=how), indent=2)
    pathlib.Path(_JSON.value).write_text(text + "\n", encoding="utf-8")
  if _PLOT.value:
    plot(results, names, _PLOT.value)
  return lines


def main(argv: list[str]) -> int:
  """Exit code, after printing what was found or what is wrong."""
  if len(argv) > 1:
    print(f"what is {' '.join(argv[1:])}? files come after --fit or --score", file=sys.stderr)
    return 78
  try:
    for line in run():
      console.say(line)
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 78
  except OSError as error:
    print(error, file=sys.stderr)
    return 74
  return 0


if __name__ == "__main__":
  app.run(main, argv=spread(sys.argv))
