import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_jax import durations


@pytest.mark.parametrize(
  "text, amount, unit",
  [
    ("200", 200, "steps"),
    (200, 200, "steps"),
    ("1 step", 1, "steps"),
    ("2_000 steps", 2000, "steps"),
    ("5%", 5, "%"),
    (".5%", 0.5, "%"),
    ("1.5B tokens", 1.5e9, "tokens"),
    ("2e9 tokens", 2e9, "tokens"),
    ("300k tokens", 3e5, "tokens"),
    ("2k", 2000, "steps"),
  ],
)
def test_what_people_write_is_read(text, amount, unit):
  assert durations.parse(text) == durations.Duration(amount, unit)


@pytest.mark.parametrize("text", ["", "many", "-5 steps", "5 epochs", "120%", "5M%", "1e999 steps", "5 %%", "nan"])
def test_anything_else_is_refused_with_the_forms_that_are_understood(text):
  with pytest.raises(ValueError, match=r"steps|share|finite"):
    durations.parse(text)


def test_tokens_round_up_to_whole_steps():
  assert durations.whole_steps("4097 tokens", tokens_per_step=4096) == 2
  assert durations.whole_steps("4096 tokens", tokens_per_step=4096) == 1


@given(st.integers(1, 10**7), st.integers(1, 100))
def test_a_share_of_the_run_is_exact_when_it_divides(run_steps, percent):
  exact = -(-run_steps * percent // 100)
  assert durations.whole_steps(f"{percent}%", tokens_per_step=7, run_steps=run_steps) == exact


def test_a_share_needs_the_length_of_the_run():
  with pytest.raises(ValueError, match="give steps or tokens"):
    durations.whole_steps("5%", tokens_per_step=1)


def test_tokens_may_be_written_without_their_unit():
  assert [durations.parse_tokens(text) for text in ("2B", "2e9", "300M tokens")] == [2e9, 2e9, 3e8]
  for text in ("20%", "0", "100 steps", "some"):
    with pytest.raises(ValueError, match=f"'{text}'"):
      durations.parse_tokens(text)
