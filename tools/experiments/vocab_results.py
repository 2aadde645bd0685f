"""What vocab_experiment.py measured -> the tables of docs/results/experiments.md, section 2, and a figure; needs no training.

Run:   python -m tools.experiments.vocab_results .../measured/vocabulary/*.jsonl --figure .../results/vocabulary.png

Every difference is one of bits per byte, on the same documents, between runs with the same seed; `none` is the base as it is.
Tables are Markdown.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from cpt_jax.config import ConfigError
from cpt_jax.results import recovery
from cpt_jax.results.report import COLOURS, GREY, panels

Record = dict[str, Any]
SOURCES = {"domain": "the domain", "general": "English"}
BANDS = ("count_rare", "count_low", "count_high_equal", "count_high", "use_low", "use_high")
CONTRASTS = (  # an arm that is claimed to do harm, one that is claimed to be safe
  ("count_high", "count_low", "count"),
  ("count_high", "count_rare", "count"),
  ("count_high_equal", "count_low", "saving"),
  ("use_high", "use_low", "count"),
)
JOINT = "count_high"  # what other rows and stages are compared with: rows by mean, all trained from the start
LEVEL = 0.95  # of intervals


class Effect(NamedTuple):
  """A difference of two arms, bits per byte."""

  mean: float  # over seeds
  margin: float  # half of its interval of LEVEL; nan where no two seeds of anything were compared

  def __str__(self) -> str:
    return f"{self.mean:+.4f}{'*' if abs(self.mean) > self.margin else ''}"


def effects(values: Mapping[str, Sequence[float]]) -> dict[str, Effect]:
  """Of arms -> the difference with each seed; how seeds scatter is pooled over the arms, by Student's t.

  {"a": [1, 3], "b": [0, 2]}: a standard deviation of 2 ** 0.5 with 2 degrees of freedom, so 2 +- 4.30 and 1 +- 4.30.
  """
  squares = sum(float(np.sum((np.array(found) - np.mean(found)) ** 2)) for found in values.values())
  freedom = sum(len(found) - 1 for found in values.values())
  wide = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * np.sqrt(squares / freedom) if freedom else float("nan")
  return {arm: Effect(float(np.mean(found)), float(wide / np.sqrt(len(found)))) for arm, found in values.items()}


class Experiment:
  """The runs of one direction."""

  def __init__(self, path: pathlib.Path):
    self.name = path.stem
    self.records: list[Record] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    same = {(name, held["documents"], held["bytes"]) for r in self.records for name, held in r["heldout"].items()}
    if len(same) != len(SOURCES):
      raise ConfigError(f"{path}: runs were evaluated on different documents: {sorted(same)}")
    self.steps = min(r["steps"] for r in self.records if r["arm"] == "none")
    # Tokens at each evaluation of the usual runs; they differ by a few from run to run.
    self.tokens: list[int] = next(r["tokens"] for r in self.records if r["arm"] == "none" and r["steps"] == self.steps)
    where = path.parent / "where" / path.name
    lines = where.read_text(encoding="utf-8").splitlines() if where.is_file() else []
    self.where: dict[tuple[str, str], Record] = {(r["arm"], r["source"]): r for r in map(json.loads, lines)}

  def runs(self, arm: str, *, steps: int = 0) -> dict[int, Record]:
    """Seed -> run; of the usual length where no other is asked for."""
    at = steps or (min(r["steps"] for r in self.records if r["arm"] == arm) if self.has(arm) else 0)
    return {r["seed"]: r for r in self.records if r["arm"] == arm and r["steps"] == at}

  def has(self, arm: str) -> bool:
    """Was there a run of it."""
    return any(r["arm"] == arm for r in self.records)

  def compare(self, arm: str, other: str = "none", *, source: str, steps: int = 0) -> list[recovery.Comparison]:
    """The arm beside the other one, for each seed of both."""
    ours, theirs = self.runs(arm, steps=steps), self.runs(other, steps=steps)
    pairs = [recovery.compare(measured(theirs[seed]), measured(ours[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    return [one for pair in pairs for one in pair if one.source == source]

  def effects(self, pairs: Iterable[tuple[str, str]], *, source: str, axis: str = "tokens", at: int = -1, steps: int = 0):
    """Label -> effect, of pairs (arm, other): at an evaluation of the arm's, or where the shorter curve ends (-1)."""
    found = {}
    for arm, other in pairs:
      if compared := self.compare(arm, other, source=source, steps=steps):
        found[arm, other] = [one.at_end(axis) if at == -1 else float(one.differences(axis)[at]) for one in compared]
    return effects(found)

  def bits_of_none(self, source: str) -> tuple[float, float]:
    """Bits per byte at the end of the usual runs of the base as it is: mean, and standard deviation of the seeds."""
    runs = [measured(record).sources[source] for record in self.runs("none", steps=self.steps).values()]
    bits = [run.nats_E[-1] / np.log(2) / run.target_bytes for run in runs]
    return float(np.mean(bits)), float(np.std(bits, ddof=1)) if len(bits) > 1 else float("nan")


def measured(record: Record) -> recovery.EvaluatedRun:
  """A record as what recovery reads from a run directory."""
  tokens = np.array(record["tokens"], np.float64)
  spent = {"tokens": tokens, "bytes": np.array(record["bytes"], np.float64), "flops": tokens * record["flops_per_token"]}
  sources = {
    name: recovery.Evaluated(np.array(record["nats"][name]), held["documents"], held["bytes"], held["target_bytes"])
    for name, held in record["heldout"].items()
  }
  path = pathlib.Path(f"{record['arm']}-seed{record['seed']}-steps{record['steps']}")
  return recovery.EvaluatedRun(path, np.array(record["eval_steps"]), spent, sources, ())


# ---- tables ----


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of Markdown."""
  lines = [title, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
  return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def bands_of(data: Experiment) -> list[str]:
  """Those that were run."""
  return [arm for arm in BANDS if data.has(arm)]


def growth_table(data: Experiment) -> list[str]:
  """What was added, and what that does to the tokenisation of what is evaluated."""
  rows = []
  for arm in bands_of(data):
    record = next(iter(data.runs(arm).values()))
    added, held = record["growth"], record["heldout"]
    use = f"{added['use']:,.0f}" if arm.startswith("use") else ""
    rows.append([arm, str(added["pieces"]), f"{added['count']:,.0f}", use, f"{added['saved']:.1%}"])
    rows[-1] += [f"{held[source][key]:.1%}" for source in SOURCES for key in ("changed", "saved")]
  heads = ["arm", "pieces", "median count", "median use", "saved, sample"]
  heads += [f"{name}: {what}" for name in SOURCES.values() for what in ("tokens changed", "saved")]
  return table(f"**{data.name}: what was added**", heads, rows)


def bands_table(data: Experiment, source: str) -> list[str]:
  """Less `none`: right after growth, on the way and at the end, at equal tokens, bytes and FLOPs."""
  pairs = [(arm, "none") for arm in bands_of(data)]
  middle = len(data.tokens) // 2
  columns = {
    "shock": data.effects(pairs, source=source, at=0),
    f"{_tokens(data, 1)} tokens": data.effects(pairs, source=source, at=1),
    f"{_tokens(data, middle)}": data.effects(pairs, source=source, at=middle),
    f"{_tokens(data, -1)}": data.effects(pairs, source=source),
    "equal bytes": data.effects(pairs, source=source, axis="bytes"),
    "equal FLOPs": data.effects(pairs, source=source, axis="flops"),
  }
  rows = [[arm, f"{one['shock'].mean:+.4f}"] for arm, one in ((p[0], {k: c[p] for k, c in columns.items()}) for p in pairs)]
  for row, pair in zip(rows, pairs, strict=True):
    row += [str(found[pair]) for name, found in columns.items() if name != "shock"]
  margins = ", ".join(f"{max(e.margin for e in found.values()):.4f}" for name, found in columns.items() if name != "shock")
  level, spread = data.bits_of_none(source)
  title = (
    f"**{data.name}, {SOURCES[source]}: bits per byte less `none`**, which ends at {level:.4f} (standard deviation of its seeds "
    f"{spread:.4f}). Margins of the columns behind the shock: {margins}"
  )
  return table(title, ["arm", *columns], rows)


def where_table(data: Experiment) -> list[str]:
  """In what text the shock lies."""
  rows = []
  for arm in bands_of(data):
    if found := [data.where[arm, source] for source in SOURCES if (arm, source) in data.where]:
      rows.append([arm])
      for record in found:
        parts = [f"{record[part]:+.4f}" for part in ("softmax", "context", "changed")]
        rows[-1] += [f"{record['kept'] / record['tokens']:.1%}", *parts]
  if not rows:
    return []
  heads = [
    f"{name}: {what}" for name in SOURCES.values() for what in ("tokens kept", "their softmax", "their context", "changed")
  ]
  return table(f"**{data.name}: where the shock lies**, bits per byte", ["arm", *heads], rows)


def contrasts_table(data: Experiment) -> list[str]:
  """High less low."""
  pairs = [(high, low) for high, low, _ in CONTRASTS if data.has(high) and data.has(low)]
  equal = {(high, low): what for high, low, what in CONTRASTS}
  middle = len(data.tokens) // 2
  found = {(source, at): data.effects(pairs, source=source, at=at) for source in SOURCES for at in (0, middle, -1)}
  rows = []
  for pair in pairs:
    cells = [f"{found[source, at][pair].mean:+.4f}" if at == 0 else str(found[source, at][pair]) for source, at in found]
    rows.append([f"{pair[0]} less {pair[1]}", equal[pair], *cells])
  whens = ["shock", _tokens(data, middle), _tokens(data, -1)]
  heads = ["arms", "equal", *(f"{name}: {when}" for name in SOURCES.values() for when in whens)]
  return table(f"**{data.name}: high less low, bits per byte**", heads, rows)


def recovery_table(data: Experiment) -> list[str]:
  """From what expense on the domain's curve is no worse than that of `none`, and stays."""
  rows = []
  for arm in bands_of(data):
    found = data.compare(arm, source="domain")
    cells = [_met([one.met(axis, within=within) for one in found], axis) for axis in recovery.AXES for within in (0.0, 0.01)]
    rows.append([arm, *cells])
  heads = ["arm", *(f"{axis}{within}" for axis in ("tokens", "MB", "TFLOP") for within in ("", ", within .01"))]
  return table(f"**{data.name}: recovery on the domain**, the seeds in order; `-`: not within the run", heads, rows)


def _met(found: Sequence[recovery.Met], axis: str) -> str:
  unit = {"tokens": 1e3, "bytes": 1e6, "flops": 1e12}[axis]
  digits, end = {"tokens": (0, "k"), "bytes": (2, ""), "flops": (2, "")}[axis]
  return ", ".join("-" if met.at is None else f"{met.at / unit:.{digits}f}{end}" for met in found)


def others_table(data: Experiment, prefix: str, *, title: str) -> list[str]:
  """Arms of a prefix less the joint arm with mean rows, on the same grown vocabulary."""
  arms = [arm for arm in dict.fromkeys(r["arm"] for r in data.records) if arm.startswith(prefix)]
  if not arms:
    return []
  pairs = [(arm, JOINT) for arm in arms]
  last = min(len(r["eval_steps"]) for arm in arms for r in data.runs(arm).values()) - 1
  points = dict.fromkeys((0, 1, last))
  found = {(source, at): data.effects(pairs, source=source, at=at if at < last else -1) for source in SOURCES for at in points}
  rows = [[pair[0], *(str(column[pair]) for column in found.values())] for pair in pairs]
  heads = ["arm", *(f"{name}: {_tokens(data, at)}" for name in SOURCES.values() for at in points)]
  return table(title, heads, rows)


def long_table(data: Experiment) -> list[str]:
  """Longer runs less `none` of the same length and seed."""
  rows, quarters = [], (0.0, 0.25, 0.5, 0.75, 1.0)
  for arm in bands_of(data):
    for source in SOURCES:
      for one in data.compare(arm, source=source, steps=max(r["steps"] for r in data.records)):
        if one.grown.steps_E[-1] > data.steps:
          curve = one.differences("tokens")
          at = [f"{curve[round(part * (len(curve) - 1))]:+.4f}" for part in quarters[:-1]]
          rows.append([arm, SOURCES[source], *at, *(f"{one.at_end(axis):+.4f}" for axis in recovery.AXES)])
  if not rows:
    return []
  tokens = max(r["tokens"][-1] for r in data.records)
  heads = ["arm", "text", *(f"{tokens * part / 1e3:.0f}k" for part in quarters), "equal bytes", "equal FLOPs"]
  return table(f"**{data.name}: longer runs, bits per byte less `none`**", heads, rows)


def _tokens(data: Experiment, at: int) -> str:
  return f"{data.tokens[at] / 1e3:.0f}k"


def report(data: Experiment) -> list[str]:
  """All tables of one experiment."""
  lines = growth_table(data)
  for source in SOURCES:
    lines += bands_table(data, source)
  lines += where_table(data) + contrasts_table(data) + recovery_table(data)
  lines += others_table(data, "rows_", title=f"**{data.name}: new rows, less mean**, of the pieces of `{JOINT}`")
  lines += others_table(data, "staged_", title=f"**{data.name}: stages, less joint training** of `{JOINT}`")
  return lines + long_table(data)


def draw(experiments: Sequence[Experiment], path: pathlib.Path) -> None:
  """Each band's difference to `none` over training, mean and range of the seeds."""
  made, grid = panels(len(experiments), len(SOURCES), size=(11.0, 3.4 * len(experiments)))
  for row, data in zip(grid, experiments, strict=True):
    for ax, (source, text) in zip(row, SOURCES.items(), strict=True):
      for arm, colour in zip(BANDS, COLOURS, strict=True):
        if not data.has(arm):
          continue
        found = data.compare(arm, source=source)
        curves_SE = np.array([one.grown_curves["tokens"][1] - one.base_curves["tokens"][1] for one in found])
        ax.plot(np.array(data.tokens) / 1e3, curves_SE.mean(axis=0), marker="o", markersize=3, color=colour, label=arm)
        ax.fill_between(np.array(data.tokens) / 1e3, curves_SE.min(axis=0), curves_SE.max(axis=0), color=colour, alpha=0.15, lw=0)
      ax.axhline(0.0, color=GREY, linewidth=0.8)
      if source == "domain":
        ax.set_yscale("symlog", linthresh=0.05)  # the shock is ten times what is left at the end
      ax.set_title(f"{data.name}: {text}", fontsize=9)
      ax.set_xlabel("thousand tokens", fontsize=8)
      ax.set_ylabel("bits per byte less none", fontsize=8)
      ax.tick_params(labelsize=7)
  handle_of = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
  shown = [arm for arm in BANDS if arm in handle_of]  # not every direction has every arm
  made.legend([handle_of[arm] for arm in shown], shown, loc="outside lower center", fontsize=8, ncols=len(BANDS))
  made.savefig(path, dpi=80)


def main(argv: Sequence[str]) -> int:
  """Prints the tables and draws the figures; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument(
    "files", nargs="+", type=pathlib.Path, help="files that tools/experiments/vocab_experiment.py --collect made"
  )
  parser.add_argument("--figure", type=pathlib.Path, help="the figure to draw, a .png")
  args = parser.parse_args(argv)
  try:
    experiments = [Experiment(path) for path in args.files]
    for data in experiments:
      print("\n".join(report(data)))
    if args.figure:
      draw(experiments, args.figure)
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
