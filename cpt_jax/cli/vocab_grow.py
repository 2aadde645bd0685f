"""Adds pieces to a base's vocabulary: flags to one call of `cpt_jax.model.growth`."""

import argparse

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  from cpt_jax.vocab import grow, initialise

  p = manual.Parser(
    "vocab grow",
    description="""
    Chooses pieces that shorten the text of a domain and adds them to a base: tokenizer, rows of the embedding and the head,
    config.json. Old ids, old rows and all other weights stay as they are, byte for byte. What growth changes in the
    tokenisation of the domain, of general text and of protected text is measured and printed. Without weights beside the
    tokenizer only the tokenizer grows.

    Ask cpt vocab assess first whether it is worth it.
    """,
    example="""
    cpt vocab grow --hf=models/base --domain='texts/zh/*.jsonl.gz' --general=texts/en.jsonl.gz --output=models/grown

    Adds up to 8000 pieces. Then prepare every source of the run with --tokenizer=models/grown.
    """,
    exit_codes=(exits.BAD_TEXT,),
  )
  p.add_argument("--hf", default="", metavar="DIR", help="The base: a Hugging Face directory, or a tokenizer alone.")
  for name, what in (
    ("domain", "Text files or globs that pieces are chosen from; repeatable."),
    ("general", "Text files or globs of text like the base's own; repeatable."),
    ("protect", "Text whose tokenisation must not change at all; repeatable."),
  ):
    p.add_argument(f"--{name}", action="append", default=[], metavar="FILES", help=what)
  p.add_argument("--size", type=int, default=8000, help="Pieces to add, at most; 8000 by default.")
  p.add_argument("--saving", type=float, default=1.0, help="Stop once the pieces save this share of the domain's tokens.")
  p.add_argument("--band", default="all", help="low, high, all (the default), or quantiles such as 0.2:0.6.")
  p.add_argument(
    "--band_by", choices=("use", "count"), default="use",
    help="What the band is of: how often the most used old piece that a new one replaces stands in --general, or how often the "
    "new piece itself stands in --domain.",
  )  # fmt: skip
  p.add_argument(
    "--min_count", type=int, default=grow.MIN_COUNT, metavar="TIMES",
    help=f"Times that a piece must stand in the sample of --domain; {grow.MIN_COUNT} by default.",
  )  # fmt: skip
  p.add_argument(
    "--sample_mb", type=float, default=50, metavar="MB",
    help="10^6 bytes of --domain that pieces are chosen from, at most; 50 by default.",
  )  # fmt: skip
  p.add_argument("--input_rows", default="mean", metavar="HOW", help=f"New embedding rows: {', '.join(initialise.INITIALISERS)}.")
  p.add_argument(
    "--output_rows", default="", metavar="HOW", help="New head rows, of the same choices; by default mean. Not for tied models."
  )
  p.add_argument("--scale", type=float, default=1.0, help="Of the noise of gaussian and random rows, in standard deviations.")
  p.add_argument("--seed", type=int, default=0, help="Of that noise.")
  p.add_argument("--multiple", type=int, default=128, help="Rows are padded to a multiple of it, for the mesh.")
  p.add_argument("--output", default="", metavar="DIR", help="The directory to write.")
  return p


def run(args: argparse.Namespace) -> int:
  """Grows, writes and prints."""
  from cpt_jax.diagnosis import vocab_tables
  from cpt_jax.model.growth import grow_base

  flags = {name: value for name, value in vars(args).items() if name not in ("help", "rest", "overrides")}
  vocab_tables.growth(grow_base(flags.pop("hf"), **flags))
  return exits.DONE
