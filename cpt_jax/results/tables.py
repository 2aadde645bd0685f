"""A run's directory -> what it measured and read, as tables of numpy columns for a notebook.

Invariant: reads the records alone and needs no jax; a run that is still going is read up to where it is.
"""

import functools
import json
import math
import pathlib
from typing import Any

import numpy as np

from cpt_jax import config as config_lib, journal
from cpt_jax.config import ConfigError


class Table(dict[str, np.ndarray]):
  """Columns of the same length, by name; prints as a table.

  >>> print(Table(step=np.array([0, 30]), loss=np.array([3.5, 3.25])))
  step    loss
     0     3.5
    30    3.25
  """

  def __str__(self) -> str:
    cells = {name: [f"{value:.6g}" if isinstance(value, float) else str(value) for value in self[name].tolist()] for name in self}
    widths = {name: max(map(len, [name, *column])) for name, column in cells.items()}
    rows = [list(self), *zip(*cells.values(), strict=True)]
    return "\n".join("    ".join(f"{cell:>{widths[name]}}" for name, cell in zip(self, row, strict=True)) for row in rows)

  __repr__ = __str__


class OpenRun:
  """A run; every table is read when it is first asked for."""

  def __init__(self, path: pathlib.Path, *, exit_code: int = 0):
    """As `open_run` gives it; `exit_code` says how `cpt_jax.train` ended, as the table in `cpt_jax.exits` has it."""
    self.path, self.exit_code = path, exit_code

  def __repr__(self) -> str:
    state = "complete" if self.summary else "not complete"
    return f"<run {self.path}, {state}; tables: losses, shares, ledger, drift, training>"

  @functools.cached_property
  def config(self) -> Any:
    """Every key, as the run resolved it."""
    return config_lib.completed(json.loads((self.path / "config.json").read_text(encoding="utf-8")))

  @functools.cached_property
  def summary(self) -> dict[str, Any]:
    """What the run said at its end; empty before."""
    file = self.path / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

  @functools.cached_property
  def losses(self) -> Table:
    """Held-out nats per token: `step`, `tokens` trained on by then, and a column for each source."""
    read = {0: 0} | {entry["step"]: sum(source["tokens"] for source in entry["sources"]) for entry in self._ledger}
    steps = [entry["step"] for entry in self.evaluations]
    return _table({"step": steps, "tokens": [read.get(step, math.nan) for step in steps]} | self.by_source("loss"))

  @functools.cached_property
  def bits_per_byte(self) -> Table:
    """The same in bits per byte, which compare between tokenizers."""
    return _table({"step": [entry["step"] for entry in self.evaluations]} | self.by_source("bits_per_byte"))

  def by_source(self, key: str) -> dict[str, list[float]]:
    """A figure of every source at each evaluation; nan where it was not measured."""
    evaluated = [entry["sources"] for entry in self.evaluations]
    return {name: [sources.get(name, {}).get(key, math.nan) for sources in evaluated] for name in self._names(*evaluated)}

  @functools.cached_property
  def ledger(self) -> Table:
    """What was read of each source before each evaluation: `step`, `source`, `role`, rows, tokens, documents, epochs, bytes."""
    rows = [{"step": entry["step"], **source} for entry in self._ledger for source in entry["sources"]]
    names = ("step", "source", "role", "rows", "tokens", "documents", "epochs", "bytes")
    return _table({name: [math.nan if row.get(name) is None else row[name] for row in rows] for name in names})

  @functools.cached_property
  def shares(self) -> Table:
    """Each source's share of the tokens between the evaluation before and the one at `step`."""
    windows = [
      (entry["step"], {source["source"]: source["window"]["tokens"] for source in entry["sources"]}) for entry in self._ledger
    ]
    windows = [(step, counts) for step, counts in windows if sum(counts.values())]
    table: dict[str, list] = {"step": [step for step, _ in windows]}
    for name in self._names(*(counts for _, counts in windows)):
      table[name] = [counts.get(name, 0) / sum(counts.values()) for _, counts in windows]
    return _table(table)

  @functools.cached_property
  def drift(self) -> Table:
    """How far the parameters have moved from the base's, relative to their size, at each evaluation, by layer."""
    rows = [{"step": entry["step"], **_by_leaf(entry["drift"])} for entry in self.evaluations if entry.get("drift")]
    return _table({name: [row.get(name, math.nan) for row in rows] for name in self._names(*rows)})

  @functools.cached_property
  def training(self) -> Table:
    """Every log.every steps: loss, rate, norm of the gradient, tokens per second, and the training loss of each source."""
    entries = [entry for entry in self._metrics if entry["kind"] == "train"]
    rows = [
      {name: value for name, value in entry.items() if isinstance(value, (int, float))} | entry.get("source_loss", {})
      for entry in entries
    ]
    return _table({name: [row.get(name, math.nan) for row in rows] for name in self._names(*rows)})

  @functools.cached_property
  def _metrics(self) -> list[dict]:
    return journal.read(self.path / "metrics.jsonl")

  @functools.cached_property
  def evaluations(self) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl, by step."""
    newest = {entry["step"]: entry for entry in self._metrics if entry["kind"] == "eval"}  # a resumed run may measure once more
    return [newest[step] for step in sorted(newest)]

  @functools.cached_property
  def _ledger(self) -> list[dict]:
    return list({entry["step"]: entry for entry in journal.read(self.path / "ledger.jsonl")}.values())

  @staticmethod
  def _names(*found: Any) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))


def open_run(workdir: str | pathlib.Path) -> OpenRun:
  """Opens what a run has recorded.

  >>> cpt_jax.open_run("runs/quickstart").losses["poetry"][-1]  # doctest: +SKIP
  3.2458

  Raises:
    ConfigError: there is no run.
  """
  path = pathlib.Path(workdir)
  if not (path / "config.json").is_file():
    raise ConfigError(f"{path}: not a run (no config.json); name the --workdir of a run")
  return OpenRun(path)


def _by_leaf(drift: dict[str, Any]) -> dict[str, float]:
  """{"embedding": 0.1, "layers": [0.2, 0.3]} -> {"embedding": 0.1, "layer_0": 0.2, "layer_1": 0.3}."""
  flat = {}
  for name, value in drift.items():
    flat |= {f"{name.removesuffix('s')}_{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
  return flat


def _table(columns: dict[str, list]) -> Table:
  return Table({name: np.array(values) for name, values in columns.items()})
