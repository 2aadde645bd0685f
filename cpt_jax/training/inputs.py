"""A config -> what it names, opened and checked: model, schedule, optimizer, texts, and the step at which the run goes on.

Invariant: needs no device; all mistakes are said at once, and those that need no text before any text is read.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import optax

from cpt_jax import config as config_lib
from cpt_jax.config import Problems
from cpt_jax.devices import hosts, mesh as mesh_lib
from cpt_jax.model import pretrained, spec as spec_lib
from cpt_jax.store import prepare, token_files
from cpt_jax.store.records import Rules
from cpt_jax.stream import pipeline, sources
from cpt_jax.training import console, guard, optimizer, schedule, start


@dataclasses.dataclass(frozen=True)
class Resolved:
  """What is known before a text is read."""

  config: Any  # resolved, with the tokenizer that it stands for
  base: start.Start
  spec: spec_lib.ModelSpec
  hf_config: dict
  rates: schedule.Staged
  tx: optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True)
class Inputs(Resolved):
  """And the texts."""

  begin: start.Start
  loader: pipeline.Loader
  decisions: list[dict]  # of the guards, in force where the run goes on
  asked: dict[str, sources.Knots]  # the shares of the config, which a decision may have changed


def open_inputs(config: Any, workdir: pathlib.Path | None = None) -> Inputs:
  """`resolve`, then `open_texts`."""
  return open_texts(resolve(config), workdir)


def resolve(config: Any) -> Resolved:
  """Reads the model's config and makes schedule and optimizer.
  Raises ConfigError: everything that is wrong with them, a line each."""
  config = config_lib.resolve(config)
  base = start.choose_base(config)
  with config.unlocked():
    config.data.tokenizer = start.tokenizer_path(config)
  spec, hf_config = start.load_spec(base)
  problems = Problems()
  start.check_row_len(config, spec, problems)
  start.check_moments(config, spec, problems)
  with problems.collect():
    rates = schedule.from_config(config)
    tx = optimizer.from_config(config, spec)
  with problems.collect():
    if base.kind == "hf":
      pretrained.check_files(base.path, spec)
  problems.raise_if_any()
  return Resolved(config, base, spec, hf_config, rates, tx)


def check_mesh(sizes: Mapping[str, int], spec: spec_lib.ModelSpec, config: Any) -> None:
  """Raises ConfigError with every size that the mesh does not divide."""
  problems = Problems()
  rows = {"batch_rows": config.train.batch_rows, "microbatches": config.train.microbatches, "eval_rows": config.eval.batch_rows}
  mesh_lib.check(sizes, spec, **rows, row_len=config.data.row_len, problems=problems)
  problems.raise_if_any()


def open_texts(resolved: Resolved, workdir: pathlib.Path | None = None, *, writes: bool = True) -> Inputs:
  """Opens the stores, and prepares those that name their text and are not there.

  A run that has saved steps in `workdir` goes on from them; without one it is a new run. Without `writes` nothing is written,
  and there must be no `unprepared` stores.
  Raises ConfigError: everything that is wrong with them, a line each.
  """
  config, problems = resolved.config, Problems()
  with hosts.main_first("data"):  # the others find its stores and the layouts of rows, or make their own on their own disks
    if writes:
      _prepare_missing_stores(config)
    opened = sources.from_config(config, problems)
    sources.check_vocabulary(opened, resolved.spec.num_ids, problems)
    problems.raise_if_any()
    begin = start.choose_start(config, workdir, resolved.base)
    past = start.data_past(begin)
    if past and begin.kind == "resume" and (changed := pipeline.changed_settings(config, past)):
      console.say(f"the texts are read from their beginning, not from where {begin.path} was: {', '.join(changed)}")
      past = None
    # What the run's guards have decided is in force as if the config said it.
    decisions = guard.decisions(workdir, step=begin.step)
    goes_on = {"past": past, "start_step": begin.step, "skip": guard.rows_to_skip(decisions, step=begin.step)}
    sizes = {"vocab_size": resolved.spec.num_ids, "keep_layouts": writes}
    loader = pipeline.from_config(config, guard.in_force(opened, decisions), **goes_on, **sizes)
  asked = {source.name: source.share for source in opened}
  return Inputs(**vars(resolved), begin=begin, loader=loader, decisions=decisions, asked=asked)


def unprepared(config: Any) -> dict[str, Any]:
  """The entries of the sources that name their text and whose store is not finished yet, by name."""
  entries = config.data.sources.items()
  return {
    name: entry for name, entry in entries if entry.text and not (pathlib.Path(entry.store) / token_files.MANIFEST).exists()
  }


def _prepare_missing_stores(config: Any) -> None:
  for name, entry in unprepared(config).items():
    console.say(f"data.sources.{name}: preparing {entry.text} into {entry.store}")
    of_entry = {key: entry[key] for key in ("records", "text_field", "answer_field", "train_on")}
    rules = Rules(on_bad=config.data.on_bad, max_bad=config.data.max_bad, **of_entry)
    report = prepare.prepare([entry.text], tokenizer=config.data.tokenizer, output=entry.store, rules=rules)
    for line in report.lines():
      console.say(line)
