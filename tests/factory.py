"""What many tests build: parts of the package, with plain values where a test does not say otherwise."""

import cpt_jax.training.optimizer
import cpt_jax.training.schedule
from cpt_jax import config as config_lib
from cpt_jax.model import transformer
from cpt_jax.stream import packing, pipeline, selection, sources
from cpt_jax.training.checkpoint import Checkpoints
from cpt_jax.training.step import make_train_step

SETTINGS = transformer.Settings("float32", remat="none", attention="auto", loss_chunk=0, max_documents=None, scan=True)


def optimizer(params, **changes):
  """AdamW as a config has it by default, with the same rate and decay for every leaf."""
  rules = dict(decay_rules=((".*", 1.0),), rate_rules=((".*", 1.0),), stages=("all",))
  options = config_lib.default().optimizer.to_dict() | rules | changes
  numbers = {name: options.pop(name) for name in ("b1", "b2", "eps", "mu_dtype", "weight_decay", "clip_norm")}
  return cpt_jax.training.optimizer.make(
    cpt_jax.training.optimizer.apply_rules(params, **options), **numbers, new_rows=options.get("new_rows")
  )


def schedule(name, **changes):
  """Without a phase that is not asked for."""
  numbers = dict.fromkeys(("warmup_steps", "cooldown_steps", "anneal_steps"), 0)
  numbers |= dict.fromkeys(("lr_start", "lr_const", "lr_final"), 0.0)
  return cpt_jax.training.schedule.make(name, **(numbers | {"shape": "1-sqrt"} | changes))


def checkpoints(path, **changes):
  """Keeps the newest, and no others."""
  return Checkpoints(path, **({"keep_every_steps": 0, "best_metric": ""} | changes))


def hidden(params, spec, tokens_BT, positions_BT, segments_BT, **changes):
  """The model's hidden states."""
  return transformer.apply(params, spec, tokens_BT, positions_BT, segments_BT, settings=SETTINGS._replace(**changes))


def source(name, store, *, share=1.0, **changes):
  """A domain source; `share` is a number, or knots (step, share) or (step, share, curve)."""
  knots = [(0, share)] if isinstance(share, float) else share
  reading = ("role", "at_end", "max_epochs", "loss_weight", "min_tokens", "max_tokens", "length_shares")
  fields = {field: config_lib.FIELDS[field].default for field in reading} | changes
  return sources.Source(name, store, share=tuple((*knot, "linear")[:3] for knot in knots), **fields)


def loader(found, *, num_steps, **changes):
  """Its shape has no default: batch_rows and row_len; `changes` are of pipeline.Settings and of Loader."""
  plain = {"seed": 0, "packing": "best_fit", "cross_documents": False, "split_positions": "restart"}
  settings = pipeline.Settings(**plain | {key: changes.pop(key) for key in pipeline.Settings._fields if key in changes})
  options = {"num_threads": 2, "eval_batch_rows": settings.batch_rows} | changes
  return pipeline.Loader(found, num_steps=num_steps, settings=settings, **options)


def rows(lengths, **changes):
  """Documents laid out in rows."""
  return packing.lay_out(lengths, **({"cross_documents": False} | changes))


def selected(lengths, documents, **changes):
  """Documents chosen by length."""
  return selection.select(lengths, documents, **({"min_tokens": 0, "max_tokens": 0, "length_shares": ()} | changes))


def train_step(spec, tx, **changes):
  """An update in one part, without z-loss."""
  numbers = dict(microbatches=1, accumulate_dtype="float32", z_loss=0.0)
  return make_train_step(spec, tx, **(numbers | changes))
