"""A config and the name of a topology -> the record of its training step, compiled for chips that are not there.

Invariant: no chip, weight or text is needed. Imports jax only after the environment of the compiler is set.
"""

import importlib.metadata
import os
import pathlib
from typing import Any

from cpt_jax.devices import chips, environment
from cpt_jax.preview import step_report


def compile_step(config: Any, topology: str, *, name: str, hlo_file: pathlib.Path | None = None) -> dict[str, Any]:
  """What the compiler says of the step of a config on a topology such as "v5p:4x4x4", and what follows from it by arithmetic.

  The record is JSON-able; `preview.step_tables` shows it. jax must not have been imported.

  Args:
    config: not resolved; its sources and the base's weights need not exist.
    topology: see `devices.chips.parse_topology`.
    name: of the config, for the record.
    hlo_file: where the text of the optimized program is written to.

  Raises:
    ConfigError: what a run would refuse, a topology that cannot be, or a compiler that is not installed.
  """
  target_chips = chips.parse_topology(topology)
  chip = target_chips.chip
  environment.prepare_ahead(os.environ, "tpu" if chip.platform == "tpu" else "gpu", gpu_model=chip.kinds[0])
  from cpt_jax.preview import absent_chips

  target = absent_chips.open_target(config, target_chips)
  job = step_report.from_config(target.config, target.spec, topology=target_chips, mesh=dict(target.mesh.shape))
  compiler = "libtpu" if chip.platform == "tpu" else "jax-cuda13-plugin"
  versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", compiler)}
  record: dict[str, Any] = {"config": name} | step_report.heading(job) | {"versions": versions}
  held = absent_chips.held(target)
  compiled = absent_chips.compile_step(target)
  if isinstance(compiled, absent_chips.Refused):
    record["memory"] = {"needed_bytes": compiled.needed_bytes, "usable_bytes": compiled.limit_bytes, "fits": False}
    record["memory"] |= {"refused": compiled.message}
  else:
    if hlo_file:
      hlo_file.write_text(compiled.text, encoding="utf-8")
    needed = compiled.memory._asdict()
    host_bytes = needed.pop("host")
    needed.pop("donated")  # in the others already
    needed |= {"program": compiled.program_bytes, "base for drift": held["base for drift"]}
    record["memory"] = step_report.memory(needed, job) | {"host_bytes": host_bytes}
    record |= step_report.measure(compiled.program, job, target.places)
    record["compile_secs"] = compiled.compile_secs
  record["memory"]["state_bytes"] = sum(held.values())
  if not record["memory"]["fits"]:
    record["advice"] = step_report.advice(job, state_bytes=sum(held.values()))
  return record
