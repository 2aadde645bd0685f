"""Runs whose mixture is changed on the way: what was read stays, every source goes on, sources end as their settings say."""

import itertools
import json
import re
import shutil

import numpy as np
import oracle
import pytest
from hypothesis import given, settings, strategies as st
from loaders import assert_same, go_on, located, mix

from cpt_jax.config import ConfigError, Problems
from cpt_jax.store.token_store import open_store
from cpt_jax.stream import pipeline, summary
from cpt_jax.stream.batch import Batch

Run = list[list[tuple[str, int]]]  # for each step, the (source, row of the source) of its rows


def planned(loader, given: dict[str, int], *, start: int, stop: int) -> Run:
  """The steps from `start` on as the oracle has them for a period of `loader`'s sources that begins there."""
  limits, at_end = [], []
  for source, layout in zip(loader.sources, loader.layouts, strict=True):
    epochs = source.max_epochs or {"repeat": np.inf}.get(source.at_end, 1)
    limits.append(None if epochs == np.inf else max(int(epochs * layout.num_rows) - given.get(source.name, 0), 0))
    at_end.append("error" if source.at_end == "repeat" else source.at_end)
  shares = [[tuple(k) if k[2] != "linear" else tuple(k[:2]) for k in source.share] for source in loader.sources]
  steps = oracle.rows(shares, num_steps=stop, batch_rows=loader.batch_rows, start_step=start, limits_M=limits, at_end_M=at_end)
  return [[(loader.names[m], given.get(loader.names[m], 0) + nth) for m, nth in step] for step in steps]


def count(loader, run: Run, totals: dict[str, list[int]]) -> None:
  """Adds rows, tokens and begun documents of `run` to `totals`, by looking into the store alone."""
  for name, nth in itertools.chain(*run):
    m = loader.names.index(name)
    pieces = loader.layouts[m].pieces(loader._shuffles[m][nth])
    entry = totals.setdefault(name, [0, 0, 0])
    entry[0] += 1
    entry[1] += sum(num for _, _, num in pieces)
    entry[2] += sum(start == 0 for _, start, _ in pieces)


# ---- any story ----

share = st.sampled_from([0.0, 0.01, 0.2, 1 / 3, 0.5, 1.0])


@st.composite
def knots(draw, lowest=0.0):
  found = []
  for time in sorted(draw(st.lists(st.one_of(st.integers(0, 40), st.sampled_from([7.25, 20.5])), min_size=1, max_size=4))):
    value = max(draw(share), lowest)
    if sum(time == knot[0] for knot in found) < 2:  # twice is a jump
      curves = ["linear", "hold"] + ["log"] * bool(found and value and found[-1][1])
      found.append((time, value, draw(st.sampled_from(curves))))
  return found


@st.composite
def mixtures(draw):
  names = draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=4, unique=True))
  found = {}
  for m, name in enumerate(names):
    at_end = draw(st.sampled_from(["repeat", "repeat", "stop", "renormalise", "renormalise", "error"]))
    fields = {"at_end": at_end, "max_epochs": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.5, 2.0]))}
    found[name] = {**fields, "share": draw(knots(lowest=0.0 if m else 0.1))}  # at each step one has a share
  return found


changes = st.lists(st.tuples(st.integers(0, 14), st.integers(-3, 20), st.one_of(st.none(), mixtures())), min_size=1, max_size=4)


@settings(max_examples=60)
@given(mixtures(), st.integers(1, 20), changes, st.sampled_from([1, 3, 5, 8]), st.randoms(use_true_random=False))
def test_whatever_changes_on_the_way_the_past_stays_and_every_source_goes_on(stores, first, length, edits, batch_rows, random):
  loader = mix(stores, first, num_steps=length, batch_rows=batch_rows)
  mixed, run, totals, step = first, [], {}, 0
  periods = [(0, {}, first)]  # start, rows of each source before it, mixture
  seen = {}  # step -> its batch, when it was read
  for steps, more, edit in [*edits, (99, 0, None)]:
    # Read up to the change, and compare with the oracle of the whole period.
    stop, (begin, given, _) = min(step + steps, loader.end_step), periods[-1]
    expected = planned(loader, given, start=begin, stop=loader.num_steps)
    assert loader.end_step == begin + len(expected)
    assert located(loader, step, stop) == expected[step - begin : stop - begin]
    run += located(loader, step, stop)
    count(loader, run[step:stop], totals)
    for at in random.sample(range(step, stop), min(2, stop - step)):
      seen[at] = loader._batch(at * batch_rows, batch_rows)
    found = {name: list(read[:3]) for name, read in loader.read(stop).items() if read.rows}
    assert found == totals
    for name, read in loader.read(stop).items():
      if name in loader.names:
        assert read.epochs == read.rows / loader.layouts[loader.names.index(name)].num_rows
    assert [{**entry, "role": ""} for entry in loader.ledger(stop)] == [
      {"source": name, "role": "", **loader.read(stop)[name]._asdict()}
      for name in [*loader.names, *(n for n in loader.read(stop) if n not in loader.names)]
    ]
    if steps == 99:
      break
    before, mixed, step = loader, edit or mixed, stop
    loader = go_on(stores, loader, mixed, step=step, num_steps=max(loader.num_steps + more, step))
    is_same = [[*m.items()] == [*mixed.items()] for _, _, m in periods]
    if not is_same[-1]:  # a period in which no step was made is as if it had never been
      periods = [period for period in periods if period[0] < step]
      if not periods or not is_same[len(periods) - 1]:
        periods.append((step, {name: entry[0] for name, entry in totals.items()}, mixed))
    else:
      assert loader.fingerprint == before.fingerprint
    # What was read is what it was, and the periods know it.
    assert located(loader, 0, step) == run
    assert loader.is_changed == (len(periods) > 1 and periods[-1][0] == step)
    found = loader.order.periods
    assert [(s.start_step, {n: read.rows for n, read in s.read.items() if read.rows}, [*s.sources]) for s in found] == [
      (start, rows, [*sources]) for start, rows, sources in periods
    ]
    if periods[-1][0] == step and not is_same[-1]:
      assert {name: list(read[:3]) for name, read in found[-1].read.items() if read.rows} == totals
  # Over the whole run no row of a source is missing or read twice.
  for name, entry in totals.items():
    assert [nth for source, nth in itertools.chain(*run) if source == name] == [*range(entry[0])]
  kept = json.loads(json.dumps(loader.periods()))
  for at, batch in seen.items():
    other = pipeline.from_periods(kept, at)
    assert_same(
      other._batch(at * batch_rows, batch_rows)._replace(source_B=0 * batch.source_B), batch._replace(source_B=0 * batch.source_B)
    )
    assert [other.locate(i)[1] for i in range(at * batch_rows, (at + 1) * batch_rows)] == [nth for _, nth in run[at]]


@pytest.fixture
def changed(stores):
  """A run of 24 rows a step: b joins and a leaves at step 7, a comes back at step 12 with a ramp."""
  loader = mix(stores, {"a": {}, "c": {"share": 0.3}}, num_steps=10, batch_rows=24)
  loader = go_on(stores, loader, {"b": {}, "c": {"share": 0.2}}, step=7, num_steps=15)
  last = {"a": {"share": [(0, 0.1), (20, 0.9)]}, "b": {}, "c": {}}
  return go_on(stores, loader, last, step=12, num_steps=20)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 8])
def test_the_global_order_is_the_same_on_any_number_of_processes(stores, changed, num_processes):
  part = 24 // num_processes
  for num_threads in (1, 5):
    changed.num_threads = num_threads
    readers = [changed.batches(12, rows=slice(p * part, (p + 1) * part)) for p in range(num_processes)]
    steps = [Batch(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*readers, strict=True)]
    assert len(steps) == 8
    for step, batch in enumerate(steps, 12):
      assert_same(batch, changed._batch(step * 24, 24))


# ---- what is no change, and what may not change ----


def test_the_same_again_or_a_longer_run_is_no_change(stores, changed):
  names = {"a": {"share": [(0, 0.1), (20, 0.9)]}, "b": {}, "c": {}}
  for step, num_steps in ((12, 20), (13, 20), (20, 20), (20, 50)):
    again = go_on(stores, changed, names, step=step, num_steps=num_steps)
    assert again.fingerprint == changed.fingerprint and len(again.order.periods) == 3
    assert again.is_changed == (step == 12)


def test_a_change_taken_back_before_a_step_was_made_is_none(stores):
  first = mix(stores, {"a": {}, "c": {}}, num_steps=10)
  second = go_on(stores, first, {"a": {}, "b": {}}, step=4, num_steps=10)
  back = go_on(stores, second, {"a": {}, "c": {}}, step=4, num_steps=10)
  assert back.fingerprint == first.fingerprint and located(back, 0, 10) == located(first, 0, 10)


def test_stores_may_move(stores, changed, tmp_path):
  for name, store in stores.items():
    shutil.copytree(store.path, tmp_path / name)
  moved = {name: open_store(tmp_path / name) for name in stores}
  names = {"a": {"share": [(0, 0.1), (20, 0.9)]}, "b": {}, "c": {}}
  again = go_on(moved, changed, names, step=15, num_steps=20)
  assert again.fingerprint == changed.fingerprint and len(again.order.periods) == 3
  # The periods say where they are now, in the steps of the past too.
  paths = {terms["store"] for period in again.periods()["periods"] for terms in period["sources"].values()}
  assert paths == {str(tmp_path / name) for name in "abc"}


def test_a_part_of_the_objective_may_change_without_another_row(stores):
  first = mix(stores, {"a": {}, "b": {}}, num_steps=10)
  second = go_on(stores, first, {"a": {"loss_weight": 0.5}, "b": {}}, step=4, num_steps=10)
  assert [period.start_step for period in second.order.periods] == [0, 4]
  assert [period.sources["a"]["loss_weight"] for period in second.order.periods] == [1.0, 0.5]


@pytest.mark.parametrize(
  "key, value", [("heldout_frac", 0.1), ("min_tokens", 3), ("max_tokens", 20), ("length_shares", ((0, 0.5), (10, 0.5)))]
)
def test_what_would_alter_the_past_is_refused_by_name(stores, key, value):
  first = mix(stores, {"a": {}, "b": {"share": 0.0}}, num_steps=10)
  with pytest.raises(ConfigError, match=rf"^data\.sources\.a: {key}.* was .*, now it is "):
    go_on(stores, first, {"a": {key: value}, "b": {}}, step=4, num_steps=10)
  go_on(stores, first, {"a": {}, "b": {key: value}}, step=4, num_steps=10)  # nothing was read of b
  gone = go_on(stores, first, {"b": {}}, step=4, num_steps=10)
  with pytest.raises(ConfigError, match=rf"^data\.sources\.a: {key}"):  # nor may it come back as another
    go_on(stores, gone, {"a": {key: value}, "b": {}}, step=6, num_steps=10)


def test_another_text_under_a_name_that_was_read_is_refused(stores):
  first = mix(stores, {"a": {}, "b": {}}, num_steps=10)
  swapped = {**stores, "a": stores["c"], "b": stores["d"]}
  with pytest.raises(ConfigError) as caught:
    go_on(swapped, first, {"a": {}, "b": {}}, step=4, num_steps=10)
  for name, now in (("a", "c"), ("b", "d")):
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"data.sources.{name}: store"))
    assert stores[name].fingerprint in line and stores[now].fingerprint in line and "before 4" in line
  assert "another name" in str(caught.value)


# ---- the end of a source ----


def rows_of(loader, name) -> int:
  return loader.order.rows(loader.end_step)[name]


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.5])
def test_a_source_that_stops_the_run(stores, epochs):
  loader = mix(stores, {"a": {"at_end": "stop", "max_epochs": epochs}, "c": {"share": 0.5}}, num_steps=500)
  limit = int(epochs * loader.layouts[0].num_rows)
  quota = 5 * (1 / 1.5)  # rows of it a step
  assert loader.end_step == int(limit / quota + 1e-9) and loader.order.ends == (("a", loader.end_step, "stop"),)
  assert limit - quota - 1 < rows_of(loader, "a") <= limit
  assert len(list(loader.batches(0))) == loader.end_step
  with pytest.raises(IndexError):
    loader.row(loader.end_step * 5)
  # It goes on when the limit is raised, and ends at once with the same one.
  step = loader.end_step
  assert go_on(stores, loader, loader_fields(loader), step=step, num_steps=900).end_step == step
  raised = {"a": {"at_end": "stop", "max_epochs": epochs + 1}, "c": {"share": 0.5}}
  assert rows_of(go_on(stores, loader, raised, step=step, num_steps=500), "a") > limit


def loader_fields(loader):
  return {s.name: {"share": s.share, "at_end": s.at_end, "max_epochs": s.max_epochs} for s in loader.sources}


def test_a_source_that_others_replace_is_read_to_its_last_row(stores):
  loader = mix(stores, {"a": {"at_end": "renormalise"}, "b": {"at_end": "renormalise", "max_epochs": 2.0}, "c": {}}, num_steps=99)
  assert loader.end_step == 99
  assert (rows_of(loader, "a"), rows_of(loader, "b")) == (loader.layouts[0].num_rows, 2 * loader.layouts[1].num_rows)
  assert loader.ledger(99)[0]["tokens"] == loader.layouts[0].num_targets
  assert [end[0::2] for end in loader.order.ends] == [("a", "renormalise"), ("b", "renormalise")]
  for name, step, _ in loader.order.ends:
    assert loader.order.rows(step)[name] <= rows_of(loader, name) == loader.order.rows(step + 1)[name]
    assert loader.order.rows(step - 1)[name] < rows_of(loader, name) and loader.order.shares(step)[name] > 0
    assert loader.order.shares(step + 1)[name] == 0
  assert loader.order.shares(98)["c"] == 1


@pytest.mark.parametrize("fields", [{"at_end": "error"}, {"at_end": "repeat", "max_epochs": 1.5}])
@pytest.mark.parametrize("step", [0, 4])
def test_a_source_that_must_not_end_is_refused_with_what_fits(stores, fields, step):
  mixed = {"a": fields, "c": {"share": 0.5}}

  def problems(num_steps, mixed=mixed):
    loader = mix(stores, {"a": {}, "b": {}}, num_steps=10)
    loader = go_on(stores, loader, mixed, step=4, num_steps=num_steps) if step else mix(stores, mixed, num_steps=num_steps)
    found = Problems()
    loader.check_ends(found)
    return found.lines

  [line] = problems(400)
  assert line.startswith("data.sources.a.") and "runs out in step" in line
  fits = int(re.search(r"train\.length to (\d+) steps", line)[1])
  assert problems(fits) == [] and len(problems(fits + 1)) == 1
  lower = float(re.search(r"lower its share to about (\S+) of", line)[1])
  # A share among others is not quite linear; what is advised is near enough to say how much.
  wanted = lower * (1 / 1.5)
  assert problems(400, {"a": {**fields, "share": 0.95 * wanted}, "c": {"share": 1 - 0.95 * wanted}}) == []
  assert len(problems(400, {"a": {**fields, "share": 1.1 * wanted}, "c": {"share": 1 - 1.1 * wanted}})) == 1


def test_a_source_comes_back_after_its_end(stores):
  once = {"a": {"at_end": "renormalise"}, "c": {}}
  first = mix(stores, once, num_steps=60)
  ended = first.layouts[0].num_rows
  assert rows_of(first, "a") == ended
  without = go_on(stores, first, {"c": {}}, step=50, num_steps=80)
  assert without.read(80)["a"].rows == ended
  again = go_on(stores, without, once, step=70, num_steps=90)
  assert rows_of(again, "a") == ended and again.order.shares(71) == {"a": 0.0, "c": 1.0}
  twice = go_on(stores, without, {"a": {"at_end": "renormalise", "max_epochs": 2.0}, "c": {}}, step=70, num_steps=150)
  assert rows_of(twice, "a") == 2 * ended
  assert next(row for row in itertools.chain(*located(twice, 70, 80)) if row[0] == "a") == ("a", ended)


def test_a_limit_below_what_was_read(stores):
  first = mix(stores, {"a": {}, "c": {}}, num_steps=60)
  read = first.order.rows(40)["a"]
  assert read > first.layouts[0].num_rows
  lower = {"a": {"at_end": "renormalise"}, "c": {}}
  assert rows_of(go_on(stores, first, lower, step=40, num_steps=60), "a") == read
  lower["a"]["at_end"] = "stop"
  stopped = go_on(stores, first, lower, step=40, num_steps=60)
  assert stopped.end_step == 40 and list(stopped.batches(40)) == [] and stopped.read(40)["a"].rows == read
  assert summary.describe(stopped)[0].rows == read
  lower["a"]["at_end"] = "error"
  problems = Problems()
  go_on(stores, first, lower, step=40, num_steps=60).check_ends(problems)
  assert len(problems.lines) == 1 and "step 40" in problems.lines[0]


def test_periods_whose_stores_are_others_now_is_refused(stores, changed, tmp_path):
  kept = changed.periods()
  with pytest.raises(ConfigError, match="step 20: the run has the steps 0 to 19"):
    pipeline.from_periods(kept, 20)
  shutil.copytree(stores["a"].path, tmp_path / "a")
  for period in kept["periods"]:
    period["sources"] = {name: {**terms, "store": str(stores["d"].path)} for name, terms in period["sources"].items()}
  with pytest.raises(ConfigError, match=rf"holds {stores['d'].fingerprint}, the run read {stores['a'].fingerprint} as a"):
    pipeline.from_periods(kept, 3)
