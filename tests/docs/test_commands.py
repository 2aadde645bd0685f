"""README and docs say what is true: commands parse and most are run, files and flags exist, the picture is that of the layers."""

import gzip
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pages
import pytest

from cpt_jax import config as config_lib
from cpt_jax.cli import app

BLOCKS = pages.blocks()
OTHER_PROGRAMS = {"pip", "pytest", "printf", "echo", "hf", "sphinx-build"}
TOOLS = [path.read_text(encoding="utf-8") for path in (pages.ROOT / "tools").rglob("*.py")]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_commands_are_ones_that_the_program_takes(block, monkeypatch):
  monkeypatch.chdir(pages.ROOT)
  assert block.commands
  for command in block.commands:
    argv = pages.argv_of(command)
    if argv is not None:
      check(argv)
    elif (words := shlex.split(command))[:2] == ["python", "-m"]:
      assert (pages.ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), words[2]
      for flag in re.findall(r"--(\w+)", command):
        assert any(re.search(rf"""["'](--)?{flag}["']""", tool) for tool in TOOLS), f"no tool has --{flag}"
    else:
      assert words[0] in OTHER_PROGRAMS, command


def check(argv):
  """Flags exist and have values that they may have; so have keys of the config."""
  found, rest = app.find(argv)
  assert found is not None, argv
  found.parser().read(rest)
  overrides = [word for word in rest if re.match(r"--config[.=]", word)]
  if any(word.startswith("--config.") for word in overrides):
    [file] = [word.partition("=")[2] for word in overrides if word.startswith("--config=")] or ["configs/quickstart.py"]
    if not pathlib.Path(file).is_file():  # one that the page makes or describes
      file = "configs/quickstart.py"
    config_lib.check_overrides(config_lib.load_file(file), overrides)


def test_what_is_not_run_says_why():
  for block in BLOCKS:
    assert block.is_run or re.fullmatch(r"not run: .{5,}", block.marker), block.name


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
  """A directory as a reader has it: a clone's configs and examples, texts of two kinds, a base, and stores made from them."""
  here = tmp_path_factory.mktemp("reader")
  for name in ("configs", "examples", "tools"):
    (here / name).symlink_to(pages.ROOT / name)
  for name, corpus, size in (("en", "english", 150), ("law", "poetry_ci", 2000), ("zh", "poetry_ci", 2000)):
    (here / "texts" / name).mkdir(parents=True)
    with gzip.open(pages.ROOT / "examples" / "corpora" / f"{corpus}.jsonl.gz") as whole:
      (here / "texts" / name / "part.jsonl.gz").write_bytes(gzip.compress(b"".join(itertools.islice(whole, size))))
  (here / "path" / "to").mkdir(parents=True)
  for name in ("base", "other_base"):
    (here / "path" / "to" / name).symlink_to(pages.ROOT / "examples" / "base")
  (here / "path" / "to" / "smollm2").symlink_to(pages.ROOT / "examples" / "base")
  (here / "zh.jsonl").write_text('{"text": "a b c d e f g h i j k l m n"}\n{"text": "another text"}\n', encoding="utf-8")
  (here / "evals.jsonl").write_text('{"question": "what: b c d e f g h i j k l m n o"}\n', encoding="utf-8")
  for curve in (pages.ROOT / "tests" / "fixtures" / "lr_curves").glob("*.gz"):
    (here / curve.stem).write_bytes(gzip.decompress(curve.read_bytes()))
  for name in ("en", "law", "zh"):
    done = app.main(
      ["prepare", f"--input={here}/texts/{name}/*.gz", f"--tokenizer={here}/path/to/base", f"--output={here}/store/{name}"]
    )
    assert done == 0
  return here


def give(block, reader, monkeypatch):
  """Gives a block's commands in the reader's directory."""
  monkeypatch.chdir(reader)
  for command in block.commands:
    argv = pages.argv_of(command)
    last = command == block.commands[-1]
    if argv is not None:
      if "short" in block.marker and argv[0] == "train":
        argv = [*argv, "--config.debug.stop_after=2"]
      jax.set_mesh(None)
      assert app.main(argv) == (block.exit_code if last else 0), command
    elif command.startswith(("printf ", "echo ")):
      subprocess.run(command, shell=True, check=True)
    elif command.startswith("python "):
      environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
      subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, stdout=subprocess.DEVNULL, env=environment)
    else:
      assert command.startswith("pip "), command  # what it installs is here


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.is_run and not b.is_slow], ids=lambda block: block.name)
def test_commands_of_a_page_work(block, reader, monkeypatch):
  give(block, reader, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.is_slow], ids=lambda block: block.name)
def test_slow_commands_of_a_page_work(block, reader, monkeypatch):
  monkeypatch.chdir(reader)
  if "runs/quickstart" in " ".join(block.commands) and not pathlib.Path("runs/quickstart/summary.json").is_file():
    assert app.main(["quickstart"]) == 0
    jax.set_mesh(None)
  give(block, reader, monkeypatch)


@pytest.mark.parametrize("page", pages.pages(), ids=lambda path: str(path.relative_to(pages.ROOT)))
def test_files_and_flags_that_a_page_names_exist(page):
  actions = [action for command in app.COMMANDS for action in command.parser()._actions]
  flags = {option.removeprefix("--") for action in actions for option in action.option_strings}
  for code in pages.codes(page.read_text(encoding="utf-8")):
    if re.fullmatch(r"(cpt_jax|tools|tests|configs|examples|docs)/[\w./-]*\w", code):
      assert (pages.ROOT / code).exists(), code
    for flag in re.findall(r"(?:^| )--(\w+)", code):
      known = flag in flags or any(re.search(rf"""["'](--)?{flag}["']""", tool) for tool in TOOLS)
      assert known or flag.startswith("xla_") or code.startswith(("scancel", "pytest", "pip")), code


def test_files_that_the_code_names_exist():
  for folder in ("cpt_jax", "tools", "configs", "tests"):
    for path in (pages.ROOT / folder).rglob("*.py"):
      for named in re.findall(r"(?<!Toolbox )(?<!/)\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8")):
        assert (pages.ROOT / named).is_file(), f"{path}: {named}"


def test_the_readme_is_read_in_one_sitting():
  lines = (pages.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
  assert len(lines) <= 120 and not [line for line in lines if len(line) > 110]


def test_the_picture_shows_the_rooms_in_the_order_that_the_layers_test_holds(monkeypatch):
  monkeypatch.syspath_prepend(str(pages.ROOT / "docs" / "how_it_works"))
  monkeypatch.syspath_prepend(str(pages.ROOT / "tests"))
  import draw_layers
  import test_architecture

  place = {room: i for i, line in enumerate(draw_layers.ROOMS) for room in line.split(", ")}
  rooms = [room for room in draw_layers.rooms_of(test_architecture.LAYERS) if room in place]
  assert [place[room] for room in rooms] == sorted(place[room] for room in rooms)
  folders = {path.parent.name for path in (pages.ROOT / "cpt_jax").glob("*/__init__.py")}
  assert folders <= set(place), "a room is missing in docs/how_it_works/draw_layers.py"
  assert (pages.ROOT / "docs" / "how_it_works" / "layers.svg").read_text(encoding="utf-8") == draw_layers.svg()


@pytest.mark.slow
def test_the_notebook_runs(reader):
  cells = json.loads((pages.ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
  code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
  environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(pages.ROOT)}
  assert subprocess.run([sys.executable, "-c", code], cwd=reader, env=environment, check=False).returncode == 0
