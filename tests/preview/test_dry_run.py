"""A dry run writes nothing, reads no text that is not prepared, and finds what is wrong before it reads any."""

import pytest

from cpt_jax.config import ConfigError
from cpt_jax.preview import dry_run
from cpt_jax.store import prepare
from cpt_jax.training import console


@pytest.fixture
def described(tiny_plan, tmp_path, monkeypatch, capsys):
  """Runs a dry run of sources without stores, in this process, and gives what it says and what it has written."""
  monkeypatch.setattr(console.console, "width", 400)
  monkeypatch.setattr(dry_run, "_memory", lambda *_: None)  # test_memory.py

  def run(*, shares=(), text="", **keys):
    c = tiny_plan.copy_and_resolve_references()
    c.data.shares, c.mesh.data = shares, 1
    for name, source in c.data.sources.items():
      source.store, source.text = str(tmp_path / "store" / name), text or source.text
      source.share = 1.0 if shares else source.share
    for key, value in keys.items():
      group, leaf = key.split("__")
      c[group][leaf] = value
    before = sorted(tmp_path.rglob("*"))
    assert dry_run.describe(c, tmp_path / "run") == 0
    assert sorted(tmp_path.rglob("*")) == before, "a dry run has written"
    return capsys.readouterr().out, c

  return run


def test_nothing_is_written_and_what_would_be_prepared_is_said(described, tmp_path, fixtures):
  said, c = described()
  assert f"prepare  general: 1 file(s) of {c.data.sources.general.text}" in said and f"into {tmp_path / 'store/poetry'}" in said
  assert "not known before that: documents, tokens, epochs" in said and "last update" in said
  for name, source in c.data.sources.items():
    prepare.prepare([source.text], tokenizer=c.start.hf, output=str(tmp_path / "store" / name), progress=False)
  said, _ = described()
  assert "prepare " not in said and "share at start" in said and not list(tmp_path.rglob("plans"))


def test_a_mesh_that_divides_nothing_is_found_before_any_text_is_read(described, monkeypatch):
  monkeypatch.setattr(dry_run.inputs_lib, "open_texts", lambda *_, **__: pytest.fail("a text was read"))
  monkeypatch.setattr(dry_run.documents, "find_files", lambda *_, **__: pytest.fail("a text was looked for"))
  with pytest.raises(ConfigError, match=r"mesh\.tensor=3"):
    described(mesh__tensor=3)


def test_shares_that_do_not_add_up_to_1_are_said_as_they_are_taken(described):
  assert "shares   add up" not in described()[0]
  shares = ((0, {"general": 0.5, "poetry": 1.0}), ("50%", {"general": 0.5, "poetry": 0.5}))
  said, _ = described(shares=shares)
  assert "shares   add up to 1.5 from 0 on: taken as general 0.333, poetry 0.667" in said and said.count("add up") == 1


def test_a_hub_id_is_told_how_to_get_the_model(described):
  with pytest.raises(ConfigError, match=r"start\.hf=meta-llama/Llama: .*hf download meta-llama/Llama --local-dir models/Llama"):
    described(start__hf="meta-llama/Llama")


def test_a_text_that_is_not_there_is_found(described):
  with pytest.raises(ConfigError, match=r"data\.sources\.general\.text.*no file matches"):
    described(text="no/such.jsonl")
