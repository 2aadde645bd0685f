"""What is said of finished trials: where a rate is stable."""

import pathlib

import numpy as np
import pytest

from cpt_jax.planning import outcome
from cpt_jax.planning.trials import Trial
from cpt_jax.results.runs import Run


def finished(rate, domain_loss):
  losses = {"general": np.array([3.0, 3.1]), "poetry": np.array([4.0, domain_loss])}
  roles = {"general": "replay", "poetry": "domain"}
  run = Run(pathlib.Path("run"), None, np.full(8, rate), np.array([0, 8]), losses, roles, {"general": 10, "poetry": 30}, True)
  return outcome.FinishedTrial(Trial(rate, 0.25, 8, 0), run, "")


@pytest.mark.parametrize("above, highest", [(0.049, 4e-3), (0.051, 2e-3)])
def test_a_rate_is_stable_up_to_the_documented_distance_from_the_lowest_loss(above, highest):
  swept = [finished(1e-3, 3.7), finished(2e-3, 3.5), finished(4e-3, 3.5 + above)]
  assert outcome.highest_stable(swept) == highest
