"""Figures of a vocabulary on a text -> expand, do not expand or choose another base, by rules that are all shown.

Invariant: expanding takes both conditions: a vocabulary far from the text, and enough text to make up for new rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

KEEP, EXPAND, OTHER_BASE = "do not expand", "expand", "choose another base"
REPEATS = 4  # of text are worth almost as much as new text (Muennighoff et al. 2305.16264)


class Rule(NamedTuple):
  """A figure against a threshold."""

  name: str
  figure: str  # what is measured, for people
  sign: str  # ">=" or "<="
  threshold: float
  unit: str  # "bits", "x" (a ratio), "%" (of a share 0..1) or "tokens"
  basis: str  # where the threshold comes from

  def find(self, value: float | None) -> "Finding":
    """The rule on a source; what cannot be measured does not meet it."""
    met = value is not None and (value >= self.threshold if self.sign == ">=" else value <= self.threshold)
    return Finding(self, value, met)


class Finding(NamedTuple):
  """A rule on a source."""

  rule: Rule
  value: float | None  # None: not measurable, and not met
  met: bool
  note: str = ""


# "hand": by hand from the measurements in docs/guide/diagnose.md, in the middle of a gap between cases whose answer is known.
RULES = {
  rule.name: rule
  for rule in (
    Rule("far", "JS distance over the noise floor", ">=", 0.45, "bits", "hand: domains to 0.35, Python 0.47, languages 0.51 up"),
    Rule("own saves", "tokens its own vocabulary saves", ">=", 0.2, "%", "ChipNeMo 3%: no gain. hand: domains to 9%, French 29%"),
    Rule("bytes", "byte tokens", ">=", 0.1, "%", "hand: domains to 0.2%, Chinese and Japanese 32% up"),
    Rule("unknown", "unknown tokens", ">=", 0.01, "%", "hand: text that is lost to the model"),
    Rule("enough text", "text, repeats counted", ">=", 50e9, "tokens", "Dagan et al. 2402.01035: pays from about 50B"),
  )
}


class Precedent(NamedTuple):
  """A published run with a changed vocabulary."""

  name: str
  tokens: float | None  # of training after the change; None: not known
  added: str
  outcome: str


# What was read at second hand is said to be so in docs/guide/vocabulary.md.
PRECEDENTS = (
  Precedent(
    "Yamaguchi et al. (2406.11477)", 1e7 / 4, "by heuristics", "30 thousand sentences: faster decoding, quality competitive"
  ),
  Precedent("EEVE (2402.14714)", 2e9, "8,960 Korean pieces", "a third of the tokens; staged training"),
  Precedent("Dagan et al. (2402.01035), early", 5e9, "another code tokenizer", "still behind the old vocabulary"),
  Precedent("Dagan et al. (2402.01035)", 50e9, "another code tokenizer", "level or ahead"),
)


def fits(met: Mapping[str, bool]) -> bool:
  """Does the vocabulary suit the text: it can spell it, and is near it or would save little by pieces of the text's own."""
  return not (met["unknown"] or (met["far"] and (met["own saves"] or met["bytes"])))


def answer(met: Mapping[str, bool]) -> str:
  """Both of the two conditions to expand: the vocabulary does not fit, and there is enough text to make up for it."""
  if fits(met):
    return KEEP
  return EXPAND if met["enough text"] else OTHER_BASE
