"""The program by its command line; in a process of its own where it is killed, or where nobody reads what it prints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import in_process
import numpy as np
import pytest

from cpt_jax import config as config_lib, journal
from cpt_jax.config import ConfigError
from cpt_jax.model import spec as spec_lib
from cpt_jax.training import checkpoint, metrics


def command(config_file, workdir, *more):
  return [sys.executable, "-m", "cpt_jax.main", f"--config={config_file}", f"--workdir={workdir}", *map(str, more)]


def environment(root):
  return {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}


def main(config_file, workdir, *more):
  return in_process.cpt("train", f"--config={config_file}", f"--workdir={workdir}", *more)


def records(workdir, kind):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [record for record in lines if record["kind"] == kind]


def weights(workdir):
  return (workdir / "hf" / "model.safetensors").read_bytes()


def test_a_run_trains_evaluates_and_exports(finished_run, write_config, tiny_base):
  workdir = finished_run
  assert [record["step"] for record in records(workdir, "eval")] == [0, 10, 20]
  first, *_, last = records(workdir, "eval")
  assert all(source["change"] == 0 for source in first["sources"].values()) and first["drift"]["layers"] == [0.0, 0.0]
  assert last["sources"]["poetry"]["change"] < -0.1 and min(last["drift"]["layers"]) > 0
  trained = records(workdir, "train")
  assert [record["step"] for record in trained] == [5, 10, 15, 20] and set(trained[0]["source_loss"]) == {"general", "poetry"}
  ledger = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
  assert sum(source["rows"] for source in ledger[-1]["sources"]) == 20 * 4
  for i, source in enumerate(ledger[-1]["sources"]):
    assert source["bytes"] == sum(record["sources"][i]["window"]["bytes"] for record in ledger) > 0
  causal, _ = spec_lib.flops_per_token(spec_lib.from_hf(spec_lib.load_hf_config(tiny_base)), 32, frozen=())
  assert [record["flops"] for record in records(workdir, "eval")] == pytest.approx([0, causal * 32 * 40, causal * 32 * 80])
  for part in ("general", "poetry", "bits", "checkpoint", str(workdir / "hf")):
    assert part in (workdir / "printed.txt").read_text(), part
  exported = spec_lib.load_hf_config(workdir / "hf")
  assert spec_lib.from_hf(exported) == spec_lib.from_hf(spec_lib.load_hf_config(tiny_base))
  assert (workdir / "hf" / "tokenizer.json").exists()

  again = main(write_config(), workdir)
  assert again.returncode == 0 and "nothing to do" in again.stdout and "poetry" in again.stdout

  other = main(write_config(), workdir, "--config.schedule.lr_peak=1e-3")
  assert other.returncode == 78 and "schedule.lr_peak: 0.003 -> 0.001" in other.stderr and "Traceback" not in other.stderr


# The program, killed as soon as it has handed its second checkpoint to the threads that write it.
KILLED = """
import os, signal, sys
from cpt_jax.training import checkpoint

save = checkpoint.Checkpoints.save

def save_and_die(self, state, step, **more):
  save(self, state, step, **more)
  if step == 10:
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoints.save = save_and_die
import runpy
runpy.run_module("cpt_jax.main", run_name="__main__", alter_sys=True)
"""


def test_killed_while_it_saves_and_stopped_by_a_signal_it_is_the_same_run(
  finished_run, write_config, tmp_path, root, monkeypatch
):
  more = (write_config(), tmp_path / "run", "--config.checkpoint.every=5 steps")
  killed = [sys.executable, "-c", KILLED, *command(*more)[3:]]
  assert subprocess.run(killed, cwd=root, env=environment(root), capture_output=True).returncode == -signal.SIGKILL
  assert 5 in checkpoint.saved_steps(tmp_path / "run") and records_so_far(tmp_path / "run")[-1]["step"] >= 5

  write = metrics.Writer.train
  with monkeypatch.context() as patch:  # a signal that comes while a step runs
    patch.setattr(metrics.Writer, "train", lambda self, *a: (write(self, *a), signal.raise_signal(signal.SIGTERM)))
    stopped = main(*more)
  assert stopped.returncode == 75, stopped.stdout + stopped.stderr
  [*_, at] = checkpoint.saved_steps(tmp_path / "run")
  assert 5 < at < 20 and f"stopped by a signal at step {at}" in stopped.stdout
  assert main(*more).returncode == 0
  assert_the_same_run(tmp_path / "run", finished_run)


def assert_the_same_run(workdir, whole):
  """The same weights, and the same records but for the speed."""
  assert weights(workdir) == weights(whole)
  for kind in ("train", "eval"):
    # A record that a kill cut in two goes on from what the checkpoint kept of it.
    found, wanted = (
      [{k: v for k, v in record.items() if k != "tokens_per_sec"} for record in records(run, kind)] for run in (workdir, whole)
    )
    assert found == wanted


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_parameters(write_config, tmp_path, root):
  config_file = write_config(steps=400, every=7, name="killed")
  assert main(config_file, tmp_path / "whole").returncode == 0
  workdir = tmp_path / "killed"
  for number, at_step in ((signal.SIGKILL, 10), (signal.SIGTERM, 60), (signal.SIGKILL, 120)):
    process = subprocess.Popen(command(config_file, workdir), cwd=root, env=environment(root), stdout=subprocess.DEVNULL)
    while process.poll() is None and not (workdir / "metrics.jsonl").exists():
      time.sleep(0.02)
    while process.poll() is None and not any(record["step"] >= at_step for record in records_so_far(workdir)):
      time.sleep(0.01)
    process.send_signal(number)
    code = process.wait(timeout=300)
    assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL)
  assert main(config_file, workdir).returncode == 0
  assert_the_same_run(workdir, tmp_path / "whole")


def records_so_far(workdir):
  return journal.read(workdir / "metrics.jsonl")


def test_moments_and_data_position_survive_too(write_config, finished_run, tmp_path):
  # stop_after ends early without touching the schedules, so the rest must be as if nothing had happened.
  config_file = write_config()
  assert main(config_file, tmp_path / "parts", "--config.debug.stop_after=7").returncode == 0
  assert not (tmp_path / "parts" / "hf").exists()
  assert main(config_file, tmp_path / "parts").returncode == 0
  assert weights(tmp_path / "parts") == weights(finished_run)


def test_a_dry_run_says_what_would_happen_and_trains_nothing(write_config, tmp_path):
  done = main(write_config(), tmp_path / "run", "--dry_run")
  assert done.returncode == 0, done.stdout + done.stderr
  for part in (
    "general",
    "epochs",
    "last update",
    "layers.wq",
    "weight decay",
    "per device",
    "Hugging Face",
    "optimizer state fresh",
    "the step, by the compiler",
    "peak ",
  ):
    assert part in done.stdout, part
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["domain", "language", "pretrain", "quickstart"])
def test_every_shipped_config_dry_runs(root, tmp_path, tiny_base, fixtures, name):
  assert {file.stem for file in (root / "configs").glob("*.py")} == {"domain", "language", "pretrain", "quickstart"}
  options = ["--dry_run", "--config.data.row_len=64", "--config.data.heldout_frac=0.1"]
  options += [f"--config.model.scratch={tiny_base}/config.json", f"--config.data.tokenizer={tiny_base}"]
  options += [f"--config.start.hf={tiny_base}"] * (name != "pretrain")
  for source in config_lib.load_file(str(root / "configs" / f"{name}.py")).data.sources:
    options.append(f"--config.data.sources.{source}.store={tmp_path / 'store'}")
    options.append(f"--config.data.sources.{source}.text={fixtures / 'corpus.jsonl'}")
  done = main(root / "configs" / f"{name}.py", tmp_path / "run", *options)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "nothing was trained" in done.stdout


@pytest.mark.parametrize(
  "options, parts",
  [
    (["--config.train.lenght=5", "--config.schedule.nme=x"], ["Did you mean train.length", "schedule.name"]),
    (["--config.train.batch_rows=eight"], ["train.batch_rows", "eight"]),
    (["--config.data.sources.general.share=-1", "--config.schedule.name=triangle"], ["sources.general.share", "schedule.name"]),
    (["--config.data.sources.poetry.store=no/such/store", "--config.data.sources.poetry.text="], ["no/such/store"]),
    (["--config.start.hf=no/such/model"], ["no/such/model", "config.json"]),
    (["--config.mesh.tensor=3"], ["mesh.tensor"]),
    (
      ["--config.optimizer.frozen=('embeding',)", "--config.data.row_len=4096"],
      ["optimizer.frozen", "embedding", "data.row_len"],
    ),
    (["--config.data.row_len=4096"], ["data.row_len=4096", "128"]),
  ],
)
def test_wrong_input_is_named_with_the_fix_and_ends_with_code_78(write_config, tmp_path, options, parts):
  done = main(write_config(), tmp_path / "run", *options)
  assert done.returncode == 78, done.stdout + done.stderr
  assert "Traceback" not in done.stderr
  for part in parts:
    assert part in done.stderr, done.stderr
  assert not (tmp_path / "run" / "ckpt").exists()


def test_two_runs_do_not_share_a_workdir(write_config, tmp_path):
  config = config_lib.resolve(config_lib.load_file(str(write_config())))
  with checkpoint.claim(tmp_path / "run", config):
    second = checkpoint.claim(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="another process"):
      second.__enter__()


def test_a_start_that_failed_may_be_mended(write_config, tmp_path):
  config = config_lib.resolve(config_lib.load_file(str(write_config())))
  with checkpoint.claim(tmp_path / "run", config):
    pass
  mended = config.copy_and_resolve_references()
  with mended.unlocked():
    mended.schedule.lr_peak = 1e-3
  with checkpoint.claim(tmp_path / "run", mended):
    assert json.loads((tmp_path / "run" / "config.json").read_text())["schedule"]["lr_peak"] == 1e-3


def test_a_run_goes_on_when_nobody_reads_its_output(write_config, root, tmp_path):
  process = subprocess.Popen(
    command(write_config(), tmp_path / "run"),
    cwd=root,
    env=environment(root),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.readline()
  process.stdout.close()
  with process:
    errors = process.stderr.read()
  assert process.returncode == 0, errors
  assert (tmp_path / "run" / "summary.json").exists()


def test_a_path_that_cannot_be_written_ends_with_code_74(write_config, tmp_path):
  (tmp_path / "file").write_text("")
  done = main(write_config(), tmp_path / "file" / "run")
  assert done.returncode == 74, done.stdout + done.stderr
  assert str(tmp_path / "file") in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_ends_the_run_with_code_86(write_config, tmp_path):
  done = main(write_config(), tmp_path / "run", "--config.optimizer.weight_decay=1e38", "--config.optimizer.clip_norm=0")
  assert done.returncode == 86, done.stdout + done.stderr
  assert "step" in done.stderr and "lr_peak" in done.stderr


def test_another_run_can_be_resumed_or_lent_its_weights(finished_run, write_config, tmp_path):
  config_file = write_config()
  first = shutil.copytree(finished_run, tmp_path / "first")
  after = ["--config.start.hf=", "--config.train.length=30 steps"]
  longer = main(config_file, tmp_path / "longer", f"--config.start.resume={first}", *after)
  assert longer.returncode == 0, longer.stdout + longer.stderr
  assert "at step 20" in longer.stdout and records(tmp_path / "longer", "train")[0]["step"] == 25
  # Forgetting is measured from where this run began, though no evaluation was due there.
  first_eval = records(tmp_path / "longer", "eval")[0]
  assert first_eval["step"] == 20 and all(source["change"] == 0 for source in first_eval["sources"].values())
  lent = main(config_file, tmp_path / "lent", f"--config.start.weights={first}", *after, "--config.debug.stop_after=5")
  assert lent.returncode == 0, lent.stdout + lent.stderr
  assert records(tmp_path / "lent", "eval")[0]["step"] == 0
  end, begin = records(first, "eval")[-1], records(tmp_path / "lent", "eval")[0]
  np.testing.assert_allclose(begin["sources"]["poetry"]["loss"], end["sources"]["poetry"]["loss"], rtol=1e-6)

  # The other run goes on and drops the checkpoint that this one began with: it goes on too, but cannot tell how far it moved.
  shutil.copytree(first / "ckpt" / "20", first / "ckpt" / "40")
  shutil.rmtree(first / "ckpt" / "20")
  more = main(config_file, tmp_path / "lent", f"--config.start.weights={first}", *after, "--config.debug.stop_after=10")
  assert more.returncode == 0, more.stdout + more.stderr
  assert "drift is not measured" in more.stdout and records(tmp_path / "lent", "eval")[-1]["drift"] == {}


def test_questions_and_answers_are_replayed_in_stages_with_a_weight_of_their_own(write_config, tmp_path, fixtures):
  texts = [json.loads(line)["text"] for line in (fixtures / "corpus.jsonl").read_text().splitlines()]
  records = [{"prompt": text[:40], "answer": text[40:120]} for text in texts if len(text) > 60]
  (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, {"prompt": "no answer"}]))
  source = (
    f"  c.data.sources.asked = config.source(store={str(tmp_path / 'asked')!r}, text={str(tmp_path / 'asked.jsonl')!r}, "
    "records='prompt', train_on='answers', role='replay', loss_weight=0.5, min_tokens=8)\n"
    "  for name in ('general', 'poetry'): c.data.sources[name].share = 1.0\n"
    "  c.data.shares = ((0, {'general': 0.5, 'poetry': 0.5}), ('50%', {'poetry': 0.5, 'asked': 0.5}))\n"
  )
  file = write_config(steps=8, name="asked")
  file.write_text(file.read_text().replace("  return c", source + "  return c"))
  done = main(file, tmp_path / "run")
  assert done.returncode == 0, done.stdout + done.stderr
  ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
  half, whole = ({entry["source"]: entry for entry in record["sources"]} for record in ledger[1:])
  assert half["asked"]["rows"] == 0 and whole["asked"]["rows"] == 8 and whole["general"]["window"]["rows"] == 0
  assert 0 < whole["asked"]["tokens"] < 8 * 32 and whole["asked"]["documents"] > 0
  assert "asked" in records_of_losses(tmp_path / "run") and "bad_records.jsonl" in done.stdout


def records_of_losses(workdir):
  """Sources that took part in some training record."""
  return {name for record in records(workdir, "train") for name in record["source_loss"]}
