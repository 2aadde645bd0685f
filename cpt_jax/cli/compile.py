"""`cpt compile`: flags to one call of `cpt_jax.preview.compile_ahead`."""

import json
import pathlib
from argparse import Namespace

from cpt_jax import config as config_lib, exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "compile",
    description="""Compiles the training step of a config for chips that are not here, and says what memory a chip needs, what it
    computes, what it sends to others, and how fast it can be at most. Needs no chip, no weights and no texts; sources may be
    missing.

    TPUs need libtpu (pip install 'cpt_jax[tpu-aot]'), GPUs XLA's plugin for CUDA (pip install 'cpt_jax[gpu-aot]').""",
    example="""cpt compile --config=configs/recipes/llama3_8b_v5e_16.py --topology=v5e:4x4

    Ends with the verdict that the recipe quotes.""",
    exit_codes=(exits.TOO_LARGE,),
    overrides=True,
  )
  p.flag("--config=FILE", "A config; --config.key=value changes a key.", required=True)
  p.flag("--topology=CHIPS", "v5p:4x4x4 (a slice), 2*v5e:16x16 (two slices), h100:32x8 (hosts x GPUs).", required=True)
  p.flag("--output=FILE", "Where to write the record as JSON.")
  p.flag("--hlo=FILE", "Where to write the optimized program's text.")
  return p


def run(args: Namespace) -> int:
  """Compiles, prints, writes."""
  from cpt_jax.preview import compile_ahead

  config = config_lib.load(args.config, args.overrides)
  hlo_file = pathlib.Path(args.hlo) if args.hlo else None
  record = compile_ahead.compile_step(config, args.topology, name=args.config, hlo_file=hlo_file)
  from cpt_jax.preview import step_tables  # imports jax

  step_tables.show(record)
  if args.output:
    path = pathlib.Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"record        {path}")
  return exits.DONE if record["memory"]["fits"] else exits.TOO_LARGE
