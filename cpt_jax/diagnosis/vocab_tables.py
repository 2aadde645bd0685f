"""Vocabularies assessed, and one that was grown -> tables for people.

Invariant: shows, computes nothing.
"""

from cpt_jax.diagnosis.tables import rules
from cpt_jax.model.growth import Growth
from cpt_jax.training import console
from cpt_jax.vocab import verdict
from cpt_jax.vocab.assess import Assessment, Comparison


def comparison(compared: Comparison) -> None:
  """Fit, distance, curve, rules and precedents, and what to do."""
  found, texts = compared
  for name, text in texts.items():
    scripts = ", ".join(f"{script} {share:.0%}" for script, share in list(text.scripts.items())[:3] if share >= 0.005)
    console.say(f"{name:<8} {console.count(text.bytes)} bytes, letters: {scripts or 'none'}; counted per {text.unit}")
  console.say("")
  rows = []
  for each in found:
    for name, side in ("domain", each.domain), ("general", each.general):
      rows.append([each.name if name == "domain" else "", f"{each.vocab_size:,}" if name == "domain" else "", name])
      rows[-1] += [f"{side.bytes_per_token:.2f}", f"{side.fertility:.2f}", f"{side.byte_frac:.1%}", f"{side.unknown_frac:.2%}"]
      rows[-1] += [f"{side.used_frac:.0%}", console.count(side.tokens)]
  console.table(
    "how the vocabularies fit",
    ["tokenizer", "size", "text", "bytes/token", "tokens/unit", "byte tokens", "unknown", "vocab used", "tokens"],
    rows,
  )
  _curves(found)
  rules([each.name for each in found], zip(*(each.findings.values() for each in found), strict=True))
  console.say(
    "the vocabulary does not fit where far is met with own saves or bytes, or where unknown is; growing asks for enough text too"
  )
  noise = ", ".join(f"{each.distance_bits:.3f} less {each.noise_bits:.3f} of noise" for each in found)
  console.say(f"far, in bits: {noise}\n")
  _precedents(found[0])
  _answers(compared)


def _curves(found: list[Assessment]) -> None:
  """Tokens saved by adding pieces, on held-out documents."""
  sizes = sorted({point.num_pieces for each in found for point in each.curve})
  rows = []
  for size in sizes:
    points = [next((point for point in each.curve if point.num_pieces == size), None) for each in found]
    parameters = next((point.new_parameters for point in points if point and point.new_parameters is not None), None)
    cells = ["" if point is None else f"{point.saved_frac:.1%} ({point.context_gain:.2f}x)" for point in points]
    rows.append([f"{size:,}", *cells, "" if parameters is None else console.count(parameters)])
  title = "tokens saved by adding so many pieces, on documents that they were not chosen from (text in a context)"
  console.table(title, ["pieces", *(each.name for each in found), "parameters (first that tells)"], rows)
  for each in found:
    if each.cannot_grow:
      console.say(f"{each.name}: {each.cannot_grow}")


def _precedents(first: Assessment) -> None:
  """What runs with a changed vocabulary needed, beside what there is."""
  rows = []
  for precedent in verdict.PRECEDENTS:
    needed = "?" if precedent.tokens is None else console.count(precedent.tokens)
    rows.append(
      [precedent.name, precedent.added, precedent.outcome, needed, f"{first.text_tokens / (precedent.tokens or 1):.2g}x"]
    )
  title = f"published runs; there are {console.count(first.text_tokens)} tokens here, {verdict.REPEATS} readings counted"
  console.table(title, ["run", "change", "outcome", "after tokens", "there are"], rows, left=3)


def _answers(compared: Comparison) -> None:
  """An answer for each tokenizer, then the one for the base."""
  found, other, answer = compared.assessments, compared.instead, compared.answer
  for each in found:
    console.say(f"{each.name}: {each.answer.upper()}: {each.because}")
  if other is not None:
    gain = other.domain.bytes_per_token / found[0].domain.bytes_per_token
    console.say(f"\nCHOOSE ANOTHER BASE: {other.name} fits the text, and spells it in {1 / gain:.0%} of {found[0].name}'s tokens")
  elif answer == verdict.OTHER_BASE:
    tried = "none of those compared fits" if len(found) > 1 else "compare some with --tokenizers base,other"
    console.say(f"\n{answer.upper()}, one whose vocabulary fits ({tried}); if there is none, keep this vocabulary")
  else:
    console.say(f"\n{answer.upper()}")


def growth(made: Growth) -> None:
  """What was added, and what that changes."""
  grown, base = made.grown, made.grown.base
  console.say(f"base     {base.path}: {base.kind}, {base.vocab_size:,} ids")
  console.say(
    f"chosen   {len(grown.pieces):,} of {grown.num_candidates:,} candidates, ids {base.vocab_size:,} to {grown.vocab_size - 1:,}"
  )
  for why, number in grown.dropped.items():
    if number:
      console.say(f"dropped  {number:,}: {why}")
  if grown.num_outside:
    console.say(f"dropped  {grown.num_outside:,}: outside the band")
  if len(grown.pieces) < made.size and made.saving == 1.0:
    console.say(f"fewer than the {made.size:,} of --size: no more candidates; give more domain text or a lower --min_count")
  readable = (grown.tokenizer.decode([number]) for number in range(base.vocab_size, grown.vocab_size))
  shown = [text for text in readable if "\ufffd" not in text]
  console.say(f"first    {' '.join(map(repr, shown[:20]))}")
  console.say(f"last     {' '.join(map(repr, shown[-20:]))}\n")
  rows = []
  for name, change in made.changes.items():
    rows.append([name, f"{change.documents:,}", f"{change.changed_documents:,}", console.count(change.tokens)])
    rows[-1] += [f"{change.changed_tokens:,}", f"{change.changed_tokens / max(change.tokens, 1):.3%}"]
    rows[-1] += [
      console.count(change.tokens_after), f"{change.saved_frac:.1%}", f"{change.bytes / max(change.tokens_after, 1):.2f}",
    ]  # fmt: skip
  heads = ["text", "parts", "changed", "tokens", "changed", "share", "tokens after", "saved", "bytes/token"]
  console.table("what growth changes in tokenisation (parts: documents, long ones cut)", heads, rows)
  kind = "a unigram model: the best path over all pieces may change anywhere" if base.is_unigram else "old merges are done first"
  console.say(f"{made.used_frac:.0%} of the new pieces stand in the domain's held-out text; {kind}\n")
  tokenizer_only = "" if made.has_model else " (tokenizer only)"
  console.say(f"wrote {made.output}: {grown.vocab_size:,} ids in {made.rows:,} rows{tokenizer_only}")
  console.say(f"next: cpt prepare --tokenizer {made.output} --input TEXT --output STORE, for every source of the run")
