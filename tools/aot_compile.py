"""A config and a topology -> its training step compiled for chips that are not there: memory, FLOPs, transfers, roofline.

Invariant: needs no chip, no weights and no data; what the compiler says and what is arithmetic stand apart (docs/scaling.md).

Exit codes: 0 it fits, 1 it does not, 78 a config or a topology that cannot be, or a compiler that is not installed.
"""

import json
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax import config as config_lib
from cpt_jax.preview import compile_ahead

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config; --config.key=value changes a key. Sources may be missing.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "v5p:4x4x4 (a slice), 2*v5e:16x16 (two slices), h100:32x8 (hosts x GPUs).")
_OUTPUT = flags.DEFINE_string("output", "", "Where to write the record as JSON.")
_HLO = flags.DEFINE_string("hlo", "", "Where to write the optimized program's text.")

EXIT_TOO_LARGE = 1


def main(argv: list[str]) -> int:
  """Compiles, prints, writes; returns the exit code."""
  try:
    if len(argv) > 1 or not flags.FLAGS["config"].present or not _TOPOLOGY.value:
      raise config_lib.ConfigError("name a config and a topology: --config=configs/recipes/NAME.py --topology=v5p:4x4x4")
    name = str(pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])))
    hlo_file = pathlib.Path(_HLO.value) if _HLO.value else None
    record = compile_ahead.compile_step(_CONFIG.value, _TOPOLOGY.value, name=name, hlo_file=hlo_file)
  except config_lib.ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  from cpt_jax.preview import step_tables

  step_tables.show(record)
  if _OUTPUT.value:
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"record        {path}")
  return 0 if record["memory"]["fits"] else EXIT_TOO_LARGE


if __name__ == "__main__":
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  app.run(main)
