"""`python -m cpt_jax.main --config=configs/quickstart.py [--workdir=DIR] [--dry_run] [--config.key=value ...]` -> `cpt train`.

Invariant: the same command by another name. Imports jax after the flags are read.
"""

import sys

from cpt_jax.cli import app

if __name__ == "__main__":
  app.entry(["train", *sys.argv[1:]])
