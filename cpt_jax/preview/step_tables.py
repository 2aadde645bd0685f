"""The record of a compiled step -> tables for people, and the verdict that the recipes quote.

Invariant: says what stands in the record and computes nothing but sums and units.
"""

from typing import Any

from cpt_jax.devices import chips
from cpt_jax.training import console

_MEMORY_WORDS = {
  "update": "new parameters and moments", "kept": "activations of all layers, kept for the backward pass",
  "layer": "the layer at work, gathered parameters, the rest", "packing": "gaps, or (below 0) memory used twice",
}  # fmt: skip


def show(record: dict[str, Any]) -> None:
  """The record as tables."""
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
    _show_transfers(record)
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
  flops = record["flops_per_chip"]
  rows = [["the model's, causal half of attention", flops["model_causal"]], ["the model's, full square", flops["model_palm"]]]
  rows += [[f"the program's, {phase}", value] for phase, value in flops["program"].items()]
  rows.append(["the program's", flops["program_total"]])
  console.table(
    "FLOPs of one chip in a step",
    ["what", "TFLOP", "of the model's, causal"],
    [[what, f"{value / 1e12:,.2f}", f"{value / flops['model_causal']:.3f}"] for what, value in rows],
  )


def _show_transfers(record: dict[str, Any]) -> None:
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
