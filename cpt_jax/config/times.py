"""A config -> its durations in steps.

Invariant: arithmetic on durations that `resolve` has parsed; of a config that nobody resolved they are parsed here.
"""

from typing import Any

from cpt_jax.config.durations import Duration


def get(config: Any, key: str) -> Any:
  """The value of a dotted key."""
  for part in key.split("."):
    config = config[part]
  return config


def tokens_per_step(config: Any) -> int:
  """Positions that a step trains on, padding counted."""
  return config.train.batch_rows * config.data.row_len


def num_steps(config: Any) -> int:
  """Length of the run in steps."""
  return Duration(config.train.length).whole_steps(tokens_per_step=tokens_per_step(config))


def steps_of(config: Any, key: str) -> int:
  """Steps of the duration at a dotted key; 0 where it is empty."""
  value = get(config, key)
  return Duration(value).whole_steps(tokens_per_step=tokens_per_step(config), run_steps=num_steps(config)) if value else 0


def steps_at(config: Any, when: str | int) -> float:
  """A time of the run in steps, not rounded."""
  return Duration(when).steps(tokens_per_step=tokens_per_step(config), run_steps=num_steps(config))
