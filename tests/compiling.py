"""How long XLA works on a test's programs."""

import contextlib

import jax


@contextlib.contextmanager
def quickly():
  """A program that runs once or twice is not worth the compiler's passes."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
