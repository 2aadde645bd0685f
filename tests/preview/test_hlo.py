"""Text of compiled programs -> computations: shapes, layouts, what an instruction says, and where it ends."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from cpt_jax.preview import hlo


def test_a_tpu_pads_its_tiles():
  line = "  %x = (bf16[3,5,130]{1,2,0:T(8,128)(2,1)}, f32[8,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%y)"
  result, other, context = hlo.parse_instruction(line).shape
  assert result == hlo.Shape("bf16", (3, 5, 130), (1, 2, 0), (8, 128), 0)
  assert (result.num_bytes, result.padded_bytes) == (2 * 3 * 5 * 130, 2 * 3 * 128 * 136)
  assert (other.space, other.padded_bytes) == (1, 4 * 8 * 128)
  assert context == hlo.Shape("u32", (), (), (), 2)


@given(dims=st.lists(st.integers(1, 40), min_size=2, max_size=4), data=st.data())
def test_padding_is_what_numpy_needs_to_fill_whole_tiles(dims, data):
  order = data.draw(st.permutations(range(len(dims))))
  rows, columns = data.draw(st.sampled_from([(8, 128), (4, 128), (16, 8)]))
  text = f"%x = f32[{','.join(map(str, dims))}]{{{','.join(map(str, order))}:T({rows},{columns})}} add(%y, %z)"
  inner_last = np.zeros(dims).transpose(order[::-1])
  pads = [(0, 0)] * (len(dims) - 2) + [(0, -inner_last.shape[-2] % rows), (0, -inner_last.shape[-1] % columns)]
  (shape,) = hlo.parse_instruction(text).shapes
  assert shape.padded_bytes == 4 * np.pad(inner_last, pads).size
  assert shape.num_bytes == 4 * math.prod(dims)


def test_what_has_no_tiles_of_two_dimensions_is_not_padded():
  for layout in ("{0}", "", "{0:T(128)}", "{0:T(1024)(128)(2,1)S(3)}"):
    (shape,) = hlo.parse_instruction(f"%x = s32[5]{layout} copy(%y)").shapes
    assert shape.padded_bytes == shape.num_bytes == 20
  (shape,) = hlo.parse_instruction("%x = s32[3,5]{1,0:T(128)} copy(%y)").shapes
  assert shape.padded_bytes == shape.num_bytes == 60


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "bfloat16", "float16", "complex64", "float8_e5m2"])
def test_the_bytes_of_a_number_are_those_of_jax(dtype):
  text = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((3, 5), dtype)).compile().as_text()
  (result,) = {i.shapes[0] for i in hlo.parse(text).computations[hlo.parse(text).entry].values() if i.op == "parameter"}
  assert result.num_bytes == 15 * jnp.dtype(dtype).itemsize


def test_numbers_of_less_than_a_byte_share_bytes_and_tokens_have_none():
  shapes = hlo.parse_instruction("%x = (s4[3,5]{1,0}, u4[4]{0}, token[], f4e2m1fn[2]{0}) custom-call(%y)").shapes
  assert [shape.num_bytes for shape in shapes] == [8, 2, 0, 1]


def nested(shape):
  """A shape as XLA prints it, with the numbers that it puts before the parts of long tuples."""
  if isinstance(shape, hlo.Shape):
    dims, order = (",".join(map(str, numbers)) for numbers in (shape.dims, shape.order))
    return f"{shape.dtype}[{dims}]{{{order}{f':S({shape.space})' if shape.space else ''}}}"
  marks = (f"/*index={n}*/" if n and n % 2 == 0 else "" for n in itertools.count())
  return f"({', '.join(mark + nested(part) for mark, part in zip(marks, shape, strict=False))})"


ARRAYS = st.builds(
  lambda dtype, dims, space: hlo.Shape(dtype, tuple(dims), tuple(range(len(dims))), (), space),
  st.sampled_from(["f32", "bf16", "pred", "s8"]),
  st.lists(st.integers(0, 99), max_size=3),
  st.sampled_from([0, 1, 5]),
)


@given(shape=st.recursive(ARRAYS, lambda part: st.lists(part, max_size=4).map(tuple), max_leaves=8))
def test_a_shape_is_read_as_it_is_printed(shape):
  i = hlo.parse_instruction(f"  ROOT %the.root-1 = {nested(shape)} tuple(%a, %b.1), metadata={{}}")
  assert i.shape == shape
  assert len(i.shapes) == nested(shape).count("[")
  assert (i.name, i.op, i.operands, i.is_root, i.attributes) == ("the.root-1", "tuple", ("a", "b.1"), True, "metadata={}")


def test_an_instruction_says_what_it_calls_and_where_it_comes_from():
  line = (
    "%c = f32[] conditional(%p, %a, %b), true_computation=%yes, false_computation=%no, branch_computations={%one, %two.1}, "
    'frontend_attributes={a={"b,c"},d=[1,2]}, index=12, metadata={op_name="jit(f)/cond[x=(1,)]" source_line=3}'
  )
  i = hlo.parse_instruction(line)
  assert list(i.called()) == ["yes", "no", "one", "two.1"]
  assert list(i.called("branch_computations")) == ["one", "two.1"]
  assert i.attribute("frontend_attributes") == '{a={"b,c"},d=[1,2]}'
  assert (i.attribute("index"), i.attribute("dex"), i.attribute("dimensions")) == ("12", "", "")
  assert (i.op_name, i.kernel, i.is_root) == ("jit(f)/cond[x=(1,)]", "", False)
  assert hlo.parse_instruction('%k = f32[] custom-call(), custom_call_target="a$b"').kernel == "a$b"


def test_an_instruction_may_take_several_lines():
  broken = """custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/splash_mha_fwd"}"""
  text = f"ENTRY %m (q: f32[8]) -> f32[8] {{\n  %q = f32[8]{{0}} parameter(0)\n  %k = f32[8]{{0}} custom-call(%q), {broken}\n"
  body = hlo.parse(text + "  ROOT %r = f32[8]{0} copy(%k)\n}\n").computations["m"]
  assert list(body) == ["q", "k", "r"]
  assert body["k"].op_name == "jit(f)/splash_mha_fwd"


@pytest.mark.parametrize("line", ["}", "%x = f32[8]{0}", "%x = 8 add(%y)", "%x = f32[8]{0} add(%y, (%z)"])
def test_what_is_no_instruction_is_an_error(line):
  with pytest.raises(ValueError, match=r"not an instruction|not a shape|closing bracket"):
    hlo.parse_instruction(line)


def test_a_program_that_the_compiler_made_is_read_whole():
  def loss(w, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, w)

  shapes = (jax.ShapeDtypeStruct((3, 8, 8), "float32"), jax.ShapeDtypeStruct((4, 8), "float32"))
  text = jax.jit(loss, donate_argnums=1).lower(*shapes).compile().as_text()
  found = hlo.parse(text)
  assert found.is_scheduled and found.aliased == {0}
  assert len(found.computations) == sum(line.endswith("{") and " = " not in line for line in text.splitlines())
  assert sum(map(len, found.computations.values())) == sum(" = " in line.split("metadata")[0] for line in text.splitlines()[1:])
  entry = found.computations[found.entry]
  assert {i.shape.dims for i in entry.values() if i.op == "parameter"} == {(3, 8, 8), (4, 8)}
  places = {name: n for n, name in enumerate(found.computations)}
  for name, body in found.computations.items():
    assert sum(i.is_root for i in body.values()) == 1
    for n, i in enumerate(body.values()):
      assert set(i.operands) <= set(list(body)[:n])  # made before they are read
      assert all(places[called] < places[name] for called in i.called())


def test_a_part_of_a_program_has_no_header():
  assert hlo.parse("\n%f (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n")[1:] == ("", False, frozenset())
