"""Names of the leaves of a pytree."""

from typing import Any

import jax

from sleep_jax import array_typing as at


def leaf_paths(tree: at.Tree) -> dict[str, Any]:
  """The leaves of a tree by dotted path, such as `levels.0.fast.delta.gate`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
