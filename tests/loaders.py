"""Small stores whose tokens tell their document, and runs of them."""

import json

import factory
import numpy as np
from store_writer import StoreWriter

from cpt_jax.store.token_store import open_store
from cpt_jax.stream import pipeline
from cpt_jax.stream.batch import Batch

UNIQUE = 100  # document i of a store has the tokens i*100, i*100+1, ..: a token tells its document


def write(path, lengths, *, name="", copies=1):
  """A store of documents whose tokens and texts are all different, the whole `copies` times over."""
  with StoreWriter(path, vocab_size=1 << 20, eos_id=0) as writer:
    for i, n in list(enumerate(lengths)) * copies:
      writer.add(list(range(UNIQUE * i, UNIQUE * i + n)), text=f"{name} {i}")
  return open_store(path)


def write_all(directory, *, seed=3):
  """Stores a, b, c and d of documents of 1 to 30 tokens: with rows of 16 an epoch is 10 to 60 rows."""
  rng, sizes = np.random.default_rng(seed), {"a": 40, "b": 25, "c": 60, "d": 12}
  return {name: write(directory / name, rng.integers(1, 30, size), name=name) for name, size in sizes.items()}


def mix(stores, mixed, *, num_steps, batch_rows=5, **options):
  """A loader of `mixed`, name -> fields of its source, where `share` is a number or knots."""
  found = [factory.source(name, stores[name], **{"heldout_frac": 0.2, **fields}) for name, fields in mixed.items()]
  return factory.loader(found, num_steps=num_steps, batch_rows=batch_rows, **{"row_len": 16, **options})


def go_on(stores, before, mixed, *, step, num_steps, skip=None, **options):
  """The loader of the run that goes on at `step`, from what a checkpoint keeps."""
  kept = json.loads(json.dumps(before.state(step)))
  options = {"batch_rows": before.batch_rows, **options}
  return mix(stores, mixed, num_steps=num_steps, begin=pipeline.Begin(step, kept, skip), **options)


def located(found, start, stop):
  """For each step, the (source, row of the source) of its rows."""
  rows = found.batch_rows
  return [[found.order.locate(i) for i in range(step * rows, (step + 1) * rows)] for step in range(start, stop)]


def assert_same(a: Batch, b: Batch):
  """Bit by bit."""
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype
