"""Steps compiled for chips that are not there: what can be told without a compiler. Those that compile are in test_aot.py."""

import re

import jax
import pytest

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.devices import chips, environment, mesh as mesh_lib
from cpt_jax.model import spec as spec_lib
from cpt_jax.preview import absent_chips, memory
from cpt_jax.training import inputs as inputs_lib, start

RECIPES = ["llama3_1b_1xh100", "llama3_8b_8xh100", "llama3_8b_v5e_16", "llama3_8b_v5p_64", "llama3_70b_v5p_512"]
RECIPES += ["llama3_70b_256xh100"]


def command(path):
  """(config, topology) of the command in a recipe's docstring."""
  match = re.search(r"cpt compile --config=(\S+) --topology=(\S+)", path.read_text(encoding="utf-8"))
  assert match, f"{path}: its docstring says how it is compiled"
  return match.groups()


def test_these_are_the_recipes(root):
  assert sorted(p.stem for p in (root / "configs/recipes").glob("*.py")) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run_but_for_its_sources_and_its_mesh_divides_its_topology(root, monkeypatch, name):
  monkeypatch.chdir(root)
  path = root / f"configs/recipes/{name}.py"
  found, text = command(path)
  assert root / found == path
  topology = chips.parse_topology(text)
  resolved = config_lib.resolve(config_lib.load_file(str(path)), needs_data=False)
  spec, _ = start.load_spec(start.choose_base(resolved))
  inputs_lib.check_mesh(mesh_lib.axis_sizes(**resolved.mesh, num_devices=topology.num_chips), spec, resolved)
  with pytest.raises(ConfigError, match=r"data\.sources is empty") as error:
    config_lib.resolve(config_lib.load_file(str(path)))
  assert len(error.value.lines) == 1  # nothing else is missing
  assert "verdict       fits: " in path.read_text(encoding="utf-8")


def test_the_shapes_are_those_of_the_models_that_they_are_named_after(root):
  sizes = {"llama3_1b": 1_235_814_400, "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496}  # the models' own pages
  for name, num_parameters in sizes.items():
    spec = spec_lib.from_hf(spec_lib.load_hf_config(root / f"configs/architectures/{name}.json"))
    assert spec_lib.num_parameters(spec) == num_parameters


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.08G) exceeds available HBM"
      " (15.75G).",
      (int(36.08 * 2**30), int(15.75 * 2**30)),
    ),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 96.12G of 95.74G hbm.", (int(96.12 * 2**30), int(95.74 * 2**30))),
  ],
)
def test_a_compiler_that_runs_out_of_memory_is_a_verdict_with_its_figures(message, expected):
  found = absent_chips.read_refusal(message)
  assert (found.needed_bytes, found.limit_bytes) == expected
  assert found.message == message


@pytest.mark.parametrize(
  "message",
  [
    "INTERNAL: Mosaic failed to compile",
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: ... Scoped allocation with size 16.80M and limit 16.00M exceeded",
  ],
)
def test_any_other_error_of_a_compiler_stays_one(message):
  assert absent_chips.read_refusal(message) is None


@pytest.mark.parametrize(("topology", "extra"), [("v5e:4x4", "tpu-aot"), ("h100:1x8", "gpu-aot")])
def test_a_compiler_that_is_not_there_is_named_with_its_extra(monkeypatch, topology, extra):
  monkeypatch.setattr(absent_chips, "_is_installed", lambda module: False)
  with pytest.raises(ConfigError, match=re.escape(f"pip install 'cpt_jax[{extra}]'")):
    absent_chips.topology_devices(chips.parse_topology(topology))


def test_every_gpu_of_the_table_has_a_description_for_its_compiler():
  for chip in chips.CHIPS:
    if chip.platform == "cuda":
      text = absent_chips.gpu_target(chip)
      assert f"device_memory_size: {chip.hbm_bytes} " in text
      assert text.count("{") == text.count("}")


def test_the_batch_is_the_one_that_the_loader_hands_over(random_batch):
  mesh = mesh_lib.make_mesh(data=2, fsdp=4, context=1, tensor=1)
  c = config_lib.default()
  c.train.batch_rows, c.data.row_len = 8, 16
  expected = mesh_lib.to_global(mesh, random_batch(0, rows=8, row_len=16))
  for name, leaf in memory.abstract_batch(c, mesh)._asdict().items():
    array = getattr(expected, name)
    assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype), name
    assert leaf.sharding.is_equivalent_to(array.sharding, array.ndim), name


def test_a_run_holds_parameters_two_moments_and_the_base_in_half_precision(tiny_spec):
  mesh = mesh_lib.make_mesh(data=2, fsdp=4, context=1, tensor=1)
  found = absent_chips.held(absent_chips.Target(chips.parse_topology("h100:1x8"), mesh, (), config_lib.default(), tiny_spec))
  params = 4 * spec_lib.num_parameters(tiny_spec) // 4  # every leaf has a width, which fsdp divides
  counts = 4 * (tiny_spec.vocab_size + 10)  # of updates: of each row of the table, and of ten leaves
  assert found == {"state": 3 * params + counts, "base for drift": params // 2}


def test_compiling_ahead_leaves_this_machines_chips_alone_and_keeps_no_program():
  environ = {"JAX_PLATFORMS": "cuda", "TPU_WORKER_HOSTNAMES": "mine"}
  environment.prepare_ahead(environ, "tpu")
  assert environ["JAX_PLATFORMS"] == "cpu"
  assert environ["TPU_WORKER_HOSTNAMES"] == "mine"
  assert "JAX_COMPILATION_CACHE_DIR" not in environ
  assert "xla_tpu" in environ["LIBTPU_INIT_ARGS"]  # the flags of the runs
  assert jax.default_backend() == "cpu"
