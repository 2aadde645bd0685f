"""Eight CPU devices, strict numerics, and the small things that many tests start from."""

import fcntl
import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".jax_cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # for the subprocesses too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A program that runs once or twice is not worth the compiler's passes: so it compiles in a quarter of the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # another XLA may not know the flag, and would end the process
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Times of a shared machine say nothing about the code, so no deadline; examples are the same at every run.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), max_examples=100)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def no_mesh_is_left():
  """A run that a test makes in this process sets its mesh for good; the next test begins without one."""
  yield
  jax.set_mesh(None)


@pytest.fixture
def cpt():
  """Gives a command line to `cpt` in this process: `done = cpt("show", "--step=3")`, then done.returncode, .stdout, .stderr."""
  import in_process

  return in_process.cpt


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
def stores(tmp_path_factory):
  """Four small stores by name, whose tokens tell their document."""
  import loaders

  return loaders.write_all(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
  """Makes a directory in the first of pytest's processes that asks for it; the others wait: `made_once(name, make)`."""
  own = tmp_path_factory.getbasetemp()
  place = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

  def get(name: str, make) -> pathlib.Path:
    where, mark = place / name, place / f"{name}.made"
    with open(place / f"{name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not mark.exists():
        make(where)
        mark.touch()
    return where

  return get


@pytest.fixture(scope="session")
def tiny_base(made_once, fixtures, tiny_hf_config):
  """A Hugging Face directory with random weights and the fixture's tokenizer."""
  from cpt_jax.model import pretrained, spec as spec_lib, transformer

  def make(where):
    tiny = spec_lib.from_hf(tiny_hf_config)
    params = transformer.init(tiny, jax.random.key(0))
    pretrained.save_params(params, tiny, where, source_dir=fixtures / "tokenizer", hf_config=tiny_hf_config)

  return made_once("tiny_base", make)


@pytest.fixture(scope="session")
def tiny_store(made_once, fixtures):
  """The token store of the fixture's corpus."""
  from cpt_jax.store import prepare

  text, tokenizer = str(fixtures / "corpus.jsonl"), str(fixtures / "tokenizer")
  make = lambda where: prepare.prepare([text], tokenizer=tokenizer, output=str(where), progress=False)  # noqa: E731
  return made_once("tiny_store", make)


RUN = """
from cpt_jax import config

def get_config():
  c = config.default()
  c.start.hf = {base!r}
  c.data.row_len = 32
  c.data.heldout_frac = 0.1
  c.data.sources.general = config.source(store={store!r}, text={text!r}, role="replay", share=0.5)
  c.data.sources.poetry = config.source(store={store!r}, text={text!r}, share=[(0, 0.1), ("50%", 0.9)])
  c.train.length = "{steps} steps"
  c.train.batch_rows = {rows}
  c.train.microbatches = {parts}
  c.schedule.lr_peak = 3e-3
  c.eval.every = "50%"
  c.eval.tokens = 500
  c.checkpoint.every = "{every} steps"
  c.log.every = {log}
  c.mesh.data, c.mesh.fsdp = {mesh}
  return c
"""


@pytest.fixture(scope="session")
def write_config(tmp_path_factory, tiny_base, tiny_store, fixtures):
  """The file of a config that trains `tiny_base` on the fixture's corpus, with what is said otherwise."""
  directory, text = tmp_path_factory.mktemp("config"), str(fixtures / "corpus.jsonl")
  of_tiny = dict(base=str(tiny_base), store=str(tiny_store), text=text, rows=4, parts=2, log=5, mesh=(-1, 1))

  def write(*, steps=20, every=10, name="tiny", **changes) -> pathlib.Path:
    file = directory / f"{name}.py"
    file.write_text(RUN.format(**(of_tiny | changes), steps=steps, every=every))
    return file

  return write


@pytest.fixture(scope="session")
def finished_run(made_once, write_config):
  """The directory of a run of 20 steps by `write_config()`, with what it printed; only to be read."""
  import in_process

  def make(workdir):
    done = in_process.cpt("train", f"--config={write_config()}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stdout + done.stderr
    (workdir / "printed.txt").write_text(done.stdout)

  return made_once("finished_run", make)


@pytest.fixture(scope="session")
def tiny_plan(tiny_base, tiny_store, fixtures):
  """The config of a run to be planned: a random 2-layer base, the fixture's corpus as both sources, 400 steps of 4 rows."""
  from cpt_jax import config as config_lib

  c = config_lib.default()
  c.start.hf = str(tiny_base)
  c.data.row_len = 32
  c.data.heldout_frac = 0.1
  for name, role, share in (("general", "replay", 0.25), ("poetry", "domain", 0.75)):
    text = str(fixtures / "corpus.jsonl")
    c.data.sources[name] = config_lib.source(store=str(tiny_store), text=text, role=role, share=share)
  c.train.length = "400 steps"
  c.train.batch_rows = 4
  c.schedule.name = "wsd"
  c.schedule.lr_peak = 3e-3
  c.schedule.lr_final = 0.0
  c.schedule.anneal = "25%"
  c.eval.tokens = 500
  return c


@pytest.fixture
def one_device():
  """Runs in this process use one device, and leave no mesh behind."""
  import in_process

  from cpt_jax.devices import mesh as mesh_lib

  with in_process.one_device(), jax.set_mesh(mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1)):
    yield


@pytest.fixture
def any_rate(monkeypatch):
  """Rates that make a run diverge at once are taken, too."""
  import dataclasses

  from cpt_jax import config as config_lib

  key = config_lib.KEYS["schedule.lr_peak"]
  monkeypatch.setitem(config_lib.KEYS, key.name, dataclasses.replace(key, at_most=None))
