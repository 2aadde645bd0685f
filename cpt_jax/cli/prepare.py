"""`cpt prepare`: flags to one call of `cpt_jax.prepare`, or of `store.machines` where datatrove's executors do it."""

import signal
from argparse import Namespace
from typing import Any

from cpt_jax import exits
from cpt_jax.cli import manual
from cpt_jax.store import decontaminate, machines, token_store
from cpt_jax.store.records import RECORDS, TRAIN_ON, Rules

_FILTERS = "datatrove's rules for English web text, in this order"


def parser() -> manual.Parser:
  """The flags."""
  p = manual.Parser(
    "prepare",
    description="""
    Tokenises text files into a store, from which runs read. The same command, given again, goes on where it was interrupted, and
    does nothing once the store is finished. Records that cannot be read are skipped and listed in the store's bad_records.jsonl.

    A .txt file is one document, or several with a line between two that holds one form feed alone (printf '\\f\\n'); .jsonl and
    .parquet files hold a document a record.
    Without --executor the processes of this machine do the work; with it datatrove's executors (pip install 'cpt_jax[prep]'),
    which can filter, and find documents that are nearly alike.""",
    example="""
    cpt prepare --input='examples/corpora/english.jsonl.gz' --tokenizer=examples/base --output=store/english

    Makes a store of 601 documents.""",
    exit_codes=(exits.BAD_TEXT, exits.STOPPED),
  )
  add, number, rules = p.add_argument, {"type": int, "metavar": "N"}, Rules()
  again = {"action": "append", "default": []}
  add("--input", metavar="FILES", help="Path or quoted glob of .txt, .jsonl or .parquet (.gz, .zst too); repeatable.", **again)
  add("--tokenizer", default="", metavar="DIR", help="The base model, or its tokenizer.json or SentencePiece model.")
  add("--output", default="", metavar="DIR", help="The store to make.")
  add("--records", default=rules.records, choices=RECORDS, help="What .jsonl and .parquet records hold; prompt: and its answer.")
  add("--train_on", default=rules.train_on, choices=TRAIN_ON, help="Which tokens of messages and prompts count in the loss.")
  add("--text_field", default="", help="Field of the text, the messages or the prompt; by default as --records is named.")
  add("--answer_field", default=rules.answer_field, help="Field of the answer, for --records=prompt.")
  add("--eos_token", default="", help="Token that ends every document; by default as the tokenizer's files say.")
  add("--num_workers", default=0, help="Processes; 0, the default, is as many as there are cores and work.", **number)
  add("--on_bad", default=rules.on_bad, choices=("skip", "fail"), help="A record that cannot be read: skip it, or fail.")
  add("--max_bad", default=rules.max_bad, help="Fail at more bad records than this; -1, the default, is no limit.", **number)
  size = "A longer document is a bad record. Memory: 110 to 400 times this. 16 by default."
  add("--max_document_mb", type=float, default=16.0, metavar="MB", help=size)
  without = "Evaluation texts, path or quoted glob; documents that share a run of words with one are left out; repeatable."
  add("--decontaminate", metavar="FILES", help=without, **again)
  fields = "Field of .jsonl and .parquet evaluation records, e.g. question; repeatable; text by default."
  add("--decontaminate_field", action="append", metavar="FIELD", help=fields)
  add("--ngram_words", default=decontaminate.NGRAM_WORDS, help="Words in a row that make a document contaminated.", **number)
  add("--verify", default="", metavar="DIR", help="Instead of preparing: read a store whole and check every file's digest.")
  add("--executor", default="", choices=("", *machines.EXECUTORS), help="Where datatrove runs the tasks.")
  p.switch("dry_run", default=False, help="Say what the executor would do, with the scripts of Slurm, and write nothing.")
  add("--max_tasks", default=256, help="Tasks in a phase at most, and so token files; each has 8 MiB of input or more.", **number)
  add("--filters", type=manual.words, default=[], metavar="A,B", help=f"{_FILTERS}: {','.join(machines.FILTERS)}.")
  p.switch("dedup", default=False, help="Keep one document of those that are nearly alike (datatrove's MinHash).")
  add("--language", default="", help="datatrove's splitter of words, e.g. eng (needs its packages); by default our own.")
  add("--cpus_per_task", default=1, help="slurm, ray: cores of a task.", **number)
  add("--mem_per_cpu_gb", default=4, help="slurm, ray: memory of a task for each of its cores.", **number)
  add("--partition", default="", help="slurm: partition.")
  add("--time", default="", help="slurm: limit of a task, e.g. 04:00:00.")
  add("--qos", default="", help="slurm: quality of service.")
  add("--env_command", default="", help="slurm: first line of a job; by default it activates this virtual environment.")
  add("--sbatch", metavar="NAME=VALUE", help="slurm: another option of sbatch, e.g. account=me; repeatable.", **again)
  return p


def run(args: Namespace) -> int:
  """Prepares, describes or verifies."""
  if args.verify:
    print(token_store.verify(args.verify))
    return exits.DONE
  missing = [f"--{name}" for name in ("input", "tokenizer", "output") if not getattr(args, name)]
  uses_datatrove = bool(args.executor or args.filters or args.dedup or args.dry_run)
  if missing and not uses_datatrove:
    parser().error(f"{' and '.join(missing)} missing")
  fields, contamination = args.decontaminate_field or ["text"], None
  if args.decontaminate:
    contamination = decontaminate.build(args.decontaminate, fields=fields, ngram_words=args.ngram_words)
  names = ("eos_token", "records", "train_on", "text_field", "answer_field", "on_bad", "max_bad")
  of_rules: dict[str, Any] = {name: getattr(args, name) for name in names} | {
    "max_document_bytes": int(args.max_document_mb * (1 << 20))
  }
  how: dict[str, Any] = {"output": args.output, "tokenizer": args.tokenizer, "rules": Rules(**of_rules)}
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
  try:
    if uses_datatrove:
      of_machines: dict[str, Any] = {name: getattr(args, name) for name in machines.Asked._fields}
      asked = machines.Asked(**of_machines)._replace(executor=args.executor or "local")
      lines = machines.prepare(args.input, asked, task=machines.Task(**how), contamination=contamination, dry_run=args.dry_run)
    else:
      import cpt_jax

      lines = cpt_jax.prepare(args.input, num_workers=args.num_workers, contamination=contamination, **how).lines()
  except KeyboardInterrupt:
    raise exits.SavedError(f"{args.output}: interrupted; give the same command again to go on") from None
  print("\n".join(lines))
  return exits.DONE
