"""Eight CPU devices, strict numerics, and the small things that many tests start from."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".jax_cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # for the subprocesses too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Times of a shared machine say nothing about the code, so no deadline; examples are the same at every run.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def no_mesh_is_left():
  """A run that a test makes in this process sets its mesh for good; the next test begins without one."""
  yield
  jax.set_mesh(None)


@pytest.fixture
def cpt(capsys):
  """Gives a command line to `cpt` in this process: `done = cpt("show", "--step=3")`, then done.returncode, .stdout, .stderr."""
  import types

  from cpt_jax.cli import app

  def call(*arguments):
    capsys.readouterr()
    code = app.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return types.SimpleNamespace(returncode=code, stdout=captured.out, stderr=captured.err)

  return call


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The repository's root."""
  return ROOT


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
  """Committed small inputs."""
  return ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def tiny_hf_config() -> dict:
  """A 2-layer llama of 40 thousand parameters, divisible by small meshes."""
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }


@pytest.fixture(scope="session")
def tiny_spec(tiny_hf_config):
  """The ModelSpec of `tiny_hf_config`."""
  from cpt_jax.model import spec as spec_lib

  return spec_lib.from_hf(tiny_hf_config)


@pytest.fixture(scope="session")
def random_batch():
  """Makes batches of random tokens, one to three documents a row and padding at its end: `random_batch(seed, rows=8)`."""
  import numpy as np

  from cpt_jax.stream.batch import Batch

  def make(seed: int, *, rows: int = 8, row_len: int = 16, vocab_size: int = 320, num_sources: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (rows, row_len)), axis=1)
    padded = np.arange(row_len)[None] >= rng.integers(row_len // 2, row_len + 1, (rows, 1))
    segments = np.where(padded, 0, segments)
    is_first = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(row_len)[None]
    positions = index - np.maximum.accumulate(np.where(is_first, index, 0), axis=1)
    tokens, targets = (np.where(padded, 0, rng.integers(0, vocab_size, (rows, row_len))) for _ in range(2))
    as_int = lambda x: x.astype(np.int32)  # noqa: E731
    return Batch(
      as_int(tokens),
      as_int(targets),
      (~padded).astype(np.float32),
      as_int(segments),
      as_int(np.where(padded, 0, positions)),
      as_int(rng.integers(0, num_sources, rows)),
    )

  return make


@pytest.fixture(scope="session")
def tiny_plan(tmp_path_factory, fixtures, tiny_hf_config):
  """The config of a run to be planned: a random 2-layer base, the fixture's corpus as both sources, 400 steps of 4 rows."""
  from cpt_jax import config as config_lib
  from cpt_jax.model import pretrained, transformer
  from cpt_jax.model import spec as spec_lib

  directory, tiny = tmp_path_factory.mktemp("plan"), spec_lib.from_hf(tiny_hf_config)
  pretrained.save_params(
    transformer.init(tiny, jax.random.key(0)),
    tiny,
    directory / "base",
    source_dir=fixtures / "tokenizer",
    hf_config=tiny_hf_config,
  )
  c = config_lib.default()
  c.start.hf = str(directory / "base")
  c.data.row_len = 32
  c.data.heldout_frac = 0.1
  for name, role, share in (("general", "replay", 0.25), ("poetry", "domain", 0.75)):
    text = str(fixtures / "corpus.jsonl")
    c.data.sources[name] = config_lib.source(store=str(directory / "store"), text=text, role=role, share=share)
  c.train.length = "400 steps"
  c.train.batch_rows = 4
  c.schedule.name = "wsd"
  c.schedule.lr_peak = 3e-3
  c.schedule.lr_final = 0.0
  c.schedule.anneal = "25%"
  c.eval.tokens = 500
  return c


@pytest.fixture
def one_device(monkeypatch):
  """Runs in this process use one device, and leave no mesh behind."""
  import functools

  from cpt_jax.devices import mesh as mesh_lib

  make = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(mesh_lib, "make_mesh", make)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  with jax.set_mesh(make(data=1, fsdp=1, context=1, tensor=1)):
    yield


@pytest.fixture
def any_rate(monkeypatch):
  """Rates that make a run diverge at once are taken, too."""
  import dataclasses

  from cpt_jax import config as config_lib

  key = config_lib.KEYS["schedule.lr_peak"]
  monkeypatch.setitem(config_lib.KEYS, key.name, dataclasses.replace(key, at_most=None))
