"""A command, without the seconds that another Python takes to start: what it printed, and its exit code."""

import contextlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import jax
import pytest

from cpt_jax.cli import app


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


def cpt(*arguments) -> Done:
  """A command line of `cpt`, on one device: `cpt("show", "--step=3")`."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_device():
    code = app.main([str(argument) for argument in arguments])
  return Done(code, out.getvalue(), err.getvalue())
