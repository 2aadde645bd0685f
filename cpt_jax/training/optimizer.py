"""Path rules -> AdamW whose rate and decay can differ by leaf and by layer, and which may train only the rows of new pieces.

Invariant: one update is p -= rate * multiplier * (adam(clipped gradient) + weight_decay * decay * p), computed in float32. The
rate comes with each update, so one compiled step serves every schedule.

What a stage does not train rests: leaves, or rows of the tables, that do not count in the norm that clips the others, are not
decayed, and keep every bit, their moments too. What no stage trains is frozen: it has no moments. Adam corrects the bias of
moments by the number of updates that they have had, so each leaf counts its own, and of the tables each row.
"""

import enum
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpt_jax import config as config_lib, trees
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import transformer
from cpt_jax.model.spec import ModelSpec

Rules = Sequence[tuple[str, float]]
Trained = str | Sequence[str]  # what a stage trains: a name of config.STAGES, or path patterns

VOCAB_DIM = {"embedding": 0, "head": 1}  # of the tables, which have a row for each id


class Trains(enum.Enum):
  """What of a parameter array is trained in a stage."""

  NOTHING, NEW_ROWS, ALL = range(3)


class Leaf(NamedTuple):
  """What happens to one parameter array in one stage."""

  trains: Trains
  is_frozen: bool  # no stage trains anything of it
  rate: float  # multiplier of the schedule's rate
  layer_rates: tuple[float, ...]  # further multipliers along the first dimension, lowest layer first; () = all 1
  decay: float  # multiplier of weight_decay


def apply_rules(
  params: Any,
  *,
  decay_rules: Rules,
  rate_rules: Rules,
  layer_rates: Sequence[float],
  frozen: Sequence[str],
  stages: Sequence[Trained],
  stage: int = -1,
  new_rows: range | None = None,
) -> dict[str, Leaf]:
  """What happens to each leaf, by path, in one of the stages; `params` may be abstract.

  Each of `stages` is a name of train.stages, or path patterns; `new_rows` are the rows of the tables that belong to new pieces.
  Raises ConfigError: a line for each rule that cannot be followed: leaves that no pattern matches, patterns without a leaf, new
  rows where there are none, as many layer rates as fit no model, nothing left to train.
  """
  problems = Problems()
  shapes = {path: leaf.shape for path, leaf in trees.paths(params).items()}
  never: set[str] = set()
  for pattern in frozen:
    never |= set(_matches(pattern, list(shapes), "optimizer.frozen", problems))
  if shapes and never == set(shapes):
    problems.add(f"optimizer.frozen={tuple(frozen)}: every parameter is frozen, nothing would be trained")
  by_stage = [_trains(what, list(shapes), never, new_rows, f"train.stages[{i}]", problems) for i, what in enumerate(stages)]
  never |= {path for path in shapes if all(found[path] is Trains.NOTHING for found in by_stage)}
  by_layer = {path: _layer_rates(layer_rates, shapes[path][0], problems) for path in shapes if path.startswith("layers.")}
  rates = _multipliers(params, rate_rules, "optimizer.rate_rules", problems)
  decays = _multipliers(params, decay_rules, "optimizer.decay_rules", problems)
  problems.raise_if_any()
  now = by_stage[stage]
  return {path: Leaf(now[path], path in never, rates[path], by_layer.get(path, ()), decays[path]) for path in shapes}


class State(NamedTuple):
  """Moments of what is not frozen, by path."""

  count: dict[str, Any]  # updates that a leaf has had, int32 []; of the tables each row, [V]
  mu: dict[str, Any]
  nu: dict[str, Any]  # float32


def make(
  leaves: dict[str, Leaf],
  *,
  b1: float,
  b2: float,
  eps: float,
  mu_dtype: str,
  weight_decay: float,
  clip_norm: float,
  new_rows: range | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW (Loshchilov & Hutter 1711.05101, decay scaled by the rate) for the parameters that `apply_rules` has made `leaves` of.

  Its update is that of the stage of `leaves`, and takes the rate: `update(gradients, state, params, rate=1e-4)`; its state is the
  same in all stages. The first moment is kept in `mu_dtype`, the second in float32.

  In bfloat16 (8 bits, so half a unit is 1/512 to 1/256 of a number) the first moment of a parameter stands still where its
  gradient is within 1/(512 (1 - b1)) to twice that of it: 2 to 4% at b1 = 0.9, 20 to 40% at 0.99. The second moment would stand
  still within 4 to 8% at b2 = 0.95 and never fall at 0.999, which no average over noise makes good; so it is not offered.
  """

  def init(params: Any) -> State:
    kept = {path: leaf for path, leaf in trees.paths(params).items() if not leaves[path].is_frozen}
    zeros = {path: jnp.zeros_like(leaf, jnp.float32) for path, leaf in kept.items()}
    count = {path: _no_updates(path, leaf) for path, leaf in kept.items()}
    return State(count, {path: zero.astype(mu_dtype) for path, zero in zeros.items()}, zeros)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    grads: dict[str, Any] = {
      path: grad for path, grad in trees.paths(updates).items() if leaves[path].trains is not Trains.NOTHING
    }
    masks = {path: _is_new(path, grads[path], new_rows) for path in grads if leaves[path].trains is Trains.NEW_ROWS}
    grads |= {path: jnp.where(is_new, grads[path], 0.0) for path, is_new in masks.items()}
    if clip_norm > 0:
      clipped: Any = optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())
      grads = clipped[0]
    parameters = trees.paths(params)
    count, mu, nu, moves = dict(state.count), dict(state.mu), dict(state.nu), {}
    for path, grad in grads.items():
      old = count[path], mu[path], nu[path]
      move, new = _adam(path, grad, *old, b1=b1, b2=b2, eps=eps)
      if decay := weight_decay * leaves[path].decay:
        move = move + decay * parameters[path]
      move = -extra["rate"] * _multiplied(move, leaves[path])
      if path in masks:
        move = jnp.where(masks[path], move, -0.0)
        each = _is_new(path, old[0], new_rows), masks[path], masks[path]
        new = tuple(jnp.where(is_new, a, b) for is_new, a, b in zip(each, new, old, strict=True))
      moves[path], count[path], mu[path], nu[path] = move, *new
    # Adding -0.0 keeps every bit of a parameter; adding 0.0 would turn -0.0 into 0.0.
    moved = trees.map_with_path(lambda path, g: moves[path] if path in moves else jnp.full_like(g, -0.0), updates)
    return moved, State(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def hold(params: Any, leaves: dict[str, Leaf], *, new_rows: range | None = None) -> Any:
  """The same parameters, through which no gradient reaches what `leaves` say that rests: it is not computed."""

  def held(path, p):
    if leaves[path].trains is Trains.ALL:
      return p
    still = jax.lax.stop_gradient(p)
    if leaves[path].trains is Trains.NOTHING:
      return still
    return jnp.where(_is_new(path, p, new_rows), p, still)

  return trees.map_with_path(held, params)


def without_rows(state: State, *, first: int) -> State:
  """The state with no moments and no updates of the tables' rows from `first` on."""

  def without(path: str, leaf: Any) -> Any:
    row = mesh_lib.index_along(leaf, VOCAB_DIM[path] if leaf.ndim > 1 else 0)
    return jnp.where(row < first, leaf, jnp.zeros((), leaf.dtype))

  @jax.jit
  def all_without(state: State) -> State:
    tables = [path for path in VOCAB_DIM if path in state.count]
    return State(*(kept | {path: without(path, kept[path]) for path in tables} for kept in state))

  return all_without(state)


def from_config(config: Any, spec: ModelSpec, *, stage: int = -1) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a resolved config in one of its train.stages; its state is that of all of them.
  Raises ConfigError: as `apply_rules`; also rules of the user's own that no leaf follows."""
  c = config.optimizer
  params = transformer.abstract_params(spec)
  _check_own_rules(c, params)
  numbers = {key: c[key] for key in ("b1", "b2", "eps", "mu_dtype", "weight_decay", "clip_norm")}
  return make(leaves_from_config(config, spec, stage=stage), **numbers, new_rows=spec.new_rows)


def leaves_from_config(config: Any, spec: ModelSpec, *, stage: int = -1) -> dict[str, Leaf]:
  """`apply_rules` of a resolved config."""
  return apply_rules(transformer.abstract_params(spec), **_rules_of(config, spec), stage=stage)


def largest_stage(config: Any, spec: ModelSpec) -> int:
  """The stage of train.stages whose step trains most parameters, and so needs most memory; 0 without stages."""
  sizes = {path: math.prod(leaf.shape) for path, leaf in trees.paths(transformer.abstract_params(spec)).items()}

  def num_trained(stage: int) -> int:
    leaves = leaves_from_config(config, spec, stage=stage)
    return sum(sizes[path] for path, leaf in leaves.items() if leaf.trains is not Trains.NOTHING)

  return max(range(max(len(config.train.stages), 1)), key=num_trained)


class Group(NamedTuple):
  """Leaves that are treated alike; a row for people."""

  leaves: tuple[str, ...]
  num_parameters: int
  rate: str  # multiplier, "0.5", "0.1 to 1 by layer", "1, new rows", "rests" or "frozen"
  weight_decay: float


def groups(params: Any, leaves: dict[str, Leaf], *, weight_decay: float, new_rows: range | None = None) -> list[Group]:
  """The leaves gathered by what happens to them, in the order of the tree; of new rows theirs alone are counted."""
  gathered: dict[tuple[str, float], list[str]] = {}
  for path, leaf in leaves.items():
    key = _describe_rate(leaf), leaf.decay * weight_decay if leaf.trains is not Trains.NOTHING else 0.0
    gathered.setdefault(key, []).append(path)
  sizes = {path: math.prod(leaf.shape) for path, leaf in trees.paths(params).items()}
  for path, leaf in leaves.items():
    if leaf.trains is Trains.NEW_ROWS:
      assert new_rows is not None  # or `apply_rules` had refused
      sizes[path] = sizes[path] // trees.paths(params)[path].shape[VOCAB_DIM[path]] * len(new_rows)
  return [Group(tuple(paths), sum(sizes[p] for p in paths), rate, decay) for (rate, decay), paths in gathered.items()]


def from_config_groups(config: Any, spec: ModelSpec, *, stage: int = -1) -> list[Group]:
  """`groups` of a resolved config, for the dry run."""
  leaves = leaves_from_config(config, spec, stage=stage)
  decay = config.optimizer.weight_decay
  return groups(transformer.abstract_params(spec), leaves, weight_decay=decay, new_rows=spec.new_rows)


def _rules_of(config: Any, spec: ModelSpec) -> dict[str, Any]:
  rules = {key: tuple(config.optimizer[key]) for key in ("decay_rules", "rate_rules", "layer_rates", "frozen")}
  stages = [what for what, *_ in config.train.stages] or ["all"]
  return rules | {"stages": stages, "new_rows": spec.new_rows}


def _adam(path: str, grad: Any, count: Any, mu: Any, nu: Any, *, b1: float, b2: float, eps: float) -> tuple[Any, tuple]:
  """Adam (Kingma & Ba 1412.6980, algorithm 1) in float32; the first moment is rounded to the dtype in which it is kept."""
  number = count + 1
  moment, square = (1 - b1) * grad + b1 * mu.astype(jnp.float32), (1 - b2) * jnp.square(grad) + b2 * nu
  n = jnp.expand_dims(number, 1 - VOCAB_DIM[path]) if path in VOCAB_DIM else number
  move = moment / (1 - b1**n) / (jnp.sqrt(square / (1 - b2**n)) + eps)
  return move, (number, moment.astype(mu.dtype), square)


def _no_updates(path: str, leaf: Any) -> Any:
  # A sum of zeros: so it lies where the table's rows do.
  return jnp.sum(jnp.zeros_like(leaf, jnp.int32), 1 - VOCAB_DIM[path]) if path in VOCAB_DIM else jnp.zeros((), jnp.int32)


def _is_new(path: str, array: Any, new_rows: range | None) -> jax.Array:
  """Of each element of a table [V, D] or [D, V], or of its rows' counts [V]: does it belong to a new row."""
  assert new_rows is not None  # or `apply_rules` had refused
  row = mesh_lib.index_along(array, VOCAB_DIM[path] if array.ndim > 1 else 0)
  return (row >= new_rows.start) & (row < new_rows.stop)


def _multiplied(move: Any, leaf: Leaf) -> Any:
  """By the multipliers of the leaf's rate."""
  if any(rate != 1.0 for rate in leaf.layer_rates):
    by_layer = np.asarray(leaf.layer_rates, np.float32) * np.float32(leaf.rate)
    return move * by_layer.reshape(-1, *(1,) * (move.ndim - 1))
  return move if leaf.rate == 1.0 else move * leaf.rate


def _trains(
  what: Trained, paths: list[str], frozen: set[str], new_rows: range | None, key: str, problems: Problems
) -> dict[str, Trains]:
  """What one stage trains of each leaf; of two patterns that match a leaf the one that trains more of it counts."""
  found = dict.fromkeys(paths, Trains.NOTHING)
  # A name is for every model: one with a tied head has no leaf of that name.
  is_name = isinstance(what, str)
  for pattern in config_lib.STAGES[what] if is_name else what:
    matched = _matches(pattern.removesuffix(config_lib.NEW_ROWS), paths, key, Problems() if is_name else problems)
    of_new = pattern.endswith(config_lib.NEW_ROWS)
    if of_new and new_rows is None:
      problems.add(
        f"{key} trains the rows of new pieces, but the model has none (its config.json has no base_vocab_size above 0); start "
        "from what cpt vocab grow wrote, or leave that stage out"
      )
    for path in matched:
      if of_new and path not in VOCAB_DIM:
        problems.add(f"{key}: {pattern!r}: {path} has no rows of pieces; only {' and '.join(VOCAB_DIM)} have")
      elif path not in frozen:
        found[path] = max(found[path], Trains.NEW_ROWS if of_new else Trains.ALL, key=lambda trains: trains.value)
  if not problems.lines and all(trains is Trains.NOTHING for trains in found.values()):
    problems.add(f"{key}={what!r}: all that it trains is in optimizer.frozen; take it from there, or leave that stage out")
  return found


def _multipliers(params: Any, rules: Rules, key: str, problems: Problems) -> dict[str, float]:
  for pattern, value in rules:
    if not (math.isfinite(value) and value >= 0):
      problems.add(f"{key}: ({pattern!r}, {value}): a multiplier is finite and not negative")
  try:
    return trees.paths(trees.match_rules(params, rules, key=key))
  except ConfigError as error:
    problems.add(str(error))
    return {}


def _layer_rates(layer_rates: Sequence[float], num_layers: int, problems: Problems) -> tuple[float, ...]:
  values = tuple(float(rate) for rate in layer_rates)
  if any(not (math.isfinite(rate) and rate >= 0) for rate in values):
    problems.add(f"optimizer.layer_rates={values}: multipliers are finite and not negative")
  if len(values) == 2:
    return tuple(float(rate) for rate in np.linspace(*values, num_layers))
  if len(values) not in (0, num_layers):
    problems.add(
      f"optimizer.layer_rates has {len(values)} numbers; give {num_layers} (one a layer, lowest first), "
      "2 (first and last layer, linear between) or none"
    )
  return values


def _matches(pattern: str, paths: list[str], key: str, problems: Problems) -> list[str]:
  try:
    matched = [path for path in paths if re.fullmatch(pattern, path)]
  except re.error as error:
    problems.add(f"{key}: {pattern!r} is no regular expression: {error}")
    return []
  if not matched:
    hint = config_lib.did_you_mean(pattern, paths)
    problems.add(f"{key}: {pattern!r} matches the whole path of no parameter.{hint} There are {', '.join(paths)}")
  return matched


def _check_own_rules(c: Any, params: Any) -> None:
  """Refuses rules that no leaf follows: a misspelt pattern, or one after a rule that takes all its leaves.

  The default rules are written for every model and may match nothing in this one.
  """
  problems = Problems()
  for name in ("decay_rules", "rate_rules"):
    left = list(trees.paths(params))
    for pattern, _ in c[name]:
      own = pattern not in [known for known, _ in config_lib.KEYS[f"optimizer.{name}"].default]
      matched = _matches(pattern, list(trees.paths(params)), f"optimizer.{name}", problems if own else Problems())
      if own and matched and not set(matched) & set(left):
        problems.add(f"optimizer.{name}: {pattern!r} has no effect, rules before it match all its leaves; put it first")
      left = [path for path in left if path not in matched]
  problems.raise_if_any()


def _describe_rate(leaf: Leaf) -> str:
  if leaf.trains is Trains.NOTHING:
    return "frozen" if leaf.is_frozen else "rests"
  rates = [leaf.rate * rate for rate in leaf.layer_rates] or [leaf.rate]
  text = f"{rates[0]:g}" if min(rates) == max(rates) else f"{rates[0]:g} to {rates[-1]:g} by layer"
  return text if leaf.trains is Trains.ALL else f"{text}, new rows"
