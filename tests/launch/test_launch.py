"""Launchers: what a host is given is what the launcher was given, and processes are started and stopped together."""

import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from cpt_jax import journal
from cpt_jax.config import ConfigError
from cpt_jax.launch import slurm, ssh, tpu_vm, xpk
from cpt_jax.launch.command import Run

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

KINDS = {
  "ssh": lambda run, **more: ssh.launch(run, ["one", "me@two", "three"], **SSH_ARGUMENTS | more),
  "slurm": lambda run, **more: slurm.launch(run, JOB._replace(name="my run", more=["comment=it's"]), **more),
  "tpu_vm": lambda run, **more: tpu_vm.launch(run, **TPU | {"zone": "us-east5-a"} | more),
  "xpk": lambda run, **more: xpk.launch(run, WORKLOAD, **more),
}
SSH_ARGUMENTS = dict(coordinator=":8476", ssh_options=["Port=2222"], grace_secs=120, only_print=False)
JOB = slurm.Job("cpt_jax", 2, gpus_per_node=8, cpus_per_task=0, time="", partition="", output="%x-%j.out", stop_secs=180)
TPU = dict(tpu="pod", queued_resource="", zone="", project="", only_print=False)
WORKLOAD = xpk.Workload("c", "w", tpu_type="v5p-64", image="i", num_slices=2, max_restarts=10, zone="", project="")
QUICKSTART = ["--config=configs/quickstart.py"]


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
def on_path(place, monkeypatch):
  """The stand-ins are found, and what marks a process is not set."""
  monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
  monkeypatch.delenv("MARK", raising=False)


def options(place):
  return [f"--config={place / 'my config.py'}", *NASTY]


def a_run(place, *more, variables=("MARK=it's $HOME",)):
  return Run([*options(place), *more], str(place), "bin/py", list(variables))


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_is_given_what_the_launcher_was_given(on_path, place, capfd, kind):
  assert KINDS[kind](a_run(place), only_print=False) == 0
  lines = capfd.readouterr().out.splitlines()
  found = [json.loads("".join(line.partition("[")[1:])) for line in lines]
  own = [[]]
  if kind == "ssh":
    own = [["--coordinator=one:8476", "--num_processes=3", f"--process_id={i}"] for i in range(3)]
    assert sorted(line.split(": ")[0] for line in lines) == ["me@two", "one", "three"]
  expected = [[str(place), "it's $HOME", ["-m", "cpt_jax.main", *options(place), *mine]] for mine in own]
  assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_print_says_what_would_be_run_and_runs_nothing(place, monkeypatch, capfd, kind):
  monkeypatch.setenv("PATH", "/nowhere")
  assert KINDS[kind](a_run(place), only_print=True) == 0
  said = capfd.readouterr().out
  words = shlex.split(said, comments=True)
  hosts = [shlex.split(word) for word in words if "cpt_jax.main " in word] or [words]
  assert len(hosts) == (3 if kind == "ssh" else 1)
  for host in hosts:
    found = host[host.index("cpt_jax.main") + 1 :]
    assert found[: len(options(place))] == options(place)
    assert "MARK=it's $HOME" in host and str(place) in host
  reasons = [line for line in said.splitlines() if line.startswith("#   ")]
  assert any("LIBTPU_INIT_ARGS" in line for line in reasons) == (kind in ("tpu_vm", "xpk"))
  assert any("JAX_OPTIMIZATION_LEVEL=O1" in line for line in reasons) == (kind in ("ssh", "slurm"))


def test_a_job_that_is_stopped_goes_back_into_the_queue(on_path, place, capfd):
  (place / "bin" / "py").write_text("#!/bin/sh\nexit $CODE\n")
  for code, requeued in ((0, False), (75, True), (78, False)):
    run = a_run(place, variables=[f"CODE={code}"])
    assert slurm.launch(run, JOB._replace(nodes=1), only_print=False) == code
    assert ("scontrol requeue" in capfd.readouterr().out) == requeued


@pytest.mark.parametrize(
  ("options", "variables", "message"),
  [
    ([], [], "name a config behind --"),
    (["--config=configs/quikstart.py"], [], "configs/quikstart.py: no such file. Did you mean"),
    (["--config=/nowhere/c.py"], [], "/nowhere/c.py: no such file"),
    ([*QUICKSTART, "--config.train.lenght=3"], [], "Did you mean train.length"),
    (QUICKSTART, ["x"], "--env=x: write --env=NAME=VALUE"),
    ([*QUICKSTART, "--num_processes=2"], [], "--num_processes=2: the launcher sees to it"),
  ],
)
@pytest.mark.parametrize("directory", [None, "a clone/where a shell starts"])
def test_mistakes_of_a_run_are_named(root, monkeypatch, options, variables, message, directory):
  monkeypatch.chdir(root)
  with pytest.raises(ConfigError, match=message):
    ssh.launch(Run(options, directory or str(root), "python3", variables), ["a"], **SSH_ARGUMENTS)


@pytest.mark.parametrize(
  ("names", "hosts_file", "message"),
  [
    ([], "", "either --hosts=a,b or --hosts_file=FILE"),
    (["a", "b", "a"], "", "host 'a' is named 2 times"),
    (["a", "-oProxyCommand=x"], "", "host '-oProxyCommand=x': write a name"),
    ([], "/nowhere", "--hosts_file=/nowhere: No such file"),
  ],
)
def test_hosts_that_cannot_be_are_named(names, hosts_file, message):
  with pytest.raises(ConfigError, match=message):
    ssh.read_hosts(names, hosts_file)


def test_hosts_stand_in_a_file_one_a_line(tmp_path):
  (tmp_path / "hosts").write_text("# ours\none\n\n me@two  # the big one\n")
  assert ssh.read_hosts([], str(tmp_path / "hosts")) == ["one", "me@two"]


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("tpu_vm", "gcloud is not on the PATH: it is part of the Google Cloud CLI"),
    ("xpk", "xpk is not on the PATH: .*pip install xpk"),
    ("slurm", "sbatch is not on the PATH: it is Slurm's"),
    ("ssh", "ssh is not on the PATH: install OpenSSH"),
  ],
)
def test_a_program_that_is_not_there_is_named(root, monkeypatch, kind, message):
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(ConfigError, match=message):
    KINDS[kind](Run(QUICKSTART, str(root), "python3", []), only_print=False)


def test_mistakes_of_one_kind_are_named(root):
  run = Run(QUICKSTART, str(root), "python3", [])
  for both in (TPU | {"tpu": ""}, TPU | {"queued_resource": "q"}):
    with pytest.raises(ConfigError, match="either --tpu=NAME"):
      tpu_vm.launch(run, **both)
  with pytest.raises(ConfigError, match="one line"):
    slurm.launch(run, JOB._replace(more=["comment=a\nb"]), only_print=True)


def test_a_config_that_only_the_pod_has_is_not_missed_here(capfd):
  run = Run(["--config=/only/there.py", "--config.any.key=1"], "cpt_jax", "python3", [])
  assert tpu_vm.launch(run, **TPU | {"only_print": True}) == 0
  assert "--config=/only/there.py" in capfd.readouterr().out


# ---- ssh: together ----


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


# A host: says that it is there and waits; ends as a run does after a SIGTERM; "two" ends by itself where MARK says so.
HOST = """#!/bin/sh
trap 'echo saved; exit 75' TERM
case "$*" in *--process_id=1*) [ -n "$MARK" ] && { sleep 0.3; echo broken >&2; exit $MARK; } ;; esac
echo "up $$"
while :; do sleep 0.05; done
"""


LAUNCHER = """
import json, sys
from cpt_jax.launch import ssh
from cpt_jax.launch.command import Run
run, hosts, more = json.loads(sys.argv[1])
sys.exit(ssh.launch(Run(*run), hosts, **more))
"""


@pytest.fixture
def start(on_path, root):
  """Starts the hosts from a process of its own."""

  def popen(run, hosts, **more):
    arguments = json.dumps([run, hosts, SSH_ARGUMENTS | more])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, arguments], cwd=root, **pipes)

  return popen


@pytest.fixture
def together(start, place):
  """Starts two waiting hosts."""
  (place / "bin" / "py").write_text(HOST)
  return lambda *variables, **more: start(a_run(place, variables=variables), ["one", "two"], **more)


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
  process = together("MARK=86")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 86, (out, err)
  assert "two: broken" in out and "one: saved" in out and "two ended with 86; the others are told" in err
  assert_ended([int(line.split()[-1]) for line in out.splitlines() if " up " in line])


def test_a_host_that_does_not_listen_is_left_after_a_while(together, place):
  (place / "bin" / "py").write_text(HOST.replace("echo saved; exit 75", ""))
  process = together("MARK=1", grace_secs=1)
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


@pytest.mark.slow
def test_two_processes_begin_the_quickstart(start, root, tmp_path):
  workdir = tmp_path / "a run"
  options = [*QUICKSTART, f"--workdir={workdir}", "--config.debug.stop_after=3", "--config.log.every=1"]
  options += ["--config.eval.tokens=1000", "--config.mesh.data=2", "--config.mesh.fsdp=1"]
  options += [f"--config.data.sources.{name}.store={tmp_path / name}" for name in ("general", "poetry")]
  run = Run(options, str(root), sys.executable, ["JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1"])
  process = start(run, ["me@localhost", "127.0.0.1"], coordinator=f":{free_port()}")
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, (out, err)
  steps = [record["step"] for record in journal.read(workdir / "metrics.jsonl") if record["kind"] == "train"]
  assert steps == [1, 2, 3]
  assert "me@localhost: " in out and "127.0.0.1: step" not in out, "process 0 alone speaks"
  parts = {path.name for path in (workdir / "ckpt" / "3" / "state").glob("ocdbt.process_*")}
  assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
