"""Finished runs -> rows of a grid (rate, replay share, tokens, seed) with the final loss of every source.

Invariant: a row holds what was set and measured, nothing that was fitted. A cell is the runs that differ by the seed alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cpt_jax.config import ConfigError, Problems

REPLAY = "replay"  # the role of text like the base's own: its loss is the general loss
DOMAIN = "domain"  # the role of text that is to be learnt


class Cell(NamedTuple):
  """One finished run: what was set, and the losses that it ended with, in nats/token."""

  rate: float  # peak learning rate
  replay: float  # share of the trained tokens from sources of role "replay", 0..1
  tokens: int  # trained tokens
  seed: int
  losses: Mapping[str, float]  # source -> final held-out loss; not finite: the run diverged
  base: Mapping[str, float]  # source -> held-out loss of the base
  roles: Mapping[str, str]  # source -> "replay" or "domain"
  run: str = ""  # a name for messages
  shares: Mapping[str, float] = {}  # source -> share of the trained tokens, where there are more than two


def checked(cells: Sequence[Cell]) -> list[Cell]:
  """The cells, when they describe one base and the same sources.

  Raises ConfigError: with a line for each cell that does not fit the first one, or whose numbers are out of range.
  """
  if not cells:
    raise ConfigError("no finished runs to fit; run the grid first")
  problems = Problems()
  first = cells[0]
  for role in (REPLAY, DOMAIN):
    if role not in first.roles.values():
      problems.add(f"no source has role={role!r}; the trade-off needs at least one of each role")
  for i, cell in enumerate(cells):
    name = cell.run or f"cell {i}"
    if not (cell.rate > 0 and 0 <= cell.replay <= 1 and cell.tokens > 0):
      problems.add(
        f"{name}: rate={cell.rate:g} replay={cell.replay:g} tokens={cell.tokens:g}: "
        "rate and tokens must be above 0 and replay in 0..1"
      )
    if dict(cell.roles) != dict(first.roles):
      problems.add(f"{name}: its sources {dict(cell.roles)} differ from {dict(first.roles)} of {first.run or 'cell 0'}")
      continue
    for source in first.roles:
      if source not in cell.losses or source not in cell.base:
        problems.add(
          f"{name}: no final loss or no loss of the base for source {source!r}; evaluate it at the start and at the end"
        )
      elif abs(cell.base[source] - first.base[source]) > 1e-3:
        problems.add(
          f"{name}: the base's loss on {source!r} is {cell.base[source]:.4f}, {first.base[source]:.4f} in "
          f"{first.run or 'cell 0'}; "
          "fit runs of one base, evaluated in one way"
        )
  problems.raise_if_any()
  return list(cells)


def sources_of(cells: Sequence[Cell], *, role: str) -> list[str]:
  """Names of the sources of a role, in the order of the first cell."""
  return [source for source, its_role in cells[0].roles.items() if its_role == role]


def inputs_of(cells: Sequence[Cell], source: str) -> dict[str, np.ndarray]:
  """Columns that the laws of `source` read: rate, replay, tokens, base, and share:NAME where the cells have shares."""
  inputs = {name: np.array([getattr(cell, name) for cell in cells], np.float64) for name in ("rate", "replay", "tokens")}
  inputs["base"] = np.array([cell.base[source] for cell in cells], np.float64)
  for name in cells[0].shares:
    inputs[f"share:{name}"] = np.array([cell.shares[name] for cell in cells], np.float64)
  return inputs


def losses_of(cells: Sequence[Cell], source: str) -> np.ndarray:
  """Final losses of `source`, (n,)."""
  return np.array([cell.losses[source] for cell in cells], np.float64)


def cell_numbers(cells: Sequence[Cell]) -> np.ndarray:
  """(n,) numbers that are equal for runs of one cell: all but the seed is the same."""
  numbers: dict[tuple, int] = {}
  return np.array([numbers.setdefault((c.rate, c.replay, c.tokens, *c.shares.values()), len(numbers)) for c in cells])


def seed_noise(loss_n: np.ndarray, cell_n: np.ndarray) -> tuple[float, int]:
  """Pooled standard deviation over the replicates of each cell, and its degrees of freedom; (nan, 0) without replicates."""
  squares, freedom = 0.0, 0
  for number in np.unique(cell_n):
    of_cell = loss_n[cell_n == number]
    squares += float(((of_cell - of_cell.mean()) ** 2).sum())
    freedom += len(of_cell) - 1
  return (float(np.sqrt(squares / freedom)), freedom) if freedom else (float("nan"), 0)
