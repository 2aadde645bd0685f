"""`cpt show`: flags to one call of `cpt_jax.results.batches`."""

import json
import pathlib
from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import manual
from cpt_jax.config import ConfigError


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "show",
    description="""Says which documents stand in the rows of one batch of a run, from which token to which, and shows their
    text. It reads the record that the run keeps of its data, and the stores; no model and no device is needed.""",
    example="""cpt show --run=runs/quickstart --step=17 --rows=0,5

    Shows two of the sixteen rows that made the update from step 17 to step 18.""",
  )
  p.flag("--run=DIR", "The --workdir of the run.", required=True)
  p.flag("--step=N", "The step, from 0: its batch makes the update to the next one.", type=int, required=True)
  p.flag("--rows=N,N", "Rows of the batch, e.g. 0,5; all by default.", [])
  p.flag("--chars=N", "Characters of each document's text, from both ends; 0 = all. 300 by default.", 300, low=0)
  p.switch("json", default=False, help="One JSON object a row, with the whole text, instead of text for people.")
  return p


def run(args: Namespace) -> int:
  """Shows them."""
  from cpt_jax.results import batches

  if not all(row.isdigit() for row in args.rows):
    raise ConfigError(f"--rows={','.join(args.rows)}: numbers of rows, e.g. 0,5")
  if args.step < 0:
    raise ConfigError(f"--step={args.step}: steps are counted from 0")
  path = pathlib.Path(args.run)
  found = batches.rows_of(path, args.step, [int(row) for row in args.rows])
  if not args.json:
    print(f"step {args.step} of {path}: {len(found)} rows")
  for row in found:
    as_text = "\n".join(batches.lines(row, chars=args.chars, row_len=batches.row_len_of(path)))
    print(json.dumps(row, ensure_ascii=False) if args.json else as_text)
  return exits.DONE
