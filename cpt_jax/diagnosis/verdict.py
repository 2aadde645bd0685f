"""Figures of a base on its sources -> which kind of continual pretraining, what of the vocabulary, where to begin, and why.

Invariant: a verdict follows from the rules alone, and every rule shows its figure, its threshold and where that comes from.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from cpt_jax.store.corpus import Lengths, Text, new_scripts_frac
from cpt_jax.vocab import verdict
from cpt_jax.vocab.verdict import EXPAND, KEEP, REPEATS, Finding, Rule

NONE, DOMAIN, LANGUAGE, LONG = "none needed", "domain knowledge", "language", "long context"


class Store(NamedTuple):
  """What a token store holds."""

  path: str
  documents: int
  tokens: int
  bytes: int | None  # None: made by datatrove alone, which does not count them
  tokens_per_byte: float


class Loss(NamedTuple):
  """The base on a source; the errors are standard errors over packed rows."""

  loss: float  # nats per token
  loss_error: float
  bits_per_byte: float
  bits_per_byte_error: float
  tokens: int
  documents: int
  sample: str  # which documents


class Vocabulary(NamedTuple):
  """How the base's vocabulary fits a sample of the text."""

  sample_tokens: int
  byte_frac: float  # tokens that are one byte of a character of several
  unknown_frac: float
  used_frac: float  # of the vocabulary
  own_saving_frac: float | None  # tokens that a vocabulary of its own would save; None where there is too little text


class Distance(NamedTuple):
  """Of a source's token distribution to the general source's."""

  bits: float  # Jensen-Shannon
  floor_bits: float  # between two halves of the general source
  sample_tokens: int  # in each of the samples


class Compressed(NamedTuple):
  """How far the text compresses by itself: what it costs a reader that knows nothing (xz), in bits per byte."""

  bits_per_byte: float
  general_bits_per_byte: float  # of as much general text
  sample_bytes: int


class Figures(NamedTuple):
  """All that was measured of a source."""

  source: str
  store: Store
  base: Loss
  compressed: Compressed
  vocabulary: Vocabulary
  distance: Distance
  lengths: Lengths
  text: Text


# "hand": by hand from the measurements in docs/guide/diagnose.md, in the middle of a gap between cases whose answer is known.
RULES = {
  rule.name: rule
  for rule in (
    Rule("near", "JS distance over the noise floor", "<=", 0.05, "bits", "hand: halves of one corpus 0.01, other topics 0.27"),
    verdict.RULES["far"],
    Rule("other script", "letters in scripts new to it", ">=", 0.5, "%", "hand: more of the text than not"),
    Rule("as good", "base/xz over general's", "<=", 1.05, "x", "hand: within 5%, or within two standard errors of none"),
    Rule("high loss", "base/xz over general's", ">=", 1.25, "x", "hand: domains and Python to 1.1, Chinese and French 1.5 up"),
    Rule("long", "tokens past the base's context", ">=", 0.5, "%", "hand: more of the text than not"),
    *(verdict.RULES[name] for name in ("own saves", "bytes", "unknown", "enough text")),
  )
}


class Practice(NamedTuple):
  """Where published runs of a kind began: (least, start, most)."""

  title: str
  config: str
  rate: tuple[float, float, float]  # times the base's peak rate
  replay: tuple[float, float, float]  # share of the tokens that are general text
  advice: str
  rate_basis: str
  replay_basis: str


PRACTICES = {
  "weak": Practice(
    "domain knowledge, weak shift", "configs/domain.py", (1 / 60, 1 / 10, 1 / 3), (0.01, 0.05, 0.1),
    "begin low: near the base's last rate, falling to a hundredth; find the share by a probe",
    "1/60 ChipNeMo, 1/3 Llemma; 1/10: from the base's last rate without re-warming (2407.07263)",
    "1% removes 67% of the forgetting of a weak shift, 5% 78% (2403.08763 table 2); D-CPT 7.6% at a 3% rise (2406.01375)",
  ),
  "strong": Practice(
    "domain knowledge, strong shift", "configs/domain.py", (1 / 30, 1 / 10, 1.0), (0.05, 0.15, 0.3),
    "a text this far from the base's moves it more than most domains do: watch the general loss from the first evaluations on",
    "1 Code Llama, 1/3 Llemma; 1/10: a tenth of ChipNeMo's 3e-4, at which it lost a third of MMLU",
    "15% Code Llama (7% language, 8% about code), 30% DeepSeek-Coder-V2; legal text shifts 4 times as much (2505.07796)",
  ),
  "language": Practice(
    "language", "configs/language.py", (1 / 10, 1 / 3, 1.0), (0.1, 0.25, 0.5),
    "raise its share little by little, and watch the general loss: the guard of the recipe is for that",
    "1/10 e-Llama, 1/3 Swallow, 1 Ibrahim et al. (2403.08763)",
    "25% of a new language's tokens removes 88% of the forgetting (2403.08763 table 2); 10% Swallow, 30% Sailor, 50% e-Llama",
  ),
  "long": Practice(
    "long context", "configs/domain.py", (1 / 30, 1 / 15, 1 / 8), (0.3, 0.3, 0.5),
    "keep the base's mix of sources and raise data.row_len; long documents to 70% of each source's tokens by length_shares",
    "2e-5 constant for a base of peak 3e-4 (2402.10171); one published point, so a factor of two to either side",
    "30% of the tokens in short documents (2402.10171); 0.5 to 5B tokens restore retrieval at 7B",
  ),
}  # fmt: skip


class Verdict(NamedTuple):
  """What is said of a source."""

  source: str
  kinds: tuple[str, ...]  # the main one first
  practice: str  # key of PRACTICES; "" where no training is needed
  because: str
  vocabulary: str
  vocabulary_because: str
  findings: tuple[Finding, ...]


def find(figures: Figures, general: Figures, *, budget_tokens: float | None = None) -> dict[str, Finding]:
  """Every rule on a source, beside the general one."""
  ratio, error = loss_ratio(figures, general)
  over_floor = figures.distance.bits - figures.distance.floor_bits
  values: dict[str, float | None] = {
    "near": over_floor, "far": over_floor, "other script": new_scripts_frac(figures.text.scripts, general.text.scripts),
    "as good": ratio, "high loss": ratio, "long": figures.lengths.beyond_context_frac,
    "own saves": figures.vocabulary.own_saving_frac, "bytes": figures.vocabulary.byte_frac,
    "unknown": figures.vocabulary.unknown_frac, "enough text": text_tokens(figures, budget_tokens),
  }  # fmt: skip
  found = {}
  for name, rule in RULES.items():
    finding = rule.find(values[name])
    if name in ("as good", "high loss"):
      is_known, met = math.isfinite(error), finding.met or (name == "as good" and ratio - 2 * error <= 1.0)
      finding = finding._replace(met=met and is_known, note=f"+-{2 * error:.2f}" if is_known else "(too few documents)")
    found[name] = finding
  return found


def loss_ratio(figures: Figures, general: Figures) -> tuple[float, float]:
  """How much less the base knows of a source than of the general one, and its standard error: above 1 less, 1 as much.

  Bits per byte over those of xz, over the same of the general source. Texts differ in how hard they are for anybody: a manual
  repeats itself, a dictionary does not, and a character of Chinese is three bytes. xz knows nothing, so it tells this apart
  from what the base knows.
  """
  xz = figures.compressed
  ratio = figures.base.bits_per_byte / xz.bits_per_byte / (general.base.bits_per_byte / xz.general_bits_per_byte)
  parts = (side.base.bits_per_byte_error / side.base.bits_per_byte for side in (figures, general))
  return ratio, ratio * sum(part**2 for part in parts) ** 0.5


def text_tokens(figures: Figures, budget_tokens: float | None) -> float:
  """Tokens of the source that a run would read: what is there, as often as repeats are worth it, within the budget."""
  there = float(REPEATS * figures.store.tokens)
  return there if budget_tokens is None else min(there, budget_tokens)


def kinds(met: Mapping[str, bool]) -> tuple[tuple[str, ...], str]:
  """The kinds of training, the main one first, and the key of the practice to begin from.

  far and high loss: language, as another script and high loss; near and as good: none; all else: domain knowledge, a strong
  shift where it is far, of another script or of a high loss. Long documents make it long context where nothing else is
  needed, and add that where something is.
  """
  is_long = met["long"]
  is_other = met["far"] or met["other script"]
  if met["near"] and met["as good"]:
    return ((LONG,), "long") if is_long else ((NONE,), "")
  main, practice = (LANGUAGE, "language") if is_other and met["high loss"] else (DOMAIN, "weak")
  if main == DOMAIN and (is_other or met["high loss"]):
    practice = "strong"
  return ((main, LONG) if is_long else (main,)), practice


def judge(figures: Figures, general: Figures, *, budget_tokens: float | None = None) -> Verdict:
  """Rules, kind and vocabulary of a source beside the general one."""
  findings = find(figures, general, budget_tokens=budget_tokens)
  met = {name: finding.met for name, finding in findings.items()}
  which, practice = kinds(met)
  return Verdict(
    figures.source, which, practice, _because(figures, general, which, practice), verdict.answer(met),
    _vocabulary_because(figures, general, verdict.answer(met), findings), tuple(findings.values()),
  )  # fmt: skip


def _because(figures: Figures, general: Figures, which: tuple[str, ...], practice: str) -> str:
  ratio, _ = loss_ratio(figures, general)
  over = figures.distance.bits - figures.distance.floor_bits
  of_xz = figures.base.bits_per_byte / figures.compressed.bits_per_byte
  loss = f"{of_xz:.2f} of xz's bits/byte, {ratio:.2f} times {general.source}'s part"
  where = f"its tokens stand {over:.2f} bits from {general.source}'s"
  text = {
    "": f"it is text like {general.source} ({where} over the noise floor) and the base does as well on it ({loss})",
    "long": f"it is text like {general.source} ({where} over the noise floor), but long",
    "weak": f"low starting loss ({loss}), other words ({where})",
    "strong": f"{loss}; {where}: a strong shift, though not another language",
    "language": f"high starting loss ({loss}), another vocabulary ({where})",
  }[practice]
  if LONG in which:
    text += f"; {figures.lengths.beyond_context_frac:.0%} of its tokens stand past the base's context in their documents"
  return text


def _vocabulary_because(figures: Figures, general: Figures, verdict: str, findings: Mapping[str, Finding]) -> str:
  saving = figures.vocabulary.own_saving_frac
  saves = "too little text to say what its own would save" if saving is None else f"its own would save {saving:.0%} of the tokens"
  cost = f"{figures.store.tokens_per_byte / general.store.tokens_per_byte:.2f} times {general.source}'s tokens/byte"
  fit = f"{cost}, {figures.vocabulary.byte_frac:.1%} byte tokens; {saves}"
  if verdict == KEEP:
    return f"the vocabulary fits: {fit}"
  text = findings["enough text"].value or 0.0
  if verdict == EXPAND:
    return f"the vocabulary does not fit ({fit}) and there are {_tokens(text)} to make up for new words"
  return (
    f"the vocabulary does not fit ({fit}), but {_tokens(text)} are too few to make up for new words: take a base whose "
    "vocabulary fits; if there is none, keep this one (EEVE, 2402.14714, gained speed with 2B tokens of staged training)"
  )


def _tokens(number: float) -> str:
  """14_480_000 -> '14.5M tokens'."""
  scale, letter = next(((s, c) for s, c in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= s), (1.0, ""))
  return f"{number / scale:.3g}{letter} tokens"
