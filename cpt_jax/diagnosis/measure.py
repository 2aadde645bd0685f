"""A base model and token stores -> the figures of every source, as `diagnose` judges them.

Invariant: the base is evaluated as a run does it (stream.heldout.evaluation_rows, training.perplexity), on the run's own
held-out documents where there are enough of them; nothing is loaded whole but the base and the stores' indices.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cpt_jax import config as config_lib, hub
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.diagnosis import verdict
from cpt_jax.diagnosis.verdict import Figures
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.progress import Progress
from cpt_jax.store import corpus, token_store, tokenization
from cpt_jax.stream import excerpts, heldout, sources
from cpt_jax.stream.excerpts import Excerpts
from cpt_jax.training import perplexity, step

# Of each source for what needs no model: enough that chance moves the distance by less than 0.01 bits (docs/guide/diagnose.md).
TEXT_TOKENS = 1_000_000
# What the base is evaluated on (chosen by hand): few documents say little of a source, short parts give the base little context.
MIN_DOCUMENTS, PART_TOKENS = 16, 512
_BATCH_POSITIONS, _MIN_BATCHES = 2048, 8  # of an evaluation batch, at least a row: errors are told from the batches' spread


class Base(NamedTuple):
  """The base, opened and checked; its parameters are not loaded."""

  path: str
  spec: spec_lib.ModelSpec
  tokenizer: tokenization.Tokenizer


class Held(NamedTuple):
  """What the base is evaluated on of a source."""

  rows: heldout.HeldOut
  sample: str  # what it is, for people


def open_base(path: str, problems: Problems) -> Base | None:
  """The base of a Hugging Face directory; None, and what is wrong in `problems`."""
  if not path:
    problems.add("--hf is empty: name the base, a Hugging Face directory (config.json, *.safetensors, tokenizer.json)")
    return None
  if not pathlib.Path(path).is_dir():
    expected = "name a Hugging Face directory (config.json, *.safetensors, tokenizer.json)"
    problems.add(f"--hf={path}: no such directory; {expected}{hub.how_to_get(path)}")
    return None
  spec = tokenizer = None
  with problems.collect():
    spec = spec_lib.from_hf(spec_lib.load_hf_config(path))
    pretrained.check_files(path, spec)
  with problems.collect():
    tokenizer = tokenization.load(path)
  return None if spec is None or tokenizer is None else Base(path, spec, tokenizer)


def open_store(name: str, path: str, base: Base | None, problems: Problems) -> token_store.TokenStore | None:
  """A source's store, made with the base's tokenizer; None, and what is wrong in `problems`."""
  here = f"--sources {name}={path}"
  try:
    store = token_store.open_store(path)
  except ConfigError as error:
    problems.add(f"--sources {name}: {error}")
    return None
  if store.num_tokens == 0 or not (store.lengths > 1).any():
    problems.add(f"{here}: the store is empty; make it again from text (cpt prepare)")
    return None
  if base is None:
    return store
  theirs, ours = store.tokenizer_fingerprint, base.tokenizer.fingerprint
  if theirs is not None and theirs != ours:
    named = f" ({store.tokenizer_name})" if store.tokenizer_name else ""
    problems.add(
      f"{here}: made with tokenizer {theirs}{named}, the base's is {ours} ({base.tokenizer.name}); prepare the text with "
      f"--tokenizer {base.path}, or give the text itself as the source"
    )
    return None
  largest = store.read_max_token_id() if store.max_token_id is None else store.max_token_id
  if largest >= base.spec.vocab_size:
    problems.add(
      f"{here}: holds token id {largest}, the base has {base.spec.vocab_size} rows; prepare the text with --tokenizer {base.path}"
    )
    return None
  return store


def row_len(base: Base, wanted: int = 0) -> int:
  """Positions of an evaluation row: what is wanted, else as the recipes train, within the base's context."""
  return wanted or min(config_lib.default().data.row_len, base.spec.max_positions)


def hold_out(
  name: str, number: int, store: token_store.TokenStore, base: Base, *, max_tokens: int, heldout_frac: float, row_len: int
) -> Held:
  """What the base is evaluated on: the documents that a run with `heldout_frac` and eval.tokens=`max_tokens` holds out.

  Where these are fewer than 16, or less than half of `max_tokens`: excerpts of documents in the order of their hashes, the
  held-out ones first.
  """
  rows = max(1, min(_BATCH_POSITIONS, max_tokens // _MIN_BATCHES) // row_len)
  rows = -(-rows // jax.device_count()) * jax.device_count()
  opening_bytes_V = base.tokenizer.opening_bytes_V
  options: dict[str, Any] = dict(opening_bytes_V=opening_bytes_V, source=number, row_len=row_len, batch_rows=rows)
  source = sources.measured(name, store, heldout_frac=heldout_frac)
  candidates = source.heldout_documents
  if source.num_pairs(candidates):
    chosen = heldout.whole_documents(candidates, store.lengths, max_tokens=max_tokens, max_bytes=0)
    if len(chosen) >= MIN_DOCUMENTS and max_tokens / 2 <= source.num_pairs(chosen) <= max_tokens:
      doc_bytes = heldout.document_bytes(store, chosen, base.tokenizer)
      rows_of = heldout.evaluation_rows(store, chosen, lengths=store.lengths, doc_bytes=doc_bytes, **options)
      return Held(rows_of, f"{len(chosen):,} held-out documents")
  drawn = excerpts.draw(store, max_tokens=max_tokens, part_tokens=min(PART_TOKENS, row_len))
  doc_bytes = np.array([_text_bytes(drawn, i, base.tokenizer) for i in range(len(drawn))], np.int64)
  everything = np.arange(len(drawn))
  rows_of = heldout.evaluation_rows(drawn, everything, lengths=drawn.lengths, doc_bytes=doc_bytes, **options)
  return Held(rows_of, f"excerpts of {len(drawn):,} documents" if drawn.num_cut else f"{len(drawn):,} documents")


def _text_bytes(drawn: Excerpts, i: int, tokenizer: tokenization.Tokenizer) -> int:
  """UTF-8 bytes of an excerpt's text, as far as it counts in the loss."""
  ids = drawn.excerpt(i)
  text = tokenizer.decode(ids[drawn.loss_mask(i, 0, len(ids))].tolist())
  # The halves of characters that were cut at the ends: one or two bytes, not the three of the mark that is put for them.
  return len(text.replace("\ufffd", "?").encode())


def evaluate(base: Base, held: dict[str, Held], *, config: Any, progress: Progress) -> dict[str, verdict.Loss]:
  """The base's loss on every source; a part of the progress each."""
  mesh = mesh_lib.make_mesh(data=-1, fsdp=1, context=1, tensor=1)
  with jax.set_mesh(mesh):
    params = pretrained.load_params(base.path, base.spec, transformer.abstract_params(base.spec))
    settings = step.settings_from_config(config)
    eval_step = jax.jit(step.make_eval_step(base.spec, settings=settings, num_sources=len(held)))
    found = {}
    for name, (rows, sample) in held.items():
      parts, advance = [], progress.part(f"evaluate the base on {name}", len(rows.batches))

      def keep(params, batch, parts=parts, advance=advance):
        parts.append(eval_step(params, batch))
        advance(1)
        return parts[-1]

      to_device = functools.partial(mesh_lib.to_global, mesh)
      (losses,) = perplexity.evaluate(params, {name: rows}, eval_step=keep, to_device=to_device)
      loss = losses[name]
      sums, tokens = zip(*[(float(part.loss), float(part.tokens)) for part in jax.device_get(parts)], strict=True)
      error = corpus.ratio_error(sums, tokens)
      found[name] = verdict.Loss(
        loss.loss, error, loss.bits_per_byte, error * loss.bits_per_byte / loss.loss, loss.tokens, loss.documents, sample
      )
    return found


class Sample(NamedTuple):
  """A source's text without a model: what is measured of it alone, and the tokens that are compared with other sources'."""

  store: verdict.Store
  vocabulary: verdict.Vocabulary
  lengths: corpus.Lengths
  text: corpus.Text
  beginnings: bytes  # of the excerpts' texts, to be compressed
  parts: list[np.ndarray]  # excerpts, views of the store


def describe(store: token_store.TokenStore, base: Base, *, max_tokens: int = TEXT_TOKENS) -> Sample:
  """Vocabulary, lengths and text of a source, from a sample of `max_tokens`."""
  tokenizer = base.tokenizer
  drawn = excerpts.draw(store, max_tokens=max_tokens)
  parts = [drawn.excerpt(i) for i in range(len(drawn))]
  texts = [tokenizer.decode(part.tolist()) for part in parts]
  counts_V = corpus.count_tokens(parts, vocab_size=base.spec.vocab_size, max_tokens=drawn.num_tokens)
  ends = [i for i in (tokenizer.eos_id, tokenizer.bos_id) if i is not None]
  control = np.asarray([*tokenizer.special_ids, *ends], np.int64)
  content = [len(part) - int(np.isin(part, control).sum()) for part in parts]  # a document's EOS is no part of its text
  num_content = max(sum(content), 1)
  text = corpus.describe_text(texts, num_tokens=sum(content))
  own = corpus.own_vocabulary_tokens(texts[::2], texts[1::2], vocab_size=min(corpus.OWN_VOCAB_SIZE, tokenizer.vocab_size))
  saving = None if own is None else 1.0 - own / max(sum(content[1::2]), 1)
  num_bytes = store.num_bytes
  return Sample(
    verdict.Store(
      str(store.path), store.num_documents, store.num_tokens, num_bytes,
      store.num_tokens / num_bytes if num_bytes else drawn.num_tokens / max(text.bytes, 1),
    ),
    verdict.Vocabulary(
      sample_tokens=drawn.num_tokens, byte_frac=float(counts_V[sorted(tokenizer.byte_ids)].sum() / num_content),
      unknown_frac=0.0 if tokenizer.unk_id is None else float(counts_V[tokenizer.unk_id] / num_content),
      used_frac=float((counts_V > 0).sum() / tokenizer.vocab_size), own_saving_frac=saving,
    ),
    corpus.describe_lengths(store.lengths, context=base.spec.max_positions),
    text,
    corpus.beginnings(texts),
    parts,
  )  # fmt: skip


def distance(parts: Sequence[np.ndarray], general: Sequence[np.ndarray], *, vocab_size: int) -> verdict.Distance:
  """Of a source to a half of the general one, and of this half to the other: three samples of the same size."""
  half, other = corpus.halves(general)
  num_tokens = min(sum(map(len, side)) for side in (parts, half, other))
  counts = [corpus.count_tokens(side, vocab_size=vocab_size, max_tokens=num_tokens) for side in (parts, half, other)]
  return verdict.Distance(
    corpus.jensen_shannon_bits(counts[0], counts[1]), corpus.jensen_shannon_bits(counts[2], counts[1]), num_tokens
  )


def gather(samples: dict[str, Sample], losses: dict[str, verdict.Loss], *, general: str, vocab_size: int) -> dict[str, Figures]:
  """All figures of every source; the general source's distance is that of its halves."""
  found = {}
  for name, sample in samples.items():
    parts = corpus.halves(sample.parts)[1] if name == general else sample.parts
    apart = distance(parts, samples[general].parts, vocab_size=vocab_size)
    size = min(len(sample.beginnings), len(samples[general].beginnings))
    own, theirs = (corpus.compressed_bits(side.beginnings[:size]) for side in (sample, samples[general]))
    xz = verdict.Compressed(own, theirs, size)
    found[name] = Figures(name, sample.store, losses[name], xz, sample.vocabulary, apart, sample.lengths, sample.text)
  return found
