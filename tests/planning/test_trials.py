"""Trials and designs: what a trial shares with its run, what a probe costs, and config files that load as what was written."""

import json

import pytest
from hypothesis import given, strategies as st

from cpt_jax import config as config_lib
from cpt_jax.config import ConfigError
from cpt_jax.planning import config_files, design, trials
from cpt_jax.planning.trials import Trial
from cpt_jax.training import schedule


def run_config(**sources):
  c = config_lib.default()
  c.start.hf = "base"
  for name, (role, share) in (sources or {"general": ("replay", 0.2), "law": ("domain", 0.8)}).items():
    c.data.sources[name] = config_lib.source(store=f"store/{name}", role=role, share=share)
  c.train.length = "1B tokens"
  c.data.row_len, c.train.batch_rows = 1024, 8
  return c


def test_a_trial_differs_from_its_run_in_what_it_must_and_in_nothing_else():
  c = run_config()
  c.schedule.lr_peak, c.schedule.lr_start, c.schedule.lr_final = 4e-4, 1e-4, 4e-5
  made = config_lib.resolve(trials.trial_config(c, Trial(8e-4, 0.05, 32, 3)))
  assert made.seed == 3 and config_lib.num_steps(made) == 32
  rates = {"lr_peak": 8e-4, "lr_start": 2e-4, "lr_const": 2e-4, "lr_final": 8e-5}
  assert dict(made.schedule) == dict(config_lib.resolve(c).schedule) | rates
  assert [made.data.sources[name].share[0][1] for name in ("general", "law")] == [0.05, 0.95]
  same = config_lib.resolve(c)
  changed = [k for k in config_lib.leaf_keys(made) if config_lib.get(made, k) != config_lib.get(same, k)]
  ours = {"seed", "train.length", "schedule.lr_peak", "schedule.lr_start", "schedule.lr_const", "schedule.lr_final"}
  ours |= {"data.sources.general.share", "data.sources.law.share", "eval.every", "log.every"}
  assert set(changed) == ours | {"checkpoint.every", "checkpoint.keep_last", "checkpoint.export_hf"}


def test_shares_of_a_role_keep_their_ratio_and_ramps_count_by_their_end():
  c = run_config(en=("replay", 0.1), de=("replay", 0.3), law=("domain", 0.2), zh=("domain", 0.4))
  c.data.sources.zh.share = config_lib.Share(((0, 0.0), ("20%", 0.4)))
  assert trials.shares(c, 0.2) == pytest.approx({"en": 0.05, "de": 0.15, "law": 0.8 / 3, "zh": 1.6 / 3})
  c.data.shares = ((0, {"en": 1.0}), ("50%", {"en": 0.5, "law": 0.5}))
  assert trials.shares(c, 0.2) == pytest.approx({"en": 0.2, "de": 0.0, "law": 0.8, "zh": 0.0})


def test_phases_given_in_steps_take_the_same_part_of_a_trial():
  c = run_config()
  c.schedule.name, c.schedule.warmup, c.schedule.anneal = "wsd", "6000 steps", "200M tokens"
  [(_, rates)] = schedule.from_config(config_lib.resolve(trials.trial_config(c, Trial(1e-3, 0.2, 40, 0)))).parts
  assert config_lib.num_steps(c) == 122_071
  assert (rates.warmup_steps, rates.falls[0].num_steps) == (2, 8)


def test_a_run_in_stages_has_no_one_rate_to_look_for():
  c = run_config()
  c.train.stages = (("embeddings", "20%", 1e-3), ("all", "rest", 1e-4))
  with pytest.raises(ConfigError, match=r"train.stages: a probe looks for one rate of the whole run; leave the stages out"):
    trials.trial_config(c, Trial(1e-3, 0.2, 40, 0))


def test_a_run_without_replay_or_domain_is_refused_with_the_fix():
  for role, other in (("replay", "domain"), ("domain", "replay")):
    with pytest.raises(ConfigError, match=f"none has role '{role}'"):
      design.make(run_config(a=(other, 1.0)))
  with pytest.raises(ConfigError, match="role 'replay' has a share"):
    trials.trial_config(run_config(a=("replay", 0.0), b=("domain", 1.0)), Trial(1e-3, 0.5, 32, 0))


@given(
  budget=st.floats(1e9, 1e13),
  part=st.floats(0.1, 100),
  num_rates=st.integers(0, 6),
  replays=st.lists(st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 1.0]), max_size=6, unique=True),
  seeds=st.integers(1, 3),
  longer=st.sets(st.sampled_from([2, 3, 4, 8])),
)
def test_a_design_costs_no_more_than_asked_and_reaches_the_run(budget, part, num_rates, replays, seeds, longer):
  c = run_config()
  rates = [1e-4 * 2**k for k in range(num_rates)]
  options = {"rates": rates, "replays": replays, "seeds": seeds, "longer": sorted(longer)}
  asked = {"budget": repr(budget), "probe_budget": f"{part}%"}
  try:
    made = design.make(c, **asked, **options)
  except ConfigError as error:
    needed = int(str(error).split("It takes ")[1].split(" tokens")[0].replace(",", ""))
    assert needed > budget * part / 100
    made = design.make(c, budget=repr(budget), probe_budget=f"{needed} tokens", **options)
    part = 100 * needed / budget
  total = sum(trial.steps for trial in made.trials()) * made.tokens_per_step
  assert total == made.num_tokens <= budget * part / 100 + 1
  assert made.steps >= design.MIN_STEPS and made.longest_tokens * design.FARTHEST >= made.budget_tokens
  assert made.longest_tokens == max(trial.steps for trial in made.trials()) * 8 * 1024
  grid = made.grid(made.ladder[-1] if made.ladder else 0.0)
  assert len({trial.name for trial in made.trials()}) == len(made.trials()) and set(grid) <= set(made.trials())
  cells = {(trial.rate, trial.replay) for trial in grid if trial.steps == made.steps}
  assert len(cells) == (num_rates or design.NUM_RATES) * len(made.replays)
  assert all((trial.rate, trial.replay) in cells for trial in grid)  # the longer ones, too
  for times in {2, 4} & set(made.longer):  # forgetting without replay grows with the tokens
    assert {t.replay for t in grid if t.steps == times * made.steps} >= {made.own_replay, min(made.replays)}
  assert all(trial.replay == made.own_replay in made.replays for trial in made.sweep())


def test_the_default_design_is_a_grid_of_four_by_five_with_two_seeds_below_the_sweep():
  made = design.make(run_config(), trial_tokens="32 steps")
  assert made.ladder[0] == 3e-4 / 4 and made.replays == (0.0, 0.01, 0.05, 0.2, 0.5) and made.own_replay == 0.2
  grid = made.grid(2.4e-3)
  assert sorted({t.rate for t in grid}) == pytest.approx([3e-4, 6e-4, 1.2e-3, 2.4e-3])
  assert [sum(t.steps == steps for t in grid) for steps in (32, 64, 128)] == [40, 4, 2]
  assert set(made.sweep()[2:6]) <= set(made.grid(made.ladder[5]))  # 3e-4 to 2.4e-3 are of both


def test_the_ladder_ends_where_rates_do():
  config = run_config()
  config.schedule.lr_peak = 2.0
  assert design.make(config, trial_tokens="32 steps").ladder == (0.5, 1.0, 2.0, 4.0, 8.0)


def test_wrong_flags_of_a_design_are_all_named():
  with pytest.raises(ConfigError) as error:
    design.make(run_config(), rates=[300.0], replays=[1.5], seeds=0, longer=[1])
  assert all(flag in str(error.value) for flag in ("--rates", "--replays", "--seeds", "--longer"))
  for options in ({"trial_tokens": "3 steps"}, {"trial_tokens": "5%"}, {"budget": "-1"}, {"probe_budget": "much"}):
    with pytest.raises(ConfigError, match="--" + next(iter(options))):
      design.make(run_config(), **options)


numbers = st.floats(0, 1, allow_nan=False)


@given(
  share=st.one_of(numbers, st.just(((0, 0.05, "linear"), ("20%", 0.3, "log")))),
  rate=st.floats(1e-6, 1.0),
  frozen=st.lists(st.sampled_from(["embedding", r"layers\.w[qk]"]), unique=True),
  text=st.text("ab'\"\\ \n{}", max_size=8),
)
def test_a_written_config_loads_as_itself(tmp_path_factory, share, rate, frozen, text):
  c = run_config()
  c.data.sources.law.share = config_lib.Share(share)
  c.data.sources.law.text = text
  c.data.sources.law.length_shares = ((0, 0.3), (4096, 0.7))
  c.schedule.lr_peak = rate
  c.optimizer.frozen = tuple(frozen)
  c.plan.losses = (("law", 2.5, 2.4, rate),)
  c.data.shares = ((0, {"law": 1.0}),)
  file = tmp_path_factory.mktemp("written") / "config.py"
  config_files.write(c, file, about=text)
  assert json.loads(config_lib.load_file(str(file)).to_json()) == json.loads(c.to_json())


def test_predictions_in_a_config_are_checked():
  c = run_config()
  c.plan.losses = (("law", 2.5, 2.4, 2.6), ("lwa", 2.5, 2.4, 2.6), ("law", 2.5))
  with pytest.raises(ConfigError) as error:
    config_lib.resolve(c)
  assert len(error.value.lines) == 2 and "Did you mean law?" in str(error.value) and "is no prediction" in str(error.value)


def test_guards_are_off_in_a_trial_and_stay_in_the_run():
  config = run_config()
  config.guard.general_loss_rise, config.guard.spike_mads = 0.3, 8.0
  made = trials.trial_config(config, Trial(1e-3, 0.25, 16, 0))
  assert (made.guard.general_loss_rise, made.guard.spike_mads) == (0.0, 0.0)
  assert trials.at_point(config, rate=1e-3, replay=0.25).guard.general_loss_rise == 0.3
