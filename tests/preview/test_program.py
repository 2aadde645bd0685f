"""Compiled programs as text: loops, products, memory traffic, transfers between chips."""

import dataclasses
import functools
import math

import factory
import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import spec as spec_lib, transformer
from cpt_jax.preview import collectives, hlo, program
from cpt_jax.training import optimizer, state


def read(text):
  return program.Program(hlo.parse(text))


# Shapes and spelling of XLA's TPU and GPU compilers, cut down to what matters.
LOOPS = """HloModule jit_train_step, is_scheduled=true

%fused_dot (param_0: bf16[16,32], param_1: bf16[32,64]) -> bf16[16,64] {
  %param_0 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1 = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot.1 = bf16[16,64]{1,0:T(8,128)(2,1)} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner_condition (p: (s32[], s32[], bf16[16,32])) -> pred[] {
  %p = (s32[]{:T(128)}, s32[]{:T(128)}, /*index=2*/bf16[16,32]{1,0}) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%now, %end), direction=LT
}

%inner_body (p.1: (s32[], s32[], bf16[16,32])) -> (s32[], s32[], bf16[16,32]) {
  %p.1 = (s32[], s32[], bf16[16,32]) parameter(0)
  %x = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=2
  %w = bf16[32,64]{1,0:T(8,128)(2,1)} constant({...})
  %fusion.1 = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(train_step)/jvp()/dot"}
  ROOT %t = (s32[], s32[], bf16[16,32]) tuple(%p.1, %p.1, %x)
}

%count_on (a.1: s32[], b.1: s32[]) -> s32[] {
  %a.1 = s32[]{:T(128)} parameter(0)
  %b.1 = s32[]{:T(128)} parameter(1)
  ROOT %sum = s32[]{:T(128)} add(%a.1, %b.1)
}

%outer_condition (p.2: (s32[], bf16[16,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p.2 = (s32[], bf16[16,32]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%outer_body (p.3: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %p.3 = (s32[], bf16[16,32]) parameter(0)
  %start = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %y = bf16[16,32]{1,0} get-tuple-element(%p.3), index=1
  %init = (s32[], s32[], bf16[16,32]) tuple(%start, %start, %y)
  %while.in = (s32[], s32[], bf16[16,32]) while(%init), condition=%inner_condition, body=%inner_body
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} fusion(%start, %step), kind=kLoop, calls=%count_on
  ROOT %t.1 = (s32[], bf16[16,32]) tuple(%next, %y)
}

ENTRY %main (a: bf16[16,32]) -> bf16[16,64] {
  %a = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %one = s32[]{:T(128)} constant(2)
  %copy.1 = s32[]{:T(128)} copy(%one)
  %init.1 = (s32[], bf16[16,32]) tuple(%copy.1, %a)
  %while.out = (s32[], bf16[16,32]) while(%init.1), condition=%outer_condition, body=%outer_body
  %b = bf16[32,64]{1,0:T(8,128)(2,1)} constant({...})
  ROOT %fusion.2 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(train_step)/transpose(jvp())/dot"}
}
"""  # noqa: E501


def test_a_loop_turns_from_its_first_count_to_its_limit():
  found = read(LOOPS)
  assert found.runs["outer_body"] == 7 - 2
  assert found.runs["outer_condition"] == 7 - 2 + 1


def test_a_loop_that_depends_on_data_turns_as_causality_lets_it_on_average():
  found = read(LOOPS)
  assert found.data_dependent == {"while.in": (5 + 1) / 2}
  assert found.runs["inner_body"] == 5 * 3


@pytest.mark.parametrize("spelling", ["branch_computations={%yes, %no}", "true_computation=%yes, false_computation=%no"])
def test_both_branches_of_a_choice_count(spelling):
  branch = "(a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n"
  lines = f"  %p = pred[] parameter(0)\n  %x = f32[] parameter(1)\n  ROOT %r = f32[] conditional(%p, %x, %x), {spelling}\n"
  text = f"%yes {branch}\n%no {branch}\nENTRY %main (p: pred[], x: f32[]) -> f32[] {{\n{lines}}}\n"
  assert read(text).runs == {"yes": 1, "no": 1, "main": 1}


def test_a_loop_that_was_unrolled_turns_less_often():
  assert read(LOOPS.replace("constant(1)", "constant(2)")).runs["outer_body"] == 3  # from 2: 2, 4, 6


def test_what_the_compiler_says_of_a_loop_goes_before_what_its_condition_says():
  said = LOOPS.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"4"}}')
  assert read(said).runs["outer_body"] == 4


def test_products_count_as_often_as_their_loops_turn():
  found = read(LOOPS)
  once = 2 * 16 * 32 * 64
  counted = {i.name: runs * found.flops_of(c, i.name) for c, i, runs in found.top_level() if found.flops_of(c, i.name)}
  assert counted == {"fusion.1": 15 * once, "fusion.2": once}


def test_what_lies_near_the_units_is_not_read_from_main_memory():
  found = read(LOOPS)
  assert found.hbm_bytes_of("inner_body", "fusion.1") == 2 * (32 * 64 + 16 * 64)  # not %x, in space 1
  assert found.hbm_bytes_of("main", "fusion.2") == 2 * (16 * 32 + 32 * 64)  # not the result


SLICES = """
%layer (param_0.1: f32[32,128,64], param_1.1: s32[], param_2.1: f32[8,64], param_3.1: f32[32,8,64]) -> f32[32,8,64] {
  %param_0.1 = f32[32,128,64]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %param_2.1 = f32[8,64]{1,0} parameter(2)
  %param_3.1 = f32[32,8,64]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %alias = f32[32,128,64]{2,1,0} bitcast(%param_0.1)
  %slice = f32[1,128,64]{2,1,0} dynamic-slice(%alias, %param_1.1, %zero, %zero), dynamic_slice_sizes={1,128,64}
  %kept = f32[1,8,64]{2,1,0} reshape(%param_2.1)
  ROOT %into = f32[32,8,64]{2,1,0} dynamic-update-slice(%param_3.1, %kept, %param_1.1, %zero, %zero)
}

ENTRY %main.1 (w: f32[32,128,64], i: s32[], x: f32[8,64], stack: f32[32,8,64]) -> f32[32,8,64] {
  %w = f32[32,128,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[8,64]{1,0} parameter(2)
  %stack = f32[32,8,64]{2,1,0} parameter(3)
  ROOT %fusion.3 = f32[32,8,64]{2,1,0} fusion(%w, %i, %x, %stack), kind=kLoop, calls=%layer
}
"""


def test_of_a_stack_of_layers_a_fusion_reads_and_writes_one_slice():
  slice_bytes, index_bytes, kept_bytes = 4 * 128 * 64, 4, 4 * 8 * 64
  assert read(SLICES).hbm_bytes_of("main.1", "fusion.3") == slice_bytes + index_bytes + 2 * kept_bytes


NESTED = """
%inner (param_0.4: f32[32,128,64], param_1.4: s32[]) -> f32[128,64] {
  %param_0.4 = f32[32,128,64]{2,1,0} parameter(0)
  %param_1.4 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,128,64]{2,1,0} dynamic-slice(%param_0.4, %param_1.4, %zero, %zero), dynamic_slice_sizes={1,128,64}
  ROOT %flat = f32[128,64]{1,0} bitcast(%slice)
}

%outer (param_0.5: f32[32,128,64], param_1.5: s32[], param_2.5: f32[8,128]) -> f32[8,64] {
  %param_0.5 = f32[32,128,64]{2,1,0} parameter(0)
  %param_1.5 = s32[] parameter(1)
  %param_2.5 = f32[8,128]{1,0} parameter(2)
  %one = f32[128,64]{1,0} fusion(%param_0.5, %param_1.5), kind=kLoop, calls=%inner
  ROOT %dot.2 = f32[8,64]{1,0} dot(%param_2.5, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.4 (w: f32[32,128,64], i: s32[], x: f32[8,128]) -> f32[8,64] {
  %w = f32[32,128,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  ROOT %fusion.4 = f32[8,64]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%outer
}
"""


def test_a_fusion_within_a_fusion_reads_its_slice_too():
  found = read(NESTED)
  assert found.hbm_bytes_of("main.4", "fusion.4") == 4 * (128 * 64 + 8 * 128 + 8 * 64) + 4
  assert found.flops_of("main.4", "fusion.4") == 2 * 8 * 64 * 128


TRANSFERS = """
%started (param_0.2: bf16[1,256,512]) -> bf16[1,2048,512] {
  %param_0.2 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/reshard"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%finished (param_0.3: bf16[1,256,512]) -> bf16[1,2048,512] {
  %param_0.3 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.3), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%condition (p: (s32[], bf16[1,256,512])) -> pred[] {
  %limit = s32[] constant(3)
  %p = (s32[], bf16[1,256,512]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], bf16[1,256,512])) -> (s32[], bf16[1,256,512]) {
  %p.1 = (s32[], bf16[1,256,512]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %shard = bf16[1,256,512]{2,1,0} get-tuple-element(%p.1), index=1
  %start = bf16[1,2048,512]{2,1,0} fusion(%shard), kind=kCustom, calls=%started
  %end = bf16[1,2048,512]{2,1,0} fusion(%shard), kind=kCustom, calls=%finished
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %t = (s32[], bf16[1,256,512]) tuple(%next, %shard)
}

ENTRY %main.2 (x: bf16[1,256,512]) -> f32[] {
  %x = bf16[1,256,512]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[1,256,512]) tuple(%zero, %x)
  %while.1 = (s32[], bf16[1,256,512]) while(%init), condition=%condition, body=%body
  %g = f32[1024]{0} constant({...})
  %h = f32[64]{0} constant({...})
  %gather-start = (f32[64]{0}, f32[512]{0}) all-gather-start(%h), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(train_step)/jvp()/reshard"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %gather-done = f32[512]{0} all-gather-done(%gather-start)
  %scatter-start = ((f32[1024]{0}), f32[512]{0}) reduce-scatter-start(%g), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%condition, metadata={op_name="jit(train_step)/transpose(jvp())/add"}
  %sums = (f32[1024]{0}, f32[64]{0}) all-reduce(%g, %h), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%condition, metadata={op_name="jit(train_step)/reduce_sum"}
  %alone = f32[64]{0} all-reduce(%h), channel_id=4, replica_groups=[8,1]<=[8], to_apply=%condition
  %moved = f32[64]{0} collective-permute(%h), channel_id=5, source_target_pairs={{0,4},{4,0}}
  ROOT %r = f32[] constant(0)
}
"""  # noqa: E501
MESH = {"data": 2, "fsdp": 4}


def test_transfers_are_counted_once_with_whole_arrays_axes_and_turns():
  found = collectives.collectives(read(TRANSFERS), MESH)
  gather = collectives.Collective("all-gather", "recomputed", 3, 2 * 2048 * 512, ("fsdp",), (0, 1, 2, 3), True)
  assert found == [
    gather,  # two instructions of one channel, overlapped with what stands between them
    collectives.Collective("all-gather", "forward", 1, 4 * 512, ("data", "fsdp"), tuple(range(8)), True),
    collectives.Collective("reduce-scatter", "backward", 1, 4 * 1024, ("data",), (0, 4), True),
    collectives.Collective("all-reduce", "update", 1, 4 * (1024 + 64), ("data",), (0, 4), False),
    collectives.Collective("collective-permute", "update", 1, 4 * 64, ("data",), (0, 4), False),
  ]


def test_groups_in_a_form_that_is_not_known_are_an_error_not_a_guess():
  text = TRANSFERS.replace("[1,8]<=[8]", "somehow(8)")
  with pytest.raises(ValueError, match="somehow"):
    collectives.collectives(read(text), MESH)


@given(dims=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_every_way_to_write_a_group_gives_the_devices_that_numpy_gives(dims, data):
  devices = np.arange(math.prod(dims)).reshape(dims)
  chosen = sorted(data.draw(st.sets(st.integers(0, len(dims) - 1), min_size=1)))
  rest = [d for d in range(len(dims)) if d not in chosen]
  groups = devices.transpose(rest + chosen).reshape(-1, math.prod(dims[d] for d in chosen))
  order = rest + chosen
  names = ",".join(f"'axis_{d}'={size}" for d, size in enumerate(dims))
  ways = [
    f"[{groups.shape[0]},{groups.shape[1]}]<=[{','.join(map(str, dims))}]T({','.join(map(str, order))})",
    "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups.tolist()) + "}",
    f"mesh[{names}] {{" + ",".join(f"'axis_{d}'" for d in chosen) + "}",
    # The chosen axes as one, in front of the others, by the numbers of the devices.
    f"mesh['x'={groups.shape[1]},'y'={groups.shape[0]}], device_ids=([{','.join(map(str, dims))}]"
    f"T({','.join(map(str, chosen + rest))})) {{'x'}}",
  ]
  for way in ways:
    line = f"%x = f32[8]{{0}} all-reduce(%y), channel_id=1, replica_groups={way}, to_apply=%add"
    assert collectives._first_group(hlo.parse_instruction(line), devices.size) == tuple(groups[0]), way


def test_a_factor_of_an_axis_is_a_group_of_its_own():
  # a = 2 x 4: the second factor is the first four devices along a, the first factor the first and the fifth.
  assert collectives._mesh_group("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}") == (0, 2, 4, 6)
  assert collectives._mesh_group("replica_groups=mesh['a'=8,'b'=2] {'a':(1)2}") == (0, 8)


@given(
  num_in=st.integers(1, 6),
  num_kernel=st.integers(1, 6),
  stride=st.integers(1, 3),
  lhs_dilate=st.integers(1, 3),
  rhs_dilate=st.integers(1, 2),
  pad=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_a_dimension_of_a_convolution_counts_the_pairs_that_meet_an_input(
  num_in, num_kernel, stride, lhs_dilate, rhs_dilate, pad
):
  line = np.zeros(pad[0] + (num_in - 1) * lhs_dilate + 1 + pad[1])
  line[pad[0] : pad[0] + (num_in - 1) * lhs_dilate + 1 : lhs_dilate] = 1  # where an input is
  reach = (num_kernel - 1) * rhs_dilate + 1
  starts = range(0, len(line) - reach + 1, stride)
  expected = sum(line[start : start + reach : rhs_dilate].sum() for start in starts)
  found = program._meetings(
    num_in, num_kernel, len(starts), stride=stride, lhs_dilate=lhs_dilate, rhs_dilate=rhs_dilate, pad_low=pad[0]
  )
  assert found == expected


def test_the_projection_to_heads_that_a_tpu_writes_as_a_convolution_is_a_product():
  text = """
ENTRY %main.3 (x: bf16[2048,2048,1], w: bf16[2048,32,64]) -> bf16[2048,32,64] {
  %x = bf16[2048,2048,1]{1,0,2} parameter(0)
  %w = bf16[2048,32,64]{2,0,1} parameter(1)
  ROOT %c = bf16[2048,32,64]{0,2,1} convolution(%x, %w), window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
}
"""
  assert read(text).flops_of("main.3", "c") == 2 * 2048 * 2048 * 32 * 64


@pytest.mark.parametrize(
  ("line", "products"),
  [
    ('%k = f32[8]{0} custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="x/splash_mha_fwd_segmented"}', 2),
    ('%k = f32[8]{0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "flash_forward"}', 2),
    ('%k = f32[8]{0} custom-call(%q), custom_call_target="__cudnn$fmhaSoftmaxBackward"', 5),
    ('%k = f32[8]{0} custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="x/somebody_elses"}', None),
    ('%k = f32[8]{0} custom-call(%q), custom_call_target="AllocateBuffer"', 0),
    ("%k = f32[8]{0} add(%q, %q)", 0),
  ],
)
def test_a_kernel_is_known_by_its_name_or_said_to_be_unknown(line, products):
  assert program.kernel_products(hlo.parse_instruction(line)) == products


@pytest.mark.parametrize("frozen", [(r"layers\..*",), (r"layers\..*", "embedding")])
def test_what_is_frozen_saves_the_flops_that_the_formula_says(tiny_spec, random_batch, frozen):
  rows, row_len = 2, 16
  untied = dataclasses.replace(tiny_spec, tied=False)
  mesh = mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    params, to_all = transformer.abstract_params(untied), ((".*", 1.0),)
    tx = factory.optimizer(params, frozen=frozen)
    leaves = optimizer.apply_rules(params, decay_rules=to_all, rate_rules=to_all, layer_rates=(), frozen=frozen, stages=("all",))
    settings = factory.SETTINGS._replace(attention="plain")
    options = {"settings": settings, "source_weights": (1.0, 1.0), "microbatches": 1, "z_loss": 0.0}
    update = factory.train_step(untied, tx, **options, hold=functools.partial(optimizer.hold, leaves=leaves))
    batch = mesh_lib.to_global(mesh, random_batch(0, rows=rows, row_len=row_len))
    text = jax.jit(update).lower(state.abstract(untied, tx), batch, 1.0).compile().as_text()
  found = read(text)
  counted = sum(runs * found.flops_of(c, i.name) for c, i, runs in found.top_level())
  _, palm = spec_lib.flops_per_token(untied, row_len, frozen=frozen)
  assert counted == pytest.approx(palm * rows * row_len, rel=0.01)


def test_the_real_step_on_cpu_has_the_flops_of_the_formula_and_moves_its_parameters(tiny_spec, random_batch):
  # An independent check of parser and formula: remat none, plain attention, logits at once, so nothing is computed twice.
  mesh = mesh_lib.make_mesh(data=2, fsdp=4, context=1, tensor=1)
  rows, row_len = 8, 16
  with jax.set_mesh(mesh):
    tx = factory.optimizer(transformer.abstract_params(tiny_spec))
    settings = factory.SETTINGS._replace(attention="plain")
    update = factory.train_step(tiny_spec, tx, settings=settings, source_weights=(1.0, 1.0), microbatches=1, z_loss=0.0)
    batch = mesh_lib.to_global(mesh, random_batch(0, rows=rows, row_len=row_len))
    text = jax.jit(update).lower(state.abstract(tiny_spec, tx), batch, 1.0).compile().as_text()
  found = read(text)
  counted = sum(runs * found.flops_of(c, i.name) for c, i, runs in found.top_level())
  _, palm = spec_lib.flops_per_token(tiny_spec, row_len, frozen=())
  assert counted == pytest.approx(palm * rows * row_len / 8, rel=0.01)
  moved = collectives.collectives(found, dict(mesh.shape))
  layers = tiny_spec.num_layers
  gathered = [c for c in moved if c.op == "all-gather" and c.turns == layers and c.axes == ("fsdp",)]
  matrices = (sum(spec_lib.matmul_leaves(tiny_spec).values()) - tiny_spec.vocab_size * tiny_spec.width) // layers
  norms = 2 * tiny_spec.width
  forward = sum(c.num_bytes for c in gathered if c.phase == "forward")
  assert forward == 4 * (matrices + norms)  # every parameter of a layer, once, in float32 here
  assert {c.axes for c in moved} <= {("fsdp",), ("data",), ("data", "fsdp")}
