"""The command: `python -m cpt_jax.main --config=configs/quickstart.py [--workdir=DIR] [--dry_run] [--config.key=value ...]`.

Invariant: a person's mistake ends with a plain message and exit code 78, never a traceback. Imports jax after the flags are read.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cpt_jax import config as config_lib
from cpt_jax.devices import environment

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, or one of your own; --config.key=value changes a key."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything; runs/NAME OF THE CONFIG by default.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what the run would do, and end.")
# Several hosts: the same command on each. Slurm, Open MPI and TPU pods need none of these.
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT where process 0 of several is found.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run, one per host.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_WAIT_SECS = flags.DEFINE_integer("wait_secs", 300, "How long to wait for the other processes at the start.", lower_bound=1)

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
      from cpt_jax.preview import dry_run

      return dry_run.describe(_CONFIG.value, workdir)
    return _run(workdir)
  except config_lib.ConfigError as error:
    return _end(str(error), error.exit_code)
  except OSError as error:
    return _end(f"{error}. What was saved is good; mend the disk or the path and give the same command.", EXIT_DISK)
  except FloatingPointError as error:
    return _end(f"stopped: {error}. The checkpoints before are good; lower schedule.lr_peak and start again.", EXIT_NUMERIC)
  except BaseException as error:
    if not _DRY_RUN.value:
      from cpt_jax.devices import hosts

      hosts.end_all(*hosts.explain(error))
    raise


def _run(workdir: pathlib.Path) -> int:
  from cpt_jax.devices import hosts

  hosts.connect(
    coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value, wait_secs=_WAIT_SECS.value
  )
  from cpt_jax.training import loop

  code = loop.run(_CONFIG.value, workdir)
  hosts.disconnect()
  return code


def _end(text: str, code: int) -> int:
  """Says `text` and returns `code`; in a run of several processes it ends them all and does not return."""
  if not _DRY_RUN.value:
    from cpt_jax.devices import hosts

    hosts.end_all(text, code)
  print(text, file=sys.stderr)
  return code


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
  environment.prepare(os.environ)  # before the config file, which may import jax
  app.run(main, flags_parser=_read_flags)
