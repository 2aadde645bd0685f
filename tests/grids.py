"""A grid of runs whose true losses are known: the two sources of a plan, a strong or a weak shift, noise between seeds."""

import numpy as np

from cpt_jax.planning.cells import Cell

RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
REPLAYS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)
TOKENS = 98304
BASE = {"strong": {"en": 3.9, "law": 6.5}, "weak": {"en": 3.9, "law": 4.2}}


def true_losses(shift: str, rate, replay, tokens):
  """Forgetting and learning of no law's exact form: bent in rate, replay and tokens, and with a rate that is too high."""
  e, t = rate / 1.2e-3, tokens / TOKENS
  a, b, rho0 = (0.06, 0.17, 0.002) if shift == "strong" else (0.01, 0.03, 0.003)
  general = BASE[shift]["en"] + e**0.9 * t**0.3 * (a - b * np.log(replay + rho0)) + 0.01 * np.log(e) * t**0.2
  gain = 2.0 if shift == "strong" else 0.5
  learnt = gain * (1 - np.exp(-1.2 * (e * t) ** 0.45 * (1 - replay) ** 0.4))
  return {"en": general, "law": BASE[shift]["law"] - learnt + 0.04 * gain * e**1.5}


def grid(shift: str, *, noise: float = 0.006, seeds: int = 2, budgets: tuple[int, ...] = (2, 4), seed: int = 0) -> list[Cell]:
  """4 rates x 6 replay shares x seeds, and six cells at each of the larger budgets, in multiples of TOKENS."""
  rng = np.random.default_rng(seed)
  places = [(rate, replay, TOKENS, s) for rate in RATES for replay in REPLAYS for s in range(seeds)]
  places += [(rate, replay, k * TOKENS, 0) for k in budgets for rate in RATES[1:3] for replay in (0.01, 0.1, 0.25)]
  cells = []
  for rate, replay, tokens, s in places:
    losses = {name: float(loss + noise * rng.normal()) for name, loss in true_losses(shift, rate, replay, tokens).items()}
    cells.append(
      Cell(rate, replay, tokens, s, losses, BASE[shift], {"en": "replay", "law": "domain"}, run=f"{rate:g}-{replay:g}-{s}")
    )
  return cells
