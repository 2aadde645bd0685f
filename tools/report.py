"""A run, and the plan that it followed -> predicted against measured: a table and a figure.

Invariant: reads records alone; a run that is still going is reported as far as it is.

Exit codes: 0 done, 78 no such run or plan, or nothing was predicted for it.
"""

import pathlib
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax.config import ConfigError
from cpt_jax.results import report, runs
from cpt_jax.training import console

_RUN = flags.DEFINE_string("run", "", "Directory of the run.")
_PLAN = flags.DEFINE_string("plan", "", "Directory of its plan; without it, the prediction that the run's config records.")
_OUTPUT = flags.DEFINE_string("output", "", "The figure; report.png in the run's directory by default.")
_FIGURE = flags.DEFINE_bool("figure", True, "Draw the figure (needs the extra [plots]).")


def main(argv: list[str]) -> int:
  """Prints the table, draws the figure; returns the exit code."""
  del argv
  try:
    if not _RUN.value:
      raise ConfigError("--run is empty: name the --workdir of a run")
    run = runs.read_run(_RUN.value)
    plan = report.read_plan(_PLAN.value) if _PLAN.value else None
    table = report.rows(run, plan.losses if plan else report.recorded(run))
    _say(run, table, plan)
    if _FIGURE.value:
      path = pathlib.Path(_OUTPUT.value or run.path / "report.png")
      report.figure(run, table, plan, path)
      console.say(f"figure        {path}")
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  return 0


def _say(run: runs.Run, table: list[report.Row], plan: report.Plan | None) -> None:
  state = (
    "complete" if run.is_complete else f"at step {run.eval_steps_E[-1]} of {len(run.rates_S)}: what follows is not its end yet"
  )
  console.say(f"run           {run.path}, {state}")
  for line in report.differences(run, plan) if plan else []:
    console.say(f"note: {line}; the prediction is not for this run")
  console.table(
    "held-out loss, nats per token: predicted before the run, measured in it",
    ["source", "role", "base", "predicted", "interval", "measured", "error", "change", "predicted change", "inside"],
    [
      [row.source, row.role, f"{row.base:.4f}", f"{row.predicted:.4f}", f"{row.low:.4f} to {row.high:.4f}", f"{row.measured:.4f}"]
      + [
        f"{row.error:+.4f}",
        f"{row.measured - row.base:+.4f}",
        f"{row.predicted - row.base:+.4f}",
        "yes" if row.is_inside else "no",
      ]
      for row in table
    ],
    left=2,
  )


if __name__ == "__main__":
  app.run(main)
