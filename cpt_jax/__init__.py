"""Continual pretraining of language models in JAX: planned, exact and measured.

Everything here is what the commands of `cpt` use themselves, and is imported when it is first named: `import cpt_jax` is quick
and does not start jax.

  run = cpt_jax.train("configs/quickstart.py", "runs/quickstart")
  print(run.losses)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from cpt_jax import config as config
  from cpt_jax.diagnosis.diagnose import diagnose as diagnose
  from cpt_jax.library import evaluate as evaluate, load_model as load_model, save_model as save_model, train as train
  from cpt_jax.planning.planner import plan as plan
  from cpt_jax.results.export import export as export
  from cpt_jax.results.tables import open_run as open_run
  from cpt_jax.store.prepare import prepare as prepare

__version__ = "0.2.0"  # here alone: the wheel takes it from this line
_HOMES = {
  "prepare": "store.prepare",
  "diagnose": "diagnosis.diagnose",
  "plan": "planning.planner",
  "train": "library",
  "evaluate": "library",
  "export": "results.export",
  "open_run": "results.tables",
  "load_model": "library",
  "save_model": "library",
}
__all__ = [*_HOMES, "config", "__version__"]


def __getattr__(name: str) -> Any:
  if name == "config":
    value: Any = importlib.import_module("cpt_jax.config")
  elif name in _HOMES:
    value = getattr(importlib.import_module(f"cpt_jax.{_HOMES[name]}"), name)
  else:
    raise AttributeError(f"module 'cpt_jax' has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted(__all__)
