"""The law of continual pretraining: published values, its replay forms, gradients, recovery of predictions from noisy curves."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import law_checks
import numpy as np
import pytest

from cpt_jax.laws import cpt_law, curves, fit as fit_lib
from cpt_jax.laws.cpt_law import REPLAY_FORMS, CptLaw

# 2505.07796, fitted examples (106M parameters, FineWeb -> Knowledge-Pile and -> Pile-of-Law): L0, A, alpha, C2, B, E, beta.
PUBLISHED = {
  "old, knowledge": ([3.057, 0.490, 0.497, 0.298, 0.366, 28, 0.189], 0.216),
  "new, knowledge": ([3.024, 0.412, 0.677, 0.324, -0.666, 5662, 0.146], -0.512),
  "old, law": ([3.064, 0.482, 0.511, 0.264, 1.353, 37, 0.262], 0.99),
}
REPLAY_TRUTH = {"none": [], "exponential": [2.5], "power": [1.7], "log": [0.01]}


def run(kind, *, num_steps=3000, peak=2e-4, replay_frac=0.0, law=None, theta=None, noise=0.0, seed=0, every=60):
  """A curve of continual pretraining whose losses are the law's."""
  step = np.arange(num_steps)
  down = {
    "constant": 1.0,
    "cosine": 0.55 + 0.45 * np.cos(np.pi * step / num_steps),
    "wsd": np.clip((num_steps - step) / 900, 0.1, 1),
  }
  made = curves.Curve(
    f"{kind}_{replay_frac}", peak * np.broadcast_to(down[kind], num_steps), np.arange(every, num_steps + 1, every), np.ones(0),
    replay_frac=replay_frac,
  )  # fmt: skip
  if law is None:
    return made
  loss_n = law.predict(np.array(theta), [made])
  return dataclasses.replace(made, loss_n=loss_n * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss_n))))


@pytest.mark.parametrize("which", PUBLISHED)
def test_published_shifts_at_a_summed_rate_of_four(which):
  (L0, A, alpha, *others), shift = PUBLISHED[which]
  law, theta_P = CptLaw(), [L0, A, alpha, 2.0, *others, 1000.0]
  assert law.parameters == ("L0", "A", "alpha", "S1_pt", "C2", "B", "E", "beta", "decay_steps")
  inputs = [run("constant", num_steps=20_000, every=20_000)]
  assert inputs[0].area_n == pytest.approx([4.0])
  without = [0.0 if name == "B" else value for name, value in zip(law.parameters, theta_P, strict=True)]
  found = law.predict(np.array(theta_P), inputs) - law.predict(np.array(without), inputs)
  assert found == pytest.approx([shift], abs=6e-4 if abs(shift) < 0.9 else 6e-3)


def test_the_law_by_hand():
  law = CptLaw(REPLAY_FORMS["power"])
  inputs = [curves.Curve("hand", np.array([2.0, 2.0, 1.0, 1.0]), np.array([4]), np.ones(1), replay_frac=0.25)]
  p = dict(L0=2.0, A=1.5, alpha=0.5, S1_pt=3.0, C2=0.1, B=0.7, E=3.0, beta=0.4, decay_steps=10.0, replay_p=2.0)
  assert law.parameters == tuple(p)
  s2 = 1.0 + 0.9  # m: 0, 0, 1, 0.9
  expected = 2.0 + 1.5 * 9.0**-0.5 - 0.1 * s2 + 0.7 * 0.75**2 * (1 - 19.0**-0.4)
  assert law.predict(np.array(list(p.values())), inputs) == pytest.approx([expected])


@pytest.mark.parametrize("form", REPLAY_FORMS.values(), ids=lambda form: form.name)
@hypothesis.given(draw=st.integers(0, 1000))
def test_replay_takes_the_shift_from_all_to_nothing(form, draw):
  (value,) = form.starts(np.random.default_rng(draw), 1)
  factors, slopes = zip(*[form.factor(value, share) for share in np.linspace(0, 1, 21)], strict=True)
  assert factors[0] == pytest.approx(1.0)
  if form.name != "none":
    assert factors[-1] == pytest.approx(0.0, abs=1e-9) and (np.diff(factors) <= 0).all()
  step = 1e-6 * max(abs(value), 1e-3)
  above, below = ([form.factor(value + side * step, share)[0] for share in np.linspace(0, 1, 21)] for side in (1, -1))
  np.testing.assert_allclose(slopes, (np.array(above) - below) / (2 * step), rtol=1e-4, atol=1e-6)


def test_the_exponential_form_bends_both_ways_and_has_no_seam_at_zero():
  exponential = REPLAY_FORMS["exponential"]
  # The published a2 of the two domains: which of the two bends belongs to which is left to the data.
  for a, expected in ((3.238, [0.317, 0.165, 0.078]), (-5.696, [0.981, 0.945, 0.850])):
    assert [exponential.factor(a, 1 - new)[0] for new in (0.67, 0.5, 0.33)] == pytest.approx(expected, abs=3e-3)
  for share in (0.0, 0.33, 0.5, 0.67):
    plain = lambda a, new=1 - share: np.expm1(a * new) / np.expm1(a)  # noqa: E731
    for a in (0.9e-3, -0.9e-3, 1.1e-3, -1.1e-3):  # to both sides of where the series takes over
      factor, slope = exponential.factor(a, share)
      np.testing.assert_allclose(factor, plain(a), atol=1e-11)
      np.testing.assert_allclose(slope, (plain(a + 1e-4) - plain(a - 1e-4)) / 2e-4, atol=1e-9)
    assert exponential.factor(0.0, share)[0] == pytest.approx(1 - share)


@pytest.mark.parametrize("form", REPLAY_FORMS.values(), ids=lambda form: form.name)
def test_gradients_are_difference_quotients(form):
  law = CptLaw(form)
  theta_P = [3.0, 0.5, 0.5, 2.0, 0.3, -0.6, 28.0, 0.2, 400.0, *REPLAY_TRUTH[form.name]]
  law_checks.assert_gradient(law, theta_P, [run("cosine", replay_frac=0.1), run("wsd", replay_frac=0.5)], atol=1e-6)


@pytest.mark.parametrize("side", ["old", "new"])
def test_unseen_schedules_lengths_and_shares_are_predicted_from_noisy_runs(side):
  law = CptLaw(replay=REPLAY_FORMS["log"])
  B, E, beta = (0.366, 28.0, 0.189) if side == "old" else (-0.666, 5662.0, 0.146)
  theta = [3.05, 0.45, 0.5, 3.0, 0.3, B, E, beta, 1000.0, 0.01]
  kinds = [("constant", 0.0), ("cosine", 0.05), ("constant", 0.25), ("cosine", 0.0)]
  seen = [run(kind, replay_frac=share, law=law, theta=theta, noise=1e-3, seed=i) for i, (kind, share) in enumerate(kinds)]
  starts_QP = law.starts(seen, curves.losses(seen), num=8, rng=np.random.default_rng(0))
  assert (np.sign(starts_QP[:, law.parameters.index("B")]) == np.sign(B)).sum() >= 6  # the data say which domain it is
  fitted = curves.fit(law, seen, num_starts=8)
  for unseen in (
    run("wsd", replay_frac=0.1, law=law, theta=theta),
    run("cosine", num_steps=6000, replay_frac=0.01, law=law, theta=theta),
  ):
    assert fit_lib.scores(fitted.predict([unseen]), unseen.loss_n).worst_relative < 5e-3
  # A law whose shift is the same at every share cannot say it.
  flat = curves.fit(dataclasses.replace(law, replay=REPLAY_FORMS["none"]), seen, num_starts=4)
  assert flat.objective > 3 * fitted.objective


def test_the_form_of_replay_is_chosen_by_held_out_error():
  truth = CptLaw(replay=REPLAY_FORMS["log"])
  theta = [3.05, 0.45, 0.5, 3.0, 0.3, 0.5, 28.0, 0.189, 1000.0, 0.005]
  seen = [
    run("constant", replay_frac=share, law=truth, theta=theta, noise=5e-4, seed=i)
    for i, share in enumerate((0.0, 0.01, 0.1, 0.5))
  ]
  unseen = run("constant", replay_frac=0.03, law=truth, theta=theta)
  errors = {}
  for name in ("exponential", "power", "log"):
    fitted = curves.fit(CptLaw(replay=cpt_law.REPLAY_FORMS[name]), seen, num_starts=6)
    errors[name] = fit_lib.scores(fitted.predict([unseen]), unseen.loss_n).mae
  assert min(errors, key=errors.get) == "log"
