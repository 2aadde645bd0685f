"""Every key of a run, once: its meaning, unit and range -> a checked, plain configuration.

Invariant: nothing else holds the default of a key, and a key that is not in the table is refused. Never imports jax.
Files in configs/ return `default()` with changes; a run begins with `resolve()`.
"""

# ruff: noqa: F401 - what is imported here is what the others call

from cpt_jax.config.check import leaf_keys, resolve
from cpt_jax.config.describe import describe_keys, reference
from cpt_jax.config.durations import Duration, get, num_steps, parse_tokens, steps_at, steps_of, tokens_per_step
from cpt_jax.config.errors import ConfigError, Problems, did_you_mean
from cpt_jax.config.files import changes, check_overrides, completed, load, load_file
from cpt_jax.config.keys import FIELDS, KEYS, default, source
from cpt_jax.config.shares import Share
from cpt_jax.config.stages import NEW_ROWS, STAGES, Stage, of_stage, stages
