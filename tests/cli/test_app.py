"""The program `cpt`: its table, its pages, what it says of mistakes, and its exit codes."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from cpt_jax import config as config_lib, exits
from cpt_jax.cli import app, manual
from cpt_jax.config import ConfigError

EXAMPLES = re.compile(r"EXAMPLE\n    (cpt .+)")


@pytest.mark.parametrize("command", app.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_manual_page(cpt, command):
  done = cpt(*command.name.split(), "--help")
  assert done.returncode == 0 and not done.stderr
  for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLE", "EXIT CODES"):
    assert f"{title}\n" in done.stdout, title
  assert f"cpt {command.name} - {command.summary}" in done.stdout
  assert re.search(r"^    0   done$", done.stdout, re.MULTILINE)
  parser = command.parser()
  assert all(action.help for action in parser._actions), "a flag without words"
  for line in parser.example.partition("\n\n")[0].strip().splitlines():  # it would be understood
    name, *arguments = shlex.split(line)
    assert name == "cpt" and app.find(arguments)[0] == command, line
    assert not parser.read(app.find(arguments)[1]).help


def test_no_command_file_is_longer_than_a_screen_or_two(root):
  files = {command.module: root / "cpt_jax" / "cli" / f"{command.module}.py" for command in app.COMMANDS}
  too_long = {name: n for name, file in files.items() if (n := len(file.read_text().splitlines())) > 100}
  assert not too_long


def test_the_list_of_commands_and_the_version(cpt):
  import cpt_jax

  for line in ([], ["--help"], ["help"]):
    done = cpt(*line)
    assert done.returncode == 0 and all(command.name in done.stdout for command in app.COMMANDS)
  assert cpt("--version").stdout == f"cpt_jax {cpt_jax.__version__}\n"
  group = cpt("launch")
  assert group.returncode == 0 and "launch slurm" in group.stdout and "prepare" not in group.stdout


@pytest.mark.parametrize(
  ("line", "words"),
  [
    (["prepar"], "there is no command prepar. Did you mean prepare?"),
    (["vocab", "gro"], "gro is none of assess, grow, compare. Did you mean grow?"),
    (["show", "--stepp=3"], "there is no --stepp. Did you mean --step?"),
    (["train", "--config=configs/quickstart.py", "--dry-run"], "there is no --dry-run. Did you mean --dry_run?"),
    (["train", "--config=configs/quikstart.py"], "Did you mean configs/quickstart.py?"),
    (["train", "--config=configs/quickstart.py", "--config.train.lenght=3"], "Did you mean train.length?"),
    (["train", "--config=configs/quickstart.py", "--config.train.batch_rows=x"], "train.batch_rows"),
    (["train"], "required: --config"),
    (["prepare", "--records=txt"], "'txt' is none of text, messages, prompt. Did you mean text?"),
    (["launch", "ssh", "--port=0", "--hosts=a"], "--port: 0: must be 1 or more, at most 65535"),
  ],
)
def test_what_is_misspelt_is_told_with_what_was_meant(cpt, line, words):
  done = cpt(*line)
  assert done.returncode == 78 and words in done.stderr and not done.stdout, done


class UnexpectedError(Exception):
  pass


@pytest.mark.parametrize(
  ("error", "code", "words"),
  [
    (ConfigError("mend it"), 78, "mend it"),
    (exits.SavedError("go on"), 75, "go on"),
    (FloatingPointError("step 3"), 86, "step 3"),
    (OSError(errno.ENOSPC, "No space left on device"), 74, "store/law: No space left on device. Mend the path"),
    (FileNotFoundError(2, "No such file or directory", "/a/b"), 74, "/a/b: No such file or directory"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("Unable to initialize backend 'tpu'"), 78, "set JAX_PLATFORMS=cpu"),
  ],
)
def test_errors_have_their_codes(cpt, monkeypatch, error, code, words):
  from cpt_jax.cli import export

  def fail(args):
    raise error

  monkeypatch.setattr(export, "run", fail)
  done = cpt("export", "--run=r", "--output=store/law")
  assert done.returncode == code and words in done.stderr, done


def test_our_own_mistakes_keep_their_traceback(cpt, monkeypatch):
  from cpt_jax.cli import export

  monkeypatch.setattr(export, "run", lambda args: (_ for _ in ()).throw(UnexpectedError()))
  with pytest.raises(UnexpectedError):
    cpt("export", "--run=r", "--output=o")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_devices_that_are_not_here(root, platform, tmp_path):
  environ = {**os.environ, "JAX_PLATFORMS": platform}
  command = [sys.executable, "-m", "cpt_jax.cli", "quickstart", f"--workdir={tmp_path / 'run'}", "--config.train.length=1 steps"]
  stores = [f"--config.data.sources.{name}.store={tmp_path / name}" for name in ("general", "poetry")]
  done = subprocess.run([*command, *stores], cwd=root, env=environ, capture_output=True, text=True)
  assert done.returncode == 78 and f"JAX_PLATFORMS={platform}" in done.stderr, done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "command, kind, code, words",
  [
    (["show", "--run=r", "--step=1"], signal.SIGINT, exits.INTERRUPTED, "interrupted"),
    (["prepare", "--input=x", "--tokenizer=t", "--output=o"], signal.SIGTERM, exits.STOPPED, "o: interrupted; give the same"),
  ],
)
def test_a_command_that_is_stopped_says_so_and_no_more(root, command, kind, code, words):
  program = (
    "import signal, time, cpt_jax\nfrom cpt_jax.cli import app, show\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    f"def work(*_, **__):\n  print('up', flush=True)\n  time.sleep(60)\nshow.run = cpt_jax.prepare = work\napp.entry({command})"
  )
  process = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "up\n"
  time.sleep(0.1)
  process.send_signal(kind)
  _, err = process.communicate(timeout=300)
  assert process.returncode == code and err.startswith(words) and len(err.splitlines()) == 1, err


# ---- flags ----


def test_both_forms_of_flags_and_changes_of_keys():
  p = manual.Parser("x", description="d", example="cpt x", overrides=True)
  p.add_argument("--workdir", help="h")
  p.switch("figure", default=True, help="h")
  read = lambda *argv: p.read(argv)  # noqa: E731
  assert read("--workdir=a").workdir == read("--workdir", "a").workdir == read("-workdir=a").workdir == "a"
  assert read().figure and not read("--nofigure").figure
  assert read("--config.a.b=1", "--config.c", "2", "--noconfig.d", "--config.e", "--workdir", "w").overrides == [
    "--config.a.b=1", "--config.c=2", "--noconfig.d", "--config.e",
  ]  # fmt: skip
  with pytest.raises(ConfigError, match="there is no left"):
    read("left", "over")
  with pytest.raises(ConfigError, match=r"there is no --config\.a"):
    read("--", "--config.a")


def test_a_config_with_changes_is_read_again_and_again(root, monkeypatch):
  monkeypatch.chdir(root)
  for rows in (3, 5):
    config = config_lib.load("configs/quickstart.py", [f"--config.train.batch_rows={rows}", "--config.log.tensorboard"])
    assert config.train.batch_rows == rows and config.log.tensorboard
  assert config_lib.load("configs/quickstart.py").train.batch_rows == 16


def test_what_is_shipped_is_found_from_anywhere(root, monkeypatch, tmp_path, capsys):
  from cpt_jax import shipped

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(shipped, "_told", set())
  config = config_lib.load("configs/quickstart.py")
  assert config.start.hf == str(root / "examples" / "base")
  assert config.data.sources.poetry.text == str(root / "examples" / "corpora" / "poetry_ci.jsonl.gz")
  assert config.data.sources.poetry.store == "store/quickstart/poetry"  # is made here
  assert "configs/quickstart.py is not in this directory: taken from" in capsys.readouterr().err
  (tmp_path / "examples" / "base").mkdir(parents=True)
  assert shipped.find("examples/base") == "examples/base"  # what is here wins
  assert shipped.find("other/base") == "other/base" and shipped.find("configs/none.py") == "configs/none.py"
