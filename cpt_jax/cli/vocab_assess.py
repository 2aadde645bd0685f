"""Says whether vocabularies fit texts: flags to one call of `cpt_jax.vocab`."""

import argparse

from cpt_jax import exits
from cpt_jax.cli import manual


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "vocab assess",
    description="""Measures how well the vocabulary of a base, and those of others, spell the text that is to be learnt: bytes
    a token, tokens that are single bytes, how far the text is from general text, and what more pieces would save on documents
    that they were not chosen from. Rules with printed thresholds then say whether to keep the vocabulary, to grow it (cpt
    vocab grow), or to take another base. Nothing is trained.""",
    example="""cpt vocab assess --tokenizers=models/base,models/other --domain='texts/zh/*.jsonl.gz' --general=texts/en.jsonl.gz

    Compares two bases on Chinese text, and says which to take.""",
    exit_codes=(exits.BAD_TEXT,),
  )
  p.flag("--tokenizers=PATH,...", "Hugging Face directories, tokenizer.json or *.model files; your base first.", [])
  p.repeated("--domain=FILES", "Text files or globs of what is to be learnt; repeatable.")
  p.repeated("--general=FILES", "Text files or globs of text like the base's own; repeatable.")
  p.flag("--domain_gb=GB", "Domain text that exists in all, 10^9 bytes, where --domain is a part of it.", None, type=float)
  p.flag("--budget=TOKENS", "Tokens of domain text that the run would read, e.g. '2B tokens'.")
  p.flag("--output=FILE", "A file for all figures, e.g. assessment.json; by default they are only printed.")
  return p


def run(args: argparse.Namespace) -> int:
  """Assesses and prints."""
  from cpt_jax.diagnosis import vocab_tables
  from cpt_jax.vocab import assess

  compared = assess.compare(
    args.tokenizers, domain=args.domain, general=args.general, domain_gb=args.domain_gb, budget=args.budget, output=args.output
  )
  vocab_tables.comparison(compared)
  if args.output:
    print(f"wrote {args.output}")
  return exits.DONE
