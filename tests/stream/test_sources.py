"""Sources: the split is the text's own, and every mistake is named with its key."""

import re

import factory
import numpy as np
import pytest
from hypothesis import given, strategies as st
from store_writer import StoreWriter

from cpt_jax import config as config_lib
from cpt_jax.config import Problems
from cpt_jax.store import tokenization
from cpt_jax.store.token_store import open_store
from cpt_jax.stream import sources


def write(path, texts, *, fingerprint="one", vocab_size=1000, ids=None):
  """A store of these texts, one token a byte and EOS 0."""
  with StoreWriter(path, vocab_size=vocab_size, eos_id=0, tokenizer_fingerprint=fingerprint) as writer:
    for text in texts:
      writer.add(ids or [*text.encode(), 0], text=text)
  return open_store(path)


def source(store, *, name="a", share=((0.0, 1.0),), heldout_frac=0.1):
  return factory.source(name, store, role="domain", share=share, heldout_frac=heldout_frac)


def config_of(**entries):
  config = config_lib.default()
  config.train.length, config.data.heldout_frac = "100 steps", 0.1
  for name, entry in entries.items():
    config.data.sources[name] = config_lib.source(**entry)
  return config


def problems_of(config):
  problems = Problems()
  return sources.from_config(config, problems), problems.lines


@pytest.fixture
def texts():
  return [f"text number {i}" for i in range(200)]


def test_the_split_depends_on_the_text_alone(tmp_path, texts):
  plain = source(write(tmp_path / "plain", texts))
  mixed = source(write(tmp_path / "mixed", texts[::-2] + ["another"] * 50), name="other", share=((0.0, 0.2),))
  held = {texts[i] for i in plain.heldout_documents}
  assert 5 < len(held) < 40
  for number, text in enumerate(texts[::-2]):
    assert (number in mixed.heldout_documents) == (text in held)
  np.testing.assert_array_equal(np.sort(np.concatenate([plain.train_documents, plain.heldout_documents])), np.arange(200))


@given(st.floats(0.01, 0.99))
def test_a_larger_fraction_holds_out_the_same_and_more(frac):
  hashes = np.arange(1000, dtype=np.uint64)

  class Store:
    def doc_hashes(self):
      return hashes

  less, more = (source(Store(), heldout_frac=f).heldout_documents for f in (frac / 2, frac))
  np.testing.assert_array_equal(more[: len(less)], less)
  assert abs(len(more) - 1000 * frac) < 5 * np.sqrt(1000 * frac * (1 - frac)) + 1


def test_mixing_is_splitmix64():
  # The first outputs of the generator seeded with 1234567, as its authors' C code prints them.
  state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  assert sources.mix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_from_config_goes_by_name_and_turns_times_into_steps(tmp_path, texts):
  write(tmp_path / "s", texts)
  share = [(0, 0.5), ("50%", 0.1), ("131072 tokens", 1.0)]
  config = config_of(z={"store": str(tmp_path / "s"), "share": share, "role": "replay"}, a={"store": str(tmp_path / "s")})
  config.train.length = "10 steps"
  found, lines = problems_of(config)
  assert lines == [] and [s.name for s in found] == ["a", "z"] and [s.role for s in found] == ["domain", "replay"]
  assert found[1].share == ((0.0, 0.5, "linear"), (5.0, 0.1, "linear"), (8.0, 1.0, "linear"))
  assert found[0].num_pairs(np.array([0, 1])) == found[0].store.lengths[:2].sum() - 2


def test_every_problem_is_named_at_once(tmp_path, texts):
  write(tmp_path / "good", texts)
  write(tmp_path / "other", texts, fingerprint="two")
  write(tmp_path / "empty", [])
  write(tmp_path / "one", ["a single document"])
  config = config_of(
    good={"store": str(tmp_path / "good")},
    other={"store": str(tmp_path / "other")},
    empty={"store": str(tmp_path / "empty")},
    one={"store": str(tmp_path / "one")},
    gone={"store": str(tmp_path / "gone")},
    raw={"store": str(tmp_path / "raw"), "text": "texts/*.txt"},
  )
  found, lines = problems_of(config)
  assert [s.name for s in found] == ["good", "other"]
  for name, pattern in {
    "gone": r"data\.sources\.gone\.store: .*no such token store",
    "raw": r"data\.sources\.raw\.store=.*not made yet.*--input 'texts/\*\.txt'",
    "empty": r"data\.sources\.empty\.store=.*empty",
    "one": r"data\.sources\.one\.store=.*one document cannot be split .*: give more text, or split it",
    "other": r"data\.sources\.other\.store=.*tokenizer two, expected one \(that of source good\)",
  }.items():
    assert sum(bool(re.search(pattern, line)) for line in lines) == 1, (name, lines)
  assert len(lines) == 5


def test_the_fraction_that_is_offered_helps(tmp_path):
  write(tmp_path / "s", [f"text {i}" for i in range(6)])
  config = config_of(a={"store": str(tmp_path / "s")})
  config.data.heldout_frac = 1e-6
  found, lines = problems_of(config)
  assert not found and len(lines) == 1
  config.data.heldout_frac = float(re.search(r"from ([0-9.e-]+) on", lines[0])[1])
  found, lines = problems_of(config)
  assert lines == [] and len(found[0].heldout_documents) >= 1


@pytest.mark.parametrize("heldout_frac", [0.01, 1 - 1e-9])
def test_one_document_is_enough_to_evaluate_alone(tmp_path, heldout_frac):
  write(tmp_path / "s", ["a single document"])
  config = config_of(a={"store": str(tmp_path / "s")})
  config.data.heldout_frac = heldout_frac
  assert "heldout_frac" not in problems_of(config)[1][0] and "one document cannot be split" in problems_of(config)[1][0]
  config.data.sources.a.share = config_lib.Share(0.0)
  found, lines = problems_of(config)
  assert bool(found) == (heldout_frac > 0.5) == (not lines)


def test_a_fraction_that_would_hold_out_most_is_not_offered(tmp_path):
  write(tmp_path / "s", ["text 1", "text 2"])
  (line,) = problems_of(config_of(a={"store": str(tmp_path / "s")}))[1]
  assert "so few documents (2) can hardly be split" in line and "give more text" in line and "heldout_frac" not in line


def test_a_split_that_leaves_nothing_to_train_on(tmp_path, texts):
  write(tmp_path / "s", texts[:3])
  config = config_of(a={"store": str(tmp_path / "s")})
  config.data.heldout_frac = 1 - 1e-9
  assert re.search(r"leaves none of the 3 documents.*share=0\.0 to evaluate only", problems_of(config)[1][0])
  config.data.sources.a.share = config_lib.Share(0.0)
  found, lines = problems_of(config)
  assert lines == [] and not found[0].is_trained


def test_documents_of_one_token_can_neither_be_trained_on_nor_evaluated(tmp_path, texts):
  write(tmp_path / "s", texts, ids=[0])
  assert re.search(r"less than two tokens", problems_of(config_of(a={"store": str(tmp_path / "s")}))[1][0])


def test_stores_of_another_tokenizer_than_the_start(tmp_path, texts, fixtures):
  real = tokenization.load(fixtures / "tokenizer").fingerprint
  write(tmp_path / "right", texts, fingerprint=real)
  write(tmp_path / "wrong", texts, fingerprint="else")
  write(tmp_path / "unknown", texts, fingerprint="")
  config = config_of(**{name: {"store": str(tmp_path / name)} for name in ("right", "wrong", "unknown")})
  config.start.hf = str(fixtures / "tokenizer")
  _, lines = problems_of(config)
  assert len(lines) == 1 and "data.sources.wrong.store" in lines[0] and real in lines[0]
  config.data.tokenizer = str(tmp_path / "nowhere")
  assert any("data.tokenizer" in line for line in problems_of(config)[1])


def test_token_ids_past_the_vocabulary(tmp_path, texts):
  store = write(tmp_path / "s", texts, ids=[1, 299, 0], vocab_size=300)
  for vocab_size, count in ((300, 0), (299, 1)):
    problems = Problems()
    sources.check_vocabulary([source(store)], vocab_size, problems)
    assert len(problems.lines) == count
  assert re.search(r"data\.sources\.a\.store=.*token id 299.*ids 0\.\.298", problems.lines[0])
  store.max_token_id = None  # as in a store that datatrove made: every token is read
  problems = Problems()
  sources.check_vocabulary([source(store)], 299, problems)
  assert len(problems.lines) == 1
