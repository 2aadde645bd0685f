"""Curves and the laws of annealing: areas against their sums, gradients, recovery, published curves, merging as decay."""

import dataclasses
import gzip

import hypothesis
import hypothesis.strategies as st
import law_checks
import numpy as np
import pytest

from cpt_jax.config import ConfigError
from cpt_jax.laws import annealing, curves, fit as fit_lib

LAWS = [annealing.Forward(), annealing.Tissue(), annealing.Tissue(1000.0), annealing.MultiPower()]
TRUTH = {  # of a run of some thousand steps with a peak of 3e-4
  "forward": [2.6, 0.55, 0.45],
  "tissue": [2.6, 0.55, 0.45, 0.6, 400.0],
  "tissue_1000": [2.6, 0.55, 0.45, 0.3],
  "multi_power": [2.6, 0.55, 0.45, 400.0, 2.0, 0.6, 0.65],  # near those that 2503.12811 prints for 100M parameters
}

rates = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=40).filter(lambda r: max(r) > 0).map(np.array)


def schedule(kind, *, num_steps=6000, warmup_steps=300, peak=3e-4):
  """The rate of each update of a run."""
  step = np.arange(num_steps)
  after = (step - warmup_steps) / (num_steps - warmup_steps)
  down = {
    "constant": np.ones(num_steps),
    "cosine": 0.55 + 0.45 * np.cos(np.pi * after),
    "linear": 1 - 0.9 * np.clip((after - 0.7) / 0.3, 0, 1),
    "jump": np.where(after < 0.5, 1.0, 0.3),
    "rewarmed": np.where(after < 0.3, 1.0, np.where(after < 0.6, 0.2, 0.7)),
  }[kind]
  return peak * np.where(step < warmup_steps, (step + 1) / warmup_steps, down)


def curve(kind, law, *, noise=0.0, seed=0, every=100, num_steps=6000, **changes):
  made = curves.Curve(
    f"{kind}_{num_steps}", schedule(kind, num_steps=num_steps), np.arange(300, num_steps + 1, every), np.ones(0), 300, **changes
  )
  loss_n = law.predict(np.array(TRUTH[law.name]), [made])
  return dataclasses.replace(made, loss_n=loss_n * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss_n))))


@hypothesis.given(rates=rates, decay=st.floats(0.0, 0.999), warmup_steps=st.integers(0, 5))
def test_the_annealing_area_is_its_double_sum(rates, decay, warmup_steps):
  area, _ = curves.annealing_area(rates, decay=decay, warmup_steps=warmup_steps)
  first = warmup_steps + 1
  for t in range(len(rates) + 1):
    double = sum((rates[k - 1] - rates[k]) * decay ** (i - k) for i in range(t) for k in range(first, i + 1))
    assert area[t] == pytest.approx(double, abs=1e-12)
  assert curves.forward_area(rates)[-1] == pytest.approx(rates.sum())


@hypothesis.given(rates=rates, decay=st.floats(0.1, 0.99))
def test_the_areas_slope_is_its_difference_quotient(rates, decay):
  _, slope = curves.annealing_area(rates, decay=decay)
  above, below = (curves.annealing_area(rates, decay=decay + move)[0] for move in (1e-6, -1e-6))
  np.testing.assert_allclose(slope, (above - below) / 2e-6, atol=1e-4 * max(1, np.abs(slope).max()))


def test_the_annealing_area_grows_at_a_rate_of_zero():
  # The law's known flaw: loss would fall without training.
  rates = np.concatenate([np.full(5000, 2e-4), np.linspace(2e-4, 0, 5000), np.zeros(5000)])
  area, _ = curves.annealing_area(rates, decay=0.999)
  assert area[10_000] == pytest.approx(0.160, abs=1e-3)
  assert area[15_000] == pytest.approx(0.200, abs=1e-3)
  # The multi-power law has no such flaw (1e-4: falls are grouped otherwise, at rates that reach 0).
  run = curves.Curve("zero", rates, np.array([10_000, 15_000]), np.ones(2))
  before, after = annealing.MultiPower().predict(np.array(TRUTH["multi_power"]), [run])
  assert before == pytest.approx(after, abs=1e-4)


def step_by_step(theta_P, run):
  """The multi-power law as it is written, with a sum over every step."""
  L0, A, alpha, B, C, beta, gamma = theta_P
  losses = []
  for t in run.step_n:
    falls = 0.0
    for k in range(run.warmup_steps + 1, t):
      if run.rates_S[k] != run.rates_S[k - 1]:
        x = run.rates_S[k] ** -gamma * run.rates_S[k:t].sum()
        falls += (run.rates_S[k - 1] - run.rates_S[k]) * (1 - (1 + C * x) ** -beta)
    losses.append(L0 + A * run.rates_S[:t].sum() ** -alpha - B * falls)
  return np.array(losses)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "jump", "rewarmed"])
@pytest.mark.parametrize("shape", [(2.0, 0.6, 0.65), (0.15, 2.0, 0.5)])
def test_grouped_falls_are_those_of_every_step(kind, shape):
  law, theta_P = annealing.MultiPower(), np.array([2.6, 0.55, 0.45, 400.0, *shape])
  run = curves.Curve(kind, schedule(kind, num_steps=3000), np.array([301, 400, 1651, 1652, 1700, 2900, 3000]), np.ones(7), 300)
  np.testing.assert_allclose(law.predict(theta_P, [run]), step_by_step(theta_P, run), atol=1e-5)
  if kind in ("jump", "rewarmed"):  # lone jumps are exact
    np.testing.assert_allclose(law.predict(theta_P, [run]), step_by_step(theta_P, run), atol=1e-11)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_gradients_are_difference_quotients(law):
  law_checks.assert_gradient(law, TRUTH[law.name], [curve(kind, law) for kind in ("cosine", "rewarmed")], atol=2e-6)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_law_is_found_from_its_own_noisy_curves(law):
  made = [curve(kind, law, noise=1e-3, seed=i) for i, kind in enumerate(("constant", "cosine", "jump"))]
  fitted = curves.fit(law, made, num_starts=12)
  for kind, num_steps in (("linear", 6000), ("cosine", 18_000)):
    truth = curve(kind, law, num_steps=num_steps)
    assert fit_lib.scores(fitted.predict([truth]), truth.loss_n).worst_relative < 4e-3


@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_the_unit_of_the_rates_changes_no_prediction(unit):
  law = annealing.MultiPower()
  own, other = [], []
  for i, kind in enumerate(("constant", "cosine", "jump", "linear")):
    made = curve(kind, law, noise=1e-3, seed=i)
    own.append(made)
    other.append(dataclasses.replace(made, rates_S=made.rates_S * unit))
  predicted = [curves.fit(law, inputs[:3], num_starts=12).predict(inputs[3:]) for inputs in (own, other)]
  np.testing.assert_allclose(*predicted, rtol=1e-4)


def test_curves_count_the_same_however_often_they_were_logged():
  law = annealing.Forward()
  often, seldom = curve("constant", law, every=10), curve("constant", law, every=500)
  weights_n = curves.weights([often, seldom])
  assert weights_n[: len(often.loss_n)].sum() == pytest.approx(weights_n[len(often.loss_n) :].sum())
  is_early_n = often.step_n < 1345  # half of the factor from 300 to 6000
  assert weights_n[: len(often.loss_n)][is_early_n].sum() == pytest.approx(0.5, abs=0.01)


# What the rows of a log say about the steps between them.


def rows(step_n, lr_n, **options):
  return curves.from_log(np.array(step_n), lr_n=np.array(lr_n), loss_n=np.linspace(4, 3, len(step_n)), name="a.csv", **options)


def test_rates_between_rows_are_straight_and_lone_changes_are_jumps():
  run = rows([10, 20, 30, 40, 50], [4.0, 4.0, 2.0, 2.0, 1.0])
  assert run.rates_S[10:30].tolist() == [4.0] * 20  # to the last step before row 30
  assert run.rates_S[30:40].tolist() == [2.0] * 10
  falling = rows([10, 20, 30, 40], [4.0, 4.0, 3.0, 1.0])
  assert falling.rates_S[25] == pytest.approx(3.5) and falling.rates_S[35] == pytest.approx(2.0)


def test_what_came_before_the_first_row_is_a_warm_up():
  run = rows([10, 20, 30], [4.0, 4.0, 4.0])
  assert run.warmup_steps == 10 and run.area_n[0] == pytest.approx(4 * 9 / 2)  # 0, 0.4, ... 3.6
  assert rows([10, 20, 30], [4.0, 4.0, 4.0], warmup_steps=4).area_n[0] == pytest.approx(6 + 24)
  assert rows([10, 20, 30], [4.0, 4.0, 4.0], warmup_steps=0).area_n[0] == pytest.approx(40)


def test_rows_of_the_warm_up_count_as_rates_and_not_as_losses():
  run = rows([0, 10, 20, 30, 40], [0.0, 2.0, 4.0, 4.0, 3.0])
  assert run.step_n.tolist() == [20, 30, 40] and run.warmup_steps == 20
  assert run.area_n[0] == pytest.approx(np.interp(np.arange(20), [0, 20], [0, 4]).sum())
  assert (run.falls.size_F > 0).all()  # the rise is no fall


@pytest.mark.parametrize(
  ("step_n", "lr_n", "message"),
  [
    ([1], [1.0], "a curve has at least 2"),
    ([1, 5, 5], [1.0] * 3, "step 5 comes after step 5"),
    ([1, 2, 3], [0.0] * 3, "somewhere above 0"),
    ([1, 2, 3], [1.0, -1.0, 1.0], "not below 0"),
    ([1, 2, 10**12], [1.0] * 3, "between 0 and"),
    ([1, 2, 3], [1.0, 2.0, 3.0], "the warm-up ends at step 3, with 1 row"),
  ],
)
def test_rows_that_are_no_curve_are_named(step_n, lr_n, message):
  with pytest.raises(ConfigError, match=f"a.csv.*{message}"):
    rows(step_n, lr_n)


# Published curves (tests/fixtures/lr_curves/README.md).

FIT_ON = ("cosine_24000", "constant_24000", "wsdcon_9")
SCORED = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")


@pytest.fixture(scope="module")
def published(fixtures, tmp_path_factory):
  folder = tmp_path_factory.mktemp("curves")
  made = {}
  for name in FIT_ON + SCORED:
    text = gzip.decompress((fixtures / "lr_curves" / f"{name}.csv.gz").read_bytes())
    (folder / f"{name}.csv").write_bytes(text)
    made[name] = curves.read_csv(folder / f"{name}.csv")
  return made


def mean_scores(law, published):
  fitted = curves.fit(law, [published[name] for name in FIT_ON], num_starts=12)
  found = [fit_lib.scores(fitted.predict([published[name]]), published[name].loss_n) for name in SCORED]
  return fitted, np.mean([s.r2 for s in found]), np.mean([s.mae for s in found])


def test_the_multi_power_law_predicts_published_curves_as_well_as_its_paper(published):
  fitted, r2, mae = mean_scores(annealing.MultiPower(), published)
  assert r2 >= 0.9988 and mae <= 0.0038  # 2503.12811 reports .9988 and .00376
  assert fitted.num_agreeing >= 3
  spread = curves.bootstrap(fitted, num=20)
  low_n, high_n = spread.interval([published[name] for name in SCORED])
  loss_n = curves.losses([published[name] for name in SCORED])
  assert np.mean((low_n <= loss_n) & (loss_n <= high_n)) > 0.75


def test_tissues_law_comes_close_and_no_annealing_does_not(published):
  _, r2, mae = mean_scores(annealing.Tissue(), published)
  assert r2 > 0.998 and mae < 0.0045
  _, r2, mae = mean_scores(annealing.Forward(), published)
  assert r2 < 0.95 and mae > 0.02
