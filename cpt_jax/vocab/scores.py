"""Scores of pieces that are added to a unigram model, whose tokenisation is the path of the highest sum of scores.

Invariant: a new piece scores a little more than the best path over older pieces that spells it, so it stands in for such paths
and shifts others as little as a new piece can; no score lies below the base's lowest, from which both libraries derive the cost
of an unknown character.
"""

from collections.abc import Mapping, Sequence

from cpt_jax.vocab.bases import Piece

# Above the path that it replaces: more than float32 rounds off sums of scores near -200, and little beside one score (about -10).
MARGIN = 1e-3
_UNKNOWN_PENALTY = 10.0  # below the lowest score, for a character that is no piece (both libraries)


def unigram_scores(scores: Mapping[str, float], pieces: Sequence[Piece]) -> list[float]:
  """A score for each of `pieces`, in their order; later ones may be made of earlier ones."""
  known, lowest = dict(scores), min(scores.values())
  longest = max(map(len, known))
  found = []
  for piece in pieces:
    path = _best_path(piece.text, known, longest=longest, unknown=lowest - _UNKNOWN_PENALTY)
    known[piece.text] = max(path + MARGIN, lowest)
    longest = max(longest, len(piece.text))
    found.append(known[piece.text])
  return found


def _best_path(text: str, scores: Mapping[str, float], *, longest: int, unknown: float) -> float:
  best = [0.0]
  for end in range(1, len(text) + 1):
    options = [best[end - 1] + unknown]
    options += [best[start] + scores[text[start:end]] for start in range(max(0, end - longest), end) if text[start:end] in scores]
    best.append(max(options))
  return best[-1]
