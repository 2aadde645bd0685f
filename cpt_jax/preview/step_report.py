"""A compiled step, its model and its chips -> one record: memory and verdict, FLOPs, transfers, roofline, what to change.

Invariant: JSON-able; a figure says in its name whether it is of one chip, one step, or one turn; never imports jax.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpt_jax.devices.chips import Topology
from cpt_jax.model.spec import ModelSpec, flops_per_token, visible_keys
from cpt_jax.preview import hlo, roofline
from cpt_jax.preview.collectives import collectives
from cpt_jax.preview.hlo import Instruction
from cpt_jax.preview.program import Program, kernel_products


class Job(NamedTuple):
  """What a step has to do, whoever compiles it."""

  topology: Topology
  mesh: Mapping[str, int]  # devices along each axis, in order
  spec: ModelSpec
  batch_rows: int
  microbatches: int
  row_len: int
  remat: str
  loss_chunk: int

  @property
  def tokens_per_chip(self) -> float:
    """Positions of a step."""
    return self.batch_rows * self.row_len / self.topology.num_chips

  @property
  def rows_per_device(self) -> float:
    """Rows of a microbatch on each chip; a row that chips share counts on each of them."""
    return self.batch_rows / self.microbatches / (self.mesh["data"] * self.mesh["fsdp"])


def from_config(config: Any, spec: ModelSpec, *, topology: Topology, mesh: Mapping[str, int]) -> Job:
  """The job of a resolved config."""
  return Job(
    topology=topology, mesh=mesh, spec=spec, batch_rows=config.train.batch_rows, microbatches=config.train.microbatches,
    row_len=config.data.row_len, remat=config.model.remat, loss_chunk=config.model.loss_chunk,
  )  # fmt: skip


def heading(job: Job) -> dict[str, Any]:
  """What is compiled, and for what."""
  record = {"topology": str(job.topology), "chips": job.topology.num_chips, "mesh": dict(job.mesh)}
  return record | {name: getattr(job, name) for name in ("batch_rows", "microbatches", "row_len", "remat")}


def memory(needed: Mapping[str, int], job: Job) -> dict[str, Any]:
  """The verdict on the bytes that one chip must find, by class."""
  usable, total = job.topology.chip.usable_bytes, sum(needed.values())
  return {
    "bytes": dict(needed), "needed_bytes": total, "usable_bytes": usable, "headroom_frac": 1 - total / usable,
    "fits": total <= usable,
  }  # fmt: skip


def flops(done: roofline.Work, job: Job) -> dict[str, Any]:
  """Of one chip in one step: the model's by both conventions, and the program's by phase."""
  causal, palm = (per_token * job.tokens_per_chip for per_token in flops_per_token(job.spec, job.row_len, frozen=()))
  total = sum(done.flops.values())
  return {
    "model_causal": causal, "model_palm": palm, "program": dict(sorted(done.flops.items())), "program_total": total,
    "program_over_model": total / causal,
  }  # fmt: skip


def measure(compiled: hlo.Module, job: Job, places: Sequence[roofline.Place]) -> dict[str, Any]:
  """Everything that follows from the optimized program; `places` are those of the mesh's devices, in order."""
  program = Program(compiled)
  unknown: set[str] = set()
  one_product = _attention_product_flops(job)

  def kernel_flops(instruction: Instruction) -> float:
    products = kernel_products(instruction)
    if products is None:
      unknown.add(instruction.op_name or instruction.kernel)
    return (products or 0) * one_product

  done = roofline.work(program, job.topology, kernel_flops=kernel_flops)
  transfers = [roofline.transfer(c, places, job.topology) for c in collectives(program, job.mesh)]
  roof = roofline.roofline(done, transfers, job.topology)
  counted = flops(done, job)
  notes = _notes(program, unknown)
  if counted["program_total"] < 0.99 * counted["model_causal"]:
    notes.append(
      "the program seems to compute less than the model needs: a part of it was not understood, and speeds are too high"
    )
  return {
    "flops_per_chip": counted, "hbm_bytes_per_chip": done.hbm_bytes, "transfers": _grouped(transfers),
    "roofline": _speeds(roof, counted, job), "notes": notes,
  }  # fmt: skip


def _attention_product_flops(job: Job) -> float:
  """Of one product of queries and keys in one layer on one chip, of a microbatch: what causality and windows leave to do.

  All layers share a kernel, so windows that differ count with their mean.
  """
  windows = job.spec.windows or (0,)
  visible = sum(visible_keys(window, job.row_len) for window in windows) / len(windows)
  heads = job.spec.num_heads / (job.mesh["tensor"] * job.mesh["context"])
  return 2.0 * job.rows_per_device * job.row_len * heads * job.spec.head_dim * visible


def _grouped(transfers: Sequence[roofline.Transfer]) -> list[dict[str, Any]]:
  """Transfers of one kind, phase, group of axes and number of turns together."""
  groups: dict[tuple, dict[str, Any]] = {}
  for t in transfers:
    c = t.collective
    key = (c.phase, c.turns, c.op, c.axes, c.is_async)
    entry = groups.setdefault(
      key,
      {
        "phase": c.phase, "turns": c.turns, "op": c.op, "axes": list(c.axes), "chips": len(c.group), "overlapped": c.is_async,
        "count_per_turn": 0, "bytes_per_turn": 0.0, "link_secs_per_step": 0.0, "network_secs_per_step": 0.0,
      },
    )  # fmt: skip
    entry["count_per_turn"] += 1
    entry["bytes_per_turn"] += c.num_bytes
    entry["link_secs_per_step"] += t.link_secs
    entry["network_secs_per_step"] += t.network_secs
  phases = ("forward", "recomputed", "backward", "update")
  return sorted(groups.values(), key=lambda e: (phases.index(e["phase"]), -e["turns"], e["op"], -e["bytes_per_turn"]))


def _speeds(roof: roofline.Roofline, counted: Mapping[str, Any], job: Job) -> dict[str, Any]:
  peak = job.topology.chip.peak_flops

  def at(secs: float) -> dict[str, float]:
    return {
      "step_secs": secs, "mfu_causal": counted["model_causal"] / secs / peak, "mfu_palm": counted["model_palm"] / secs / peak,
      "tokens_per_sec_per_chip": job.tokens_per_chip / secs,
    }  # fmt: skip

  return {
    "compute_secs": roof.compute_secs, "hbm_secs": roof.hbm_secs, "link_secs": roof.link_secs,
    "network_secs": roof.network_secs, "bound": roof.bound, "busy_secs": roof.busy_secs,
    "exposed_transfer_secs": roof.exposed_secs, "overlapped_transfer_secs": roof.hidden_secs,
    "all_at_once": at(roof.roofline_secs), "one_after_the_other": at(roof.step_secs),
  }  # fmt: skip


def _notes(program: Program, unknown: set[str]) -> list[str]:
  notes = []
  if program.data_dependent:
    turns = ", ".join(sorted({f"{mean:g}" for mean in program.data_dependent.values()}))
    notes.append(
      f"{len(program.data_dependent)} loops turn as often as the data says (blockwise attention); counted as {turns} turns, as in"
      " rows of one document"
    )
  notes += [f"the work of the kernel {name} is not known and not counted" for name in sorted(unknown)]
  return notes


def advice(job: Job, *, state_bytes: int) -> list[str]:
  """What to change where a step does not fit, the cheapest first."""
  usable = job.topology.chip.usable_bytes
  if state_bytes > 0.9 * usable:
    # A power of 2 that leaves at least three tenths of the memory to everything else.
    shards = least = job.mesh["fsdp"] * job.mesh["tensor"]
    while state_bytes * shards > 0.7 * usable * least:
      least *= 2
    return [
      f"the state alone takes {state_bytes / 2**30:.2f} GiB of each chip's {usable / 2**30:.2f}: divide it over more chips, with"
      f" mesh.fsdp x mesh.tensor = {least} or more instead of {shards}"
    ]
  found = []
  if job.loss_chunk == 0 or job.loss_chunk > 1024:
    found.append(f"model.loss_chunk=1024 instead of {job.loss_chunk}: fewer positions whose logits exist at once")
  if job.remat != "full":
    found.append(f"model.remat=full instead of {job.remat}: the backward pass computes each layer again")
  if job.rows_per_device > 1:
    found.append(f"train.microbatches={2 * job.microbatches} instead of {job.microbatches}: half the activations, more turns")
  if job.mesh["data"] > 1:
    data, fsdp = job.mesh["data"], job.mesh["fsdp"]
    found.append(f"mesh.fsdp={data * fsdp}, mesh.data=1 instead of {fsdp} and {data}: the state divided over more chips")
  if job.rows_per_device <= 1:
    found.append("mesh.context=2: two chips share a row; or a shorter data.row_len")
  found.append(f"train.batch_rows={job.batch_rows // 2} instead of {job.batch_rows}, or more chips")
  return found
