import copy
import json
import pickle

import pytest
from hypothesis import given, strategies as st

from cpt_jax.config.durations import Duration, parse_tokens


@pytest.mark.parametrize(
  "text, amount, unit",
  [
    ("200 steps", 200, "steps"),
    (0, 0, "steps"),
    ("1 step", 1, "steps"),
    ("2_000 steps", 2000, "steps"),
    ("5%", 5, "%"),
    (".5%", 0.5, "%"),
    ("1.5B tokens", 1.5e9, "tokens"),
    ("2e9 tokens", 2e9, "tokens"),
    ("300k tokens", 3e5, "tokens"),
    ("2k steps", 2000, "steps"),
  ],
)
def test_what_people_write_is_read(text, amount, unit):
  found = Duration(text)
  assert (found, found.amount, found.unit) == (str(text), amount, unit) and Duration(found) is found


@pytest.mark.parametrize("text", ["", "many", "-5 steps", "5 epochs", "120%", "5M%", "1e999 steps", "5 %%", "nan", True])
def test_anything_else_is_refused_with_the_forms_that_are_understood(text):
  with pytest.raises(ValueError, match=r"steps|share|finite"):
    Duration(text)


@pytest.mark.parametrize("text", ["200", 200, "2B", "2k", 5.0])
def test_a_length_without_a_unit_is_refused_with_both_that_it_may_have(text):
  with pytest.raises(ValueError, match=f"'{text} steps' or '{text} tokens'"):
    Duration(text)
  assert Duration(text, bare="tokens").unit == "tokens" and Duration(text, bare="steps").unit == "steps"


def test_a_duration_is_its_text_wherever_it_goes():
  found = Duration("2_000 steps")
  assert json.dumps(found) == '"2_000 steps"' and pickle.loads(pickle.dumps(found)).amount == copy.deepcopy(found).amount == 2000


def test_tokens_round_up_to_whole_steps():
  assert Duration("4097 tokens").whole_steps(tokens_per_step=4096) == 2
  assert Duration("4096 tokens").whole_steps(tokens_per_step=4096) == 1


@given(st.integers(1, 10**7), st.integers(1, 100))
def test_a_share_of_the_run_is_exact_when_it_divides(run_steps, percent):
  exact = -(-run_steps * percent // 100)
  assert Duration(f"{percent}%").whole_steps(tokens_per_step=7, run_steps=run_steps) == exact


def test_a_share_needs_the_length_of_the_run():
  with pytest.raises(ValueError, match="give steps or tokens"):
    Duration("5%").whole_steps(tokens_per_step=1)


def test_tokens_may_be_written_without_their_unit():
  assert [parse_tokens(text) for text in ("2B", "2e9", "300M tokens")] == [2e9, 2e9, 3e8]
  for text in ("20%", "0", "100 steps", "some"):
    with pytest.raises(ValueError, match=f"'{text}'"):
      parse_tokens(text)
