"""What kind of machine this is -> the variables that jax, XLA and libtpu read when they start, each set here with its reason.

Invariant: what a person has set stays, and no other module sets any of them. Never imports jax, which reads them once.
"""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple

from cpt_jax.config import ConfigError

# As jax's own look for a driver has them: a machine, a container, Windows.
_NVIDIA_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
_GOOGLE_VENDOR = "0x1ae0"


class Setting(NamedTuple):
  """A variable and why it is set."""

  name: str
  value: str
  reason: str
  is_flags: bool = False  # the value is options, which join those that are in the variable
  other_name: str = ""  # another variable that says the same


def settings(kind: str, *, gpu_model: str = "") -> list[Setting]:
  """All that is set on a machine of this kind, whatever is set there already; `gpu_model` as the driver names it."""
  cache = str(pathlib.Path.home() / ".cache" / "cpt_jax" / "jax")
  kept = "compiled programs are kept: the next start of a run does not wait for them"
  small = "a start has a hundred small programs; together they take seconds"
  found = [Setting("JAX_COMPILATION_CACHE_DIR", cache, kept), Setting("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0", small)]
  if kind == "gpu":
    # NVIDIA/JAX-Toolbox docs/GPU_performance.md (2026-07), openxla.org/xla/gpu_optimization_levels. The combiners of O1 fill
    # the free memory, so that no thresholds are set here; NVLS is used by NCCL where there is any without being told.
    hides = "latency-hiding scheduler, pipelined collectives, double-buffered loops"
    found.append(Setting("JAX_OPTIMIZATION_LEVEL", "O1", f"{hides}: the collectives of fsdp run beside the layers"))
    # The default of 0.75 leaves a quarter of the card empty; cuBLAS, cuDNN and NCCL need the tenth that is left.
    # jax refuses to start where both names are set.
    older = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    found.append(Setting("XLA_CLIENT_MEM_FRACTION", "0.9", "arrays may take 90% of the card, not 75%", other_name=older))
    if is_hopper(gpu_model):
      # Same document: needed on Hopper, slower than the default on Blackwell.
      found.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", "kernels start in the order in which XLA has scheduled them"))
  if kind == "tpu":
    # AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py, DATA_PARALLEL_OVERLAP. What else is listed there is libtpu's
    # default by now, or the tuning of one chip and model. Only for LIBTPU_INIT_ARGS: in XLA_FLAGS they end the process.
    options = "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
    overlap = "gradients of replicas are added up over the slow network between slices while other layers are computed"
    found.append(Setting("LIBTPU_INIT_ARGS", options, overlap, is_flags=True))
  return found


def is_hopper(gpu_model: str) -> bool:
  """Is a card of this name one of NVIDIA's Hopper generation: H20, H100, H200, H800, GH200."""
  return re.search(r"\bG?H(20|100|200|800)\b", gpu_model) is not None


def missing(environ: Mapping[str, str], wanted: list[Setting]) -> dict[str, str]:
  """The variables to set, whole; nothing that a person has set, in this or another of its options, is changed.

  >>> missing({"A": "-x=1"}, [Setting("A", "-x=2 -y=3", "", is_flags=True), Setting("A", "5", ""), Setting("B", "6", "")])
  {'A': '-x=1 -y=3', 'B': '6'}
  """
  found = {}
  for setting in wanted:
    given = environ.get(setting.name, "")
    if setting.is_flags:
      names = {option.split("=")[0] for option in given.split()}
      added = [option for option in setting.value.split() if option.split("=")[0] not in names]
      if added:
        found[setting.name] = " ".join([*given.split(), *added])
    elif setting.name not in environ and setting.other_name not in environ:
      found[setting.name] = setting.value
  return found


def detect(
  environ: Mapping[str, str],
  *,
  exists: Callable[[str], bool] = os.path.exists,
  pci_vendors: Callable[[], list[str]] | None = None,
  is_installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> str:
  """The kind of device that jax will take: the first that JAX_PLATFORMS names, else what this machine has."""
  first = environ.get("JAX_PLATFORMS", "").split(",")[0].strip()
  if first:
    return {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(first, "cpu")
  if any(exists(path) for path in _NVIDIA_FILES):
    return "gpu"
  # The vendor alone is not enough: Google's network cards have it too.
  if _GOOGLE_VENDOR in (pci_vendors or _pci_vendors)() and is_installed("libtpu"):
    return "tpu"
  return "cpu"


def check(
  environ: Mapping[str, str],
  *,
  exists: Callable[[str], bool] = os.path.exists,
  plugins: Callable[[], list[str]] = lambda: [plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")],
  is_installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> None:
  """Raises ConfigError where JAX_PLATFORMS asks for devices that jax cannot have here, of which it says little itself."""
  asked = environ.get("JAX_PLATFORMS", "")
  remedy = "unset it for what is here, or set JAX_PLATFORMS=cpu"
  for name in asked.split(","):
    if name.strip() in ("cuda", "gpu") and not any(exists(path) for path in _NVIDIA_FILES):
      raise ConfigError(f"JAX_PLATFORMS={asked}: there is no NVIDIA GPU here (no {_NVIDIA_FILES[0]}); {remedy}")
    if name.strip() == "cuda" and not any("cuda" in plugin for plugin in plugins()):
      raise ConfigError(f"JAX_PLATFORMS={asked}: jax has no CUDA plugin here; pip install 'jax[cuda13]', or {remedy}")
    if name.strip() == "tpu" and not is_installed("libtpu"):
      raise ConfigError(f"JAX_PLATFORMS={asked}: libtpu is not installed; pip install 'jax[tpu]', or {remedy}")


def prepare(environ: MutableMapping[str, str]) -> None:
  """Sets what is missing in this process's environment, before jax is imported; nothing where CPT_JAX_ENVIRONMENT is "off".

  That is the way out where a version of XLA or libtpu refuses to start with one of its options.
  Raises ConfigError: as `check`.
  """
  if environ.get("CPT_JAX_ENVIRONMENT") != "off":
    check(environ)
    environ.update(missing(environ, settings(detect(environ), gpu_model=_gpu_model())))


def prepare_ahead(environ: MutableMapping[str, str], kind: str, *, gpu_model: str = "") -> None:
  """As `prepare`, where the step is compiled for chips of another machine, of this kind.

  Nothing of this machine's own chips is taken, whatever JAX_PLATFORMS says, and no program is kept: there is no chip to load it.
  """
  environ["JAX_PLATFORMS"] = "cpu"
  wanted = [setting for setting in settings(kind, gpu_model=gpu_model) if not setting.name.startswith("JAX_COMPILATION_CACHE")]
  no_chip = "there is no chip that they could quarrel over"
  wanted += [
    Setting("TPU_SKIP_MDS_QUERY", "1", "libtpu does not ask Google's cloud which machine this is, and wait for an answer"),
    Setting("TPU_WORKER_HOSTNAMES", "localhost", "nor complain that nobody told it"),
    Setting("TPU_ACCELERATOR_TYPE", "v5p-8", "the same; the topology that is compiled for is named elsewhere"),
    Setting("ALLOW_MULTIPLE_LIBTPU_LOAD", "1", f"two processes may compile at once: {no_chip}"),
    Setting("TPU_MIN_LOG_LEVEL", "3", "libtpu's diary of chips that it does not find"),
    Setting("TF_CPP_MIN_LOG_LEVEL", "3", "the same of XLA"),
  ]
  environ.update(missing(environ, wanted))


def _pci_vendors() -> list[str]:
  return [pathlib.Path(path).read_text(encoding="ascii").strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")]


def _gpu_model() -> str:
  """What NVIDIA's driver calls the first card; empty without one."""
  for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
    found = re.search(r"^Model:\s*(.+)$", pathlib.Path(path).read_text(encoding="utf-8"), re.M)
    if found:
      return found.group(1).strip()
  return ""
