"""The command: `python -m cpt_jax.main --config=configs/quickstart.py [--workdir=DIR] [--dry_run] [--config.key=value ...]`.

Invariant: a person's mistake ends with a plain message and exit code 78, never a traceback. Imports jax after the flags are read.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cpt_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, or one of your own; --config.key=value changes a key."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything; runs/NAME OF THE CONFIG by default.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what the run would do, and end.")

EXIT_DISK, EXIT_CONFIG, EXIT_NUMERIC = 74, 78, 86  # as sysexits.h has them, and one of our own


def main(argv: list[str]) -> int:
  """Runs or describes what the flags ask for; returns the exit code."""
  if len(argv) > 1:
    print(f"what is {' '.join(argv[1:])}? options look like --workdir=DIR and --config.key=value", file=sys.stderr)
    return EXIT_CONFIG
  if not flags.FLAGS["config"].present:
    print("name a config: python -m cpt_jax.main --config=configs/quickstart.py", file=sys.stderr)
    return EXIT_CONFIG
  config_file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config_file.stem)
  try:
    if _DRY_RUN.value:
      from cpt_jax.train import dry_run

      return dry_run.describe(_CONFIG.value, workdir)
    from cpt_jax.train import loop

    return loop.run(_CONFIG.value, workdir)
  except config_lib.ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  except OSError as error:
    print(f"{error}. What was saved is good; mend the disk or the path and give the same command.", file=sys.stderr)
    return EXIT_DISK
  except FloatingPointError as error:
    print(f"stopped: {error}. The checkpoints before are good; lower schedule.lr_peak and start again.", file=sys.stderr)
    return EXIT_NUMERIC


def _read_flags(argv: list[str]) -> list[str]:
  """absl's flags, with every unknown config key reported at once and with what was meant."""
  try:
    config_lib.check_overrides(argv)
    rest = flags.FLAGS(argv)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # the libraries' own diaries come with --verbosity=0
    return rest
  except (flags.Error, config_lib.ConfigError) as error:
    print(error, file=sys.stderr)
    sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
  # Compiled programs are kept between runs: the second start of a run takes a fraction of the first.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "cpt_jax" / "jax"))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # there are many small programs at the start
  app.run(main, flags_parser=_read_flags)
