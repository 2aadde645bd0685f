"""A model's name where its directory is asked for."""

import pytest

from cpt_jax import hub


@pytest.mark.parametrize("name, is_one", [("meta-llama/Llama-3.2-1B", True), ("a/b/c", False), ("/a/b", False), ("base", False)])
def test_a_name_of_the_hub_is_told_from_a_path(name, is_one, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  told = hub.how_to_get(name)
  assert (f"hf download {name} --local-dir models/" in told) == is_one
  assert bool(told) == is_one


def test_a_path_below_a_directory_that_is_there_is_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "models").mkdir()
  assert hub.how_to_get("models/llama") == ""
