"""Run directories -> what was asked of each run and what it measured, as arrays.

Invariant: reads the records alone, never a checkpoint, and needs no jax; a run that is still going is read up to where it is.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.results import tables
from cpt_jax.training import schedule


class Run(NamedTuple):
  """One run; losses are held-out nats per token."""

  path: pathlib.Path
  config: Any  # as resolved
  rates_S: np.ndarray  # the rate of each update of the whole run
  eval_steps_E: np.ndarray  # updates finished at each evaluation, the base's (0) first
  losses: dict[str, np.ndarray]  # source -> loss at each evaluation; nan where it was not measured
  roles: dict[str, str]  # source -> replay or domain
  tokens: dict[str, int]  # source -> targets trained on, at the last evaluation
  is_complete: bool

  @property
  def rate(self) -> float:
    """The largest rate."""
    return float(self.config.schedule.lr_peak)

  @property
  def seed(self) -> int:
    """Of shuffles and order."""
    return int(self.config.seed)

  @property
  def num_tokens(self) -> int:
    """Targets trained on, of all sources."""
    return sum(self.tokens.values())

  @property
  def replay(self) -> float:
    """Share of the tokens trained on that came from replay sources, as it really was."""
    of_replay = sum(count for name, count in self.tokens.items() if self.roles[name] == "replay")
    return of_replay / self.num_tokens if self.num_tokens else float("nan")

  def base(self, source: str) -> float:
    """Loss before the first update."""
    return float(self.losses[source][0])

  def final(self, source: str) -> float:
    """Loss at the last evaluation."""
    return float(self.losses[source][-1])


def read_run(path: str | pathlib.Path) -> Run:
  """Reads one run. Raises ConfigError: no run there, or one without its first evaluation."""
  opened = tables.open_run(path)
  config, ledger, losses = opened.config, opened.ledger, opened.by_source("loss")
  if not opened.evaluations:
    raise ConfigError(f"{path}: no evaluation yet; let the run reach its first step")
  names = [name for name in config.data.sources if name in losses]
  read = dict(zip(ledger["source"].tolist(), ledger["tokens"].tolist(), strict=True))  # the last entry of each
  return Run(
    opened.path, config, np.asarray(schedule.from_config(config)(np.arange(config_lib.num_steps(config))), np.float64),
    np.array([entry["step"] for entry in opened.evaluations]), {name: np.array(losses[name]) for name in names},
    {name: config.data.sources[name].role for name in names}, {name: read.get(name, 0) for name in names}, bool(opened.summary),
  )  # fmt: skip


def read_runs(folder: str | pathlib.Path) -> list[Run]:
  """All runs below a folder, or the one that it is, by path. Raises ConfigError: there is none."""
  found = sorted(file.parent for file in pathlib.Path(folder).rglob("config.json") if (file.parent / "metrics.jsonl").is_file())
  if not found:
    raise ConfigError(f"{folder}: no run there (a directory with config.json and metrics.jsonl)")
  return [read_run(path) for path in found]
