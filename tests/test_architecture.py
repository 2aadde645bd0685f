"""The layers of the package, held by its imports; and what the light layers must not pull in."""

import ast
import pathlib
import subprocess
import sys

import pytest

# A module imports from its own layer or a lower one; inside a layer only what comes before it.
LAYERS = [
  ["exits", "shipped", "progress", "hub", "config.durations", "config.errors", "config.shares", "config.keys", "config.times"]
  + ["config.stages", "config.check", "config.files", "config.describe", "journal", "trees"],
  ["devices.environment", "devices.chips", "devices.hosts", "devices.mesh", "devices.signals", "devices.launch", "devices.ssh"],
  ["store.documents", "store.tokenizer", "store.corpus", "store.chat", "store.store", "store.decontaminate", "store.prepare"]
  + ["store.cluster", "store.machines", "store.integrity"],
  ["stream.batch", "stream.sources", "stream.selection", "stream.packing", "stream.shuffle", "stream.quotas", "stream.mixture"]
  + ["stream.order", "stream.pipeline", "stream.excerpts"],
  ["vocab.verdict", "vocab.bases", "vocab.scores", "vocab.fast", "vocab.sentencepiece", "vocab.kinds", "vocab.candidates"]
  + ["vocab.changes", "vocab.texts", "vocab.grow", "vocab.assess", "vocab.similarity", "vocab.initialise"],
  ["model.spec", "model.rope", "model.layers", "model.visible", "model.blockwise", "model.flash", "model.cudnn"]
  + ["model.splash", "model.attention", "model.transformer", "model.loss", "model.hf_files", "model.expansion"]
  + ["model.pretrained", "model.growth"],
  ["training.perplexity", "training.drift", "training.schedule", "training.optimizer", "training.state", "training.step"]
  + ["training.guard", "training.checkpoint", "training.start", "training.metrics", "training.console", "training.inputs"]
  + ["training.stack", "training.recorder", "training.loop"],
  ["preview.hlo", "preview.buffers", "preview.memory", "preview.dry_run", "preview.program", "preview.collectives"]
  + ["preview.roofline", "preview.step_report", "preview.absent_chips", "preview.compile_ahead", "preview.step_tables"],
  ["results.runs", "results.report", "results.tables", "results.learning", "results.export", "results.recovery"]
  + ["results.recovery_tables", "results.batches"],
  ["diagnosis.verdict", "diagnosis.measure", "diagnosis.diagnose", "diagnosis.tables", "diagnosis.vocab_tables"],
  ["laws.fit", "laws.curves", "laws.annealing", "laws.cpt_law", "laws.separable", "laws.change", "laws.replay", "laws.domain"]
  + ["laws.dcpt", "laws.mixing", "laws.fit_curves", "laws.tables"],
  ["planning.cells", "planning.choose", "planning.predictor", "planning.recommend", "planning.plots"]
  + ["planning.trials", "planning.design", "planning.config_files", "planning.outcome", "planning.execute", "planning.tables"]
  + ["planning.planner"],
  ["library"],
  ["cli.manual", "cli.overrides", "cli.launching"],
  [f"cli.{name}" for name in ("prepare", "diagnose", "vocab_assess", "vocab_grow", "vocab_compare", "plan", "train", "report")]
  + [f"cli.{name}" for name in ("export", "show", "fit_laws", "compile", "quickstart")]
  + [f"cli.launch_{name}" for name in ("slurm", "ssh", "tpu_vm", "xpk")],
  ["cli.app", "cli.__main__", "main"],
]
# Rooms that a notebook or a machine without devices opens quickly: none of these libraries is imported there when they are.
NEVER = {
  "config": {"jax", "flax", "optax", "orbax", "grain"},
  "store": {"jax", "flax", "optax", "orbax"},
  "stream": {"jax", "flax", "optax", "orbax"},
  "vocab": {"jax", "flax", "optax", "orbax"},
  "results": {"jax", "flax", "optax", "orbax"},
  "laws": {"jax", "flax", "optax", "orbax"},
  "cli": {"jax", "flax", "optax", "orbax", "grain"},
}
MAY_ALL_THE_SAME = {"results.export"}


def modules(root):
  package = root / "cpt_jax"
  return {".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py") if p.stem != "__init__"} | {
    "shipped": package / "shipped" / "__init__.py"
  }


def imported(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def test_every_module_stands_in_a_layer_and_imports_downwards(root):
  found = modules(root)
  place = {name: (number, i) for number, layer in enumerate(LAYERS) for i, name in enumerate(layer)}
  assert set(found) == set(place), "a module is missing from LAYERS, or gone"
  wrong = []
  for name, path in found.items():
    for target in imported(path):
      parts = target.removeprefix("cpt_jax.").split(".")
      ours = next((t for t in (".".join(parts[:2]), parts[0]) if target.startswith("cpt_jax") and t in place), None)
      if ours and place[ours] >= place[name]:
        wrong.append(f"{name} imports {ours}")
      if name not in MAY_ALL_THE_SAME and target.split(".")[0] in NEVER.get(name.split(".")[0], ()):
        wrong.append(f"{name} imports {target}")
  assert not wrong


@pytest.mark.parametrize("module", ["cpt_jax.main", "cpt_jax.store.prepare", "cpt_jax.stream.sources", "cpt_jax.results.runs"])
def test_light_modules_do_not_load_jax(root, module):
  code = f"import sys, {module}; sys.exit(any(name == 'jax' or name.startswith('jax.') for name in sys.modules))"
  assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_no_module_is_a_drawer(root):
  assert not [name for name in modules(root) if name.split(".")[-1] in ("utils", "helpers", "common", "lib", "misc", "manager")]


def test_configs_are_never_read_with_a_default(root):
  # A default away from config.default() is a second place that decides (anchors: hidden defaults).
  for name, path in modules(root).items():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        owner = ast.unparse(node.func.value)
        assert owner.split(".")[0] not in ("config", "c"), f"{name}: {ast.unparse(node)}"
