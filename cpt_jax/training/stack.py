"""R runs of one shape -> one program, their arrays along a leading dimension R; a run alone has its arrays as they are.

Invariant: each run reads the rows, has the rates and makes the updates that it would alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.config import ConfigError
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.stream.batch import Batch

ONE_DEVICE: dict[str, int] = dict.fromkeys(mesh_lib.AXES, 1)  # the mesh of a stack


class Stack(NamedTuple):
  """How many runs are trained at once."""

  num_runs: int

  @property
  def is_alone(self) -> bool:
    """One run, without the dimension R."""
    return self.num_runs == 1

  def check(self, opened: Sequence[Any]) -> None:
    """Raises ConfigError where runs of a stack (training.inputs.Inputs) do not end together."""
    if self.is_alone:
      return
    for inputs in opened:
      guards = inputs.config.guard
      assert inputs.begin.kind != "run" and guards.general_loss_rise == guards.spike_mads == 0, "a stack cannot go back"
      if inputs.loader.end_step != opened[0].loader.num_steps:
        raise ConfigError("a source of a trial runs out before its end; trials of one stack have one length: use --stack=1")

  def make_mesh(self, config: Any) -> jax.sharding.Mesh:
    """The mesh of the config, or for a stack the first device."""
    if self.is_alone:
      return mesh_lib.make_mesh(**config.mesh)
    return mesh_lib.make_mesh(**ONE_DEVICE, devices=jax.devices()[:1])

  def known(self, max_documents: int) -> int | None:
    """How many documents a row has at most, for kernels that want to know; a stack's, which are mapped over R, are not told."""
    return max_documents if self.is_alone else None

  def map(self, function: Callable, in_axes: Any = 0) -> Callable:
    """The function of one run, for all of them."""
    return function if self.is_alone else jax.vmap(function, in_axes)

  def join(self, trees: Sequence[Any], stack: Callable = jnp.stack) -> Any:
    """A tree of each run -> one tree; with `np.stack` it stays on the host."""
    return trees[0] if self.is_alone else jax.tree.map(lambda *leaves: stack(leaves), *trees)

  def part(self, tree: Any, r: int) -> Any:
    """One tree -> that of a run."""
    return tree if self.is_alone else jax.tree.map(lambda leaf: leaf[r], tree)

  def parts(self, tree: Any) -> list[Any]:
    """One tree -> that of each run."""
    return [self.part(tree, r) for r in range(self.num_runs)]

  def to_device(self, mesh: jax.sharding.Mesh, batches: Sequence[Batch], *, num_rows: int) -> Batch:
    """A batch of each run, as `mesh.local_rows` of `num_rows` -> global arrays."""
    if self.is_alone:
      return mesh_lib.to_global(mesh, batches[0], num_rows=num_rows)
    place = {ndim: mesh_lib.sharding(mesh, None, *("batch", "seq")[: ndim - 1]) for ndim in (2, 3)}
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place[leaf.ndim]), self.join(batches, np.stack))
