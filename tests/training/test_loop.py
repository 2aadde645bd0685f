"""What the loop hands to a checkpoint is what a start that goes on needs."""

from cpt_jax import exits
from cpt_jax.stream import pipeline
from cpt_jax.training import checkpoint, inputs as inputs_lib, loop


def rows_read(record: dict, steps: range) -> list[tuple[str, int]]:
  """(source, which of its rows) for each row of these steps, by the run's own record."""
  loader = pipeline.from_periods(record, steps[0])
  return [loader.order.locate(row) for row in range(steps.start * loader.batch_rows, steps.stop * loader.batch_rows)]


def test_under_new_shares_each_source_goes_on_with_the_row_after_its_last(tiny_plan, one_device, tmp_path):
  c = tiny_plan.copy_and_resolve_references()
  c.train.length, c.debug.stop_after = "6 steps", 3
  c.schedule.warmup = "0 steps"
  workdir = tmp_path / "run"
  assert loop.run(c, workdir) == exits.DONE
  kept = checkpoint.read_meta(workdir, 3)["loader"]
  c.data.sources.general.share, c.data.sources.poetry.share = 0.75, 0.25
  record = inputs_lib.open_inputs(c, workdir).loader.periods()
  assert [period["start_step"] for period in record["periods"]] == [0, 3]
  rows = rows_read(record, range(3)) + rows_read(record, range(3, 6))
  for name in ("general", "poetry"):
    ours = [nth for source, nth in rows if source == name]
    assert ours == list(range(len(ours))), f"no row of {name} is read twice or left out"
    assert kept["read"][name]["rows"] == len([source for source, _ in rows[:12] if source == name])
