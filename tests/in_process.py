"""A command, without the seconds that another Python takes to start: what it printed, and its exit code."""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import pytest
from absl import flags


class Done(NamedTuple):
  """As subprocess.run gives it."""

  returncode: int
  stdout: str
  stderr: str


@contextlib.contextmanager
def one_device() -> Iterator[None]:
  """The program sees one of this process's devices, and leaves no mesh behind."""
  device = jax.devices()[0]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "device_count", lambda *_: 1)
    for name in ("devices", "local_devices"):
      patch.setattr(jax, name, lambda *_, **__: [device])
    yield
  jax.set_mesh(None)


def call(function: Callable[[], int]) -> Done:
  """Of a function that returns its exit code, or ends as programs do."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      code = function()
    except SystemExit as end:
      code = end.code if isinstance(end.code, int) else int(end.code is not None)
  return Done(code, out.getvalue(), err.getvalue())


def main(*arguments) -> Done:
  """`python -m cpt_jax.main` with these arguments, on one device."""
  from cpt_jax import main as program

  command = ["main", *map(str, arguments)]
  flags.FLAGS.unparse_flags()
  with pytest.MonkeyPatch.context() as patch, one_device():
    patch.setattr(sys, "argv", command)  # where ml_collections looks for the keys that are changed
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of ml_collections, as it loads the file
        return call(lambda: program.main(program._read_flags(command)))
    finally:
      for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
      for name in ("config", "workdir", "dry_run", "verbosity"):
        flags.FLAGS[name].unparse()
