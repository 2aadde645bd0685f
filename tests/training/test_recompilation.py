"""A run compiles its programs once: counted in the real loop, over evaluations, saves, short batches and a resume."""

import collections
import copy

import pytest

from cpt_jax import config as config_lib
from tools.bench import bench_endurance


@pytest.fixture
def tiny_run(tiny_plan):
  """20 steps of 4 rows; the rows that are evaluated, 8 at a time, do not fill their last batch."""
  c = tiny_plan.copy_and_resolve_references()
  c.schedule = config_lib.default().schedule
  c.train.length = "20 steps"
  c.train.microbatches = 2
  c.schedule.lr_peak = 1e-3
  c.eval.every = "6 steps"
  c.eval.batch_rows = 8
  c.checkpoint.every = "5 steps"
  c.log.every = 3
  return c


def test_every_program_is_compiled_once(one_device, tiny_run, tmp_path):
  found = []
  for stop_after in (14, 0):
    config = copy.deepcopy(tiny_run)
    config.debug.stop_after = stop_after
    found.append(bench_endurance.watched(config, tmp_path / "run", every=1))
  first, second = found
  assert [step for step, _ in first.memory] == list(range(1, 15)) and [step for step, _ in second.memory] == list(range(15, 21))
  for watch in found:
    count = collections.Counter(program for _, program in watch.compiled)
    assert count["jit(train_step)"] == count["jit(eval_step)"] == 1, watch.compiled
  assert {step for step, _ in first.compiled} == {0}, "evaluations and saves after the first step use what there is"
  # The second start goes on behind step 14 and meets its first evaluation at 18; at the end it exports.
  late = [(step, program) for step, program in second.compiled if step > 0]
  assert late[0] == (18, "jit(eval_step)")
  assert {late_step for late_step, program in late[1:] if program != "jit(_norms)"} <= {20}
