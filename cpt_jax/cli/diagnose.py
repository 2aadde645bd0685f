"""Says what kind of continual pretraining texts ask of a base: flags to one call of `cpt_jax.diagnosis`."""

import argparse

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "diagnose",
    description="""Measures a base on text like its own and on the texts that it is to learn: its loss, how its vocabulary fits,
    how long the documents are. Rules with printed thresholds say of each text whether it is domain knowledge, another language or
    longer than the base's context, what to do about the vocabulary, and which rate and replay share published runs began with.
    Nothing is trained.

    Ends with the command that says what the run would do, and writes all figures into diagnosis.json.""",
    example="""cpt diagnose --hf=models/base --sources=general=texts/en.jsonl.gz,law=texts/law.jsonl.gz

    Prepares both texts with the base's tokenizer, evaluates the base on each, and says what learning the second one takes.""",
    exit_codes=(exits.BAD_TEXT,),
  )
  p.flag("--hf=DIR", "The base: a Hugging Face directory.")
  p.repeated("--sources=NAME=PATH,...", "Token stores, or texts to make stores of; repeatable.")
  p.flag("--general=NAME", "The source that is like the base's own text; by default the one named general, else the first.")
  p.flag("--tokens", "Tokens of each source that the base is evaluated on, at most; 50000 by default.", 50_000, low=100)
  p.flag("--budget=TOKENS", "Tokens of the run that is planned, e.g. '2B tokens'.")
  p.flag("--base_peak_lr=RATE", "The peak rate of the base's own pretraining, where it is known.", None, type=float)
  held_out = "Share of documents that the run holds out; by default that of data.heldout_frac."
  p.flag("--heldout_frac=SHARE", held_out, None, type=float)
  row = "Positions of an evaluation row (data.row_len); 0, the default: as a run has them, within the base's context."
  p.flag("--row_len=POSITIONS", row, 0, low=0)
  p.flag("--output=DIR", "Where the result goes; by default diagnosis, or the first diagnosis_N that is free.")
  return p


def run(args: argparse.Namespace) -> int:
  """Diagnoses and prints."""
  from cpt_jax.diagnosis import tables
  from cpt_jax.diagnosis.diagnose import diagnose

  found = diagnose(
    args.hf, args.sources, general=args.general, tokens=args.tokens, budget=args.budget, base_peak_lr=args.base_peak_lr,
    heldout_frac=args.heldout_frac, row_len=args.row_len, output=args.output,
  )  # fmt: skip
  tables.show(found)
  return exits.DONE
