"""A config as a person wrote it -> checked, its durations parsed, locked.

Invariant: all mistakes that can be seen without a file and a device are told at once, each with its key, its value and the fix.
"""

import math
import numbers
from typing import Any

from ml_collections import ConfigDict

from cpt_jax.config import keys, shares, stages as stages_lib
from cpt_jax.config.durations import Duration, get, num_steps, steps_at
from cpt_jax.config.errors import Problems, did_you_mean
from cpt_jax.config.shares import Share


def resolve(config: Any, *, needs_data: bool = True) -> ConfigDict:
  """Checks every key that needs no file and no device; returns a locked copy in which durations are parsed.

  Without `needs_data` there need be no sources. Raises ConfigError: with a line for each problem.
  """
  problems = Problems()
  config = config.copy_and_resolve_references()
  _check_keys(config, problems)
  problems.raise_if_any()  # the checks below read keys
  parse_times(config, problems)
  _check_values(config, problems)
  # A run of unknown length hides what depends on it.
  has_length = not any(line.startswith(("train.length", "data.row_len", "train.batch_rows")) for line in problems.lines)
  _check_rates(config, problems)
  if has_length and not any(line.startswith(("schedule.", "train.")) for line in problems.lines):
    _check_stages(config, problems)
  _check_together(config, problems)
  if needs_data or config.data.sources:
    _check_sources(config, problems, has_length=has_length)
  _check_predictions(config, problems)
  problems.raise_if_any()
  config.lock()
  return config


def leaf_keys(config: Any) -> list[str]:
  """Dotted names of all leaves."""
  found = []
  for name in config:
    value = config[name]
    found += [f"{name}.{k}" for k in leaf_keys(value)] if isinstance(value, ConfigDict) else [name]
  return found


def unknown_key(key: str, known: list[str]) -> str:
  """The line for a key that does not exist."""
  return f"{key}: there is no such key.{did_you_mean(key, known)} cpt train --help lists them all."


def parse_times(config: Any, problems: Problems, *, bare: str = "") -> None:
  """Replaces every duration of the config by what it is parsed to; `bare` as of Duration.

  What cannot be parsed goes to `problems` and gives way to the default, so that the rest can be checked.
  """
  with config.unlocked(), config.ignore_type():
    for key in keys.KEYS.values():
      if not (key.duration and (text := get(config, key.name))):
        continue
      group, _, leaf = key.name.rpartition(".")
      del config[group][leaf]  # a ConfigDict makes a plain str of whatever follows one
      try:
        config[group][leaf] = Duration(text, bare=bare)
      except ValueError as error:
        problems.add(f"{key.name}: {error}")
        config[group][leaf] = Duration(key.default) if key.default else ""
    found, before = [], len(problems.lines)
    for i, entry in enumerate(config.train.stages):
      is_last = i == len(config.train.stages) - 1
      found.append(stages_lib.parsed(f"train.stages[{i}]", entry, problems, is_last=is_last, bare=bare))
    config.train.stages = tuple(found) if len(problems.lines) == before else ()
    config.data.shares = _parsed_shares(config.data.shares, problems, bare=bare)
    for name, entry in config.data.sources.items():
      try:
        entry.share = Share(entry.share, bare=bare)
      except ValueError as error:
        problems.add(f"data.sources.{name}.share: {error}")
        entry.share = Share(keys.FIELDS["share"].default)


def _parsed_shares(entries: Any, problems: Problems, *, bare: str) -> tuple:
  found, before = [], len(problems.lines)
  for entry in entries:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], (dict, ConfigDict))):
      problems.add(
        f"data.shares: {entry!r} is no entry; write (when, {{name: share, ...}}), e.g. ('20%', {{'en': 0.3, 'zh': 0.7}})"
      )
      continue
    try:
      found.append((Duration(entry[0], bare=bare), dict(entry[1])))
    except ValueError as error:
      problems.add(f"data.shares: {error}")
  return tuple(found) if len(problems.lines) == before else ()


def _check_keys(config: Any, problems: Problems) -> None:
  """Every key is there, none that is not known, and each has the type of its default."""
  found = [k for k in leaf_keys(config) if not k.startswith("data.sources.")]
  for name in found:
    if name not in keys.KEYS and name != "data.sources":
      problems.add(unknown_key(name, list(keys.KEYS)))
  for key in keys.KEYS.values():
    if key.name not in found:
      problems.add(f"{key.name}: missing; start the config file from cpt_jax.config.default()")
    elif not key.has_type(value := get(config, key.name)):
      problems.add(
        f"{key.name}={value!r}: expected {type(key.default).__name__}, e.g. {key.default!r}; found {type(value).__name__}"
      )
  if not ("data" in config and "sources" in config.data and isinstance(config.data.sources, ConfigDict)):
    problems.add("data.sources: expected entries name = config.source(store=..., role=..., share=...)")
    return
  for name, entry in config.data.sources.items():
    source = f"data.sources.{name}"
    if not isinstance(entry, ConfigDict):
      problems.add(f"{source}={entry!r}: expected config.source(store=..., role=..., share=...)")
      continue
    for field in entry:
      if field not in keys.FIELDS:
        problems.add(unknown_key(f"{source}.{field}", [f"{source}.{f}" for f in keys.FIELDS]))
    for field, key in keys.FIELDS.items():
      if field not in entry:
        problems.add(f"{source}.{field}: missing; make the entry with config.source(...)")
      elif field != "share" and not key.has_type(entry[field]):
        problems.add(
          f"{source}.{field}={entry[field]!r}: expected {type(key.default).__name__}, found {type(entry[field]).__name__}"
        )


def _check_value(name: str, key: keys.Key, value: Any, problems: Problems) -> None:
  """By the table: choices, limits, and of a duration its unit."""
  because = f" ({key.reason})" if key.reason else ""
  if key.choices and value not in key.choices:
    problems.add(f"{name}={value!r}: choose one of {', '.join(key.choices)}.{did_you_mean(value, key.choices)}")
  elif key.duration == "length" and value.unit == "%":
    problems.add(f"{name}={value!r}: the run's own length is in steps or tokens, e.g. '1000 steps' or '2B tokens'")
  elif key.duration and value and not key.allows(value.amount):
    problems.add(f"{name}={value!r}: must be {key.range()}{because}")
  elif isinstance(value, numbers.Real) and not isinstance(value, bool) and not key.allows(float(value)):
    problems.add(f"{name}={value}: must be {key.range() or 'finite'}{because}")


def _check_values(config: Any, problems: Problems, *, only: str = "") -> None:
  """Of the keys that begin with `only`."""
  for key in keys.KEYS.values():
    if key.name.startswith(only):
      _check_value(key.name, key, get(config, key.name), problems)


def _check_rates(config: Any, problems: Problems) -> None:
  for key in ("schedule.lr_start", "schedule.lr_const", "schedule.lr_final"):
    used = key != "schedule.lr_const" or config.schedule.name == "infinite"
    if used and get(config, key) > config.schedule.lr_peak:
      problems.add(f"{key}={get(config, key):g}: above schedule.lr_peak={config.schedule.lr_peak:g}; lower it or raise the peak")


def _check_stages(config: Any, problems: Problems) -> None:
  """Lengths that make up the run, and the schedule of each."""
  found = stages_lib.stages(config)
  if not config.train.stages:
    return
  for i, stage in enumerate(found):
    own = Problems()
    if stage.end <= stage.first:
      own.add(
        f"from step {stage.first} to {stage.end}: there is no step in it; make it or the run longer, or the stages before shorter"
      )
    else:
      as_run = stages_lib.of_stage(config, stage)
      _check_values(as_run, own, only="schedule.")
      _check_rates(as_run, own)
    for line in own.lines:
      problems.add(f"train.stages[{i}]: {line}")
  if found[-1].end != num_steps(config):
    problems.add(
      f"train.stages take {found[-1].end} steps, the run has {num_steps(config)}; the last stage may be as long as the 'rest'"
    )


def _check_together(config: Any, problems: Problems) -> None:
  """Keys that must fit each other."""
  rows, parts = config.train.batch_rows, config.train.microbatches
  if rows % max(parts, 1):
    problems.add(
      f"train.microbatches={parts} does not divide train.batch_rows={rows}; "
      f"use {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}"
    )
  starts = [k for k in ("start.resume", "start.hf", "start.weights") if get(config, k)]
  if not starts and not config.model.scratch:
    problems.add(
      "start.hf is empty: name a Hugging Face directory to continue, or model.scratch=config.json to train from scratch"
    )
  if len(starts) > 1:
    problems.add(f"{' and '.join(starts)} are all set: a run starts from one of them; empty the others")
  for axis, devices in config.mesh.items():
    if devices == 0 or devices < -1:
      problems.add(f"mesh.{axis}={devices}: a number of devices from 1 up, or -1 for the rest")
  if list(config.mesh.values()).count(-1) > 1:
    problems.add(f"mesh={dict(config.mesh)}: one axis at most may be -1 (the rest)")


def _check_sources(config: Any, problems: Problems, *, has_length: bool) -> None:
  if not config.data.sources:
    problems.add("data.sources is empty: name at least one source, data.sources.domain = config.source(store=...)")
    return
  _check_shares(config, problems, has_length=has_length)
  for name, entry in config.data.sources.items():
    source = f"data.sources.{name}"
    if not name.isidentifier():
      problems.add(f"{source}: a source's name is letters, digits and underscores, as in a Python name")
    for field, key in keys.FIELDS.items():
      _check_value(f"{source}.{field}", key, entry[field], problems)
    if not entry.store:
      problems.add(f"{source}.store is empty: make one with cpt prepare --input ... --tokenizer ... --output STORE")
    if entry.records == "text" and entry.train_on == "answers":
      problems.add(f"{source}.train_on='answers': plain texts have no answers; set records to messages or prompt")
    brackets = entry.length_shares  # stream.selection looks at the numbers
    if not all(isinstance(b, (list, tuple)) and len(b) == 2 and all(isinstance(x, numbers.Real) for x in b) for b in brackets):
      problems.add(f"{source}.length_shares={brackets!r}: write brackets (from_tokens, share), e.g. ((0, 0.3), (4096, 0.7))")
  metrics = [f"eval/{name}/loss" for name in config.data.sources]
  if config.checkpoint.best_metric and config.checkpoint.best_metric not in metrics:
    problems.add(f"checkpoint.best_metric={config.checkpoint.best_metric!r}: choose one of {', '.join(metrics)}")
  sources = config.data.sources.values()
  if config.guard.general_loss_rise > 0 and not any(entry.role == "replay" for entry in sources):
    problems.add(
      f"guard.general_loss_rise={config.guard.general_loss_rise:g}: no source has role 'replay', whose loss it could watch; give "
      "general text that role (share=0.0 only evaluates it), or set it to 0"
    )
  if max(entry.loss_weight for entry in sources) == 0 and not problems.lines:
    problems.add("every source's loss_weight is 0: nothing would be learnt; give at least one a weight above 0")


def _check_shares(config: Any, problems: Problems, *, has_length: bool) -> None:
  """Of the sources, or of data.shares: numbers, times that rise, and some share above 0."""

  def check(key: str, knots: Any) -> None:
    steps = [steps_at(config, when) for when, *_ in knots] if has_length else None
    shares.check_knots(key, knots, steps, problems)

  named = config.data.shares
  for name, entry in config.data.sources.items():
    if named and entry.share != Share(keys.FIELDS["share"].default):
      problems.add(
        f"data.sources.{name}.share={tuple(entry.share)}: data.shares gives the shares of this run; leave one of the two out"
      )
    check(f"data.sources.{name}.share", entry.share)
  for when, of_sources in named:
    for name, share in of_sources.items():
      if name not in config.data.sources:
        problems.add(f"data.shares at {when!r}: there is no source {name}.{did_you_mean(name, config.data.sources)}")
      shares.check_number(f"data.shares at {when!r}: {name}", share, problems)
  if problems.lines:
    return
  if named:
    check("data.shares", [(when, max(of_sources.values(), default=0.0), "hold") for when, of_sources in named])
    if named[0][0].amount != 0:
      problems.add(f"data.shares begin at {named[0][0]!r}; the first entry begins at 0")
  given = [share for _, of_sources in named for share in of_sources.values()]
  given = given or [share for entry in config.data.sources.values() for _, share, _ in entry.share]
  if max(given) == 0:
    problems.add("every source's share is 0: nothing would be trained on; give at least one a share above 0")


def _check_predictions(config: Any, problems: Problems) -> None:
  for entry in config.plan.losses:
    is_entry = isinstance(entry, (list, tuple)) and len(entry) == 4 and isinstance(entry[0], str)
    if not (is_entry and all(isinstance(x, numbers.Real) and math.isfinite(x) for x in entry[1:])):
      problems.add(f"plan.losses: {entry!r} is no prediction; write (source, loss, low, high), e.g. ('law', 2.91, 2.88, 2.95)")
    elif entry[0] not in config.data.sources:
      problems.add(f"plan.losses: there is no source {entry[0]}.{did_you_mean(entry[0], config.data.sources)}")
