"""The base, its grown copies and held-out texts -> where the shock of growth lies: in text that is cut anew, or in the rest.

Run:   python -m tools.experiments.vocab_where plan/vocab/zh --output tools/experiments/measured/vocabulary/where/zh.jsonl

Invariant: a token is kept where both tokenisations have it at the same place of the text; the loss of all kept tokens and of all
others adds up to the whole. The folder is one of tools/experiments/vocab_experiment.py; rows of 256 as in its runs' evaluations.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.vocab import kinds
from cpt_jax.vocab.bases import Base
from tools.experiments import vocab_experiment

ROW_LEN, BATCH_ROWS = 256, 16
SETTINGS = transformer.Settings("float32", remat="none", attention="auto", loss_chunk=0, max_documents=None, scan=True)


class Scored(NamedTuple):
  """A text under a model, in nats for each token; the first token is no target and has 0."""

  ids: np.ndarray
  nats: np.ndarray
  old_nats: np.ndarray  # of a softmax over the base's ids alone; of a new id nothing that would mean anything


def score(path: pathlib.Path, texts: Sequence[np.ndarray], *, num_old: int) -> list[Scored]:
  """Each text's ids under the model in `path`, in rows that each begin with the last token of the one before."""
  spec = spec_lib.from_hf(spec_lib.load_hf_config(path))
  params = pretrained.load_params(path, spec, transformer.abstract_params(spec))
  pieces = [(text, start) for text, ids in enumerate(texts) for start in range(0, len(ids) - 1, ROW_LEN)]
  tokens = np.zeros((-(-len(pieces) // BATCH_ROWS) * BATCH_ROWS, ROW_LEN + 1), np.int32)
  for row, (text, start) in zip(tokens, pieces, strict=False):
    row[: len(texts[text]) - start] = texts[text][start : start + ROW_LEN + 1]
  run = _scorer(spec, num_old)
  found = [np.asarray(run(params, tokens[at : at + BATCH_ROWS])) for at in range(0, len(tokens), BATCH_ROWS)]
  nats = np.zeros((2, sum(map(len, texts))))
  ends = np.cumsum([0, *map(len, texts)])
  for row, (text, start) in zip(np.concatenate(found, axis=1).swapaxes(0, 1), pieces, strict=False):
    size = min(ROW_LEN, len(texts[text]) - 1 - start)
    nats[:, ends[text] + start + 1 :][:, :size] = row[:, :size]
  return [Scored(ids, *nats[:, a:b]) for ids, a, b in zip(texts, ends, ends[1:], strict=False)]


@functools.cache
def _scorer(spec: spec_lib.ModelSpec, num_old: int) -> Callable[..., jax.Array]:
  """Parameters and rows [B, T + 1] -> nats of all but the first token, with all ids and with the old ones alone [2, B, T]."""

  @jax.jit
  def run(params: Any, tokens_BS: jax.Array) -> jax.Array:
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    positions_BT = jnp.broadcast_to(jnp.arange(ROW_LEN)[None], inputs_BT.shape)
    hidden_BTD = transformer.apply(params, spec, inputs_BT, positions_BT, jnp.ones_like(inputs_BT), settings=SETTINGS)
    logits_BTV = transformer.logits(params, spec, hidden_BTD)
    ids_BTV = jnp.arange(spec.vocab_size)[None, None]
    picked_BT = jnp.where(ids_BTV == targets_BT[..., None], logits_BTV, 0.0).sum(-1)
    both = (logits_BTV, jnp.where(ids_BTV < num_old, logits_BTV, -jnp.inf))
    return jnp.stack([jax.nn.logsumexp(one_BTV, -1) - picked_BT for one_BTV in both])

  return run


def kept(old: np.ndarray, new: np.ndarray, *, lengths_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which tokens of either tokenisation the other one has at the same place."""
  ends = [np.cumsum(lengths_W[ids]) for ids in (old, new)]
  keys = [(end - lengths_W[ids]) * len(lengths_W) + ids for end, ids in zip(ends, (old, new), strict=True)]
  return np.isin(keys[0], keys[1]), np.isin(keys[1], keys[0])


def where(before: Sequence[Scored], after: Sequence[Scored], *, lengths_W: np.ndarray) -> dict[str, float]:
  """Bits per byte of the text that targets spell, after less before, in three parts that add up to `total`.

  `softmax`: of kept tokens, for the new ids that now share in their probability; `context`: the rest of what kept tokens lost,
  for what stands before them reads differently; `changed`: of the text between kept tokens.
  """
  parts = dict.fromkeys(("total", "softmax", "context", "changed"), 0.0)
  num_kept = num_bytes = 0
  for old, new in zip(before, after, strict=True):
    kept_old, kept_new = kept(old.ids, new.ids, lengths_W=lengths_W)
    softmax = float((new.nats - new.old_nats)[kept_new].sum())
    in_kept = float(new.nats[kept_new].sum() - old.nats[kept_old].sum())
    total = float(new.nats.sum() - old.nats.sum())
    for name, nats in (("total", total), ("softmax", softmax), ("context", in_kept - softmax), ("changed", total - in_kept)):
      parts[name] += nats
    num_kept += int(kept_old.sum())
    num_bytes += int(lengths_W[new.ids[1:]].sum())
  return {name: round(nats / np.log(2) / num_bytes, 5) for name, nats in parts.items()} | {"kept": num_kept}


def encode(base: Base, texts: list[str]) -> list[np.ndarray]:
  """Each text's ids."""
  return [np.array(ids) for ids in base.tokenizer.encode_contents(texts)]


def main(argv: Sequence[str]) -> int:
  """Scores what is there; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("folder", type=pathlib.Path, help="of tools/experiments/vocab_experiment.py")
  parser.add_argument("--arms", nargs="+", default=list(vocab_experiment.BANDS), help="whose bases are looked at")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="the file to make")
  args = parser.parse_args(argv)
  jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1))
  base = kinds.load(str(vocab_experiment.BASE))
  records = []
  for source in ("domain", "general"):
    texts = [text for text in vocab_experiment.read(args.folder / f"{source}.jsonl.gz") if vocab_experiment.is_heldout(text)]
    before = score(vocab_experiment.BASE, encode(base, texts), num_old=base.vocab_size)
    for arm in args.arms:
      if (path := args.folder / "bases" / arm).exists():
        grown = kinds.load(str(path))
        after = score(path, encode(grown, texts), num_old=base.vocab_size)
        records.append({"arm": arm, "source": source, "tokens": sum(len(one.ids) for one in before)})
        records[-1] |= where(before, after, lengths_W=grown.lengths_V)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
