"""Checks for NaN and Inf in losses and weights before a life is saved."""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.runtime import sharding


class NotFinite(FloatingPointError):
  """A loss or weight is NaN or Inf; the message names phase, step and leaf."""


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def nonfinite_leaf(tree: at.Tree) -> str | None:
  """The path of the first leaf that holds a NaN or Inf, or None."""
  leaves = [
    (jax.tree_util.keystr(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and np.size(leaf)
  ]
  if not leaves:
    return None
  finite = np.asarray(_all_finite([leaf for _, leaf in leaves]))
  return None if finite.all() else leaves[int(finite.argmin())][0]


def check_finite(
  phase: str,
  loss: at.Array,
  tree: at.Tree,
  *,
  first_step: int = 0,
) -> None:
  """Checks the losses of consecutive steps, and the weights after the last.

  Args:
    phase: name of the phase, for the message.
    loss: losses `[steps, ...]`.
    tree: the weights after the last step.
    first_step: index of the first step, for the message.

  Raises:
    NotFinite: if a loss or a weight is not finite.
  """
  loss = np.asarray(sharding.fetch(loss))
  finite = np.asarray(np.isfinite(loss.reshape(len(loss), -1)).all(axis=1))
  leaf = nonfinite_leaf(tree)
  if finite.all() and leaf is None:
    return
  # If every loss is finite, the last update made the weights non-finite.
  step = int(finite.argmin()) if not finite.all() else len(finite) - 1
  where = f'the first bad leaf is {leaf}' if leaf else 'all weights are finite'
  raise NotFinite(
    f'{phase}, step {first_step + step}: the loss is '
    f'{loss[step].reshape(-1)[0]}, and {where}. Lower the learning rate of '
    'this phase; earlier checkpoints are intact.'
  )
