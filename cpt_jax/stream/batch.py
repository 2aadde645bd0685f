"""The batch: what a training or evaluation step is given.

Invariant: shifted once, in packing; segment 0 / weight 0 is padding; one row holds one source.
"""

from typing import Any, NamedTuple

Array = Any  # numpy on a host, jax on its devices


class Batch(NamedTuple):
  """B rows of T positions. Position t of a row predicts `targets_BT` from `tokens_BT[:, :t+1]` of its segment.

  Letters of dimensions: cpt_jax/model/__init__.py.
  """

  tokens_BT: Array  # int32, ids below the vocabulary size; 0 where padded
  targets_BT: Array  # int32, the next token of the same document; 0 where padded
  weights_BT: Array  # float32, 1 where the target counts in the loss, else 0
  segments_BT: Array  # int32, document number within the row from 1; 0 = padding
  positions_BT: Array  # int32, from 0 in each segment
  source_B: Array  # int32, index of the row's source in the order of config.data.sources
