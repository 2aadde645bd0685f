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


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The repository's root."""
  return ROOT


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
  """Committed small inputs."""
  return ROOT / "tests" / "fixtures"
