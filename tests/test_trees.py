"""Leaf paths, rules on them, and the difference of two trees."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from cpt_jax import trees
from cpt_jax.config import ConfigError


class Pair(NamedTuple):
  first: object
  second: object


TREE = {"layers": {"wq": 1, "attn_norm": 2}, "embedding": 3}


def test_paths_are_dotted_in_every_kind_of_tree():
  tree = Pair(first={"layers": {"wq": 1}}, second=[2, (3, None)])
  assert trees.paths(tree) == {"first.layers.wq": 1, "second.0": 2, "second.1.0": 3}


def test_paths_keep_the_order_of_the_leaves():
  assert list(trees.paths(TREE).values()) == jax.tree.leaves(TREE)


def test_map_with_path_keeps_the_shape_and_passes_further_trees():
  found = trees.map_with_path(lambda path, leaf, other: f"{path}={leaf + other}", TREE, jax.tree.map(lambda x: 10 * x, TREE))
  assert found == {"layers": {"wq": "layers.wq=11", "attn_norm": "layers.attn_norm=22"}, "embedding": "embedding=33"}


def test_match_rules_takes_the_first_full_match():
  rules = (("layers", "whole path only"), (r".*norm", 0.0), (r"layers\..*", 1.0), (r".*", 2.0))
  assert trees.match_rules(TREE, rules, key="k") == {"layers": {"wq": 1.0, "attn_norm": 0.0}, "embedding": 2.0}


def test_match_rules_lists_every_leaf_without_a_rule():
  with pytest.raises(ConfigError, match=r"optimizer\.decay_rules: no pattern matches embedding, layers\.wq"):
    trees.match_rules(TREE, ((r".*norm", 0.0),), key="optimizer.decay_rules")


def test_match_rules_names_a_pattern_that_is_no_regular_expression():
  with pytest.raises(ConfigError, match=r"optimizer\.frozen: 'layers\.\(' is no regular expression"):
    trees.match_rules(TREE, (("layers.(", True),), key="optimizer.frozen")


def test_diff_lists_missing_extra_and_reshaped_leaves():
  def f32(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)

  expected = {"a": f32(2, 3), "b": f32(4), "c": f32(5), "d": f32(6)}
  found = {"a": f32(2, 3), "b": f32(4, 1), "c": np.zeros(5, np.int32), "e": f32(1)}
  difference = trees.diff(found, expected)
  assert difference.missing == ["d"]
  assert difference.extra == ["e"]
  assert difference.reshaped == ["b: found float32[4, 1], expected float32[4]", "c: found int32[5], expected float32[5]"]
  assert difference
  assert not trees.diff(expected, expected)
