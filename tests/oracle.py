"""A mixture's rows, worked out step by step from the rules in stream.mixture's docstring: plain Python, nothing shared, slow."""

import bisect
import decimal
import fractions
import itertools
import math

ONE = 1 << 40  # quotas are whole numbers of 2**-40 rows
FORESIGHT = 3000  # steps after the run in which a deadline is still looked for


def rows(shares_M, *, num_steps, batch_rows, start_step=0, limits_M=None, at_end_M=None) -> list[list[tuple[int, int]]]:
  """For each step from `start_step` on, until the rows end, the (source, number) of its rows in the order of the batch."""
  sources = range(len(shares_M))
  margin = ONE // (2 * len(sources) + 1)
  sums_M = _sums(shares_M, num_steps, batch_rows, start_step, limits_M or [None for _ in sources], at_end_M)
  given, batches = [0 for _ in sources], []
  for step in range(min(num_steps - start_step, len(sums_M[0]))):
    drawn = [[] for _ in sources]
    for _ in range(batch_rows):
      free = [m for m in sources if sums_M[m][step] > given[m] * ONE + margin]
      earliest = min(free, key=lambda m: bisect.bisect_left(sums_M[m], (given[m] + 1) * ONE - margin))
      drawn[earliest].append(given[earliest])
      given[earliest] += 1
    assert all(abs(given[m] * ONE - sums_M[m][step]) < ONE - margin for m in sources)
    places = [(fractions.Fraction(2 * n + 1, 2 * len(own)), m, row) for m, own in enumerate(drawn) for n, row in enumerate(own)]
    batches.append([(m, row) for _, m, row in sorted(places)])
  return batches


def _sums(shares_M, num_steps, batch_rows, start_step, limits_M, at_end_M) -> list[list[int]]:
  """For each source, its quota after each step; past the run's end too, where that shows when the next rows are due."""
  limits = [math.inf if limit is None else limit * ONE for limit in limits_M]
  margin = ONE // (2 * len(limits) + 1)
  ended, sums, last_knot = set(), [[0 for _ in limits]], max(knot[0] for knots in shares_M for knot in knots)
  num_even, even = _even(shares_M, batch_rows, start_step, limits)
  for step in itertools.count(start_step):
    shares = [0.0 if m in ended else _share(knots, step + 0.5) for m, knots in enumerate(shares_M)]
    if step >= num_steps:
      rises = [(a + margin) // ONE > (b + margin) // ONE for a, b in zip(sums[-1], sums[num_steps - start_step], strict=True)]
      if step > num_steps + FORESIGHT or all(rise or (step > last_knot and not shares[m]) for m, rise in enumerate(rises)):
        break
    if step - start_step < num_even:
      sums.append(even(step - start_step + 1))
      continue
    after = [total + part for total, part in zip(sums[-1], _cut(batch_rows * ONE, shares), strict=True)]
    over = [m for m, limit in enumerate(limits) if after[m] > limit]
    left = batch_rows * ONE
    exact = [fractions.Fraction(share) for share in shares]
    while over and any(exact):
      if any(at_end_M and at_end_M[m] != "renormalise" for m in over):
        break
      for m in over:
        exact[m], left = 0, left - (limits[m] - sums[-1][m])
        ended.add(m)
      parts = _cut(left, exact)
      after = [limits[m] if m in ended else total + part for m, (total, part) in enumerate(zip(sums[-1], parts, strict=True))]
      over = [m for m, limit in enumerate(limits) if after[m] > limit]
    if over or sum(after) < sum(sums[-1]) + batch_rows * ONE:
      break  # the run ends before this step
    sums.append(after)
  return [list(column) for column in zip(*sums[1:], strict=True)] or [[] for _ in limits]


def _share(knots, time: float) -> float:
  before, after = [k for k in knots if k[0] <= time], [k for k in knots if k[0] > time]
  if not before or not after:
    return float((before or after)[-1 if before else 0][1])
  (time_0, share_0, *_), (time_1, share_1, *curve) = before[-1], after[0]
  if curve == ["hold"]:
    return float(share_0)
  if curve == ["log"]:
    first, last, part = map(decimal.Decimal, (share_0, share_1, (time - time_0) / (time_1 - time_0)))
    return float(first * (last / first) ** part)
  return max((share_1 - share_0) / (time_1 - time_0) * (time - time_0) + share_0, 0.0)


def _cut(units: int, shares: list) -> list[int]:
  """Whole parts of `units` by shares; floats are divided as floats."""
  edges = [0, *itertools.accumulate(shares)]
  total = edges[-1]
  if not total:
    return [0 for _ in shares]
  scaled = [int(edge / total * float(units)) if isinstance(total, float) else edge * units // total for edge in edges]
  return [high - low for low, high in itertools.pairwise(scaled)]


def _even(shares_M, batch_rows: int, start_step: int, limits: list):
  """Where shares are constant fractions: for how many steps whole periods fit in, and the quotas after a number of steps."""
  constant = [{_share(knots, start_step + 0.5), *(float(k[1]) for k in knots if k[0] > start_step + 0.5)} for knots in shares_M]
  exact = [fractions.Fraction(str(max(values))) for values in constant]
  if any(len(values) > 1 for values in constant) or not any(exact):
    return 0, None
  parts = [batch_rows * share / sum(exact) for share in exact]
  if math.lcm(*((part / batch_rows).denominator for part in parts)) > 1 << 20:
    return 0, None
  period = math.lcm(*(part.denominator for part in parts))
  counts, one_step = [int(part * period) for part in parts], _cut(batch_rows * ONE, exact)
  num_periods = min(limit // (count * ONE) for limit, count in zip(limits, counts, strict=True) if count)
  return num_periods * period, lambda steps: [
    steps // period * count * ONE + steps % period * quota for count, quota in zip(counts, one_step, strict=True)
  ]
