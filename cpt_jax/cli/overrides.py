"""--config=FILE and --config.key=value ... -> the configuration that they say, not yet resolved.

Invariant: a key that does not exist is refused with what was probably meant, all of them at once.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from cpt_jax import config as config_lib
from cpt_jax import shipped


def read(path: str, overrides: Sequence[str] = ()) -> Any:
  """The config of a file, here or shipped with the package, with the changes of the command line.

  Raises:
    ConfigError: no such file, a mistake in it, or changes of keys that do not exist or to values that are of another type.
  """
  file, colon, argument = path.partition(":")
  argv = [f"--config={shipped.find(file)}{colon}{argument}", *overrides]
  config_lib.check_overrides(argv)
  values = flags.FlagValues()  # of this call alone
  config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=["cpt", *argv])
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections loads modules in a way that Python will give up
      values(["cpt", *argv])
  except flags.Error as error:
    raise config_lib.ConfigError(str(error)) from None
  return shipped.complete(values["config"].value)
