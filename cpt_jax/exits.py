"""An error that a person can mend -> its words and the exit code of the program, in one place for all commands.

Invariant: what is not listed here is our own mistake and keeps its traceback. Imports nothing heavy, so that all may use it.
"""

# By sysexits.h where it has one: 65 data, 74 input and output, 78 configuration.
DONE, TOO_LARGE, BAD_TEXT, DISK, STOPPED, CONFIG, NOT_FINITE, LOST, GUARD = 0, 1, 65, 74, 75, 78, 86, 87, 88
INTERRUPTED = 130  # as shells say it of a program that Ctrl-C has ended

MEANINGS = {
  DONE: "done",
  TOO_LARGE: "the step does not fit into the chips' memory",
  BAD_TEXT: "bad input texts",
  DISK: "a file or the disk",
  STOPPED: "stopped by a signal, and all is saved: the same command goes on from there",
  CONFIG: "wrong settings: a flag, a key, or a file that is not what it should be",
  NOT_FINITE: "loss or gradient were not finite for too long",
  LOST: "another process of the run is gone",
  GUARD: "a guard has stopped the run, and all is saved",
  INTERRUPTED: "ended by Ctrl-C",
}


class SavedError(Exception):
  """A person has ended what goes on from there when the same command is given again."""

  exit_code = STOPPED


def explain(error: BaseException) -> tuple[str, int] | None:
  """What to say and to end with; None for an error that is nobody's but the program's.

  >>> explain(FileNotFoundError(2, "No such file or directory", "texts/a.txt"))
  ('texts/a.txt: No such file or directory. Mend the path or the disk and give the same command: what was saved is good.', 74)
  """
  code = getattr(error, "exit_code", None)  # of config.ConfigError and its kinds, and SavedError
  if code is not None:
    return str(error), code
  if isinstance(error, KeyboardInterrupt):
    return "interrupted", INTERRUPTED
  if isinstance(error, FloatingPointError):
    return f"stopped: {error}. The checkpoints before are good; lower schedule.lr_peak and start again.", NOT_FINITE
  if isinstance(error, OSError):
    where = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    return f"{where}. Mend the path or the disk and give the same command: what was saved is good.", DISK
  if isinstance(error, RuntimeError) and "nable to initialize backend" in str(error):
    return f"{error}\nUnset JAX_PLATFORMS for what is here, or set JAX_PLATFORMS=cpu", CONFIG
  return None
