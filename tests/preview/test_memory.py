"""Memory by class: a program read by hand, the compiler's totals, and what the dry run says of it."""

import dataclasses
import subprocess

import jax
import pytest

from cpt_jax import config as config_lib
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.preview import buffers, dry_run, hlo, memory
from cpt_jax.training import inputs as inputs_lib, optimizer, state

SPEC = ModelSpec("llama", 384, 64, 5, 4, 2, 16, 192, max_positions=512)
ROWS, ROW_LEN = 4, 64
ONE = dict.fromkeys(mesh_lib.AXES, 1)

PROGRAM = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, entry_computation_layout={...}

%fused (p0: f32[100]) -> f32[100] {
  %p0 = f32[100]{0} parameter(0)
  ROOT %n = f32[100]{0} negate(%p0)
}

%body (state: (s32[], f32[100])) -> (s32[], f32[100]) {
  %state = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[100]{0} get-tuple-element(%state), index=1
  %wide = f32[300]{0} broadcast(%x), dimensions={0}, metadata={op_name="jit(f)/while/body/wide"}
  %less = f32[100]{0} slice(%wide), slice={[0:100]}
  ROOT %next = (s32[], f32[100]{0}) tuple(%i, %less)
}

%condition (state.1: (s32[], f32[100])) -> pred[] {
  %state.1 = (s32[], f32[100]{0}) parameter(0)
  ROOT %go = pred[] constant(false)
}

ENTRY %main (a: f32[100]) -> (f32[100], /*index=1*/f32[50]) {
  %a = f32[100]{0} parameter(0)
  %zero = s32[] constant(0)
  %b = f32[100]{0} fusion(%a), kind=kLoop, calls=%fused
  %c = f32[100]{0} fusion(%b), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/c"}
  %hosted = f32[1000]{0:S(5)} copy(%c)
  %s = (s32[], f32[100]{0}) tuple(%zero, %c)
  %w = (s32[], f32[100]{0}) while(%s), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %x.1 = f32[100]{0} get-tuple-element(%w), index=1
  %second = f32[50]{0} slice(%x.1), slice={[0:50]}
  %first = f32[100]{0} copy(%x.1)
  ROOT %out = (f32[100]{0}, f32[50]{0}) tuple(%first, %second)
}
"""


def test_the_peak_of_a_program_that_can_be_read_by_hand():
  # In the loop: its state of 100 numbers (c wrote over b), and 300 more. Not: the argument, the host's copy, the loop's result.
  found = buffers.at_peak(hlo.parse(PROGRAM))
  assert sorted((b.dims, b.num_bytes, b.op_name) for b in found if b.num_bytes) == [
    ((100,), 400, "jit(f)/c"),
    ((300,), 1200, "jit(f)/while/body/wide"),
  ]


def settings(**keys):
  c = config_lib.default()
  c.model.attention, c.model.loss_chunk = "plain", 0
  c.train.batch_rows, c.data.row_len = ROWS, ROW_LEN
  for key, value in keys.items():
    group, name = key.split("__")
    c[group][name] = value
  return c


def of_step(spec=SPEC, **keys):
  with jax.set_mesh(mesh_lib.make_mesh(**ONE, devices=jax.devices()[:1])):
    return memory.of_step(settings(**keys), spec, source_weights=(1.0,))


@pytest.fixture(scope="module")
def step_memory():
  return of_step(model__remat="dots")


def test_the_classes_add_up_to_what_the_compiler_says(step_memory):
  with jax.set_mesh(mesh_lib.make_mesh(**ONE, devices=jax.devices()[:1])):
    tx = optimizer.from_config(settings(), SPEC)
    abstract = state.abstract(SPEC, tx)
  params, moments = (
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (abstract.params, abstract.opt_state)
  )
  m = step_memory
  assert (m.parameters, m.moments, m.donated) == (params, moments, params + moments + 4)
  assert m.batch == ROWS * ROW_LEN * 5 * 4 + ROWS * 4 + 4 + 4  # five arrays of positions, the sources, the rate, the step
  assert abs(m.packing) < 0.15 * m.total
  parts = m._asdict()
  assert sum(parts[name] for name in parts if name not in ("donated", "host")) == m.total
  expected = SPEC.num_layers * ROWS * ROW_LEN * transformer.kept_bytes(SPEC, "dots", itemsize=4, tensor=1)
  assert m.kept == pytest.approx(expected - SPEC.num_layers * ROWS * ROW_LEN * 4 * SPEC.num_heads, rel=0.02)  # plain: no log sums


def test_each_class_falls_by_what_makes_it_smaller(step_memory):
  less = of_step(model__remat="full", optimizer__mu_dtype="bfloat16")
  assert less.kept == pytest.approx(SPEC.num_layers * ROWS * ROW_LEN * SPEC.width * 4, rel=0.02)
  assert less.moments == pytest.approx(0.75 * step_memory.moments, rel=0.001)
  assert less.total < step_memory.total


PARTS = dict(model__remat="dots", train__batch_rows=2 * ROWS, train__microbatches=2)


@pytest.fixture(scope="module")
def parts_memory():
  return of_step(**PARTS)


def test_a_microbatch_keeps_what_a_batch_of_its_size_keeps(step_memory, parts_memory):
  parts = parts_memory
  assert parts.kept == pytest.approx(step_memory.kept, rel=0.03)
  assert parts.gradients > 1.8 * parts.parameters  # of the part, and their sum; the embedding's comes last


def test_the_logits_are_the_loss_where_they_are_the_most():
  wide = dataclasses.replace(SPEC, vocab_size=8000, num_layers=2)
  logits = ROWS * ROW_LEN * wide.vocab_size * 4
  assert logits <= of_step(wide, model__remat="full").loss <= 3 * logits


def test_bfloat16_sums_of_gradients_take_half(parts_memory):
  full, half = parts_memory, of_step(**PARTS, train__accumulate_dtype="bfloat16")
  assert 0.4 * full.parameters < full.gradients - half.gradients <= 0.5 * full.parameters
  assert half.total < full.total


def test_a_mesh_that_this_process_has_not_is_compiled_by_another():
  sizes = {"data": 2, "fsdp": 8, "context": 1, "tensor": 1}
  found = memory.of_step_elsewhere(settings(train__batch_rows=16), SPEC, source_weights=(1.0,), sizes=sizes)
  with jax.sharding.use_abstract_mesh(mesh_lib.abstract_mesh(**sizes)):
    expected = sum(map(memory.shard_bytes, jax.tree.leaves(transformer.abstract_params(SPEC))))
  assert found.parameters == expected and found.total > 4 * expected


def test_what_to_change_names_the_largest_class_and_keys_that_can_change():
  nothing = memory.Memory(*[1] * len(memory.Memory._fields))
  c = settings(model__remat="dots", train__microbatches=2)
  assert memory.what_to_change(nothing._replace(kept=9), c).startswith("model.remat='attention_dots', or train.microbatches=4")
  c.model.loss_chunk = 512
  assert "model.loss_chunk=256" in memory.what_to_change(nothing._replace(loss=9), c)
  assert memory.what_to_change(nothing._replace(moments=9), c).startswith("more devices along mesh.fsdp, or optimizer.mu_dtype")
  c.optimizer.mu_dtype, c.model.remat, c.train.microbatches = "bfloat16", "full", ROWS
  assert "mu_dtype" not in memory.what_to_change(nothing._replace(moments=9), c)
  assert memory.what_to_change(nothing._replace(kept=9), c).startswith("a smaller data.row_len")


def test_the_estimate_by_arithmetic_is_of_one_device_and_microbatch():
  c = settings(train__microbatches=2, model__attention="auto")
  whole = memory.kept_bytes(c, SPEC, ONE, 2)
  assert whole == SPEC.num_layers * ROWS // 2 * ROW_LEN * transformer.kept_bytes(SPEC, "none", itemsize=2, tensor=1)
  assert memory.kept_bytes(c, SPEC, {**ONE, "fsdp": 2}, 2) == whole // 2


@pytest.fixture
def describe(tiny_plan, monkeypatch):
  """Runs the memory part of a dry run in this process and gives the words that it says."""
  said = []
  monkeypatch.setattr(dry_run.console, "say", said.append)
  monkeypatch.setattr(dry_run.console, "table", lambda title, *_, **__: said.append(title))

  def run(sizes=ONE, **keys):
    c = tiny_plan.copy_and_resolve_references()
    with c.unlocked():
      for key, value in keys.items():
        group, name = key.split("__")
        c[group][name] = value
    inputs = inputs_lib.open_inputs(c)
    with jax.sharding.use_abstract_mesh(mesh_lib.abstract_mesh(**sizes)):
      abstract = state.abstract(inputs.spec, inputs.tx)
    dry_run._memory(inputs, abstract, sizes)
    return "\n".join(said)

  return run


def test_the_dry_run_says_whether_it_fits_and_what_to_change(describe, monkeypatch):
  of_step, compiled = memory.of_step, []
  monkeypatch.setattr(memory, "of_step", lambda *a, **k: (compiled or compiled.append(of_step(*a, **k)) or compiled)[0])
  monkeypatch.setattr(memory, "device_bytes", lambda: 1000)
  text = describe(model__remat="full_offload")
  assert "compiled for 1 x cpu" in text and "does NOT fit: a device has 1000 B. Try " in text
  assert "remat    full_offload: a CPU's memory is the host's" in text
  monkeypatch.setattr(memory, "device_bytes", lambda: 2**40)
  assert "fits: a device has 1.00 TiB" in describe(model__remat="full_offload")


def test_what_cannot_be_compiled_is_estimated_and_the_reason_is_said(describe, monkeypatch):
  def fails(*_, **__):
    raise subprocess.CalledProcessError(1, "python", stderr=b"Traceback ...\nValueError: no\n")

  monkeypatch.setattr(memory, "of_step_elsewhere", fails)
  text = describe({**ONE, "data": 16})
  assert "by arithmetic, since the step did not compile for 16 CPU devices: ValueError: no" in text
  assert "memory of one device (the layer at work" in text
