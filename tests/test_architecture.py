"""The layers of the package, held by its imports; and what the light layers must not pull in."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest

# A module imports from its own layer or a lower one; inside a layer only what comes before it.
LAYERS = [
  ["exits", "shipped", "progress", "hub", "config.durations", "config.errors", "config.shares", "config.keys"]
  + ["config.stages", "config.check", "config.files", "config.describe", "journal", "trees"],
  ["devices.environment", "devices.chips", "devices.hosts", "devices.mesh", "devices.signals", "devices.launch", "devices.ssh"],
  ["store.records", "store.compressed", "store.lines", "store.parquet", "store.documents"]
  + ["store.spelling", "store.tokenizer_files", "store.tokenizer_json", "store.sentencepiece_model", "store.tokenization"]
  + ["store.corpus", "store.chat", "store.token_files", "store.token_store", "store.decontaminate"]
  + ["store.units", "store.work", "store.processes", "store.assembly", "store.prepare", "store.cluster", "store.machines"],
  ["stream.batch", "stream.sources", "stream.selection", "stream.policies", "stream.packing", "stream.layout_files"]
  + ["stream.shuffle", "stream.quotas", "stream.mixture", "stream.order", "stream.tally", "stream.heldout", "stream.pipeline"]
  + ["stream.summary", "stream.excerpts"],
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
  ["results.tables", "results.runs", "results.report", "results.learning", "results.export", "results.recovery"]
  + ["results.recovery_tables", "results.batches"],
  ["diagnosis.verdict", "diagnosis.measure", "diagnosis.diagnose", "diagnosis.tables", "diagnosis.vocab_tables"],
  ["laws.fit", "laws.curves", "laws.annealing", "laws.cpt_law", "laws.separable", "laws.change", "laws.replay", "laws.domain"]
  + ["laws.dcpt", "laws.fit_curves", "laws.tables"],
  ["planning.cells", "planning.choose", "planning.predictor", "planning.recommend", "planning.plots"]
  + ["planning.trials", "planning.design", "planning.config_files", "planning.outcome", "planning.execute", "planning.tables"]
  + ["planning.planner"],
  ["library"],
  ["cli.manual", "cli.launching"],
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


MOST_LINES, MOST_FUNCTION_LINES = 500, 80
STORIES = {"training.loop._run": 150}  # told in numbered parts, in one place


def sources_of(root):
  """Every Python file of the project: its path from the root, and its text."""
  folders = ("cpt_jax", "tools", "tests", "examples", "configs", "recipes")
  return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for f in folders for p in sorted((root / f).rglob("*.py"))}


def test_a_module_has_the_same_name_wherever_it_is_imported(root):
  known, names = {f"cpt_jax.{name}" for name in modules(root)}, collections.defaultdict(dict)
  for path, text in sources_of(root).items():
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
          target = f"{node.module}.{alias.name}"
          if target in known and path != "cpt_jax/__init__.py":
            names[target].setdefault(alias.asname or alias.name, path)
  assert not {target: found for target, found in names.items() if len(found) > 1}


def test_headers_name_no_callers(root):
  # Who calls a module is for a reader's tools: every fifth such line was wrong.
  callers = re.compile(r"(?im)^\s*(called|used|read|imported) by\b")
  assert not [path for path, text in sources_of(root).items() if callers.search(ast.get_docstring(ast.parse(text)) or "")]


def test_files_and_functions_are_short_enough_to_be_held(root):
  long_files, long_functions = set(), set()
  for path, text in sources_of(root).items():
    if path.startswith(("tests/", "tools/bench/")):
      continue
    if text.count("\n") > MOST_LINES:
      long_files.add(path)
    name = path.removeprefix("cpt_jax/").removesuffix(".py").replace("/", ".")
    for node in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
      if (node.end_lineno or 0) - node.lineno + 1 > STORIES.get(f"{name}.{node.name}", MOST_FUNCTION_LINES):
        long_functions.add(f"{name}.{node.name}")
  assert not long_files and not long_functions


def test_no_module_is_a_drawer(root):
  assert not [name for name in modules(root) if name.split(".")[-1] in ("utils", "helpers", "common", "lib", "misc", "manager")]


def test_configs_are_never_read_with_a_default(root):
  # A default away from config.default() is a second place that decides (anchors: hidden defaults).
  for name, path in modules(root).items():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        owner = ast.unparse(node.func.value)
        assert owner.split(".")[0] not in ("config", "c"), f"{name}: {ast.unparse(node)}"
