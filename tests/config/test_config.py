import json
import pathlib

import pytest

from cpt_jax import config as config_lib
from cpt_jax.config import durations


def good():
  c = config_lib.default()
  c.start.hf = "base"
  c.data.sources.general = config_lib.source(store="store/en", role="replay", share=0.25)
  c.data.sources.domain = config_lib.source(store="store/zh", share=[(0, 0.05), ("20%", 0.75)])
  return c


def test_a_good_config_resolves_to_a_locked_copy_that_is_json():
  c = good()
  resolved = config_lib.resolve(c)
  assert resolved.is_locked and not resolved.data.sources.domain.is_type_safe
  assert json.loads(resolved.to_json())["data"]["sources"]["domain"]["share"] == [["0", 0.05, "linear"], ["20%", 0.75, "linear"]]


def test_the_surface_stays_under_a_hundred_keys():
  # anchors.md point 3: surfaces grow without end unless something counts them.
  assert len(config_lib.leaf_keys(config_lib.default())) <= 73


WRONG = {
  "schedule.name": ("warmup_cosine", "choose one of"),
  "train.length": ("10%", "steps or tokens"),
  "train.microbatches": (3, "use 1, 2, 4, 8"),
  "schedule.lr_peak": (300.0, "at most 10 (AdamW moves each weight by about the rate"),
  "schedule.anneal": ("200", "'200 steps' or '200 tokens'"),
  "train.z_loss": (float("inf"), "at least 0"),
  "schedule.lr_start": (1.0, "above schedule.lr_peak"),
  "schedule.lr_final": (-1.0, "at least 0"),
  "schedule.warmup": ("200%", "between 0% and 100%"),
  "optimizer.b2": (1.0, "below 1"),
  "optimizer.eps": (0.0, "above 0"),
  "data.heldout_frac": (0.0, "above 0 and below 1"),
  "data.row_len": (1, "at least 2"),
  "data.packing": ("bestfit", "Did you mean best_fit"),
  "eval.every": ("0 steps", "above 0"),
  "mesh.fsdp": (0, "from 1 up"),
  "checkpoint.best_metric": ("loss", "eval/domain/loss"),
  "start.weights": ("runs/other", "starts from one of them"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_named_with_its_fix(key):
  value, fix = WRONG[key]
  c = good()
  with c.unlocked():
    parent, _, leaf = key.rpartition(".")
    config_lib.get(c, parent)[leaf] = value
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.resolve(c)
  assert key in str(error.value) and fix in str(error.value)


def test_everything_that_is_wrong_is_reported_at_once():
  c = good()
  c.schedule.name, c.train.microbatches, c.optimizer.b1 = "x", 5, -1.0
  c.data.sources.general.role = "reply"
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.resolve(c)
  text = str(error.value)
  assert text.startswith("4 problems")
  assert all(key in text for key in ("schedule.name", "train.microbatches", "optimizer.b1", "data.sources.general.role"))


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_shares_must_be_finite_and_not_negative(share):
  c = good()
  c.data.sources.general.share = share
  with pytest.raises(config_lib.ConfigError, match=r"data\.sources\.general\.share"):
    config_lib.resolve(c)


@pytest.mark.parametrize("share", [75, "75", [(0, 0.25), ("20%", 75)]])
def test_a_share_in_per_cent_is_told_what_to_write(share):
  c = good()
  c.data.sources.domain.share = share
  with pytest.raises(config_lib.ConfigError, match=r"domain\.share=75: shares are parts of 1, not of 100; write 0\.75"):
    config_lib.resolve(c)
  c.data.sources.domain.share, c.data.sources.general.share = 1.0, 1.0
  c.data.shares = ((0, {"general": 25, "domain": 75}),)
  with pytest.raises(config_lib.ConfigError, match=r"domain=75: .* write 0\.75"):
    config_lib.resolve(c)


def test_shares_that_are_all_zero_are_refused():
  c = good()
  c.data.sources.general.share = c.data.sources.domain.share = 0.0
  with pytest.raises(config_lib.ConfigError, match="every source's share is 0"):
    config_lib.resolve(c)


def test_knots_must_rise():
  c = good()
  c.data.sources.domain.share = [("20%", 0.1), ("5 steps", 0.2)]
  with pytest.raises(config_lib.ConfigError, match="must rise"):
    config_lib.resolve(c)


@pytest.mark.parametrize("value", [0.3, 1, "0.3", "[(0, 0.1), ('5%', 0.2)]", [(0, 0.1)]])
def test_a_share_is_a_number_or_knots_from_a_file_or_the_command_line(value):
  assert all(len(knot) == 3 and knot[2] == "linear" for knot in config_lib.Share(value))
  assert config_lib.Share([(0, 0.1), ("5%", 0.2, "log")])[1] == ("5%", 0.2, "log")


@pytest.mark.parametrize("value", ["x", "1,2,3", None, [1, 2], "__import__('os')"])
def test_what_is_no_share_is_refused(value):
  with pytest.raises(ValueError, match="is no share"):
    config_lib.Share(value)


@pytest.mark.parametrize(
  "share,message",
  [
    ([(0, 0.0), ("20%", 0.3, "log")], "between two shares above 0"),
    ([(0, 0.3, "log")], "between two shares above 0"),
    ([(0, 0.1), ("20%", 0.3, "cubic")], "one of linear, log, hold"),
    ([("5%", 0.1), ("5%", 0.2), ("5%", 0.3)], "twice the same time is a jump"),
    ([("5%", 0.1), ("5%", 0.2)], None),
    ([(0, 0.1), ("20%", 0.3, "log"), ("30%", 0.9, "hold")], None),
  ],
)
def test_curves_between_knots(share, message):
  c = good()
  c.data.sources.domain.share = share
  if message is None:
    config_lib.resolve(c)
  else:
    with pytest.raises(config_lib.ConfigError, match=message):
      config_lib.resolve(c)


def test_data_shares_give_all_shares_at_once():
  c = good()
  c.data.sources.general.share = c.data.sources.domain.share = 1.0
  c.data.shares = ((0, {"general": 0.9, "domain": 0.1}), ("20%", {"domain": 1.0}))
  config_lib.resolve(c)
  wrong = [
    (((0, {"generel": 0.9}),), "Did you mean general"),
    (((0, {"general": -1.0}),), "finite and not negative"),
    ((("20%", {"general": 1.0}),), "begins at 0"),
    (((0, 0.5),), "is no entry"),
    (((0, {"general": 1.0}), ("50%", {"domain": 1.0}), ("20%", {"general": 1.0})), "must rise"),
  ]
  for shares, message in wrong:
    c.data.shares = shares
    with pytest.raises(config_lib.ConfigError, match=message):
      config_lib.resolve(c)
  c.data.shares, c.data.sources.general.share = ((0, {"general": 1.0}),), 0.5
  with pytest.raises(config_lib.ConfigError, match="leave one of the two out"):
    config_lib.resolve(c)


def test_every_mistake_in_a_source_is_named():
  c = good()
  c.data.sources.domain.update(dict(at_end="wrap", records="chat", loss_weight=-1.0, min_tokens=-2, length_shares=(3,)))
  c.data.sources.general.train_on = "answers"
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.resolve(c)
  for field in ("domain.at_end", "domain.records", "domain.loss_weight", "domain.min_tokens", "domain.length_shares"):
    assert f"data.sources.{field}" in str(error.value)
  assert "general.train_on='answers': plain texts have no answers" in str(error.value)


def test_nothing_parses_a_duration_after_resolve(monkeypatch):
  c = good()
  c.train.stages = (("all", "20%", 2e-4, {"warmup": "5%"}), ("all", "rest", 1e-4))
  c.checkpoint.keep_every = "25%"
  resolved = config_lib.resolve(c)
  monkeypatch.setattr(durations, "_PATTERN", None)
  assert config_lib.num_steps(resolved) == 1000 and config_lib.steps_of(resolved, "checkpoint.keep_every") == 250
  first, last = (config_lib.of_stage(resolved, stage) for stage in config_lib.stages(resolved))
  assert config_lib.steps_of(first, "schedule.warmup") == 10 and config_lib.steps_of(last, "schedule.warmup") == 8
  assert config_lib.steps_at(resolved, resolved.data.sources.domain.share[1][0]) == 200


def test_unknown_keys_on_the_command_line_are_all_named_with_what_was_meant(tmp_path):
  file = tmp_path / "run.py"
  file.write_text("from cpt_jax import config\nget_config = config.default\n")
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.load(str(file), ["--config.train.lenght=5", "--config.sched.lr_peak=1"])
  assert "train.length" in str(error.value) and "schedule.lr_peak" in str(error.value)


@pytest.mark.parametrize(
  "body, message",
  [
    ("c.train.lenght = '5'", "Did you mean train.length"),
    ("c.train.batch_rows = 'eight'", ":5: TypeError"),
    ("c.train.length = 200", "'200 steps' or '200 tokens'"),
    ("c.data.sources.zh = config.source(share=[(5, 0.1)])", "'5 steps' or '5 tokens'"),
    ("c.data.sources.zh = config.source(path='x')", ":5: TypeError"),
    ("import nothing_of_the_kind", ":5: ModuleNotFoundError"),
  ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(tmp_path, body, message):
  file = tmp_path / "run.py"
  file.write_text(f"from cpt_jax import config\n\ndef get_config():\n  c = config.default()\n  {body}\n  return c\n")
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.load(str(file))
  assert message in str(error.value) and "run.py:5" in str(error.value)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_what_is_no_config_file_is_told_what_one_is(tmp_path, name):
  (tmp_path / name).write_text("train: {length: 100 steps}\n")
  with pytest.raises(config_lib.ConfigError, match=rf"{name}: a config file is Python: it defines get_config\(\)"):
    config_lib.load(str(tmp_path / name))


def test_the_record_of_an_older_version_is_read_with_its_bare_steps_and_old_names():
  record = json.loads(config_lib.resolve(good()).to_json())
  record["schedule"]["warmup"], record["data"]["stages"] = "10", record["data"].pop("shares")
  record["data"]["sources"]["domain"]["share"] = [[0, 0.05, "linear"], [5, 0.75, "linear"]]
  del record["guard"], record["data"]["sources"]["general"]["loss_weight"]
  found = config_lib.completed(record)
  assert config_lib.steps_of(found, "schedule.warmup") == 10 and found.data.sources.domain.share[1][0].unit == "steps"
  assert found.guard.spike_records == 3 and found.data.sources.general.loss_weight == 1.0
  now = json.loads(config_lib.resolve(good()).to_json())
  changed = config_lib.changes(record, now, allowed=("nothing",))
  assert list(changed) == ["data.sources.domain.share", "schedule.warmup"] and changed["schedule.warmup"] == ("10", "1%")
  assert list(config_lib.changes(record, now, allowed=("nothing", "ahead"))) == ["schedule.warmup"]


def test_the_table_says_enough_of_every_key_and_nothing_that_is_none():
  for name, key in {**config_lib.KEYS, **config_lib.FIELDS}.items():
    assert key.text and key.has_type(key.default) and key.alters in ("rows", "run", "ahead", "nothing"), name
    assert not key.choices or key.default in key.choices, name
    assert not (isinstance(key.default, float) and not key.range()), f"{name}: a number without a limit"


def test_the_help_and_the_reference_have_every_key_and_every_field():
  names = [*config_lib.KEYS, *(f"data.sources.NAME.{field}" for field in config_lib.FIELDS)]
  help_text, page = config_lib.describe_keys(), config_lib.reference()
  assert all(f"\n  {name} = " in f"\n{help_text}" and f"\n`{name}` = `" in page for name in names)
  assert "mesh" not in config_lib.describe_keys("train.") and "microbatches" in config_lib.describe_keys("train.")
  assert max(map(len, help_text.splitlines())) <= 130


def test_every_shipped_config_resolves(root: pathlib.Path):
  files = sorted((root / "configs").glob("*.py"))
  assert files
  for file in files:
    c = config_lib.load_file(str(file))
    if not c.start.hf and not c.model.scratch:
      c.start.hf = "some/base"
    config_lib.resolve(c)
