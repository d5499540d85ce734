"""Lives on disk: one orbax checkpoint a night, atomic, the newest two kept."""

import pathlib

from flax import serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from sleep_jax import typing as t

_KEEP = 2


class Checkpoints:
  """The checkpoints of one life.

  A save becomes visible only when it is whole (orbax renames it into place),
  so a life killed in the middle of one resumes from the night before.
  """

  def __init__(self, folder: pathlib.Path):
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_KEEP, enable_async_checkpointing=False
      ),
    )

  def newest(self) -> int | None:
    """The last night that was saved, or None."""
    return self._manager.latest_step()

  def save(self, night: int, state: t.Tree) -> None:
    """Saves `state` as it is after `night`."""
    flat = serialization.to_state_dict(state)
    # A baseline's notes may hold empty arrays, which the format cannot.
    leaves = {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(flat)
      if np.size(leaf)
    }
    self._manager.save(night, args=ocp.args.StandardSave(leaves))

  def restore(self, night: int, template: t.Tree) -> t.Tree:
    """The state after `night`, in the structure of `template`.

    Sizes may differ from the template's: a life's notes grow.

    Raises:
      ValueError: if the checkpoint is of a life of another structure.
    """
    leaves = self._manager.restore(night, args=ocp.args.StandardRestore())
    flat = serialization.to_state_dict(template)
    paths, treedef = jax.tree_util.tree_flatten_with_path(flat)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    if unknown := set(leaves) - set(names):
      raise ValueError(
        f'the checkpoint of night {night} holds {sorted(unknown)[0]}, which '
        'this learner does not have; it is of another learner or version. '
        'Use another --workdir.'
      )
    values = [leaves.get(n, leaf) for n, (_, leaf) in zip(names, paths)]
    return serialization.from_state_dict(
      template, jax.tree_util.tree_unflatten(treedef, values)
    )

  def close(self) -> None:
    """Waits for what is under way."""
    self._manager.close()
