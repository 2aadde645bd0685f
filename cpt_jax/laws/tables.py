"""Fitted laws of curves -> tables for people.

Invariant: shows, computes nothing but means.
"""

import dataclasses

from cpt_jax.laws.fit_curves import CurveFits, parameter_figures
from cpt_jax.training import console

_EXTRAPOLATED = 1.05  # reach from which it is said


def show(found: CurveFits) -> None:
  """Errors on curves that were not seen, parameters, and the laws beside each other."""
  results, names, title = found.results, found.names, found.how
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
  for line in (*found.failures, *(f"wrote {file}" for file in found.written)):
    console.say(line)
