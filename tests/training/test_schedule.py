"""Schedules against formulas written out in float64, at every step."""

import math

import factory
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.training import schedule

PEAK, START, CONST, FINAL = 3e-4, 1e-5, 1e-4, 2e-5


def rates(made, num_steps: int) -> np.ndarray:
  # Op by op and always at one shape: each example has other constants, and compiling them all would take the time.
  return np.asarray(made(np.arange(256)), np.float64)[:num_steps]


def expected(name, *, n, w, start, peak, const=0.0, final=0.0, cool=0, anneal=0, shape="1-sqrt") -> np.ndarray:
  """Each schedule as one branch per phase, in float64."""
  out = np.empty(n)
  for t in range(n):
    if t < w:
      out[t] = start + (peak - start) * (t + 1) / w
    elif name == "constant":
      out[t] = peak
    elif name == "linear":
      out[t] = peak + (final - peak) * (t - w) / (n - w)
    elif name in ("cosine", "rewarm"):
      out[t] = final + (peak - final) * (1 + math.cos(math.pi * (t - w) / (n - w))) / 2
    elif name == "wsd":
      x = max(0.0, (t - (n - anneal)) / anneal) if anneal else 0.0
      out[t] = final + (peak - final) * (1 - x if shape == "linear" else 1 - x**0.5)
    elif t < w + cool:
      out[t] = const + (peak - const) / 2 * (1 + math.cos(math.pi * (t - w) / cool))
    elif t < n - anneal:
      out[t] = const
    else:
      out[t] = const * (final / const) ** ((t - (n - anneal)) / anneal)
  return out


@st.composite
def phases(draw):
  n = draw(st.integers(1, 120))
  borders = sorted(draw(st.integers(0, n)) for _ in range(3))
  w, cool, anneal = borders[0], borders[1] - borders[0], n - borders[2]
  return {"n": n, "w": w, "cool": cool, "anneal": anneal}


@pytest.mark.parametrize(
  ("name", "shape"),
  [("constant", ""), ("linear", ""), ("cosine", ""), ("rewarm", ""), ("wsd", "linear"), ("wsd", "1-sqrt"), ("infinite", "")],
)
@hypothesis.given(lengths=phases(), start=st.sampled_from([0.0, START, PEAK]), final=st.sampled_from([FINAL, CONST]))
def test_every_step_follows_the_formula(name, shape, lengths, start, final):
  n, w, cool, anneal = lengths["n"], lengths["w"], lengths["cool"], lengths["anneal"]
  made = factory.schedule(
    name,
    num_steps=n,
    warmup_steps=w,
    lr_peak=PEAK,
    lr_start=start,
    lr_const=CONST,
    lr_final=final,
    cooldown_steps=cool,
    anneal_steps=anneal,
    shape=shape,
  )
  found = rates(made, n)
  wanted = expected(name, n=n, w=w, start=start, peak=PEAK, const=CONST, final=final, cool=cool, anneal=anneal, shape=shape)
  np.testing.assert_allclose(found, wanted, rtol=2e-6)
  # Up, then never up again; nowhere 0.
  assert (np.diff(found[: max(w, 1)]) >= 0).all()
  assert (np.diff(found[max(w - 1, 0) :]) <= 0).all()
  assert (found > 0).all() and (found <= np.float32(PEAK)).all()
  if name != "infinite" and 0 < w < n:
    assert found[w - 1] == found[w] == np.float32(PEAK)


@pytest.mark.parametrize("name", ["linear", "cosine", "rewarm", "wsd"])
def test_lr_final_of_zero_wastes_no_update_and_holds_after_the_end(name):
  made = factory.schedule(name, num_steps=50, warmup_steps=5, lr_peak=PEAK, lr_final=0.0, anneal_steps=10)
  found = rates(made, 60)
  assert (found[:50] > 0).all()
  assert (found[50:] == 0).all()


def as_run(made):
  return schedule.Staged(((0, made),))


def test_no_anneal_holds_the_constant_rate_to_the_end():
  for name, wanted in (("wsd", PEAK), ("infinite", CONST)):
    made = factory.schedule(name, num_steps=10, lr_peak=PEAK, lr_const=CONST, lr_final=0.0, anneal_steps=0)
    assert (rates(made, 12) == np.float32(wanted)).all()
    assert "anneal begins" not in [what for what, _, _ in schedule.table(as_run(made), num_steps=10)]


def test_a_constant_run_may_end_in_its_warm_up():
  made = factory.schedule("constant", num_steps=10, warmup_steps=20, lr_peak=PEAK)
  np.testing.assert_allclose(rates(made, 10)[-1], PEAK / 2, rtol=1e-6)


def test_is_float32_whatever_the_step_is():
  made = factory.schedule("cosine", num_steps=10, lr_peak=PEAK)
  for step in (3, np.int32(3), np.array(3)):
    assert isinstance(made(step), np.float32) and made(step) == made(np.arange(10))[3]
  assert hash(made) == hash(factory.schedule("cosine", num_steps=10, lr_peak=PEAK))


def test_large_steps_keep_their_resolution():
  n = 20_000_000  # beyond float32's integers; the fall is counted from its own beginning
  made = factory.schedule("wsd", num_steps=n, lr_peak=PEAK, anneal_steps=1000, shape="linear")
  found = np.asarray(made(np.arange(n - 1000, n, dtype=np.int32)), np.float64)
  np.testing.assert_allclose(found, PEAK * (1 - np.arange(1000) / 1000), rtol=1e-4)


def test_refuses_what_cannot_be():
  with pytest.raises(ConfigError, match=r"schedule.warmup \+ schedule.anneal take 110 steps, the run has 100"):
    factory.schedule("wsd", num_steps=100, warmup_steps=60, anneal_steps=50, lr_peak=PEAK)
  with pytest.raises(ConfigError, match="lr_final=0"):
    factory.schedule("infinite", num_steps=100, lr_peak=PEAK, lr_const=CONST, lr_final=0.0, anneal_steps=5)
  with pytest.raises(ConfigError, match="lr_const"):
    factory.schedule("infinite", num_steps=100, lr_peak=PEAK, lr_const=0.0, lr_final=0.0)
  with pytest.raises(ConfigError, match="Did you mean rewarm"):
    factory.schedule("rewrm", num_steps=100, lr_peak=PEAK)


def test_from_config_reads_durations():
  config = config_lib.default()
  config.train.length = "200 steps"
  config.schedule.name, config.schedule.warmup, config.schedule.lr_start = "wsd", "5%", START
  config.schedule.anneal, config.schedule.shape = "40 steps", "linear"
  found = rates(schedule.from_config(config), 200)
  peak, final = config.schedule.lr_peak, config.schedule.lr_final
  wanted = expected("wsd", n=200, w=10, start=START, peak=peak, final=final, anneal=40, shape="linear")
  np.testing.assert_allclose(found, wanted, rtol=2e-6)


def test_table_names_the_key_steps():
  made = factory.schedule(
    "infinite", num_steps=100, warmup_steps=10, lr_peak=PEAK, lr_const=CONST, lr_final=FINAL, cooldown_steps=20, anneal_steps=30
  )
  rows = schedule.table(as_run(made), num_steps=100)
  assert [(what, step) for what, step, _ in rows] == [
    ("first update", 0),
    ("end of warm-up", 9),
    ("cool-down begins", 10),
    ("25%", 25),
    ("cool-down ends", 30),
    ("50%", 50),
    ("anneal begins", 70),
    ("75%", 75),
    ("last update", 99),
  ]
  assert all(rate == float(made(step)) for _, step, rate in rows)
  for num_steps in (1, 2, 3):
    made = as_run(factory.schedule("cosine", num_steps=num_steps, lr_peak=PEAK))
    assert schedule.table(made, num_steps=num_steps)[-1][1] == num_steps - 1
