"""Small updates for tests: a state, the jitted step and its rates."""

import functools

import factory
import jax

from cpt_jax.model import transformer
from cpt_jax.training import optimizer, state

SETTINGS = factory.SETTINGS._replace(attention="plain")
RULES = dict(decay_rules=((".*norm", 0.0), (".*", 1.0)), rate_rules=((".*", 1.0),), layer_rates=(), frozen=())


# A large eps: with a small one Adam turns the rounding of a gradient near zero into a whole step.
@functools.cache
def compiled(
  spec, *, microbatches=1, z_loss=0.0, clip_norm=1.0, frozen=(), source_weights=(1.0, 1.0), mu_dtype="float32", sums="float32"
):
  """(optimizer, the jitted step), compiled once for all tests of a process."""
  params = transformer.init(spec, jax.random.key(0))
  rules = {**RULES, "frozen": frozen}
  tx = factory.optimizer(params, b1=0.9, b2=0.95, eps=1e-3, mu_dtype=mu_dtype, weight_decay=0.1, clip_norm=clip_norm, **rules)
  update = factory.train_step(
    spec,
    tx,
    settings=SETTINGS,
    source_weights=source_weights,
    microbatches=microbatches,
    z_loss=z_loss,
    hold=functools.partial(optimizer.hold, leaves=optimizer.apply_rules(params, **rules, stages=("all",))),
    accumulate_dtype=sums,
  )
  return tx, jax.jit(update)


def build(spec, *, params=None, **options):
  """State, step and rates."""
  rates = factory.schedule("rewarm", num_steps=10, warmup_steps=2, lr_peak=1e-2, lr_final=1e-3, shape="linear")
  tx, update = compiled(spec, **options)
  return state.create(transformer.init(spec, jax.random.key(0)) if params is None else params, tx), update, rates
