"""Placement: sizes, networks, rules, rows to global arrays, and the same loss and gradients on every mesh."""

import dataclasses
import functools
import itertools
import math

import factory
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from cpt_jax import trees
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import loss, transformer
from cpt_jax.model.spec import ModelSpec
from cpt_jax.stream.batch import Batch

SPEC = ModelSpec("qwen3", 32, 16, 2, 4, 2, 6, 24, max_positions=64, qk_norm=True, qkv_bias=True, windows=(0, 5), init_std=0.3)
B, T, M = 8, 16, 3


def make(data=1, fsdp=1, context=1, tensor=1):
  devices = jax.devices()[: data * fsdp * context * tensor]
  return mesh_lib.make_mesh(data=data, fsdp=fsdp, context=context, tensor=tensor, devices=devices)


def batch() -> Batch:
  random = np.random.default_rng(0)
  segments_BT = np.repeat(np.array([[1] * 5 + [2] * 8 + [0] * 3], np.int32), B, axis=0)
  segments_BT[0] = 1
  return Batch(
    tokens_BT=random.integers(SPEC.vocab_size, size=(B, T)).astype(np.int32),
    targets_BT=random.integers(SPEC.vocab_size, size=(B, T)).astype(np.int32),
    weights_BT=(segments_BT > 0).astype(np.float32),
    segments_BT=segments_BT,
    positions_BT=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    source_B=random.integers(M, size=B).astype(np.int32),
  )


@functools.partial(jax.jit, static_argnames=("remat", "chunk", "attention"))
def loss_and_gradient(params, batch, *, remat, chunk, attention):
  def objective(params):
    hidden_BTD = factory.hidden(
      params,
      SPEC,
      batch.tokens_BT,
      batch.positions_BT,
      batch.segments_BT,
      compute_dtype=jnp.float32,
      remat=remat,
      attention=attention,
    )
    return loss.objective(params, SPEC, hidden_BTD, batch, source_weights=range(M), z_loss=0.1, chunk=chunk)

  return jax.grad(objective, has_aux=True)(params)


@pytest.fixture(scope="module")
def one_device():
  params = transformer.init(SPEC, jax.random.key(0))
  return params, loss_and_gradient(params, batch(), remat="none", chunk=0, attention="plain")


@pytest.mark.parametrize(
  ("sizes", "attention"),
  [
    (dict(), "blockwise"),
    pytest.param(dict(data=8), "blockwise", marks=pytest.mark.slow),
    pytest.param(dict(fsdp=8), "plain", marks=pytest.mark.slow),
    pytest.param(dict(data=2, fsdp=2, tensor=2), "blockwise", marks=pytest.mark.slow),
    (dict(fsdp=2, context=2, tensor=2), "blockwise"),
    (dict(context=4, tensor=2), "plain"),  # too many for the heads: keys and values are gathered
    (dict(data=4, context=2), "auto"),  # each device has heads of its own
  ],
  ids=str,
)
def test_loss_and_gradients_equal_those_of_one_device(sizes, attention, one_device):
  one_params, (one_gradient, one_sums) = one_device
  mesh = make(**sizes)
  with jax.set_mesh(mesh):
    params = transformer.init(SPEC, jax.random.key(0))
    abstract = transformer.abstract_params(SPEC)
    gradient, sums = loss_and_gradient(params, mesh_lib.to_global(mesh, batch()), remat="dots", chunk=3, attention=attention)
    for path, expected in trees.paths(abstract).items():
      found, found_gradient = trees.paths(params)[path], trees.paths(gradient)[path]
      assert found.sharding == expected.sharding, path
      assert found_gradient.sharding.is_equivalent_to(expected.sharding, found.ndim), path
      np.testing.assert_allclose(found, trees.paths(one_params)[path], rtol=1e-5, atol=1e-7, err_msg=path)
  for name in (*loss.Sums._fields, "loss", "z_loss", "tokens"):
    np.testing.assert_allclose(getattr(sums, name), getattr(one_sums, name), rtol=1e-5, err_msg=name)
  for path, expected in trees.paths(one_gradient).items():
    np.testing.assert_allclose(trees.paths(gradient)[path], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=path)


def test_rows_may_come_as_they_are(one_device):
  params, (_, expected) = one_device
  with jax.set_mesh(make(data=2, context=2)):
    _, sums = loss_and_gradient(params, batch(), remat="none", chunk=0, attention="plain")
  np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-5)


def test_eval_shape_knows_where_everything_lives():
  mesh = make(fsdp=4, tensor=2)
  shardings = mesh_lib.batch_shardings(mesh)
  with jax.set_mesh(mesh):
    abstract = transformer.abstract_params(SPEC)
    gradient, sums = jax.eval_shape(
      functools.partial(loss_and_gradient, remat="none", chunk=0, attention="auto"),
      abstract,
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[x.ndim]), batch()),
    )
    assert gradient["layers"]["w_gate"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert gradient["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert all(x.sharding.spec == PartitionSpec(None) for x in sums)


def test_parameters_are_described_without_devices():
  with jax.sharding.use_abstract_mesh(mesh_lib.abstract_mesh(data=2, fsdp=64, context=1, tensor=8)):
    wq = transformer.abstract_params(SPEC)["layers"]["wq"]
  assert wq.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
  assert dict(wq.sharding.mesh.shape) == dict(data=2, fsdp=64, context=1, tensor=8)


def test_without_a_mesh_everything_stays_where_it_is():
  x = jnp.ones((2, 3))
  assert mesh_lib.constrain(x, "batch", "embed") is x
  assert mesh_lib.gathered(x, "vocab", "embed") is x
  assert mesh_lib.out("batch") is None
  assert mesh_lib.current() is None
  assert mesh_lib.axis_size("fsdp") == 1
  assert mesh_lib.per_device(math.sqrt, inputs=(("batch",),), output=("batch",)) is math.sqrt


def test_every_parameter_axis_has_a_rule():
  for _, axes in jax.tree.leaves(transformer.declared(SPEC), is_leaf=lambda x: isinstance(x, tuple)):
    assert set(axes) <= set(mesh_lib.LOGICAL_RULES)


@hypothesis.given(*[st.integers(1, 4)] * 4, st.integers(0, 4))
def test_minus_one_takes_the_rest(data, fsdp, context, tensor, hidden):
  sizes = dict(zip(mesh_lib.AXES, (data, fsdp, context, tensor), strict=True))
  asked = {name: -1 if index == hidden else size for index, (name, size) in enumerate(sizes.items())}
  assert mesh_lib.axis_sizes(**asked, num_devices=math.prod(sizes.values())) == sizes


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((3, 1, 1, 1), r"mesh\.data=3.*they make 3, not the 8 devices"),
    ((-1, 3, 1, 1), r"the fixed axes make 3, which does not divide the 8 devices"),
    ((-1, -1, 1, 1), r"mesh\.data and mesh\.fsdp are -1; one axis at most"),
    ((0, 1, 1, -1), r"mesh\.data=0: a mesh axis holds 1 or more devices"),
  ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
  with pytest.raises(ConfigError, match=message):
    mesh_lib.axis_sizes(**dict(zip(mesh_lib.AXES, sizes, strict=True)), num_devices=8)


@dataclasses.dataclass(frozen=True)
class Fake:
  """What `arrange` looks at in a device."""

  id: int
  platform: str = "gpu"
  device_kind: str = ""
  slice_index: int | None = None
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0


def hosts_of(num, *, each, platform="gpu"):
  return [Fake(id=host * each + i, platform=platform, slice_index=host) for host in range(num) for i in range(each)]


def slices_of(num, *, torus=(4, 4, 4)):
  """Slices of v5p."""
  places = enumerate(itertools.product(range(num), *map(range, torus)))
  return [Fake(i, "tpu", "TPU v5p", index, coords) for i, (index, *coords) in places]


def arranged(devices, data=1, fsdp=1, context=1, tensor=1):
  found = mesh_lib.arrange(devices, dict(data=data, fsdp=fsdp, context=context, tensor=tensor))
  assert found.shape == (data, fsdp, context, tensor) and {device.id for device in found.flat} == set(range(len(devices)))
  return found


@hypothesis.given(st.permutations(hosts_of(2, each=4)), st.sampled_from([(2, 4, 1, 1), (4, 1, 1, 2), (2, 1, 4, 1), (8, 1, 1, 1)]))
def test_replicas_lie_on_hosts_and_the_rest_inside(devices, sizes):
  found = arranged(devices, *sizes)
  for replica in found:
    assert len({device.slice_index for device in replica.flat}) == 1
  order = [device.id for device in found.flat]
  assert order == sorted(order), "neighbours of one host are neighbours on the inner axes, whatever the order they came in"


def test_a_model_may_fill_several_hosts_of_gpus_but_its_layers_do_not_cross():
  found = arranged(hosts_of(4, each=8), data=2, fsdp=8, tensor=2)
  assert [{d.slice_index for d in replica.flat} for replica in found] == [{0, 1}, {2, 3}]
  for group in found.reshape(-1, 2):  # of tensor
    assert len({device.slice_index for device in group}) == 1
  with pytest.raises(ConfigError, match=r"mesh\.context=2 x mesh\.tensor=8 would cross between hosts: .* 4 hosts .* of 8"):
    arranged(hosts_of(4, each=8), data=2, context=2, tensor=8)


@pytest.mark.parametrize("sizes", [(2, 64, 1, 1), (4, 8, 1, 4), (2, 16, 2, 2), (2, 32, 1, 2)])
def test_slices_are_replicas_and_axes_lie_along_the_torus(sizes):
  found = arranged(slices_of(2), *sizes)
  for number, half in enumerate(np.split(found, 2)):
    assert {device.slice_index for device in half.flat} == {number}
  for group in found.reshape(-1, sizes[2] * sizes[3]):  # what shares a layer's middle lies in a box that holds no other chip
    sides = [1 + max(c) - min(c) for c in zip(*(device.coords for device in group), strict=True)]
    assert math.prod(sides) == len(group)


def test_slices_that_replicas_do_not_fill_are_named():
  with pytest.raises(ConfigError, match=r"mesh\.data=1: the devices are 2 slices of 64, .* use a multiple of 2"):
    arranged(slices_of(2), fsdp=128)
  with pytest.raises(ConfigError, match="the 2 slices or hosts have 8, 4 devices"):
    arranged(hosts_of(2, each=8)[:12], fsdp=12)


def test_on_one_network_devices_keep_their_order():
  for devices in (jax.devices()[::-1], [Fake(id=i, platform="gpu", slice_index=3) for i in (1, 0, 2, 3)]):
    found = mesh_lib.arrange(devices, dict(data=1, fsdp=len(devices) // 2, context=1, tensor=2))
    assert list(found.flat) == list(devices)


def test_check_names_everything_that_the_mesh_does_not_divide():
  problems = Problems()
  good = dict(batch_rows=12, microbatches=2, row_len=16, eval_rows=6)
  mesh_lib.check(dict(data=3, fsdp=2, context=4, tensor=2), SPEC, **good, problems=problems)
  assert problems.lines == []
  bad = dict(batch_rows=10, microbatches=2, row_len=15, eval_rows=4)
  mesh_lib.check(dict(data=1, fsdp=3, context=2, tensor=5), SPEC, **bad, problems=problems)
  found = "\n".join(problems.lines)
  for part in ("5 rows of a microbatch", "eval.batch_rows=4", "mesh.context=2 does not divide data.row_len (15)", "width (16)"):
    assert part in found
  for part in ("heads (4)", "key/value heads (2)", "mlp width (24)", "vocabulary size (32)"):
    assert f"mesh.tensor=5 does not divide the model's {part}" in found
  mesh_lib.check(dict(data=1, fsdp=1, context=1, tensor=1), SPEC, **{**bad, "microbatches": 3}, problems=problems)
  assert "train.microbatches=3 does not divide train.batch_rows=10" in problems.lines


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, context=2, tensor=2), dict(fsdp=4, context=2)], ids=str)
def test_rows_become_global_arrays(sizes):
  mesh = make(**sizes)
  found = mesh_lib.to_global(mesh, batch())
  for name, array, expected in zip(Batch._fields, found, batch(), strict=True):
    np.testing.assert_array_equal(array, expected, err_msg=name)
    assert array.sharding == mesh_lib.batch_shardings(mesh)[array.ndim]
  assert mesh_lib.local_rows(mesh, num_rows=B) == slice(0, B)
