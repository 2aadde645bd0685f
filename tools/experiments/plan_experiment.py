"""Run directories of a probe -> a small file of what was measured; these -> tables and figures of docs/results/experiments.md.

Run:   python -m tools.experiments.plan_experiment --collect plan/poetry/trials --output .../measured/plans/poetry.jsonl
       python -m tools.experiments.plan_experiment .../measured/plans/*.jsonl --output .../results

The second needs no training: laws are fitted to the runs of the smallest budget on the grid, and held against the other runs,
which they did not see. Misses are printed as they are.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.laws import cpt_law, curves, fit as fit_lib
from cpt_jax.laws.curves import Curve
from cpt_jax.planning import cells as cells_lib, choose, recommend
from cpt_jax.planning.cells import Cell
from cpt_jax.planning.predictor import fit_sources
from cpt_jax.planning.trials import replay_share
from cpt_jax.results.runs import read_runs
from cpt_jax.training import console

# Share of the forgetting without replay that a share of replay removes: Ibrahim et al. 2403.08763, from tables 2 and 4.
IBRAHIM = {
  "Pile to German, 405M": {0.01: 0.52, 0.05: 0.71, 0.10: 0.79, 0.25: 0.88, 0.50: 0.95},
  "Pile to SlimPajama, 405M": {0.01: 0.67, 0.05: 0.78, 0.10: 0.85, 0.50: 1.04},
}
TARGET = 0.02  # nats: the mean absolute error that was aimed at, or 1.5 times the seeds' noise if that is larger
_NUM_STARTS = 6  # of a fit of the CPT law
LIMITS = (0.05, 0.1, 0.2, 0.4)  # nats of general loss rise, for the regret of what the laws choose

Record = dict[str, Any]


def collect(folder: pathlib.Path) -> list[Record]:
  """A record for each complete run below `folder`: all that the laws read."""
  return [
    {
      "run": run.path.name,
      "rate": run.rate,
      "replay": round(replay_share(run.config), 6),
      "seed": run.seed,
      "tokens": len(run.rates_S) * config_lib.tokens_per_step(run.config),
      "roles": run.roles,
      "rates": [float(f"{rate:.7g}") for rate in run.rates_S],
      "warmup_steps": config_lib.steps_of(run.config, "schedule.warmup"),
      "eval_steps": run.eval_steps_E.tolist(),
      "losses": {name: [round(float(loss), 6) for loss in losses_E] for name, losses_E in run.losses.items()},
    }
    for run in read_runs(folder)
    if run.is_complete
  ]


class MeasuredRuns:
  """The runs of one experiment."""

  def __init__(self, path: pathlib.Path):
    self.name = path.stem
    self.records: list[Record] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    self.roles: dict[str, str] = self.records[0]["roles"]
    self.base = {name: losses[0] for name, losses in self.records[0]["losses"].items()}
    self.tokens = min(r["tokens"] for r in self.records)
    small = self.longer(1)
    seeds: dict[tuple, set] = {}
    for r in small:
      seeds.setdefault(_place(r), set()).add(r["seed"])
    # The grid is what more than one seed was run of. Faster runs than the grid's are the sweep's, which looks for the limit.
    self.grid = [r for r in small if len(seeds[_place(r)]) > 1]
    fastest, slowest = (f(r["rate"] for r in self.grid) for f in (max, min))
    single = [r for r in small if len(seeds[_place(r)]) == 1 and slowest <= r["rate"] <= fastest]
    self.off_grid = [r for r in single if r["replay"] < 1]
    self.control = {r["rate"]: r for r in single if r["replay"] == 1}  # nothing new: what the rate alone does to the old loss
    self.rates, self.replays = (sorted({_place(r)[axis] for r in self.grid}) for axis in (0, 1))

  def longer(self, times: int) -> list[Record]:
    """Runs of so many times the smallest budget."""
    return [r for r in self.records if r["tokens"] == times * self.tokens]

  def noise(self, source: str) -> tuple[float, int]:
    """Pooled standard deviation of the grid's seeds, and its degrees of freedom."""
    cells = list(map(cell, self.grid))
    return cells_lib.seed_noise(cells_lib.losses_of(cells, source), cells_lib.cell_numbers(cells))


def _place(record: Record) -> tuple[float, float]:
  return record["rate"], record["replay"]


def cell(record: Record) -> Cell:
  """What the laws of final losses read."""
  first, last = ({name: losses[i] for name, losses in record["losses"].items()} for i in (0, -1))
  rate, replay, tokens, seed = (record[key] for key in ("rate", "replay", "tokens", "seed"))
  return Cell(rate, replay, tokens, seed, last, first, record["roles"], record["run"])


def curve(record: Record, source: str) -> Curve:
  """What the laws of whole curves read, without the base's own point, which no law moves."""
  steps_n, losses_n = np.array(record["eval_steps"][1:]), np.array(record["losses"][source][1:])
  return Curve(
    record["run"], np.array(record["rates"]), steps_n, losses_n, warmup_steps=record["warmup_steps"], replay_frac=record["replay"]
  )


# ---- what was measured ----


def grid_tables(data: MeasuredRuns) -> None:
  """For every source the change over the base, mean over seeds, at every rate and replay share."""
  for source, role in data.roles.items():
    noise, freedom = data.noise(source)
    console.table(
      f"{data.name}: final loss on {source} ({role}) less the base's {data.base[source]:.4f} nats/token, {data.tokens:,} tokens, "
      f"mean of seeds; seeds differ by {noise:.4f} (pooled standard deviation, {freedom} degrees of freedom)",
      ["rate \\ replay", *(f"{replay:.0%}" for replay in data.replays)],
      [[f"{rate:.2g}", *(f"{_mean_change(data, source, (rate, p)):+.4f}" for p in data.replays)] for rate in data.rates],
    )


def removed_table(data: MeasuredRuns) -> None:
  """Share of the forgetting without replay that replay removed, beside the published ones.

  Also of what the same rate does not do to the old loss anyway, in runs on old text alone, where there are such runs.
  """
  general = next(name for name, role in data.roles.items() if role == "replay")
  replays = [p for p in data.replays if p > 0]
  rows = []
  for rate in data.rates:
    without = _mean_change(data, general, (rate, 0.0))
    removed = [1 - _mean_change(data, general, (rate, p)) / without for p in replays]
    rows.append([f"{data.name}, rate {rate:.2g}", f"{without:+.4f}", *(f"{share:.0%}" for share in removed)])
    if rate in data.control:
      floor = data.control[rate]["losses"][general][-1] - data.base[general]
      above = [(without - _mean_change(data, general, (rate, p))) / (without - floor) for p in replays]
      rows.append([f"  less {floor:+.4f} with replay alone", f"{without - floor:+.4f}", *(f"{share:.0%}" for share in above)])
  for name, known in IBRAHIM.items():
    rows.append([name, "", *(f"{known[p]:.0%}" if p in known else "" for p in replays)])
  console.table(
    "share of the forgetting without replay that replay removes; the last two from Ibrahim et al. 2403.08763",
    ["runs", "without replay", *(f"{p:.0%}" for p in replays)],
    rows,
  )


def _mean_change(data: MeasuredRuns, source: str, place: tuple[float, float]) -> float:
  return float(np.mean([r["losses"][source][-1] - r["losses"][source][0] for r in data.grid if _place(r) == place]))


# ---- what the laws say of runs that they did not see ----


class Outcome(dict):
  """A row of the table of errors."""

  def __init__(self, data: MeasuredRuns, source: str, what: str, law: str, predicted_n: np.ndarray, runs: Sequence[Record]):
    measured_n = np.array([r["losses"][source][-1] for r in runs])
    error_n = predicted_n - measured_n
    target = max(TARGET, 1.5 * data.noise(source)[0])
    mae = float(np.abs(error_n).mean())
    super().__init__(
      experiment=data.name, source=source, held_out=what, runs=len(runs), law=law, mae=mae, bias=float(error_n.mean()),
      worst=float(np.abs(error_n).max()), target=target, is_met=mae <= target,
    )  # fmt: skip


def outcomes(data: MeasuredRuns) -> Iterable[Outcome]:
  """Errors on other rates and shares of the grid's budget, and on runs of 2 and 4 times the tokens.

  The longer runs are predicted by the CPT law from the whole curves of the grid's runs alone, those of 4 times the tokens also by
  the law of final losses that a plan chooses, from the grid and the runs of twice the tokens. "Same cell" is the grid's own
  measured loss at the same rate and share, "nearest cell" that of the nearest.
  """
  grid = list(map(cell, data.grid))
  two_budgets = [*grid, *map(cell, data.longer(2))]
  for source in data.roles:
    choice = choose.choose(grid, source)
    if runs := data.off_grid:
      what = "rates and shares off the grid"
      yield Outcome(data, source, what, choice.law, choice.predict(_inputs(runs, source)).loss_n, runs)
      yield Outcome(data, source, what, "nearest cell", _nearest(data, source, runs), runs)
    law = curve_fit(data, source)
    for times in (2, 4):
      if runs := data.longer(times):
        what = f"{times} times the tokens"
        yield Outcome(data, source, what, f"{law.law.name}, from curves", _ends(law, runs, source), runs)
        if times == 4 and len(two_budgets) > len(grid):
          longer = choose.choose(two_budgets, source)
          yield Outcome(
            data, source, what, f"{longer.law}, from 1 and 2 times", longer.predict(_inputs(runs, source)).loss_n, runs
          )
        yield Outcome(data, source, what, "same cell, shorter", _nearest(data, source, runs), runs)


def curve_fit(data: MeasuredRuns, source: str) -> fit_lib.Fit:
  """The CPT law on the grid's curves, means over seeds, with the form of replay that predicts a held-out share best."""
  places = [[r for r in data.grid if _place(r) == place] for place in sorted({_place(r) for r in data.grid})]
  means = [runs[0] | {"losses": {source: np.mean([r["losses"][source] for r in runs], axis=0).tolist()}} for runs in places]

  def fitted(law: cpt_law.CptLaw, runs: Sequence[Record]) -> fit_lib.Fit:
    return curves.fit(law, [curve(r, source) for r in runs], num_starts=_NUM_STARTS)

  def held_out_error(law: cpt_law.CptLaw) -> float:
    middle = data.replays[len(data.replays) // 2]
    held = [r for r in means if r["replay"] == middle]
    others = fitted(law, [r for r in means if r["replay"] != middle])
    return float(np.mean([abs(end - r["losses"][source][-1]) for end, r in zip(_ends(others, held, source), held, strict=True)]))

  # decay_steps=None: these runs are shorter than the thousand steps after which the papers' areas forget a fall of the rate.
  forms = [form for name, form in cpt_law.REPLAY_FORMS.items() if name != "none"]
  return fitted(min((cpt_law.CptLaw(form) for form in forms), key=held_out_error), means)


def _ends(fitted: fit_lib.Fit, runs: Sequence[Record], source: str) -> np.ndarray:
  return np.array([fitted.predict([curve(r, source)])[-1] for r in runs])


def _nearest(data: MeasuredRuns, source: str, runs: Sequence[Record]) -> np.ndarray:
  def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return abs(np.log2(a[0] / b[0])) + abs(np.log2((a[1] + choose.REPLAY0) / (b[1] + choose.REPLAY0)))

  places = sorted({_place(r) for r in data.grid})
  nearest = [min(places, key=lambda place: distance(place, _place(r))) for r in runs]
  return np.array([data.base[source] + _mean_change(data, source, place) for place in nearest])


def _inputs(runs: Sequence[Record], source: str) -> dict[str, np.ndarray]:
  return cells_lib.inputs_of(list(map(cell, runs)), source)


def regrets(data: MeasuredRuns) -> list[Record]:
  """What the laws choose at the grid's budget, against the best measured cell that keeps the limit; both as measured.

  The chosen setting lies between cells, so the nearest cell stands for it.
  """
  general, domain = (next(n for n, role in data.roles.items() if role == wanted) for wanted in ("replay", "domain"))
  places = sorted({_place(r) for r in data.grid})
  rows = []
  for limit in LIMITS:
    allowed = [place for place in places if _mean_change(data, general, place) <= limit]
    try:
      plan = recommend.plan_from_cells(list(map(cell, data.grid)), tokens=data.tokens, general_loss_rise=limit)
    except ConfigError as error:
      rows.append({"limit": limit, "why": str(error), "best": min(allowed, default=None)})
      continue
    fitted = fit_sources(list(map(cell, data.grid)), tokens=data.tokens)
    points = [(place, fitted.point("", *place, limit=limit)) for place in places]
    chosen = min((p for p in points if p[1] is not None and p[1].is_allowed), key=lambda p: p[1].domain_loss)[0]
    best = min(allowed, key=lambda place: _mean_change(data, domain, place))
    rows.append(
      {
        "limit": limit, "rate": plan.rate, "replay": plan.replay, "cell": chosen, "best": best,
        "rise": _mean_change(data, general, chosen),
        "regret": _mean_change(data, domain, chosen) - _mean_change(data, domain, best),
      }
    )  # fmt: skip
  return rows


# ---- the tool ----


def say_outcomes(rows: Sequence[Outcome]) -> None:
  """The table of errors."""
  console.table(
    f"runs that the laws did not see: errors of final losses, nats/token (target: {TARGET} or 1.5 times the seeds' noise)",
    ["experiment", "source", "held out", "predicted by", "runs", "mean error", "bias", "worst", "target", "met"],
    [
      [row["experiment"], row["source"], row["held_out"], row["law"], row["runs"]]
      + [
        f"{row['mae']:.4f}",
        f"{row['bias']:+.4f}",
        f"{row['worst']:.4f}",
        f"{row['target']:.4f}",
        "yes" if row["is_met"] else "no",
      ]
      for row in rows
    ],
    left=4,
  )


def say_regrets(data: MeasuredRuns, rows: Sequence[Record]) -> None:
  """What the laws would choose on the grid, against the best of it."""
  general, domain = (next(n for n, role in data.roles.items() if role == wanted) for wanted in ("replay", "domain"))
  place = lambda p: f"{p[0]:.2g}, {p[1]:.0%}"  # noqa: E731
  console.table(
    f"{data.name}: the choice at {data.tokens:,} tokens; regret = measured {domain} loss of the chosen cell less that of the "
    f"best measured cell within the limit; seeds differ by {data.noise(domain)[0]:.4f}",
    [f"limit of {general}'s rise", "recommended: rate, replay", "chosen cell", "its measured rise", "best cell", "regret"],
    [
      [f"{row['limit']:g}", row["why"], "", "", place(row["best"]) if row["best"] else "none", ""]
      if "why" in row
      else [
        f"{row['limit']:g}", place((row["rate"], row["replay"])), place(row["cell"]), f"{row['rise']:+.4f}", place(row["best"]),
        f"{row['regret']:+.4f}",
      ]
      for row in rows
    ],
  )  # fmt: skip


def main(argv: Sequence[str]) -> int:
  """Collects, or prints the tables; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("files", nargs="*", type=pathlib.Path, help="files that --collect made")
  parser.add_argument("--collect", type=pathlib.Path, help="a folder of run directories to make such a file from")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="the file to make, or the folder for results.json")
  args = parser.parse_args(argv)
  try:
    if args.collect:
      records = collect(args.collect)
      args.output.parent.mkdir(parents=True, exist_ok=True)
      args.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
      console.say(f"{len(records)} complete runs -> {args.output}")
      return 0
    experiments = [MeasuredRuns(path) for path in args.files]
    if not experiments:
      raise ConfigError("name the files that --collect made")
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  rows, results = [], {}
  for data in experiments:
    grid_tables(data)
    removed_table(data)
    rows += outcomes(data)
    results[data.name] = regrets(data)
    say_regrets(data, results[data.name])
  say_outcomes(rows)
  args.output.mkdir(parents=True, exist_ok=True)
  (args.output / "results.json").write_text(json.dumps({"held_out": rows, "choices": results}, indent=1), encoding="utf-8")
  console.say(f"results       {args.output / 'results.json'}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
