"""cpt fit-laws: what it reads, refuses and writes; the published curves from their files."""

import json

import numpy as np
import pytest

from cpt_jax import config as config_lib
from cpt_jax.cli import app
from cpt_jax.laws import annealing, curves, fit_curves

TRUTH = np.array([2.6, 0.55, 0.45, 400.0, 2.0, 0.6, 0.65])


@pytest.fixture
def call(capsys):
  """Runs the command in this process: (exit code, printed, complained)."""

  def run(*arguments):
    code = app.main(["fit-laws", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, "".join(line for line in printed.err.splitlines(keepends=True) if not line.startswith("fit "))

  return run


def rate(kind, step_n):
  return 3e-4 * {"constant": np.ones(len(step_n)), "jump": np.where(step_n < 2000, 1.0, 0.3), "slope": 1.2 - step_n / 4000}[kind]


def write_curve(path, kind, *, header="step,lr,loss", seed=0):
  step_n = np.arange(200, 4001, 100)
  made = curves.from_log(step_n, lr_n=rate(kind, step_n), loss_n=np.ones(len(step_n)), name=kind)
  loss_n = annealing.MultiPower().predict(TRUTH, [made]) * np.exp(5e-4 * np.random.default_rng(seed).standard_normal(len(step_n)))
  rows = [f"{step},{lr:.6g},{loss:.5f}" for step, lr, loss in zip(step_n, rate(kind, step_n), loss_n, strict=True)]
  path.write_text("\n".join([header, *rows, ""]))
  return path


@pytest.fixture
def files(tmp_path):
  return [write_curve(tmp_path / f"{kind}.csv", kind, seed=i) for i, kind in enumerate(("constant", "jump", "slope"))]


def test_figures_go_into_tables_json_and_a_png(call, files, tmp_path):
  out = tmp_path / "new" / "out.json"
  options = ["--resamples=8", "--starts=8", "--json", out, "--plot", tmp_path / "out.png"]
  code, printed, complained = call("--fit", files[0], files[1], "--score", files[2], *options)
  assert (code, complained) == (0, "")
  found = json.loads(out.read_text())
  assert found["fitted_on"] == [str(file) for file in files[:2]] and found["how"] == "curves that were not fitted"
  (law,) = found["laws"]
  assert law["law"] == "multi_power" and list(law["parameters"]) == ["L0", "A", "alpha", "B", "C", "beta", "gamma"]
  assert all(p["low"] <= p["high"] for p in law["parameters"].values())
  scored = law["scored"][str(files[2])]
  assert scored["r2"] > 0.99 and scored["mae"] < 0.01 and scored["worst_relative"] < 0.01 and 0 <= scored["inside_90"] <= 1
  assert law["mean"]["mae"] == scored["mae"]
  assert f"{scored['mae']:.5f}" in printed and "slope" in printed and printed.endswith(f"wrote {tmp_path / 'out.png'}\n")
  assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_without_curves_to_score_each_is_predicted_from_the_others(call, files, tmp_path):
  code, printed, _ = call("--law=all", "--fit", *files, "--resamples=0", "--starts=4", "--json", tmp_path / "out.json")
  assert code == 0
  found = json.loads((tmp_path / "out.json").read_text())
  assert found["how"] == "each curve predicted from the others"
  by_name = {law["law"]: law for law in found["laws"]}
  assert set(by_name) == {"forward", "tissue_1000", "tissue", "multi_power"}
  assert all(set(law["scored"]) == {str(file) for file in files} for law in by_name.values())
  assert by_name["multi_power"]["mean"]["mae"] < by_name["forward"]["mean"]["mae"]
  assert by_name["multi_power"]["parameters"]["L0"]["low"] is None  # no resamples, no intervals
  assert printed.rindex("forward ") > printed.rindex("multi_power ")  # ranked, the best first


def test_a_curve_that_is_left_out_has_no_say_in_its_prediction(files):
  found = fit_curves.fit_curves(files, law="forward", resamples=0, starts=4)
  made = [curves.read_csv(file) for file in files]
  for i, scored in enumerate(found.results[0].scored):
    others = curves.fit(annealing.Forward(), made[:i] + made[i + 1 :], num_starts=4)
    np.testing.assert_allclose(scored.predicted_n, others.predict([made[i]]))


def test_headers_may_have_spaces_capitals_and_more_columns(tmp_path):
  file = write_curve(tmp_path / "a.csv", "jump", header=" Step , LR,  loss ")
  file.write_text("\n".join(f"{line},x" for line in file.read_text().splitlines()) + "\n\n")
  assert curves.read_csv(file).step_n.tolist() == list(range(200, 4001, 100))


def test_everything_that_is_wrong_is_said_at_once(call, files, tmp_path):
  texts = {
    "empty.csv": "",
    "no_rows.csv": "step,lr,loss\n",
    "columns.csv": "step,rate\n1,2\n",
    "words.csv": "step,lr,loss\n1,0.1,4\n2,zero,3.9\n3,0.1,nan\n4,0.1\n5.5,0.1,3\n",
    "order.csv": "step,lr,loss\n1,0.1,4\n3,0.1,3.9\n2,0.1,3.8\n",
  }
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
  code, _, complained = call(
    "--law=multipower", "--fit", *(tmp_path / name for name in texts), tmp_path / "none.csv", "--score", tmp_path
  )
  assert code == 78
  for line in (
    "--law=multipower: choose one of forward, .* Did you mean multi_power?",
    "empty.csv: empty; expected a first line step,lr,loss",
    "no_rows.csv: no rows under the header",
    "columns.csv: no column lr and no loss; found step, rate",
    "words.csv, line 3: lr='zero': expected a finite number",
    "words.csv, line 4: loss='nan': expected a finite number",
    "words.csv, line 5: loss='': expected a finite number",
    "words.csv, line 6: step='5.5': expected a whole number",
    "order.csv: step 2 comes after step 3",
    "none.csv: no such file",
    "a run measures several sources; name one with --source",
  ):
    assert all(part in complained for part in line.split(".*")), (line, complained)
  assert len(complained.splitlines()) == 11


def test_mistakes_in_the_flags_are_named(call, files, tmp_path):
  for arguments, message in (
    ((), "--fit and --runs missing"),
    (("--fit", files[0], "--score", files[0]), "both fitted and scored"),
    (("--runs", tmp_path / "none"), "no such folder"),
    (("--fit", files[0], "--starts=0"), "at least 0 and 1"),
    ((files[0],), "there is no "),
    (("--runs", tmp_path, "--source=general"), "no run there"),
  ):
    code, _, complained = call(*arguments)
    assert code == 78 and message in complained, complained


def write_run(folder, kind, *, replay, steps=400):
  """A run directory as the loop leaves it, of which only the records matter."""
  config = config_lib.default()
  config.train.length, config.schedule.warmup, config.schedule.lr_peak = f"{steps} steps", "20 steps", 3e-4
  config.schedule.name = kind
  config.start.hf = "base"
  for name, share, role in (("general", replay, "replay"), ("domain", 1 - replay, "domain")):
    config.data.sources[name] = config_lib.source(store=name, share=share, role=role)
  config_lib.resolve(config)
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config.to_json_best_effort())
  evals = np.arange(0, steps + 1, 20)
  rise_n = 0.4 * (1 - replay) ** 3 * (1 - (1 + 2e4 * 3e-4 * evals / 20) ** -0.3)
  records = [
    {"kind": "eval", "step": int(step), "sources": {"general": {"loss": 3 + rise}, "domain": {"loss": 4 - rise}}}
    for step, rise in zip(evals, rise_n, strict=True)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  tokens = [{"source": "general", "tokens": int(1000 * replay)}, {"source": "domain", "tokens": int(1000 * (1 - replay))}]
  (folder / "ledger.jsonl").write_text(json.dumps({"step": steps, "sources": tokens}) + "\n")


def test_runs_of_this_project_are_read(call, tmp_path):
  for i, (kind, replay) in enumerate((("constant", 0.0), ("cosine", 0.1), ("constant", 0.5))):
    write_run(tmp_path / "probe" / str(i), kind, replay=replay)
  arguments = ["--law=cpt_power", "--runs", tmp_path / "probe", "--resamples=0", "--starts=4"]
  code, _, complained = call(*arguments, "--source=general", "--json", tmp_path / "out.json")
  assert (code, complained) == (0, "")
  (law,) = json.loads((tmp_path / "out.json").read_text())["laws"]
  assert law["on_fitted"]["mae"] < 3e-3 and len(law["scored"]) == 3
  code, _, complained = call(*arguments, "--source=zh")
  assert code == 78 and complained.count("measures no source 'zh'; it has domain, general") == 3
