"""Raw text files -> a token store (cpt_jax.store.prepare), from the command line.

Invariant: the same command, given again, goes on where it was interrupted, and does nothing once the store is finished.

Exit codes: 0 done, 65 bad input texts, 74 disk or file error, 75 interrupted (give the same command again), 78 wrong settings.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax.config import ConfigError
from cpt_jax.store import chat, decontaminate, documents, prepare, store

_INPUT = flags.DEFINE_multi_string("input", [], "Path or quoted glob of .txt, .jsonl or .parquet (.gz, .zst too); repeatable.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Directory of the base model, or its tokenizer.json or SentencePiece model.")
_OUTPUT = flags.DEFINE_string("output", "", "Directory of the store to make.")
_RECORDS = flags.DEFINE_enum(
  "records", "text", documents.RECORDS, "What .jsonl and .parquet records hold; prompt: and its answer."
)
_TRAIN_ON = flags.DEFINE_enum("train_on", "all", chat.TRAIN_ON, "Which tokens of messages and prompts count in the loss.")
_TEXT_FIELD = flags.DEFINE_string(
  "text_field", "", "Field of the text, the messages or the prompt; empty = as --records is named."
)
_ANSWER_FIELD = flags.DEFINE_string("answer_field", "answer", "Field of the answer, for --records prompt.")
_EOS_TOKEN = flags.DEFINE_string("eos_token", "", "Token that ends every document; empty = as the tokenizer's files say.")
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes; 0 = as many as there are cores and work.")
_ON_BAD = flags.DEFINE_enum("on_bad", "skip", ["skip", "fail"], "A record that cannot be read: skip and report it, or fail.")
_MAX_BAD = flags.DEFINE_integer("max_bad", -1, "Fail at more bad records than this; -1 = no limit.")
_MAX_DOCUMENT_MB = flags.DEFINE_float(
  "max_document_mb", 16.0, "A longer document is a bad record. Memory: 110 to 400 times this."
)
_DECONTAMINATE = flags.DEFINE_multi_string(
  "decontaminate",
  [],
  "Path or quoted glob of evaluation texts; documents that share a run of words with one are left out; repeatable.",
)
_DECONTAMINATE_FIELD = flags.DEFINE_multi_string(
  "decontaminate_field",
  ["text"],
  "Field of .jsonl and .parquet evaluation records, e.g. question; repeatable, one of them is enough.",
)
_NGRAM_WORDS = flags.DEFINE_integer("ngram_words", decontaminate.NGRAM_WORDS, "Words in a row that make a document contaminated.")
_VERIFY = flags.DEFINE_string("verify", "", "Instead of preparing: read a store whole and check every file against its digest.")


def verify() -> list[str]:
  """Checks a store; returns the lines to print."""
  opened = store.open_store(_VERIFY.value)
  damaged = opened.verify()
  if damaged:
    raise documents.DataError("\n".join([f"{_VERIFY.value}: damaged; copy it again or make it again:", *damaged]))
  return [f"{_VERIFY.value}: whole; {opened.num_documents:,} documents, {opened.num_tokens:,} tokens"]


def run() -> list[str]:
  """Prepares as the flags say; returns the lines to print."""
  missing = [f"--{f.name}" for f in (_INPUT, _TOKENIZER, _OUTPUT) if not f.value]
  if missing:
    example = "--input 'texts/*.jsonl' --tokenizer path/to/base --output store/name"
    raise ConfigError(f"{' and '.join(missing)} missing, e.g. {example}")
  return prepare.prepare(
    _INPUT.value,
    tokenizer=_TOKENIZER.value,
    output=_OUTPUT.value,
    records=_RECORDS.value,
    train_on=_TRAIN_ON.value,
    text_field=_TEXT_FIELD.value,
    answer_field=_ANSWER_FIELD.value,
    eos_token=_EOS_TOKEN.value,
    num_workers=_NUM_WORKERS.value,
    on_bad=_ON_BAD.value,
    max_bad=_MAX_BAD.value,
    max_document_bytes=int(_MAX_DOCUMENT_MB.value * (1 << 20)),
    contamination=contamination(),
  ).lines()


def contamination() -> decontaminate.Contamination | None:
  """What the flags say to compare documents with."""
  if not _DECONTAMINATE.value:
    return None
  return decontaminate.build(_DECONTAMINATE.value, fields=_DECONTAMINATE_FIELD.value, ngram_words=_NGRAM_WORDS.value)


def finish(argv: list[str], run: Callable[[], list[str]]) -> int:
  """Exit code, after printing what was done or what is wrong."""
  if len(argv) > 1:
    print(f"unexpected arguments {argv[1:]}: quote the pattern of --input, so that the shell leaves it alone", file=sys.stderr)
    return 78
  try:
    print("\n".join(verify() if _VERIFY.value else run()))
  except documents.DataError as error:
    print(error, file=sys.stderr)
    return 65
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 78
  except OSError as error:
    print(error.strerror or error, file=sys.stderr)
    return 74
  except KeyboardInterrupt:
    print(f"{_OUTPUT.value}: interrupted; give the same command again to go on", file=sys.stderr)
    return 75
  return 0


def main(argv: list[str]) -> int:
  """Exit code, after printing what was done or what is wrong."""
  return finish(argv, run)


if __name__ == "__main__":
  app.run(main)
