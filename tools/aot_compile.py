"""A config and a topology -> its training step compiled for chips that are not there: memory, FLOPs, transfers, roofline.

Invariant: needs no chip, no weights and no data; what the compiler says and what is arithmetic stand apart (docs/scaling.md).

Exit codes: 0 it fits, 1 it does not, 78 a config or a topology that cannot be, or a compiler that is not installed.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a clone that is not installed

from cpt_jax import config as config_lib
from cpt_jax.devices import chips, environment
from cpt_jax.preview import step_report
from cpt_jax.preview.roofline import Place

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config; --config.key=value changes a key. Sources may be missing.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "v5p:4x4x4 (a slice), 2*v5e:16x16 (two slices), h100:32x8 (hosts x GPUs).")
_OUTPUT = flags.DEFINE_string("output", "", "Where to write the record as JSON.")
_HLO = flags.DEFINE_string("hlo", "", "Where to write the optimized program's text.")

EXIT_TOO_LARGE = 1
_MEMORY_WORDS = {
  "update": "new parameters and moments",
  "kept": "activations of all layers, kept for the backward pass",
  "layer": "the layer at work, gathered parameters, the rest",
  "packing": "gaps, or (below 0) memory used twice",
}


def main(argv: list[str]) -> int:
  """Compiles, prints, writes; returns the exit code."""
  try:
    if len(argv) > 1 or not flags.FLAGS["config"].present or not _TOPOLOGY.value:
      raise config_lib.ConfigError(f"name a config and a topology: {__doc__.splitlines()[3].split(': ', 1)[1]}")
    topology = chips.parse_topology(_TOPOLOGY.value)
    kind = "tpu" if topology.chip.platform == "tpu" else "gpu"
    environment.prepare_ahead(os.environ, kind, gpu_model=topology.chip.kinds[0])  # before anything imports jax
    record = compile_record(_CONFIG.value, topology, name=str(_config_file()))
  except config_lib.ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  show(record)
  if _OUTPUT.value:
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"record        {path}")
  return 0 if record["memory"]["fits"] else EXIT_TOO_LARGE


def _config_file() -> pathlib.Path:
  return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))


def compile_record(config: Any, topology: chips.Topology, *, name: str) -> dict[str, Any]:
  """The step of a config on a topology, as `preview.step_report` describes it.

  Raises:
    ConfigError: what a run would refuse, or a compiler that is not installed.
  """
  from cpt_jax.preview import ahead

  target = ahead.open_target(config, topology)
  config, spec = target.config, target.spec
  job = step_report.Job(
    topology=topology,
    mesh=dict(target.mesh.shape),
    spec=spec,
    batch_rows=config.train.batch_rows,
    microbatches=config.train.microbatches,
    row_len=config.data.row_len,
    remat=config.model.remat,
    loss_chunk=config.model.loss_chunk,
  )
  record = {"config": name, "topology": str(topology), "chips": topology.num_chips, "mesh": dict(job.mesh)}
  record |= {"batch_rows": job.batch_rows, "microbatches": job.microbatches, "row_len": job.row_len, "remat": job.remat}
  record["versions"] = _versions(topology)
  held = ahead.held(target)
  state_bytes = sum(held.values())
  compiled = ahead.compile_step(target)
  if isinstance(compiled, ahead.Refused):
    verdict = {"needed_bytes": compiled.needed_bytes, "usable_bytes": compiled.limit_bytes, "fits": False}
    verdict |= {"refused": compiled.message, "state_bytes": state_bytes}
    return record | {"memory": verdict, "advice": step_report.advice(job, state_bytes=state_bytes)}
  if _HLO.value:
    pathlib.Path(_HLO.value).write_text(compiled.text, encoding="utf-8")
  needed = compiled.memory._asdict()
  host = needed.pop("host")
  needed.pop("donated")  # in the others already
  needed |= {"program": compiled.program_bytes, "base for drift": held["base for drift"]}
  record["memory"] = step_report.memory(needed, job) | {"host_bytes": host, "state_bytes": state_bytes}
  places = [Place(domain, coords) for domain, coords in zip(target.domains, target.coords, strict=True)]
  record |= step_report.measure(compiled.text, job, places)
  record["compile_secs"] = compiled.compile_secs
  if not record["memory"]["fits"]:
    record["advice"] = step_report.advice(job, state_bytes=state_bytes)
  return record


def _versions(topology: chips.Topology) -> dict[str, str]:
  compiler = "libtpu" if topology.chip.platform == "tpu" else "jax-cuda13-plugin"
  return {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", compiler)}


def show(record: dict[str, Any]) -> None:
  """The record as tables."""
  from cpt_jax.training import console

  topology = chips.parse_topology(record["topology"])
  mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items())
  console.say(f"config        {record['config']}")
  console.say(f"topology      {record['topology']}, {record['chips']} chips: {mesh}")
  console.say(
    f"step          {record['batch_rows']} rows of {record['row_len']} in {record['microbatches']} parts, remat {record['remat']}"
  )
  console.say(f"compiled by   {', '.join(f'{name} {version}' for name, version in record['versions'].items())}")
  memory = record["memory"]
  if "refused" in memory:
    console.say(f"compiler      {memory['refused'].splitlines()[0]}")
  else:
    rows = [[_MEMORY_WORDS.get(name, name), f"{size / 2**30:.2f}"] for name, size in memory["bytes"].items()]
    rows += [["needed", f"{memory['needed_bytes'] / 2**30:.2f}"], ["usable", f"{memory['usable_bytes'] / 2**30:.2f}"]]
    console.table("memory of one chip, when the step needs most", ["what", "GiB"], rows)
    _show_flops(record)
    _show_transfers(record, console)
    _show_roofline(record, topology)
  for line in record.get("notes", []):
    console.say(f"note: {line}")
  console.say(verdict(record))
  for line in record.get("advice", []):
    console.say(f"  change      {line}")


def verdict(record: dict[str, Any]) -> str:
  """The last line, which the recipes quote."""
  memory = record["memory"]
  used = f"{memory['needed_bytes'] / 2**30:.2f} of {memory['usable_bytes'] / 2**30:.2f} GiB"
  if not memory["fits"]:
    return f"verdict       does not fit: {used} a chip"
  roof = record["roofline"]
  causal, palm, tokens = (roof["one_after_the_other"][key] for key in ("mfu_causal", "mfu_palm", "tokens_per_sec_per_chip"))
  return (
    f"verdict       fits: {used} a chip ({memory['headroom_frac']:.0%} free); bound by {roof['bound']}; at most"
    f" {causal:.1%} MFU causal ({palm:.1%} palm), {tokens:,.0f} tokens/s a chip"
  )


def _show_flops(record: dict[str, Any]) -> None:
  from cpt_jax.training import console

  flops = record["flops_per_chip"]
  rows = [["the model's, causal half of attention", flops["model_causal"]], ["the model's, full square", flops["model_palm"]]]
  rows += [[f"the program's, {phase}", value] for phase, value in flops["program"].items()]
  rows.append(["the program's", flops["program_total"]])
  console.table(
    "FLOPs of one chip in a step",
    ["what", "TFLOP", "of the model's, causal"],
    [[what, f"{value / 1e12:,.2f}", f"{value / flops['model_causal']:.3f}"] for what, value in rows],
  )


def _show_transfers(record: dict[str, Any], console: Any) -> None:
  rows = [
    [entry["phase"], f"{entry['turns']:g}", entry["op"], " x ".join(entry["axes"]), entry["chips"], entry["count_per_turn"]]
    + [console.size(entry["bytes_per_turn"]), console.size(entry["turns"] * entry["bytes_per_turn"])]
    + [f"{1e3 * (entry['link_secs_per_step'] + entry['network_secs_per_step']):.2f}", "yes" if entry["overlapped"] else "no"]
    for entry in record["transfers"]
  ]
  console.table(
    "transfers between chips",
    ["phase", "turns", "what", "mesh axis", "chips", "a turn", "bytes a turn", "bytes a step", "ms a step", "overlapped"],
    rows,
    left=1,
  )


def _show_roofline(record: dict[str, Any], topology: chips.Topology) -> None:
  from cpt_jax.training import console

  roof, chip = record["roofline"], topology.chip
  links, network = ("NVLink", "network of hosts") if chip.platform == "cuda" else ("ICI", "network of slices")
  rows = [
    ["compute", f"{roof['compute_secs'] * 1e3:,.1f}", f"{chip.peak_flops / 1e12:,.0f} TFLOP/s"],
    ["HBM", f"{roof['hbm_secs'] * 1e3:,.1f}", f"{chip.hbm_bytes_per_sec / 1e9:,.0f} GB/s"],
    [links, f"{roof['link_secs'] * 1e3:,.1f}", f"{chip.link_bytes_per_sec / 1e9:,.0f} GB/s a link, one way"],
    [network, f"{roof['network_secs'] * 1e3:,.1f}", f"{chip.network_bytes_per_sec / 1e9:,.2f} GB/s a chip, one way"],
  ]
  console.table("roofline: a step by each resource alone", ["resource", "ms", "at"], rows)
  console.say(f"bound by {roof['bound']}")
  console.table(
    "the ceiling of the speed",
    ["if", "ms a step", "MFU causal", "MFU palm", "tokens/s a chip"],
    [
      [what, f"{speed['step_secs'] * 1e3:,.1f}", f"{speed['mfu_causal']:.1%}", f"{speed['mfu_palm']:.1%}"]
      + [f"{speed['tokens_per_sec_per_chip']:,.0f}"]
      for what, speed in (
        ("all resources work at once", roof["all_at_once"]),
        ("operations follow each other, transfers overlap where they can", roof["one_after_the_other"]),
      )
    ],
  )


if __name__ == "__main__":
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  app.run(main)
