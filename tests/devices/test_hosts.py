"""Several processes as one run: real processes over loopback, each with one CPU device, started by the program's own command."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal

import in_process
import jax
import numpy as np
import pytest
from fleet import Fleet, by_open_mpi, by_slurm, trained
from safetensors.numpy import load_file

from cpt_jax import exits, journal
from cpt_jax.config import ConfigError
from cpt_jax.devices import hosts
from cpt_jax.devices.hosts import join_arguments
from cpt_jax.model import pretrained, spec as spec_lib, transformer
from cpt_jax.training import checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory, fixtures, tiny_hf_config, write_config):
  """A directory to run in: config.py, the text, and a base whose sizes 1 to 4 processes divide."""
  where = tmp_path_factory.mktemp("hosts")
  hf_config = {**tiny_hf_config, "hidden_size": 48, "intermediate_size": 96}
  model = spec_lib.from_hf(hf_config)
  params = transformer.init(model, jax.random.key(0))
  pretrained.save_params(params, model, where / "base", source_dir=fixtures / "tokenizer", hf_config=hf_config)
  own = dict(base=str(where / "base"), store="store", text="corpus.jsonl", rows=12, parts=1, log=1, mesh=(1, -1))
  shutil.copy(write_config(steps=60, every=4, name="config", **own), where)
  shutil.copy(fixtures / "corpus.jsonl", where)
  return where


@pytest.fixture
def fleet(root, place):
  """Starts processes; kills what a failed test leaves."""
  started = []

  def start(workdir, *options, **more):
    started.append(Fleet(root, place, workdir, *options, **more))
    return started[-1]

  yield start
  for each in started:
    each.kill()


def read_in_all(workdir):
  """What the ledger says was read of each source before a step."""
  records = journal.read(workdir / "ledger.jsonl")
  return {r["step"]: [{key: source[key] for key in source if key != "window"} for source in r["sources"]] for r in records}


def open_records(process):
  """Names of the .jsonl files that a process holds open for writing."""
  files = set()
  for link in pathlib.Path(f"/proc/{process.pid}/fd").iterdir():
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
      files.add(os.readlink(link))
  return {pathlib.Path(file).name.removesuffix(" (deleted)") for file in files if ".jsonl" in file and "corpus" not in file}


def assert_same_run(workdir, expected, *, whole=True):
  """The same steps once each, the same rows exactly (tokens, ledger), losses that differ by rounding alone."""
  for kind, keys in (("train", ("loss", "grad_norm", "rate")), ("eval", ())):
    found, wanted = ([r for r in journal.read(w / "metrics.jsonl") if r["kind"] == kind] for w in (workdir, expected))
    wanted = wanted if whole else wanted[: len(found)]
    assert found and [r["step"] for r in found] == [r["step"] for r in wanted]
    for one, other in zip(found, wanted, strict=True):
      assert one.get("tokens") == other.get("tokens")
      for key in keys:
        # Rounding, which differs with the number of processes, grows as such a short run learns: in the gradient's norm it was
        # 3e-4 after 30 steps where the loss was still the same to 1e-8. A row read twice or never moves both by per cents.
        rtol = 2e-3 if key == "grad_norm" else 2e-4
        np.testing.assert_allclose(one[key], other[key], rtol=rtol, err_msg=f"step {one['step']}, {key}")
      if kind == "train":
        assert one["source_loss"] == pytest.approx(other["source_loss"], rel=2e-4)
      else:
        for name, source in one["sources"].items():
          assert source["tokens"] == other["sources"][name]["tokens"]
          assert source["loss"] == pytest.approx(other["sources"][name]["loss"], rel=2e-4)
  if whole:
    assert (workdir / "ledger.jsonl").read_text() == (expected / "ledger.jsonl").read_text()


# ---- who takes part ----


def test_a_laptop_runs_alone_and_flags_win():
  assert join_arguments({}) is None
  assert join_arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "a batch script is no step"
  assert join_arguments(by_slurm(1, 1, 0)[1]) is None and join_arguments({"OMPI_COMM_WORLD_SIZE": "1"}) is None
  assert join_arguments({}, coordinator="h:1", num_processes=1, process_id=0) is None
  found = join_arguments(by_slurm(1, 4, 2)[1], coordinator="h:1", num_processes=2, process_id=1)
  assert found == dict(coordinator_address="h:1", num_processes=2, process_id=1, cluster_detection_method="deactivate")


def test_launchers_are_known_by_their_environment():
  one_per_host = {"local_device_ids": []}  # all of them; jax's own rule gives each process the device of its local rank
  assert join_arguments(by_slurm(1, 4, 2)[1]) == {"cluster_detection_method": "slurm", **one_per_host}
  assert join_arguments(by_slurm(1, 4, 2)[1] | {"SLURM_STEP_NUM_NODES": "2"}) == {"cluster_detection_method": "slurm"}
  assert join_arguments(by_slurm(1, 4, 2)[1] | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) == {"cluster_detection_method": "slurm"}
  assert join_arguments(by_open_mpi(1, 3, 2)[1]) == {"cluster_detection_method": "ompi", **one_per_host}
  assert join_arguments(by_open_mpi(1, 3, 2)[1] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}) == {"cluster_detection_method": "ompi"}
  assert join_arguments({"TPU_ML_PLATFORM": "JAX"}) == {}
  assert join_arguments({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
  ("environ", "flags", "message"),
  [
    ({}, dict(coordinator="h:1"), "--num_processes and --process_id missing"),
    ({}, dict(process_id=0, num_processes=2), "--coordinator missing"),
    ({}, dict(coordinator="h:1", num_processes=2, process_id=2), "--process_id=2: with --num_processes=2 use 0 to 1"),
    ({}, dict(coordinator="h:1", num_processes=2, process_id=-1), "--process_id=-1"),
    ({}, dict(coordinator="h:1", num_processes=0, process_id=0), "--num_processes=0: use 1 or more"),
    ({}, dict(coordinator="h", num_processes=2, process_id=0), "--coordinator=h: write HOST:PORT"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "Open MPI 5 .* --coordinator=HOST:PORT of rank 0"),
  ],
)
def test_flags_that_do_not_fit_are_named(environ, flags, message):
  with pytest.raises(ConfigError, match=message):
    join_arguments(environ, **flags)


def test_one_process_waits_for_nobody():
  hosts.connect(coordinator="", num_processes=None, process_id=None, wait_secs=300)
  assert hosts.is_main() and hosts.num_processes_connected() == 1
  with hosts.main_first("alone"):
    hosts.agree({"key": "value"})
  assert hosts.end_all("text", 78) is None
  hosts.disconnect()


# ---- what they do ----


@pytest.mark.slow
def test_two_processes_do_the_run_of_one(fleet, tmp_path):
  short = ["--config.debug.stop_after=4", "--config.eval.every=4 steps"]
  assert fleet(tmp_path / "one", *short, num=1).codes() == [0]
  two = fleet(tmp_path / "two", *short, num=2)
  assert two.codes() == [0, 0], str(two)
  assert_same_run(tmp_path / "two", tmp_path / "one")
  assert "step 4/60" in two.out(0) and "step" not in two.out(1)
  parts = {path.name for path in (tmp_path / "two" / "ckpt" / "4" / "state").glob("ocdbt.process_*")}
  assert parts == {"ocdbt.process_0", "ocdbt.process_1"}, "each process saves its own shards"


def alone(place, workdir, *options):
  """The run on one process: this one."""
  with contextlib.chdir(place):
    done = in_process.cpt("train", f"--config={place}/config.py", f"--workdir={workdir}", *options)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
  """The whole run on one process."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  alone(place, workdir)
  return workdir


STAGES = ((1, 3, None), (2, 6, by_slurm), (3, 9, by_open_mpi))  # processes, steps since the kill, started by


@pytest.mark.parametrize(
  ("first", "stages", "last"),
  [(2, (), 1), pytest.param(2, STAGES, 4, marks=pytest.mark.slow), pytest.param(4, STAGES, 4, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_on_any_number_of_processes_it_is_the_same_run(fleet, place, whole, tmp_path, first, stages, last):
  workdir = tmp_path / "run"
  started = fleet(workdir, num=first)
  started.until(lambda: len(trained(workdir)) > 5 and checkpoint.saved_steps(workdir))
  started.kill()
  at = checkpoint.saved_steps(workdir)[-1]
  assert at < 48
  for num, steps, launcher in stages:
    stage = fleet(workdir, f"--config.debug.stop_after={at + steps}", num=num, launcher=launcher)
    assert stage.codes() == [0] * num, str(stage)
    assert trained(workdir)[-1]["step"] == at + steps
  if last == 1:
    alone(place, workdir)
  else:
    ended = fleet(workdir, num=last)
    assert ended.codes() == [0] * last, str(ended)
  # The ends of the stages were evaluated too, which makes the windows of the ledger shorter; the rest of the record is that of
  # the run that never stopped.
  records, expected = (read_in_all(where) for where in (workdir, whole))
  assert expected.keys() == {0, 30, 60} and {step: records[step] for step in expected} == expected
  evals = [json.dumps(r) for r in journal.read(workdir / "metrics.jsonl") if r["kind"] == "train" or r["step"] in (0, 30, 60)]
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "metrics.jsonl").write_text("\n".join(evals))
  (tmp_path / "kept" / "ledger.jsonl").write_text((whole / "ledger.jsonl").read_text())
  assert_same_run(tmp_path / "kept", whole)
  exported, wanted = (load_file(where / "hf" / "model.safetensors") for where in (workdir, whole))
  assert exported.keys() == wanted.keys()
  for name, tensor in exported.items():
    # Sums over processes round otherwise, and Adam makes whole steps of small gradients: a few 1e-5 were seen for rare tokens.
    np.testing.assert_allclose(tensor, wanted[name], atol=1e-4, err_msg=name)


# A step takes milliseconds, and the word of a signal needs some hundred of them to reach the other process. The rate is low, or
# the rounding of another number of processes would grow over so many steps.
LONG = ("--config.train.length=300 steps", "--config.eval.every=150 steps", "--config.checkpoint.every=1000 steps")
LONG += ("--config.schedule.lr_peak=1e-5", "--config.schedule.lr_final=1e-6")


@pytest.fixture(scope="module")
def long_whole(root, place, tmp_path_factory):
  """A run that lasts long enough to be stopped, on one process."""
  workdir = tmp_path_factory.mktemp("long") / "run"
  alone = Fleet(root, place, workdir, *LONG, num=1)
  assert alone.codes() == [0], str(alone)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_at_the_same_step(fleet, long_whole, tmp_path, number):
  workdir = tmp_path / "run"
  two = fleet(workdir, *LONG, num=2)
  two.until(lambda: len(trained(workdir)) > 3)
  # A second writer would not show in the files: each start replaces them, and only one of the two would write what is left.
  assert [open_records(process) for process in two.processes] == [{"metrics.jsonl", "ledger.jsonl"}, set()]
  two.processes[1].send_signal(number)
  assert two.codes() == [75, 75], str(two)
  [saved] = checkpoint.saved_steps(workdir)
  assert f"stopped by a signal at step {saved}" in two.out(0) and trained(workdir)[-1]["step"] == saved
  again = fleet(workdir, *LONG, num=2)
  assert again.codes() == [0, 0], str(again)
  assert_same_run(workdir, long_whole)


# ---- what they refuse ----


def refused(fleet, tmp_path, **more):
  two = fleet(tmp_path / "run", num=2, **more)
  assert two.codes(timeout=100) == [78, 78], str(two)
  assert not (tmp_path / "run" / "ckpt").exists() and "Traceback" not in two.err(0) + two.err(1)
  return two


@pytest.mark.slow
def test_a_differing_config_is_named_on_all(fleet, tmp_path):
  two = refused(fleet, tmp_path, each={1: ["--config.schedule.lr_peak=1e-3"]})
  for i in range(2):
    assert re.search(r"process 1 \(.+\): config key schedule.lr_peak: 0.001, process 0 \(.+\): 0.003", two.err(i))
    assert two.err(i).count("config key") == 1


@pytest.mark.slow
def test_differing_code_and_workdir_are_named_on_all(fleet, root, tmp_path):
  shutil.copytree(root / "cpt_jax", tmp_path / "changed" / "cpt_jax", ignore=shutil.ignore_patterns("__pycache__"))
  with open(tmp_path / "changed" / "cpt_jax" / "config" / "durations.py", "a") as file:
    file.write("# one line more\n")
  each = {1: [f"--workdir={tmp_path / 'elsewhere'}"]}
  two = refused(fleet, tmp_path, python_paths={1: tmp_path / "changed"}, each=each)
  for i in range(2):
    assert re.search(r"process 1 \(.+\): version of cpt_jax: \w{32}, process 0 \(.+\): \w{32}", two.err(i))
    assert "must be on a disk that all share" in two.err(i)


@pytest.mark.slow
def test_differing_data_is_named_on_all(fleet, place, fixtures, tmp_path):
  (tmp_path / "local").mkdir()
  lines = (fixtures / "corpus.jsonl").read_text().splitlines()
  (tmp_path / "local" / "corpus.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # the same relative path, another disk
  two = refused(fleet, tmp_path, cwds={1: tmp_path / "local"})
  for i in range(2):
    assert re.search(r"process 1 \(.+\): data fingerprint: \w{32}, process 0 \(.+\): \w{32}", two.err(i))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_on_one_ends_all_with_its_words(fleet, tmp_path, wrong):
  two = refused(fleet, tmp_path, each={wrong: ["--config.train.microbatches=5"]})
  assert all("train.microbatches=5 does not divide" in two.err(i) for i in range(2))
  assert f"process {wrong} (" in two.err(1 - wrong) and "has ended this run" in two.err(1 - wrong)


@pytest.mark.slow
def test_rows_that_the_processes_do_not_divide_are_named(fleet, tmp_path):
  two = refused(fleet, tmp_path, each={i: ["--config.train.batch_rows=13"] for i in range(2)})
  assert all("does not divide the 13 rows" in two.err(i) for i in range(2))


@pytest.mark.slow
def test_nobody_waits_for_ever(fleet, tmp_path):
  lonely = fleet(tmp_path / "run", num=2, each={0: ["--wait_secs=12"], 1: ["--config.no.such.key=1"]})
  assert lonely.codes() == [exits.LOST, 78], str(lonely)
  assert "process 0 of 2" in lonely.err(0) and "not all processes came" in lonely.err(0)

  workdir = tmp_path / "killed"
  two = fleet(workdir, num=2)
  two.until(lambda: len(trained(workdir)) > 1)
  two.processes[1].kill()
  assert two.codes(timeout=120) == [exits.LOST, -signal.SIGKILL], str(two)
  assert "lost another process" in two.err(0) and "no answer from process 1" in two.err(0)
