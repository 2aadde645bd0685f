"""`cpt launch`: what a host is given is what the launcher was given, and processes are started and stopped together."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

CONFIG = "from cpt_jax import config\n\ndef get_config():\n  return config.default()\n"
NASTY = [
  '--config.start.hf=/models/it\'s a "base"; $HOME `id` \\ & | > *',
  "--config.data.tokenizer=",
  '--config.schedule.shape=[(0, 0.05), ("20%", 0.3)]',
  "--workdir=/a disk/of (ours)",
  "--config.train.length=line\nbreak",
]
# Says what it was started with, as Python on a host.
PYTHON = "#!{python}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), os.environ.get('MARK'), sys.argv[1:]]))\n"
SSH = '#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\nshift\nexec sh -c "$1"\n'  # options, the host, the command
LAST = '#!/bin/sh\nfor last; do :; done\nexec sh -c "${last#--command=}"\n'
SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'

TOOLS = {
  "ssh": ["--hosts=one,me@two,three"],
  "slurm": ["--nodes=2", "--name=my run", "--sbatch=comment=it's"],
  "tpu-vm": ["--tpu=pod", "--zone=us-east5-a"],
  "xpk": ["--cluster=c", "--workload=w", "--tpu_type=v5p-64", "--image=i", "--num_slices=2"],
}


@pytest.fixture
def place(tmp_path):
  """A directory with a name that shells take apart, a config and stand-ins for everything that is started."""
  where = tmp_path / "a clone's (dir) $x"
  (where / "bin").mkdir(parents=True)
  (where / "my config.py").write_text(CONFIG)
  for name, text in {
    "py": PYTHON.format(python=sys.executable),
    "ssh": SSH,
    "gcloud": LAST,
    "xpk": LAST,
    "sbatch": "#!/bin/sh\nexec bash -s\n",
    "srun": SRUN,
    "scontrol": '#!/bin/sh\necho scontrol "$@"\n',
  }.items():
    (where / "bin" / name).write_text(text)
    (where / "bin" / name).chmod(0o755)
  return where


@pytest.fixture
def launch(root, place):
  """Starts a launcher; `path` is its PATH."""

  def start(tool, *arguments, path=None, popen=subprocess.run, **more):
    environ = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}" if path is None else path}
    environ.pop("MARK", None)
    command = [sys.executable, "-m", "cpt_jax.cli", "launch", tool, *arguments]
    return popen(command, env=environ, text=True, cwd=root, **more)

  return start


def output(done):
  return done.stdout, done.stderr, done.returncode


def options(place):
  return [f"--config={place / 'my config.py'}", *NASTY]


def given(place, tool):
  return [*TOOLS[tool], f"--dir={place}", "--python=bin/py", "--env=MARK=it's $HOME", "--", *options(place)]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_host_is_given_what_the_launcher_was_given(launch, place, tool):
  done = launch(tool, *given(place, tool), capture_output=True)
  assert done.returncode == 0, output(done)
  lines = [line.partition("[")[1:] for line in done.stdout.splitlines()]
  found = [json.loads("".join(parts)) for parts in lines]
  own = [[]]
  if tool == "ssh":
    own = [["--coordinator=one:8476", "--num_processes=3", f"--process_id={i}"] for i in range(3)]
    assert sorted(line.split(": ")[0] for line in done.stdout.splitlines()) == ["me@two", "one", "three"]
  expected = [[str(place), "it's $HOME", ["-m", "cpt_jax.main", *options(place), *mine]] for mine in own]
  assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("tool", TOOLS)
def test_print_says_what_would_be_run_and_runs_nothing(cpt, monkeypatch, place, tool):
  monkeypatch.setenv("PATH", "/nowhere")
  done = cpt("launch", tool, "--print", *given(place, tool))
  assert done.returncode == 0, output(done)
  words = shlex.split(done.stdout, comments=True)
  hosts = [shlex.split(word) for word in words if "cpt_jax.main " in word] or [words]
  assert len(hosts) == (3 if tool == "ssh" else 1)
  for host in hosts:
    found = host[host.index("cpt_jax.main") + 1 :]
    assert found[: len(options(place))] == options(place)
    assert "MARK=it's $HOME" in host and str(place) in host
  reasons = [line for line in done.stdout.splitlines() if line.startswith("#   ")]
  assert any("LIBTPU_INIT_ARGS" in line for line in reasons) == (tool in ("tpu-vm", "xpk"))
  assert any("JAX_OPTIMIZATION_LEVEL=O1" in line for line in reasons) == (tool in ("ssh", "slurm"))


def test_a_job_that_is_stopped_goes_back_into_the_queue(launch, place):
  (place / "bin" / "py").write_text("#!/bin/sh\nexit $CODE\n")
  for code, requeued in ((0, False), (75, True), (78, False)):
    arguments = ["--nodes=1", f"--dir={place}", "--python=bin/py", f"--env=CODE={code}", "--", *options(place)[:1]]
    done = launch("slurm", *arguments, capture_output=True)
    assert done.returncode == code and ("scontrol requeue" in done.stdout) == requeued, output(done)


@pytest.mark.parametrize(
  ("tool", "arguments", "message"),
  [
    ("ssh", ["--hosts=a,b"], "name a config behind --"),
    ("ssh", ["--hosts=a,b", "--", "--config=configs/quikstart.py"], "configs/quikstart.py: no such file. Did you mean"),
    ("ssh", ["--hosts=a,b", "--", "--config=/nowhere/c.py"], "/nowhere/c.py: no such file"),
    ("tpu-vm", ["--tpu=a", "--", "--config=configs/quickstart.py", "--config.train.lenght=3"], "Did you mean train.length"),
    ("ssh", ["--", "--config=configs/quickstart.py"], "either --hosts=a,b or --hosts_file=FILE"),
    ("ssh", ["--hosts=a,b,a", "--", "--config=configs/quickstart.py"], "host 'a' is named 2 times"),
    ("ssh", ["--hosts=a,-oProxyCommand=x", "--", "--config=configs/quickstart.py"], "host '-oProxyCommand=x': write a name"),
    ("ssh", ["--hosts_file=/nowhere", "--", "--config=configs/quickstart.py"], "--hosts_file=/nowhere: No such file"),
    ("ssh", ["--hosts=a,b", "--env=x", "--", "--config=configs/quickstart.py"], "--env=x: write --env=NAME=VALUE"),
    (
      "slurm",
      ["--nodes=2", "--", "--config=configs/quickstart.py", "--num_processes=2"],
      "--num_processes=2: the launcher sees to it",
    ),
    ("slurm", ["--", "--config=configs/quickstart.py"], "--nodes"),
    ("ssh", ["--hosts=a", "--config=configs/quickstart.py"], "The options of cpt train come after --"),
    (
      "tpu-vm",
      ["--tpu=a", "--", "--config=configs/quickstart.py"],
      "gcloud is not on the PATH: it is part of the Google Cloud CLI",
    ),
    ("xpk", [*TOOLS["xpk"], "--", "--config=configs/quickstart.py"], "xpk is not on the PATH: .*pip install xpk"),
    ("slurm", ["--nodes=2", "--", "--config=configs/quickstart.py"], "sbatch is not on the PATH: it is Slurm's"),
    ("ssh", ["--hosts=a", "--", "--config=configs/quickstart.py"], "ssh is not on the PATH: install OpenSSH"),
  ],
)
def test_mistakes_are_named(cpt, monkeypatch, tool, arguments, message):
  monkeypatch.setenv("PATH", "/nowhere")
  done = cpt("launch", tool, *arguments)
  assert done.returncode == 78 and re.search(message, done.stderr) and "Traceback" not in done.stderr, output(done)


def test_a_config_that_only_the_pod_has_is_not_missed_here(cpt):
  done = cpt("launch", "tpu-vm", "--print", "--tpu=a", "--", "--config=/only/there.py", "--config.any.key=1")
  assert done.returncode == 0 and "--config=/only/there.py" in done.stdout, output(done)


# ---- ssh: together ----

# A host: says that it is there and waits; ends as a run does after a SIGTERM; "two" ends by itself where MARK says so.
HOST = """#!/bin/sh
trap 'echo saved; exit 75' TERM
case "$*" in *--process_id=1*) [ -n "$MARK" ] && { sleep 0.3; echo broken >&2; exit $MARK; } ;; esac
echo "up $$"
while :; do sleep 0.05; done
"""


@pytest.fixture
def together(launch, place):
  """Starts two waiting hosts."""
  (place / "bin" / "py").write_text(HOST)

  def start(*more):
    arguments = ["--hosts=one,two", f"--dir={place}", "--python=bin/py", *more, "--", *options(place)[:1]]
    return launch("ssh", *arguments, popen=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  return start


def read_pids(process, num):
  pids = []
  while len(pids) < num:
    line = process.stdout.readline()
    assert line, process.stderr.read()
    pids.append(int(line.split()[-1]))
  return pids


def assert_ended(pids):
  deadline = time.monotonic() + 30
  while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
    assert time.monotonic() < deadline, "still there"
    time.sleep(0.05)


def test_ctrl_c_ends_all_of_them_saved(together):
  process = together()
  pids = read_pids(process, 2)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 75 and sorted(out.splitlines()) == ["one: saved", "two: saved"], (out, err)
  assert_ended(pids)


def test_the_first_failure_ends_the_others_with_its_code(together):
  process = together("--env=MARK=86")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 86, (out, err)
  assert "two: broken" in out and "one: saved" in out and "two ended with 86; the others are told" in err
  assert_ended([int(line.split()[-1]) for line in out.splitlines() if " up " in line])


def test_a_host_that_does_not_listen_is_left_after_a_while(together, place):
  (place / "bin" / "py").write_text(HOST.replace("echo saved; exit 75", ""))
  process = together("--env=MARK=1", "--grace_secs=1")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 1 and "no end after 1 s on one" in err, (out, err)
  [pid] = [int(line.split()[-1]) for line in out.splitlines() if " up " in line]
  os.kill(pid, signal.SIGKILL)


def test_hosts_end_when_the_launcher_is_gone(together):
  process = together()
  pids = read_pids(process, 2)
  process.kill()
  process.communicate(timeout=60)
  assert_ended(pids)
