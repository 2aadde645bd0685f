"""`cpt export`: flags to one call of `cpt_jax.export`."""

from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "export",
    description="""Writes a checkpoint of a run as a Hugging Face directory that transformers loads, with the tokenizer and
    the other files of the base. The run is only read, on the CPU, and may go on training meanwhile. At its end a run writes
    one by itself, into its hf/.""",
    example="""cpt export --run=runs/quickstart --output=exported/quickstart --dtype=bfloat16

    Writes the newest checkpoint in half the bytes.""",
  )
  p.flag("--run=DIR", "The --workdir of a run.", required=True)
  p.flag("--output=DIR", "Directory to make; one that an export made earlier is replaced.", required=True)
  p.flag("--step=N", "Step of the checkpoint; -1, the default, is the newest.", -1)
  p.flag("--dtype", "Stored as; by default as the base, else float32.", choices=("", "float32", "bfloat16", "float16"))
  p.flag("--source=DIR", "The base or tokenizer, if it has moved since the run.")
  p.flag("--verbosity=N", "0 shows the diaries of the libraries too; -1, the default, none.", "-1")
  return p


def run(args: Namespace) -> int:
  """Exports, and says what was written."""
  import cpt_jax

  step = None if args.step < 0 else args.step
  written = cpt_jax.export(args.run, args.output, step=step, dtype=args.dtype or None, source=args.source or None)
  for file in written.files:
    print(f"  {file.name}  {file.stat().st_size:,} bytes")
  megabytes = sum(file.stat().st_size for file in written.files) / 1e6
  print(f"{args.run} at step {written.step} -> {args.output}  ({len(written.files)} files, {megabytes:,.1f} MB)")
  return exits.DONE
