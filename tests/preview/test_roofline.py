"""Chips, topologies, and the seconds that follow from a program: numbers worked out by hand."""

import pytest

from cpt_jax.config import ConfigError
from cpt_jax.devices import chips
from cpt_jax.model import spec as spec_lib
from cpt_jax.preview import hlo, roofline, step_report
from cpt_jax.preview.collectives import Collective
from cpt_jax.preview.program import Program
from cpt_jax.preview.roofline import Place


@pytest.mark.parametrize(
  ("text", "num_chips", "domains"),
  [("v5p:4x4x4", 64, 1), ("2*v5e:16x16", 512, 2), ("h100:32x8", 256, 32), ("h200:1x1", 1, 1), ("V6E:2x4", 8, 1)],
)
def test_a_topology_says_how_many_chips_in_how_many_domains(text, num_chips, domains):
  found = chips.parse_topology(text)
  assert (found.num_chips, found.domains) == (num_chips, domains)
  assert chips.parse_topology(str(found)) == found


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("v5p", "CHIP:SHAPE"),
    ("v5q:4x4", "the chips are v5e, v5p"),
    ("v4:2x2x1", "the chips are v5e, v5p"),  # its compiler lays out a core, not a chip: no verdict could be given
    ("v5p:4x4", "3 dimensions, e.g. v5p:4x4x4"),
    ("h100:8", "hosts x GPUs of a host, e.g. h100:2x8"),
    ("2*h100:1x8", "hosts x GPUs"),
    ("0*v5e:4x4", "1 or more"),
  ],
)
def test_what_is_no_topology_is_refused_with_an_example(text, said):
  with pytest.raises(ConfigError, match=said):
    chips.parse_topology(text)


def test_every_figure_of_a_chip_is_there_and_has_its_source():
  for chip in chips.CHIPS:
    assert min(chip.peak_flops, chip.hbm_bytes_per_sec, chip.link_bytes_per_sec, chip.network_bytes_per_sec) > 1e9, chip.name
    assert chip.usable_bytes <= chip.hbm_bytes
    assert f"{chip.peak_flops / 1e12:g} TFLOP/s" in chip.source
    assert chips.of_device(chip.kinds[0]) is chip


def torus(*shape):
  places = [()]
  for size in shape:
    places = [(*place, i) for place in places for i in range(size)]
  return [Place(0, place) for place in places]


def test_links_of_a_torus_count_twice_where_they_close_a_ring():
  link = 9e10
  cube = chips.parse_topology("v5p:4x4x4")
  assert roofline.link_rate(torus(4, 4, 4), cube) == 6 * link
  assert roofline.link_rate([p for p in torus(4, 4, 4) if p.coords[0] == 0], cube) == 4 * link
  assert roofline.link_rate([p for p in torus(4, 4, 4) if p.coords[0] < 2], cube) == 5 * link  # two of four in a row: no ring
  flat = chips.parse_topology("v5e:4x4")
  assert roofline.link_rate(torus(4, 4), flat) == 2 * 4.5e10  # v5e closes its rings at 16 chips
  assert roofline.link_rate(torus(16, 16), chips.parse_topology("v5e:16x16")) == 4 * 4.5e10
  diagonal = [p for p in torus(4, 4, 4) if p.coords[0] == p.coords[1] and p.coords[2] == 0]
  assert roofline.link_rate(diagonal, cube) == 2 * link


def gather(num_bytes, group, *, op="all-gather", turns=1.0, is_async=True):
  return Collective(op, "forward", turns, num_bytes, ("fsdp",), tuple(group), is_async)


def test_a_gather_inside_a_host_takes_what_the_others_hold_over_nvlink():
  host = chips.parse_topology("h100:1x8")
  places = [Place(0, ())] * 8
  found = roofline.transfer(gather(900e9, range(8), turns=2), places, host)
  assert (found.link_secs, found.network_secs) == (pytest.approx(2 * 900 * 7 / 8 / 450), 0.0)
  both_ways = roofline.transfer(gather(900e9, range(8), op="all-reduce"), places, host)
  assert both_ways.link_secs == pytest.approx(2 * 900 * 7 / 8 / 450)


def test_a_gather_over_hosts_shares_their_network_among_the_gpus_of_each():
  hosts = chips.parse_topology("h100:4x8")
  places = [Place(i // 8, ()) for i in range(32)]
  found = roofline.transfer(gather(400e9, range(32)), places, hosts)
  assert found.network_secs == pytest.approx(400 / 8 * 3 / 4 / 50)
  assert found.link_secs == pytest.approx(400 * 7 / 8 / 450)
  # One GPU of each host: nothing over NVLink, everything over one port.
  ranks = roofline.transfer(gather(400e9, (0, 8, 16, 24)), places, hosts)
  assert (ranks.link_secs, ranks.network_secs) == (0.0, pytest.approx(400 * 3 / 4 / 50))


STEP = """
%fused (a: bf16[1024,1024], b: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  ROOT %d = bf16[1024,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[1024,1024], y: f32[4096,1024]) -> f32[4096,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %y = f32[4096,1024]{1,0} parameter(1)
  %product = bf16[1024,1024]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/jvp()/dot"}
  ROOT %copied = f32[4096,1024]{1,0} copy(%y)
}
"""


def test_operations_one_after_the_other_take_their_flops_or_their_bytes():
  topology = chips.parse_topology("h100:1x8")
  done = roofline.work(Program(hlo.parse(STEP)), topology, kernel_flops=lambda instruction: 0.0)
  product_flops, product_bytes, copy_bytes = 2 * 1024**3, 3 * 2 * 1024**2, 2 * 4 * 4096 * 1024
  assert done.flops == {"forward": product_flops}
  assert done.hbm_bytes == product_bytes + copy_bytes
  assert done.busy_secs == pytest.approx(max(product_flops / 989e12, product_bytes / 3352e9) + copy_bytes / 3352e9)


def test_transfers_that_overlap_hide_and_those_that_do_not_add_up():
  topology = chips.parse_topology("h100:1x8")
  places = [Place(0, ())] * 8
  done = roofline.Work({"forward": 989e12}, 335.2e9, busy_secs=1.2)
  transfers = [
    roofline.transfer(gather(450e9 * 8 / 7, range(8)), places, topology),
    roofline.transfer(gather(45e9 * 8 / 7, range(8), is_async=False), places, topology),
  ]
  found = roofline.roofline(done, transfers, topology)
  assert found.compute_secs == pytest.approx(1.0)
  assert found.hbm_secs == pytest.approx(0.1)
  assert found.link_secs == pytest.approx(1.1)
  assert found.bound == "links"
  assert found.step_secs == pytest.approx(1.2 + 0.1)


SPEC = spec_lib.ModelSpec(
  family="llama", vocab_size=1000, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128,
  max_positions=512,
)  # fmt: skip


def job(**changes):
  given = dict(
    topology=chips.parse_topology("h100:1x8"),
    mesh={"data": 2, "fsdp": 4, "context": 1, "tensor": 1},
    spec=SPEC,
    batch_rows=32,
    microbatches=2,
    row_len=128,
    remat="dots",
    loss_chunk=256,
  )
  return step_report.Job(**(given | changes))


def test_the_verdict_follows_from_what_is_needed_and_usable():
  usable = chips.parse_topology("h100:1x8").chip.usable_bytes
  assert step_report.memory({"a": usable // 2, "b": usable - usable // 2}, job())["fits"]
  found = step_report.memory({"a": usable, "b": 1}, job())
  assert not found["fits"]
  assert found["headroom_frac"] < 0


def test_a_kernel_of_attention_has_the_flops_that_causality_leaves():
  # 2 rows on each device, 4 heads of 16, 128 queries that see 64 keys on average: two products forward.
  text = """
ENTRY %main (q: bf16[2,128,4,16]) -> bf16[2,128,4,16] {
  %q = bf16[2,128,4,16]{3,2,1,0} parameter(0)
  ROOT %k = bf16[2,128,4,16]{3,2,1,0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/jvp()/flash_forward"}
}
"""  # noqa: E501
  found = step_report.measure(hlo.parse(text), job(), [Place(0, ())] * 8)
  assert found["flops_per_chip"]["program"] == {"forward": 2 * 2 * 2 * 4 * 16 * 128 * 64}
  unknown = step_report.measure(hlo.parse(text.replace("flash_forward", "mine")), job(), [Place(0, ())] * 8)
  assert "the work of the kernel jit(f)/jvp()/mine is not known and not counted" in unknown["notes"]
  assert "a part of it was not understood" in unknown["notes"][-1]  # far less than the model's FLOPs


def test_speed_is_tokens_over_the_step_and_mfu_the_models_flops_over_the_peak():
  found = step_report.measure(hlo.parse(STEP), job(), [Place(0, ())] * 8)
  speed = found["roofline"]["one_after_the_other"]
  assert speed["tokens_per_sec_per_chip"] == pytest.approx(32 * 128 / 8 / speed["step_secs"])
  causal, palm = spec_lib.flops_per_token(SPEC, 128, frozen=())
  assert speed["mfu_causal"] == pytest.approx(causal * speed["tokens_per_sec_per_chip"] / 989e12)
  assert speed["mfu_palm"] == pytest.approx(palm * speed["tokens_per_sec_per_chip"] / 989e12)


def test_advice_begins_with_what_costs_least_and_names_values():
  assert [line.split()[0] for line in step_report.advice(job(), state_bytes=1)] == [
    "model.remat=full",
    "train.microbatches=4",
    "mesh.fsdp=8,",
    "train.batch_rows=16",
  ]
  usable = chips.parse_topology("h100:1x8").chip.usable_bytes
  (line,) = step_report.advice(job(), state_bytes=2 * usable)
  assert "mesh.fsdp x mesh.tensor = 16 or more instead of 4" in line
