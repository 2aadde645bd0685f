"""Adds pieces to a base's vocabulary: flags to one call of `cpt_jax.model.growth`."""

import argparse

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  from cpt_jax.vocab import grow, initialise

  p = manual.Parser(
    "vocab grow",
    description="""Chooses pieces that shorten the text of a domain and adds them to a base: tokenizer, rows of the embedding and
    the head, config.json. Old ids, old rows and all other weights stay as they are, byte for byte. What growth changes in the
    tokenisation of the domain, of general text and of protected text is measured and printed. Without weights beside the
    tokenizer only the tokenizer grows.

    Ask cpt vocab assess first whether it is worth it.""",
    example="""cpt vocab grow --hf=models/base --domain='texts/zh/*.jsonl.gz' --general=texts/en.jsonl.gz --output=models/grown

    Adds up to 8000 pieces. Then prepare every source of the run with --tokenizer=models/grown.""",
    exit_codes=(exits.BAD_TEXT,),
  )
  p.flag("--hf=DIR", "The base: a Hugging Face directory, or a tokenizer alone.")
  p.repeated("--domain=FILES", "Text files or globs that pieces are chosen from; repeatable.")
  p.repeated("--general=FILES", "Text files or globs of text like the base's own; repeatable.")
  p.repeated("--protect=FILES", "Text whose tokenisation must not change at all; repeatable.")
  p.flag("--size", "Pieces to add, at most; 8000 by default.", 8000)
  p.flag("--saving", "Stop once the pieces save this share of the domain's tokens.", 1.0)
  p.flag("--band", "low, high, all (the default), or quantiles such as 0.2:0.6.", "all")
  p.flag(
    "--band_by",
    "What the band is of: how often the most used old piece that a new one replaces stands in --general, or how often the "
    "new piece itself stands in --domain.",
    "use",
    choices=("use", "count"),
  )
  least = f"Times that a piece must stand in the sample of --domain; {grow.MIN_COUNT} by default."
  p.flag("--min_count=TIMES", least, grow.MIN_COUNT)
  p.flag("--sample_mb=MB", "10^6 bytes of --domain that pieces are chosen from, at most; 50 by default.", 50, type=float)
  p.flag("--input_rows=HOW", f"New embedding rows: {', '.join(initialise.INITIALISERS)}.", "mean")
  p.flag("--output_rows=HOW", "New head rows, of the same choices; by default mean. Not for tied models.")
  p.flag("--scale", "Of the noise of gaussian and random rows, in standard deviations.", 1.0)
  p.flag("--seed", "Of that noise.", 0)
  p.flag("--multiple", "Rows are padded to a multiple of it, for the mesh.", 128)
  p.flag("--output=DIR", "The directory to write.")
  return p


def run(args: argparse.Namespace) -> int:
  """Grows, writes and prints."""
  from cpt_jax.diagnosis import vocab_tables
  from cpt_jax.model.growth import grow_base

  flags = {name: value for name, value in vars(args).items() if name not in ("help", "rest", "overrides")}
  vocab_tables.growth(grow_base(flags.pop("hf"), **flags))
  return exits.DONE
