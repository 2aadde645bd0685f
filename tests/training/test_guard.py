"""Guards: the update that is skipped, the rules by which a run stops, holds or goes back, and their records."""

import json
import math
import os

import factory
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from loaders import go_on, located, mix
from updates import RULES, SETTINGS, build

from cpt_jax import config as config_lib, trees
from cpt_jax.config import ConfigError
from cpt_jax.model.loss import objective
from cpt_jax.stream import pipeline
from cpt_jax.stream.quotas import Curves
from cpt_jax.training import checkpoint, guard, metrics, start, step
from cpt_jax.training.perplexity import SourceLoss
from cpt_jax.training.state import TrainState

# ---- the update ----


def poisoned(state, value):
  """The parameters with one number that makes every loss not finite."""
  return state._replace(params={**state.params, "final_norm": state.params["final_norm"].at[0].set(value)})


def assert_same_bits(found, expected):
  for (path, a), b in zip(trees.paths(found).items(), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("frozen", [(), ("embedding",)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_every_bit_but_the_step(tiny_spec, random_batch, value, frozen):
  now, update, _ = build(tiny_spec, frozen=frozen)
  for seed in range(2):
    now, _ = update(now, random_batch(seed), np.float32(1e-2))
  before = jax.device_get(poisoned(now, value))
  after, measured = update(poisoned(now, value), random_batch(2), np.float32(1e-2))
  assert not (np.isfinite(measured.grad_norm) and np.isfinite(measured.sums.loss))
  assert int(after.step) == int(before.step) + 1
  assert_same_bits(jax.device_get(after)._replace(step=0), before._replace(step=0))


def test_a_step_that_was_skipped_is_as_if_its_batch_had_never_been(tiny_spec, random_batch):
  """A gradient too large for float32 in one batch; the next updates are those of a run without it, step count aside."""
  now, update, _ = build(tiny_spec)
  other, _, _ = build(tiny_spec)
  for seed, skipped in ((0, False), (1, True), (2, False)):
    if skipped:
      kept = now.params
      now, measured = update(poisoned(now, math.nan), random_batch(seed), np.float32(1e-2))
      assert not np.isfinite(measured.grad_norm)
      now = now._replace(params=kept)
    else:
      now, _ = update(now, random_batch(seed), np.float32(1e-2))
      other, _ = update(other, random_batch(seed), np.float32(1e-2))
  assert (int(now.step), int(other.step)) == (3, 2)
  assert_same_bits(jax.device_get(now)._replace(step=0), jax.device_get(other)._replace(step=0))


@pytest.mark.parametrize("microbatches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_without_such_numbers_the_guard_changes_no_bit(tiny_spec, random_batch, microbatches):
  """The step against the same update written without the choice."""
  now, update, _ = build(tiny_spec, microbatches=microbatches)
  tx = factory.optimizer(now.params, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip_norm=1.0, **{**RULES, "frozen": ()})
  weights_M = jnp.ones(2)

  def loss_of(params, batch):
    hidden_BTD = step.hidden_states(params, batch, tiny_spec, settings=SETTINGS)
    chunk = SETTINGS.loss_chunk
    return objective(params, tiny_spec, hidden_BTD, batch, source_weights=weights_M, z_loss=0.0, chunk=chunk)

  @jax.jit
  def plain(state, batch, rate):
    grads, sums = step.accumulate(
      jax.grad(loss_of, has_aux=True), state.params, batch, microbatches=microbatches, dtype="float32"
    )
    tokens = jnp.sum(weights_M * sums.tokens_M.astype(jnp.float32))
    scale = 1.0 / jnp.where(tokens > 0, tokens, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, rate=rate)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

  # As users compile it: the quick way of these tests rounds by what stands around a product.
  quickly = "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
  options = {"xla_cpu_use_fusion_emitters": True} if quickly else None
  other, rate = now, np.float32(1e-2)
  update, plain = (f.lower(now, random_batch(0), rate).compile(options) for f in (update, plain))
  for seed in range(4):
    now, _ = update(now, random_batch(seed), rate)
    other = plain(other, random_batch(seed), rate)
  assert_same_bits(jax.device_get(now), jax.device_get(other))


# ---- shares ----

share = st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0])


@st.composite
def knots(draw):
  found = []
  for time in sorted(draw(st.lists(st.one_of(st.integers(0, 40), st.sampled_from([7.25, 20.5])), min_size=1, max_size=4))):
    value = draw(share)
    if sum(time == knot[0] for knot in found) < 2:  # twice is a jump
      curves = ["linear", "hold"] + ["log"] * bool(found and value and found[-1][1])
      found.append((float(time), value, draw(st.sampled_from(curves))))
  return tuple(found)


mixtures = st.dictionaries(st.sampled_from("abc"), knots(), min_size=1, max_size=3)


def shares(mixed, stop):
  return Curves(list(mixed.values()), batch_rows=8).shares(0, stop)


@given(mixtures, st.integers(1, 45))
def test_held_shares_are_those_of_the_step_before(mixed, at):
  found = guard.held(mixed, at)
  assert not guard.moves(found, 0)
  np.testing.assert_allclose(shares(found, 60), shares(mixed, 60)[:, at - 1 : at].repeat(60, 1), rtol=1e-12)


@given(mixtures, st.integers(0, 45))
def test_shares_move_if_a_later_step_has_another_than_the_step_before(mixed, at):
  later = shares(mixed, 200)[:, at:]
  before = shares(mixed, at)[:, -1:] if at else None
  if before is not None:
    is_still = np.allclose(later, before, rtol=1e-12, atol=0)
    assert guard.moves(mixed, at) != is_still
  elif not guard.moves(mixed, at):
    assert (later == later[:, :1]).all()


def slowed_on_paper(mixed, at, until):
  """The shares of each later step, walked along the old path in quarters of a step: half the speed, and a ramp at a jump."""
  paths = {name: guard._Path(k) for name, k in mixed.items()}
  jumps = sorted({time for path in paths.values() for time in path.jumps() if time > at - 0.5})
  out, old, now = [], at - 0.5, at - 0.5
  borders = []  # (new time, old time) of each jump's ramp
  for time in jumps:
    now += 2 * (time - old)
    borders.append((now, time))
    now, old = now + 2 * (until - at), time
  for t in range(at, 400):
    middle, begin_new, begin_old = t + 0.5, at - 0.5, at - 0.5
    value = None
    for new, time in borders:
      if middle <= new:
        break
      if middle <= new + 2 * (until - at):
        part = (middle - new) / (2 * (until - at))
        value = [path.before(time) * (1 - part) + path.after(time) * part for path in paths.values()]
        break
      begin_new, begin_old = new + 2 * (until - at), time
    if value is None:
      time = begin_old + (middle - begin_new) / 2
      value = [path.before(time) if time > begin_old else path.after(time) for path in paths.values()]
    out.append(value)
  return np.array(out).T


@settings(max_examples=100)
@given(mixtures, st.integers(0, 45), st.integers(1, 9))
def test_slower_shares_walk_the_same_path_at_half_the_speed(mixed, at, window):
  found = guard.slower(mixed, at, until=at + window)
  np.testing.assert_allclose(shares(found, 400)[:, at:], slowed_on_paper(mixed, at, at + window), rtol=1e-9, atol=1e-12)
  assert not any(path.jumps() for path in map(guard._Path, found.values()))  # once slowed there is none left
  again = guard.slower(found, at, until=at + window)
  assert not any(path.jumps() for path in map(guard._Path, again.values()))


def test_what_half_the_slope_means_in_numbers():
  ramp = {"en": ((0.0, 1.0, "linear"), (40.0, 0.2, "linear")), "zh": ((0.0, 0.0, "linear"), (40.0, 0.8, "linear"))}
  slopes = [np.diff(shares(mixed, 60))[:, 20] for mixed in (ramp, guard.slower(ramp, 10, until=20))]
  np.testing.assert_allclose(slopes, [[-0.02, 0.02], [-0.01, 0.01]])
  log = {"zh": ((0.0, 0.01, "linear"), (40.0, 1.0, "log"))}
  ratios = [np.diff(np.log(shares(mixed, 60)))[0, 20] for mixed in (log, guard.slower(log, 10, until=20))]
  np.testing.assert_allclose(ratios[0], 2 * ratios[1])
  jump = {"en": ((0.0, 1.0, "hold"), (12.0, 0.2, "hold")), "zh": ((0.0, 0.0, "hold"), (12.0, 0.8, "hold"))}
  found = guard.slower(jump, 10, until=15)
  assert found["zh"] == ((9.5, 0.0, "linear"), (14.5, 0.0, "linear"), (24.5, 0.8, "linear"))


# ---- decisions ----

DEFAULT = guard.Settings(3, 0.1, "rewind", 5.0, 2, "skip", 2)
RAMP = {"en": ((0.0, 1.0, "linear"), (90.0, 0.2, "linear")), "zh": ((0.0, 0.0, "linear"), (90.0, 0.8, "linear"))}


class Rows:
  """As much of a loader as a guard looks at: 3 rows of en and 1 of zh in a step."""

  batch_rows = 4

  @property
  def order(self):
    return self

  def positions(self, step):
    return {"en": 3 * step, "zh": step}


def watch(settings=DEFAULT, *, state=None, decisions=(), first_step=0, knots=RAMP):
  return guard.Watch(
    settings, protected=["en"], asked=RAMP, knots=knots, decisions=decisions, state=state, first_step=first_step, log_every=2
  )


def held_out(en, zh=5.0):
  return {name: SourceLoss(loss, 1.0, 1, 1, 1) for name, loss in (("en", en), ("zh", zh))}


def reading(step, losses, *, not_finite=None):
  return metrics.Reading(step, {"source_loss": losses} if losses else None, 0.0, None, not_finite)


BASE = held_out(3.0)


def test_a_rise_within_the_budget_is_good_and_one_past_it_goes_back_there():
  w = watch()
  for at, loss in ((0, 3.0), (10, 3.05), (20, 3.09)):
    w.evaluated(at, held_out(loss, zh=9.0), BASE)  # a domain's loss is not watched
    assert w.decide(at, Rows()) is None and w.saves(at) and at in w.needed
  w.evaluated(30, held_out(3.11), BASE)
  found = w.decide(30, Rows())
  assert (found["act"], found["to_step"], found["guard"], found["rewinds"]) == ("rewind", 20, "collapse", 1)
  assert found["rise"] == {"en": pytest.approx(0.11)} and found["limit"] == 0.1
  assert found["shares"] == guard._plain(guard.slower(RAMP, 20, until=30)) and found["config_shares"] == guard._plain(RAMP)
  assert not w.saves(30) and "half their speed" in guard.words(found)


@pytest.mark.parametrize("loss", [3.2, math.nan, math.inf])
def test_what_cannot_be_gone_back_from_stops(loss):
  def decided(**more):
    w = watch(**more)
    w.evaluated(30, held_out(loss), BASE)
    return w.decide(30, Rows())

  assert decided()["to_step"] == 0  # to the run's beginning
  assert decided(decisions=[{"rewinds": 2}])["why"] == "it has gone back guard.max_rewinds=2 times already"
  assert decided(state=guard.NO_STATE)["why"] == "no checkpoint from before it is kept"
  still = {"en": ((0.0, 0.5, "linear"),), "zh": ((0.0, 0.5, "linear"),)}
  found = decided(knots=still)
  assert (found["act"], found["to_step"], found["rewinds"]) == ("stop", 30, 0) and "no share moves" in found["why"]
  assert decided(settings=DEFAULT._replace(on_collapse="hold"))["shares"] == guard._plain(guard.held(RAMP, 30))
  assert decided(settings=DEFAULT._replace(on_collapse="hold"), knots=still) is None  # as it is after it was held
  held = watch(DEFAULT._replace(on_collapse="hold"), knots=still)
  assert "nothing to hold" in held.evaluated(30, held_out(loss), BASE) and held.evaluated(40, held_out(3.0), BASE) == ""
  assert decided(settings=DEFAULT._replace(general_loss_rise=0.0)) is None


def test_a_spike_of_one_source_skips_the_rows_since_the_last_good_step_before_it():
  w = watch()
  for at in range(2, 41, 2):
    w.saw(reading(at, {"en": 3.0 + 0.01 * (at % 3), "zh": 4.0}), Rows())
    if at % 10 == 0:
      w.evaluated(at, held_out(3.0), BASE)
    assert w.decide(at, Rows()) is None
  assert w.needed == (30, 40)
  w.saw(reading(42, {"en": 3.02, "zh": 4.5}), Rows())
  w.saw(reading(44, {"en": 3.02}), Rows())  # without a row of zh nothing is known about it
  assert w.decide(44, Rows()) is None
  w.evaluated(45, held_out(3.0), BASE)
  assert w.needed == (30, 40)  # a step within a spike is none to go back to
  w.saw(reading(46, {"en": 3.02, "zh": math.nan}), Rows())
  found = w.decide(46, Rows())
  assert (found["act"], found["to_step"], found["outside_since"]) == ("skip", 40, {"zh": 42})
  assert found["source_rows"] == {"en": [120, 138], "zh": [40, 46]}
  # Had the good step been after the last record before the spike, the one before it is taken.
  w._good = [30, 41]
  assert w.decide(46, Rows())["to_step"] == 30


def test_a_loss_that_comes_back_is_no_spike_and_a_falling_one_never():
  w = watch()
  for at in range(2, 200, 2):
    w.saw(reading(at, {"zh": 8.0 - at / 50 + (3.0 if at % 20 == 0 else 0.0)}), Rows())
    assert w.decide(at, Rows()) is None


def test_a_band_is_of_8_records_to_50_and_never_narrower_than_a_thousandth_of_their_median():
  assert guard.upper([4.0] * 8, 5.0) == pytest.approx(4.02) and guard.upper([3.0, 4.0, 6.0], 5.0) == 9.0
  for num_inside, is_spike in ((7, False), (8, True)):
    w = watch()
    for at, loss in enumerate([4.0] * num_inside + [9.0] * 2, 1):
      w.saw(reading(at, {"zh": loss}), Rows())
    assert (w.decide(num_inside + 2, Rows()) is not None) == is_spike
  for at in range(60):
    w.saw(reading(at, {"en": 3.0}), Rows())
  assert len(w.state()["windows"]["en"]) == 50


events = st.lists(
  st.tuples(st.sampled_from([3.0, 3.01, 4.0, math.nan]), st.sampled_from([3.0, 3.05, 3.2]), st.booleans()), max_size=30
)


@settings(max_examples=60)
@given(events, st.sampled_from(["stop", "hold", "rewind"]), st.sampled_from(["skip", "stop", "hold", "rewind"]), st.data())
def test_a_resume_decides_as_the_run_that_never_stopped(story, on_collapse, on_spike, data):
  story = [(3.0 + 0.01 * (i % 4), 3.0, True) for i in range(20)] + story  # so that there is a band
  chosen = DEFAULT._replace(on_collapse=on_collapse, on_spike=on_spike, nonfinite_steps=99)
  cut = data.draw(st.integers(18, len(story)))

  def play(w, events, start):
    decided = []
    for at, (loss, general, is_finite) in enumerate(events, start + 1):
      values = {"zh": loss} if at % 2 == 0 else None
      bad = None if is_finite else {"loss": math.nan, "grad_norm": math.inf}
      decided.append(w.saw(reading(at, values, not_finite=bad), Rows()))
      if at % 5 == 0:
        w.evaluated(at, held_out(general), BASE)
      decided.append(w.decide(at, Rows()))
    return decided, w.state()

  whole = play(watch(chosen), story, 0)
  first = play(watch(chosen), story[:cut], 0)
  kept = json.loads(json.dumps(first[1]))
  resumed = watch(chosen, state=kept, first_step=cut)
  if cut and cut % 5 == 0:
    resumed.evaluated(cut, held_out(story[cut - 1][1]), BASE)  # as the loop does it where it goes on
    assert resumed.decide(cut, Rows()) == first[0][-1]
  second = play(resumed, story[cut:], cut)
  assert json.dumps(first[0] + second[0]) == json.dumps(whole[0]) and json.dumps(second[1]) == json.dumps(whole[1])


def test_updates_that_are_not_finite_are_noted_with_their_rows_and_too_many_are_too_many():
  w = watch()
  bad = {"loss": math.nan, "grad_norm": 2.0}
  note = w.saw(reading(6, None, not_finite=bad), Rows())
  assert note == {
    "step": 5,
    "kind": "skipped",
    "loss": "nan",
    "grad_norm": 2.0,
    "rows": [20, 24],
    "source_rows": {"en": [15, 18], "zh": [5, 6]},
    "in_a_row": 1,
  }
  assert "3 of en, 1 of zh" in guard.words(note)
  assert w.saw(reading(7, None), Rows()) is None
  for at in (8, 9, 10):
    assert not w.is_lost
    w.saw(reading(at, None, not_finite=bad), Rows())
  assert w.is_lost


# ---- records ----


def decision(to_step, *, step=99, act="rewind", **more):
  return {"step": step, "kind": "decision", "act": act, "to_step": to_step, "rewinds": 1, **more}


def test_a_record_is_written_once_and_what_is_given_up_is_marked(tmp_path):
  assert guard.read(tmp_path) == [] and guard.decisions(None, step=3) == []
  records = [{"step": 4, "kind": "skipped"}, decision(20), {"step": 21, "kind": "skipped"}, decision(10)]
  for record in [*records, decision(10)]:
    guard.add(tmp_path, record)
  assert guard.read(tmp_path) == records
  assert guard.decisions(tmp_path, step=10) == [decision(10)]
  guard.drop_after(tmp_path, 10)
  assert guard.read(tmp_path) == [records[0], {**decision(20), "kind": "undone"}, decision(10)]
  guard.drop_after(tmp_path, 4)  # the checkpoints were lost
  assert [record["kind"] for record in guard.read(tmp_path)] == ["undone", "undone"]


def test_a_checkpoint_from_before_a_decision_is_void_if_it_is_newer_than_its_step():
  found = [decision(20), decision(30)]
  assert [guard.is_void(s, num_decisions=0, found=found) for s in (20, 21, 30)] == [False, True, True]
  assert [guard.is_void(s, num_decisions=1, found=found) for s in (25, 30, 31)] == [False, False, True]
  assert not guard.is_void(99, num_decisions=2, found=found)


def test_void_checkpoints_are_removed_whole_and_never_begun_from(tmp_path):
  saved = factory.checkpoints(tmp_path, keep_last=9)
  small = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, ())
  for at in (10, 20, 30):
    saved.save(small, at, meta={"guard": {**guard.NO_STATE, "decisions": 0}}, losses={})
  saved.close()
  base = start.Start("scratch", "config.json")
  c = config_lib.default()
  assert start.choose_start(c, tmp_path, base).step == 30
  guard.add(tmp_path, decision(10))
  assert start.choose_start(c, tmp_path, base) == start.Start("run", str(tmp_path), 10, 10)
  # A kill in the middle of removing: one is moved away, and what was moved before is half deleted.
  (tmp_path / "void" / "30-0" / "state").mkdir(parents=True)
  (tmp_path / "ckpt" / "30").rename(tmp_path / "void" / "30-1")
  assert start.choose_start(c, tmp_path, base).step == 10
  start.remove_void(tmp_path)
  assert checkpoint.saved_steps(tmp_path) == [10] and not (tmp_path / "void").exists()
  saved = factory.checkpoints(tmp_path, keep_last=9)
  saved.save(small, 15, meta={"guard": {**guard.NO_STATE, "decisions": 1}}, losses={})
  saved.close()
  start.remove_void(tmp_path)
  assert start.choose_start(c, tmp_path, base).step == 15


def test_a_checkpoint_that_is_needed_is_kept_whatever_the_rules(tmp_path):
  saved = factory.checkpoints(tmp_path, keep_last=1)
  small = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, ())
  for at in range(6):
    saved.need([at] if at == 1 else [1] if at < 4 else [2])
    saved.save(small, at, meta={}, losses={})
    saved.wait()
    assert saved.steps() == sorted({at, *([1] if 1 <= at < 4 else [])})
  saved.close()


# ---- rows that are passed over ----


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 8), st.sampled_from([1, 4, 5]))
def test_rows_that_are_passed_over_are_listed_and_no_row_is_read_twice(stores, back, more, again, batch_rows):
  mixed = {"a": {"share": [(0, 0.9), (20, 0.1)]}, "c": {"share": 0.4}}
  first = mix(stores, mixed, num_steps=60, batch_rows=batch_rows)
  at, seen_at = back, back + more
  windows = {name: [first.order.positions(step)[name] for step in (at, seen_at)] for name in first.names}
  skip = {name: stop - begin for name, (begin, stop) in windows.items() if stop > begin}
  second = go_on(stores, first, mixed, step=at, num_steps=60, skip=skip or None)
  run = located(second, 0, at + again)
  assert run[:at] == located(first, 0, at)
  for name, (begin, stop) in windows.items():
    rows = [nth for step in run for source, nth in step if source == name]
    assert rows == [*range(begin), *range(stop, stop + len(rows) - begin)]
  period = second.order.periods[-1]
  assert period.skipped == {name: [[*windows[name]]] for name in skip}
  # The ledger counts what was read, by looking into the layout.
  for m, name in enumerate(second.names):
    rows = [second._shuffles[m][nth] for step in run for source, nth in step if source == name]
    read, layout = second.read(at + again)[name], second.layouts[m]
    assert tuple(read[:3]) == (len(rows), layout.row_targets[rows].sum(), layout.row_docs[rows].sum())
    assert read.bytes == second._tallies[m]._of(np.array(rows, np.int64))[2]
  # Restarted, changed, and read from its periods it stays so.
  third = go_on(stores, second, {"a": {}, "c": {}}, step=at + again, num_steps=60)
  assert located(third, 0, at + again) == run
  assert third.order.positions(at + again) == second.order.positions(at + again)
  kept = json.loads(json.dumps(second.periods()))
  if again:
    other = pipeline.from_periods(kept, at + again - 1)
    assert located(other, at + again - 1, at + again) == run[at + again - 1 :]


def test_rows_that_are_passed_over_count_towards_a_source_s_end(stores):
  mixed = {"a": {"at_end": "renormalise"}, "c": {}}
  first = mix(stores, mixed, num_steps=60, batch_rows=2)
  second = go_on(stores, first, mixed, step=5, num_steps=60, skip={"a": 4})
  epoch = second.layouts[0].num_rows
  rows = [nth for step in located(second, 0, 60) for source, nth in step if source == "a"]
  assert rows == [*range(5), *range(9, epoch)] and second.read(60)["a"].rows == epoch - 4


def test_a_second_window_that_joins_the_first_is_one(stores):
  first = mix(stores, {"a": {}}, num_steps=60, batch_rows=2)
  second = go_on(stores, first, {"a": {}}, step=5, num_steps=60, skip={"a": 4})
  third = go_on(stores, second, {"a": {}}, step=8, num_steps=60, skip={"a": 3})
  assert third.order.periods[-1].skipped == {"a": [[10, 14], [20, 23]]}
  joined = go_on(
    stores,
    first,
    {"a": {}},
    step=5,
    num_steps=60,
    skip=guard.rows_to_skip(
      [
        decision(5, act="skip", source_rows={"a": [10, 14]}),
        decision(5, act="rewind", source_rows={}),
        decision(4, act="skip", source_rows={"a": [8, 9]}),
        decision(5, act="skip", source_rows={"a": [14, 17]}),
      ],
      step=5,
    ),
  )
  assert joined.order.periods[-1].skipped == {"a": [[10, 17]]}


# ---- the config ----


def test_a_guard_without_anything_to_watch_is_refused():
  c = config_lib.default()
  c.start.hf = "base"
  c.data.sources.zh = config_lib.source(store="zh")
  c.guard.general_loss_rise, c.guard.spike_mads, c.guard.on_spike = 0.1, -1.0, "jump"
  with pytest.raises(ConfigError, match=r"(?s)guard\.spike_mads=-1.*guard\.on_spike='jump'.*no source has role 'replay'"):
    config_lib.resolve(c)
  c.guard.on_spike, c.guard.spike_mads = "skip", 0.0
  c.data.sources.en = config_lib.source(store="en", role="replay", share=0.0)
  config_lib.resolve(c)


def test_every_guard_that_is_on_has_a_line():
  off = guard.Settings(3, 0.0, "rewind", 0.0, 2, "skip", 2)
  assert len(off.describe(["en"], moves=True)) == 1 and not off.rewinds
  _, collapse, spike = DEFAULT.describe(["en"], moves=True)
  assert "rewind when the held-out loss of en is more than 0.1" in collapse and "back at most 2 times" in collapse
  assert "skip when a source's training loss is more than 5 MADs" in spike and DEFAULT.rewinds
  assert "no share moves, so it stops" in DEFAULT.describe(["en"], moves=False)[1]
  assert not DEFAULT._replace(max_rewinds=0).rewinds
