"""A Diagnosis -> tables for people: what was measured, every rule with its threshold, and what each source is.

Invariant: shows, computes nothing.
"""

from collections.abc import Iterable, Sequence

import rich.table
import rich.text

from cpt_jax.diagnosis import verdict
from cpt_jax.diagnosis.diagnose import Diagnosis
from cpt_jax.diagnosis.verdict import Figures, Practice, Verdict
from cpt_jax.model import spec as spec_lib
from cpt_jax.training import console

LONG_ADVICE = (
  "a stage of its own, after the rest, in rows as long as data.row_len, which a run takes up to the base's context; to go past "
  "that the base's rotary positions must be rescaled first, which this version does not do"
)


def show(found: Diagnosis) -> None:
  """All of it."""
  for line in found.prepared:
    console.say(line)
  _base(found)
  _figures(found.figures, found.general)
  _rules(found.verdicts)
  for one in found.verdicts:
    _verdict(one, found)
  for note in found.notes:
    console.say(f"note: {note}")
  console.say(f"wrote {found.output / 'diagnosis.json'}")
  if found.commands:
    each = "" if len(found.commands) == 1 else " (one for each source)"
    console.say(f"next: the command above, which says what the run would do{each}")


def _base(found: Diagnosis) -> None:
  """The base and what is compared with what."""
  base, spec = found.base, found.base.spec
  parameters = console.count(spec_lib.num_parameters(spec))
  console.say(f"base     {base.path}: {spec.family}, {parameters} parameters, context {spec.max_positions:,}")
  console.say(f"tokens   {base.tokenizer.vocab_size:,} in the vocabulary of {base.tokenizer.name}")
  console.say(f"general  {found.general} (what the base is taken to know; the others are compared with it)\n")


def _figures(figures: dict[str, Figures], general: str) -> None:
  """Three tables: the base's loss, the vocabulary, the documents."""
  rows = []
  for name, figure in figures.items():
    loss, (ratio, _) = figure.base, verdict.loss_ratio(figure, figures[general])
    rows.append(
      [name, f"{loss.loss:.3f} +-{2 * loss.loss_error:.3f}", f"{loss.bits_per_byte:.3f} +-{2 * loss.bits_per_byte_error:.3f}"]
      + [f"{figure.compressed.bits_per_byte:.3f}", f"{loss.bits_per_byte / figure.compressed.bits_per_byte:.2f}"]
      + ["" if name == general else f"{ratio:.2f}", f"{loss.tokens:,}", loss.sample]
    )
  console.table(
    "the base on each source, +- two standard errors",
    ["source", "nats/token", "bits/byte", "xz bits/byte", "base/xz", "x general", "tokens", "measured on"],
    rows,
  )
  console.say("base/xz: the base's bits/byte over those of xz, which knows nothing; it compares between texts of any language\n")
  rows = []
  for name, figure in figures.items():
    vocabulary, store, saving = figure.vocabulary, figure.store, figure.vocabulary.own_saving_frac
    rows.append([name, f"{store.tokens_per_byte:.3f}", f"{1 / store.tokens_per_byte:.2f}"])
    rows[-1] += [f"{figure.text.fertility:.2f} a {figure.text.unit}"]
    rows[-1] += [f"{vocabulary.byte_frac:.1%}", f"{vocabulary.unknown_frac:.1%}", f"{vocabulary.used_frac:.0%}"]
    rows[-1] += ["?" if saving is None else f"{round(saving, 2) + 0.0:.0%}"]
    rows[-1] += [f"{figure.distance.bits:.3f}", f"{figure.distance.floor_bits:.3f}"]
  console.table(
    "how the base's vocabulary fits",
    ["source", "tokens/byte", "bytes/token", "tokens", "byte tokens", "unknown", "vocab used", "own saves", "JS bits", "noise"],
    rows,
  )
  rows = []
  for name, figure in figures.items():
    lengths, store = figure.lengths, figure.store
    scripts = [f"{script} {share:.0%}" for script, share in figure.text.scripts.items() if share >= 0.01][:3]
    rows.append([name, console.count(store.documents), console.count(store.tokens)])
    rows[-1] += [f"{lengths.median:,.0f}", f"{lengths.p90:,.0f}", f"{lengths.p99:,.0f}"]
    rows[-1] += [*(f"{share:.0%}" for share in lengths[4:]), ", ".join(scripts) or "no letters"]
  console.table(
    "documents, in tokens; shares of the tokens",
    ["source", "documents", "tokens", "median", "p90", "p99", "in > 4k", "in > 32k", "in > context", "past context", "letters"],
    rows,
  )


def _rules(verdicts: Sequence[Verdict]) -> None:
  """Every rule, its threshold and the figures; met ones are marked."""
  shown = 6  # sources beside each other in a table that fits a screen
  for first in range(0, len(verdicts), shown):
    part = verdicts[first : first + shown]
    rules([f"{one.source}  " for one in part], zip(*(one.findings for one in part), strict=True))
  console.say("where the thresholds come from (docs/guide/diagnose.md)")
  for rule in verdict.RULES.values():
    console.say(f"  {rule.name:<13} {rule.basis}")
  console.say("")


def rules(names: Sequence[str], found: Iterable[Sequence[verdict.Finding]]) -> None:
  """A row for each rule, with its finding on each of `names`."""
  rows = []
  for findings in found:
    rule = findings[0].rule
    cells = [f"{_amount(f.value, rule.unit)}{' ' + f.note if f.note else ''} {'*' if f.met else ' '}" for f in findings]
    rows.append([rule.name, rule.figure, f"{rule.sign} {_amount(rule.threshold, rule.unit)}", *cells])
  console.table("rules (* = met)", ["rule", "figure", "threshold", *names], rows, left=2)


def _amount(value: float | None, unit: str) -> str:
  """A figure in its unit."""
  if value is None:
    return "?"
  return {"%": f"{value:.1%}", "tokens": console.count(value)}.get(unit, f"{value:.2f} {unit}")


def _verdict(one: Verdict, found: Diagnosis) -> None:
  """What it is, why, and where to begin."""
  grid = rich.table.Table.grid(padding=(0, 2), pad_edge=False)
  grid.add_column(style="dim", no_wrap=True)
  grid.add_column(overflow="fold")
  lines = [("kind", " + ".join(one.kinds).upper()), ("because", one.because)]
  lines += [("vocabulary", one.vocabulary.upper()), ("because", one.vocabulary_because)]
  if one.practice:
    practice = verdict.PRACTICES[one.practice]
    least, start, most = (f"{share:.0%}" for share in practice.replay)
    lines += [("rate", f"{_rates(practice, found.base_peak_lr)}  [{practice.rate_basis}]")]
    lines += [
      ("replay", f"begin with {start} of the tokens, {least} to {most}  [{practice.replay_basis}]"),
      ("advice", practice.advice),
    ]
    if verdict.LONG in one.kinds:
      lines += [("long", LONG_ADVICE)]
    lines += [("config", practice.config)]
  for label, text in lines:
    grid.add_row(label, rich.text.Text(text))
  console.console.rule(rich.text.Text(f" {one.source} ", style="bold"), align="left", characters="-")
  console.console.print(grid)
  if one.source in found.commands:
    console.say(f"\n{found.commands[one.source]}\n")


def _rates(practice: Practice, base_peak_lr: float | None) -> str:
  """The range of rates, absolute where the base's peak is known."""
  least, start, most = (f"1/{round(1 / x)}" if x < 1 else "1" for x in practice.rate)
  if base_peak_lr is None:
    return f"begin at {start} of the base's peak, {least} to {most}; its peak is unknown here: --base_peak_lr makes it a rate"
  low, begin, high = (f"{x * base_peak_lr:.2g}" for x in practice.rate)
  return f"begin at {begin}, {low} to {high} ({start}, {least} to {most} of the base's peak {base_peak_lr:g})"
