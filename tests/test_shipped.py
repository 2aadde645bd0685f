"""Paths of what comes with the package, from a directory that has none of it; the directory's own files win."""

import pytest

import cpt_jax
from cpt_jax import config as config_lib, shipped
from cpt_jax.store import documents, tokenization


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_everything_that_opens_a_path_finds_them(tmp_path):
  plan = config_lib.load("examples/plans/poetry.py")
  assert plan.start.hf == str(shipped.root() / "examples" / "base")
  assert config_lib.load_file("configs/recipes/llama3_8b_v5p_64.py").mesh.fsdp
  assert documents.find_files(["examples/corpora/*.gz"]) == sorted(map(str, (shipped.root() / "examples/corpora").glob("*.gz")))
  assert tokenization.load("examples/base").vocab_size == 4096
  params, spec = cpt_jax.load_model("examples/base")
  assert (tmp_path / "mine" / "tokenizer.json") in cpt_jax.save_model(params, spec, tmp_path / "mine", source="examples/base")


def test_what_is_here_wins_and_what_is_nowhere_is_named_as_it_was_given(tmp_path):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text("def get_config():\n  return 1\n")
  with pytest.raises(config_lib.ConfigError, match=r"^configs/quickstart.py: get_config\(\) returned int"):
    config_lib.load("configs/quickstart.py")
  with pytest.raises(config_lib.ConfigError, match=r"--config=configs/none\.py: no such file"):
    config_lib.load("configs/none.py")


def test_all_values_that_cannot_be_read_are_said():
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.load("configs/quickstart.py", ["--config.data.row_len=abc", "--config.train.batch_rows=x", "--config.seed=3"])
  assert all(words in str(error.value) for words in ("row_len", "abc", "batch_rows"))
