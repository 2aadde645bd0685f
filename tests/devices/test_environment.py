"""The variables that jax, XLA and libtpu start with: which, where, and that the libraries take them."""

import importlib.util
import os
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from cpt_jax.config import ConfigError
from cpt_jax.devices import environment
from cpt_jax.devices.environment import Setting

HOPPER = "NVIDIA H100 80GB HBM3"
NAMES = st.sampled_from(["--a", "--b", "--xla_a", "--xla_ab"])
OPTIONS = st.lists(st.builds("{}={}".format, NAMES, st.integers(0, 9)), max_size=5, unique_by=lambda option: option.split("=")[0])


def set_on(kind, *, gpu_model="", **given):
  return environment.missing(given, environment.settings(kind, gpu_model=gpu_model))


@hypothesis.given(OPTIONS, OPTIONS)
def test_options_join_those_that_are_there_and_change_none(given, wanted):
  setting = Setting("FLAGS", " ".join(wanted), "", is_flags=True)
  found = environment.missing({"FLAGS": " ".join(given)}, [setting])
  options = (found["FLAGS"] if found else " ".join(given)).split()
  names = [option.split("=")[0] for option in options]
  assert options[: len(given)] == given and len(set(names)) == len(names)
  assert set(names) == {option.split("=")[0] for option in given + wanted}
  assert environment.missing(found, [setting]) == {} or not found, "twice is once"


def test_what_a_person_has_set_stays():
  assert set_on("gpu", gpu_model=HOPPER).keys() > {
    "JAX_OPTIMIZATION_LEVEL",
    "XLA_CLIENT_MEM_FRACTION",
    "CUDA_DEVICE_MAX_CONNECTIONS",
  }
  given = dict(JAX_OPTIMIZATION_LEVEL="O2", JAX_COMPILATION_CACHE_DIR="", CUDA_DEVICE_MAX_CONNECTIONS="8")
  # jax refuses to start where the fraction is set by both of its names.
  found = set_on("gpu", gpu_model=HOPPER, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", **given)
  assert found.keys() == {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
  environ = {"CPT_JAX_ENVIRONMENT": "off"}
  environment.prepare(environ)
  assert environ == {"CPT_JAX_ENVIRONMENT": "off"}


@pytest.mark.parametrize(
  "asked, here, said",
  [
    ("cuda", (), "there is no NVIDIA GPU here"),
    ("cuda,cpu", (), "there is no NVIDIA GPU here"),
    ("cuda", ("/dev/nvidia0",), r"no CUDA plugin here; pip install 'jax\[cuda13\]'"),
    ("tpu", (), "libtpu is not installed"),
  ],
)
def test_a_platform_that_jax_cannot_have_here_is_refused_with_the_variable_and_the_remedy(asked, here, said):
  with pytest.raises(ConfigError, match=rf"JAX_PLATFORMS={asked}: .*{said}.*JAX_PLATFORMS=cpu"):
    environment.check({"JAX_PLATFORMS": asked}, exists=here.__contains__, plugins=lambda: [], is_installed=lambda _: False)
  everything = dict(exists=lambda _: True, plugins=lambda: ["xla_cuda13"], is_installed=lambda _: True)
  for fine in ({}, {"JAX_PLATFORMS": asked}, {"JAX_PLATFORMS": "cpu"}):
    environment.check(fine, **everything)


def test_each_kind_gets_its_own_and_options_of_tpus_go_to_libtpu_alone():
  found = {kind: set_on(kind, gpu_model=HOPPER) for kind in ("cpu", "gpu", "tpu")}
  assert found["cpu"].items() < found["gpu"].items() and found["cpu"].items() < found["tpu"].items()
  for kind, variables in found.items():
    for name, value in variables.items():
      assert ("xla_tpu" in value) == (name == "LIBTPU_INIT_ARGS"), name
      assert kind == "tpu" or name != "LIBTPU_INIT_ARGS"
  assert all(setting.reason for kind in ("cpu", "gpu", "tpu") for setting in environment.settings(kind, gpu_model=HOPPER))


@pytest.mark.parametrize(
  ("model", "expected"),
  [(HOPPER, True), ("NVIDIA GH200 480GB", True), ("NVIDIA H200", True), ("NVIDIA B200", False), ("NVIDIA A100-SXM4-80GB", False)],
)
def test_hopper_is_known_by_its_name(model, expected):
  assert environment.is_hopper(model) == expected
  assert ("CUDA_DEVICE_MAX_CONNECTIONS" in set_on("gpu", gpu_model=model)) == expected


@pytest.mark.parametrize(
  ("environ", "files", "vendors", "packages", "expected"),
  [
    ({}, [], [], [], "cpu"),
    ({}, ["/dev/nvidiactl"], ["0x10de"], [], "gpu"),
    ({}, ["/dev/nvidia0"], ["0x1ae0", "0x10de"], ["libtpu"], "gpu"),  # a GPU machine of Google's with a Google network card
    ({}, [], ["0x1ae0"], ["libtpu"], "tpu"),
    ({}, [], ["0x1ae0"], [], "cpu"),
    ({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidia0"], [], [], "cpu"),
    ({"JAX_PLATFORMS": "cuda,cpu"}, [], [], [], "gpu"),
    ({"JAX_PLATFORMS": "tpu"}, [], [], [], "tpu"),
  ],
)
def test_the_kind_of_a_machine_is_seen_without_jax(environ, files, vendors, packages, expected):
  found = environment.detect(environ, exists=files.__contains__, pci_vendors=lambda: vendors, is_installed=packages.__contains__)
  assert found == expected


def started(code, variables):
  # On the CPU: XLA reads every option, those of GPUs too, and ends the process at one that it does not know.
  environ = {**{k: v for k, v in os.environ.items() if k not in variables}, **variables, "JAX_PLATFORMS": "cpu"}
  return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300, check=False)


COMPUTE = "import jax; print(jax.config.jax_optimization_level, jax.jit(lambda x: x @ x)(jax.numpy.ones((2, 2))).sum())"


def test_jax_starts_with_what_a_gpu_gets(tmp_path):
  variables = set_on("gpu", gpu_model=HOPPER) | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
  done = started(COMPUTE, variables)
  assert done.returncode == 0 and done.stdout.split() == ["O1", "8.0"], done.stderr
  assert list((tmp_path / "cache").iterdir()), "however short it took to compile, it is kept"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_libtpu_starts_with_what_a_tpu_gets():
  code = "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
  environ = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  done = started(code, environ | set_on("tpu"))
  assert done.returncode == 0, done.stderr
  assert "Unknown" in started(code, environ | {"LIBTPU_INIT_ARGS": "--xla_tpu_no_such=1"}).stderr


def test_main_sets_them_before_anything_imports_jax_or_says_why_not(tmp_path):
  name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
  (tmp_path / "c.py").write_text(f"import os, sys\nprint(os.environ['{name}'], 'jax' in sys.modules)\nsys.exit(3)\n")
  command = [sys.executable, "-m", "cpt_jax.main", f"--config={tmp_path / 'c.py'}", "--dry_run"]
  environ = {key: value for key, value in os.environ.items() if key != name}
  done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
  assert done.stdout.split() == ["0", "False"], done.stderr
  environ["JAX_PLATFORMS"] = "tpu,cuda" if importlib.util.find_spec("libtpu") is None else "cuda"
  if environment.detect({}) == "cpu":
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 78 and "Traceback" not in done.stderr and "JAX_PLATFORMS" in done.stderr, done.stderr
