"""Path rules -> AdamW whose rate and weight decay can differ by leaf and by layer.

Invariant: one update is p -= rate * multiplier * (adam(clipped gradient) + weight_decay * decay * p), computed in float32. The
rate comes with each update, so one compiled step serves every schedule. Called by train.loop, train.state, train.dry_run.

Frozen leaves have no moments, do not count in the norm that clips the others, and keep every bit.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpt_jax import config as config_lib
from cpt_jax import trees
from cpt_jax.config import ConfigError, Problems

Rules = Sequence[tuple[str, float]]


class Leaf(NamedTuple):
  """What happens to one parameter array."""

  trained: bool
  rate: float  # multiplier of the schedule's rate
  layer_rates: tuple[float, ...]  # further multipliers along the first dimension, lowest layer first; () = all 1
  decay: float  # multiplier of weight_decay


def plan(
  params: Any, *, decay_rules: Rules, rate_rules: Rules, layer_rates: Sequence[float], frozen: Sequence[str]
) -> dict[str, Leaf]:
  """What happens to each leaf, by path; `params` may be abstract.

  Raises:
    ConfigError: a line for each rule that cannot be followed: leaves that no pattern matches, frozen patterns without a leaf,
      as many layer rates as fit no model, nothing left to train.
  """
  problems = Problems()
  shapes = {path: leaf.shape for path, leaf in trees.paths(params).items()}
  is_frozen = dict.fromkeys(shapes, False)
  for pattern in frozen:
    matched = _matches(pattern, list(shapes), "optimizer.frozen", problems)
    is_frozen.update(dict.fromkeys(matched, True))
  if shapes and all(is_frozen.values()):
    problems.add(f"optimizer.frozen={tuple(frozen)}: every parameter is frozen, nothing would be trained")
  by_layer = {path: _layer_rates(layer_rates, shapes[path][0], problems) for path in shapes if path.startswith("layers.")}
  rates = _multipliers(params, rate_rules, "optimizer.rate_rules", problems)
  decays = _multipliers(params, decay_rules, "optimizer.decay_rules", problems)
  problems.raise_if_any()
  return {path: Leaf(not is_frozen[path], rates[path], by_layer.get(path, ()), decays[path]) for path in shapes}


def make(
  params: Any,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  mu_dtype: str = "float32",
  weight_decay: float = 0.1,
  clip_norm: float = 1.0,
  decay_rules: Rules = ((".*", 1.0),),
  rate_rules: Rules = ((".*", 1.0),),
  layer_rates: Sequence[float] = (),
  frozen: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """AdamW (Loshchilov & Hutter 1711.05101, decay scaled by the rate) for a nested dict like `params`, which may be abstract.

  Its update takes the rate: `update(gradients, state, params, rate=1e-4)`. The first moment is kept in `mu_dtype`, the second in
  float32.

  Raises:
    ConfigError: as `plan`.
  """
  leaves = plan(params, decay_rules=decay_rules, rate_rules=rate_rules, layer_rates=layer_rates, frozen=frozen)
  pieces = [
    _adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
    _add_decay(weight_decay, leaves),
    _scale_by_leaf(leaves),
    _scale_by_rate(),
  ]
  if clip_norm > 0:
    pieces.insert(0, optax.clip_by_global_norm(clip_norm))
  chain = optax.chain(*pieces)
  return chain if all(leaf.trained for leaf in leaves.values()) else _without_frozen(chain, leaves)


def from_config(config: Any, params: Any) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a resolved config; `params` may be abstract.

  Raises:
    ConfigError: as `plan`; also rules of the user's own that no leaf follows.
  """
  c = config.optimizer
  _check_own_rules(c, params)
  return make(
    params,
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    mu_dtype=c.mu_dtype,
    weight_decay=c.weight_decay,
    clip_norm=c.clip_norm,
    **_rules_of(c),
  )


class Group(NamedTuple):
  """Leaves that are treated alike; a row for people."""

  leaves: tuple[str, ...]
  num_parameters: int
  rate: str  # multiplier, "0.5", "0.1 to 1 by layer" or "frozen"
  weight_decay: float


def groups(params: Any, leaves: dict[str, Leaf], *, weight_decay: float) -> list[Group]:
  """The leaves of a `plan`, gathered by what happens to them, in the order of the tree."""
  gathered: dict[tuple[str, float], list[str]] = {}
  for path, leaf in leaves.items():
    key = (_describe_rate(leaf), leaf.decay * weight_decay) if leaf.trained else ("frozen", 0.0)
    gathered.setdefault(key, []).append(path)
  sizes = {path: math.prod(leaf.shape) for path, leaf in trees.paths(params).items()}
  return [Group(tuple(paths), sum(sizes[p] for p in paths), rate, decay) for (rate, decay), paths in gathered.items()]


def from_config_groups(config: Any, params: Any) -> list[Group]:
  """`groups` of a resolved config, for the dry run."""
  c = config.optimizer
  return groups(params, plan(params, **_rules_of(c)), weight_decay=c.weight_decay)


def _rules_of(c: Any) -> dict[str, Any]:
  return {key: tuple(c[key]) for key in ("decay_rules", "rate_rules", "layer_rates", "frozen")}


def _adam(*, b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
  """Adam in float32, whose first moment is rounded to `mu_dtype` between updates.

  In bfloat16 (8 bits, so half a unit is 1/512 to 1/256 of a number) the moment of a parameter stands still where its gradient is
  within 1/(512 (1 - b1)) to twice that of it: 2 to 4% at b1 = 0.9, 20 to 40% at 0.99. The second moment would stand still within
  4 to 8% at b2 = 0.95 and never fall at 0.999, which no average over noise makes good; so it is not offered.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32)
  if mu_dtype == "float32":
    return adam

  # Not optax's own mu_dtype: that multiplies in bfloat16, so it rounds twice, and how often depends on the compiler.
  def kept(state):
    return state._replace(mu=optax.tree.cast(state.mu, mu_dtype))

  def update(updates, state, params=None):
    updates, state = adam.update(updates, state._replace(mu=optax.tree.cast(state.mu, jnp.float32)), params)
    return updates, kept(state)

  return optax.GradientTransformation(lambda params: kept(adam.init(params)), update)


def _add_decay(weight_decay: float, leaves: dict[str, Leaf]) -> optax.GradientTransformation:
  def update(updates, params):
    decays = {path: weight_decay * leaf.decay for path, leaf in leaves.items()}
    return trees.map_with_path(lambda path, u, p: u + decays[path] * p if decays[path] else u, updates, params)

  return optax.stateless(update)


def _scale_by_leaf(leaves: dict[str, Leaf]) -> optax.GradientTransformation:
  def scale(path, update):
    leaf = leaves[path]
    if any(rate != 1.0 for rate in leaf.layer_rates):
      by_layer = np.asarray(leaf.layer_rates, np.float32) * np.float32(leaf.rate)
      return update * by_layer.reshape(-1, *(1,) * (update.ndim - 1))
    return update if leaf.rate == 1.0 else update * leaf.rate

  return optax.stateless(lambda updates, params: trees.map_with_path(scale, updates))


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
  def update(updates: Any, state: Any, params: Any = None, **extra: Any):
    return jax.tree.map(lambda u: -extra["rate"] * u, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _without_frozen(
  inner: optax.GradientTransformationExtraArgs, leaves: dict[str, Leaf]
) -> optax.GradientTransformationExtraArgs:
  """`inner` for the trained leaves alone: it sees and keeps a tree that does not have the others."""

  def init(params):
    return inner.init(_trained(params, leaves))

  def update(updates: Any, state: Any, params: Any = None, **extra: Any):
    trained, state = inner.update(_trained(updates, leaves), state, _trained(params, leaves), **extra)
    found = trees.paths(trained)
    # Adding -0.0 keeps every bit of a parameter; adding 0.0 would turn -0.0 into 0.0.
    return trees.map_with_path(lambda path, g: found[path] if path in found else jnp.full_like(g, -0.0), updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def _trained(tree: dict[str, Any], leaves: dict[str, Leaf], prefix: str = "") -> dict[str, Any]:
  kept = {}
  for name, branch in tree.items():
    if isinstance(branch, dict):
      below = _trained(branch, leaves, f"{prefix}{name}.")
      kept |= {name: below} if below else {}
    elif leaves[prefix + name].trained:
      kept[name] = branch
  return kept


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
  default: Any = config_lib.default().optimizer
  for name in ("decay_rules", "rate_rules"):
    left = list(trees.paths(params))
    for pattern, _ in c[name]:
      own = pattern not in [known for known, _ in default[name]]
      matched = _matches(pattern, list(trees.paths(params)), f"optimizer.{name}", problems if own else Problems())
      if own and matched and not set(matched) & set(left):
        problems.add(f"optimizer.{name}: {pattern!r} has no effect, rules before it match all its leaves; put it first")
      left = [path for path in left if path not in matched]
  problems.raise_if_any()


def _describe_rate(leaf: Leaf) -> str:
  rates = [leaf.rate * rate for rate in leaf.layer_rates] or [leaf.rate]
  return f"{rates[0]:g}" if min(rates) == max(rates) else f"{rates[0]:g} to {rates[-1]:g} by layer"
