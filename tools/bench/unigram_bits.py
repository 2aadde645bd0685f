"""A config's sources -> the bits per byte of a model that knows nothing but how frequent each token is: what any base must beat.

Invariant: the same held-out documents, targets and bytes as the run's own evaluation; counts come from the training documents,
each with 1 added.
"""

import math
import sys

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from cpt_jax.config import ConfigError
from cpt_jax.stream.sources import Source
from cpt_jax.training import console, inputs as inputs_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose sources are measured.")


def token_counts(source: Source, vocab_size: int) -> np.ndarray:
  """How often each token stands in the training documents, int64 [V]."""
  counts = np.zeros(vocab_size, np.int64)
  for document in source.train_documents:
    counts += np.bincount(source.store.document(document), minlength=vocab_size)
  return counts


def unigram_loss(counts_V: np.ndarray, targets: np.ndarray) -> float:
  """Nats per token of `targets` under the frequencies, each count with 1 added."""
  log_probs_V = np.log(counts_V + 1.0) - math.log(counts_V.sum() + len(counts_V))
  return float(-log_probs_V[targets].mean())


def main(argv: list[str]) -> int:
  """Prints a row for each source."""
  try:
    inputs = inputs_lib.open_inputs(_CONFIG.value)
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  rows = []
  for source in inputs.loader.sources:
    held = inputs.loader.heldout_rows(source.name, max_tokens=inputs.config.eval.tokens, max_bytes=inputs.config.eval.bytes)
    targets = np.concatenate([batch.targets_BT[batch.weights_BT > 0] for batch in held.batches])
    loss = unigram_loss(token_counts(source, inputs.spec.vocab_size), targets)
    bits_per_byte = loss * held.num_tokens / math.log(2) / held.num_target_bytes
    rows.append([source.name, f"{held.num_tokens:,}", f"{held.num_bytes:,}", f"{loss:.4f}", f"{bits_per_byte:.4f}"])
  console.table("token frequencies alone, on held-out documents", ["source", "tokens", "bytes", "nats/token", "bits/byte"], rows)
  return 0


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
