"""Stops a life whose numbers are no longer finite, before it is saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.runtime import sharding


class NotFinite(FloatingPointError):
  """A NaN or Inf; the message names phase, step and leaf, and the way out."""


@functools.partial(jax.jit, static_argnums=0)
def _finite(which: tuple[int, ...], leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaves[i]).all() for i in which])


def nonfinite_leaf(tree: at.Tree) -> str | None:
  """The path of the first leaf that holds a NaN or Inf, or None."""
  named = [
    (jax.tree_util.keystr(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and np.size(leaf)
  ]
  if not named:
    return None
  good = np.asarray(
    _finite(tuple(range(len(named))), [leaf for _, leaf in named])
  )
  return None if good.all() else named[int(good.argmin())][0]


def check_finite(
  phase: str, loss: np.ndarray, tree: at.Tree, *, first_step: int = 0
) -> None:
  """Looks at one period: its losses, and the weights it ended with.

  Args:
    phase: its name, for the message.
    loss: of every step, any shape; its first axis counts steps.
    tree: the weights after the last of them.
    first_step: the number of the period's first step.

  Raises:
    NotFinite: if a loss or a weight is not finite.
  """
  loss = sharding.fetch(loss)
  good = np.isfinite(loss.reshape(len(loss), -1)).all(axis=1)
  leaf = nonfinite_leaf(tree)
  if good.all() and leaf is None:
    return
  # Weights that broke under a finite loss did so at the very last step.
  step = int(good.argmin()) if not good.all() else len(good) - 1
  where = f'the first bad leaf is {leaf}' if leaf else 'all weights are finite'
  raise NotFinite(
    f'{phase}, step {first_step + step}: the loss is '
    f'{loss[step].reshape(-1)[0]}, and {where}. Lower the learning rate of '
    'this phase; what was saved before it is intact.'
  )
