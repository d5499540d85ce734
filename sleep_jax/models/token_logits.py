"""Functions of logits, with the logits of few tokens at a time.

A row of 2,048 tokens with a vocabulary of 128k has a gibibyte of logits, and
what is computed from them is a few numbers a token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.models import layers
from sleep_jax.models import mesh_axes

MOST = 2**28  # Logits of a device at a time: 1 GiB.


def map_tokens(
  fn: Callable[..., at.Tree],
  hidden: at.Float[jax.Array, 'B T D'],
  unembedding: at.Float[jax.Array, 'V D'],
  *rows: at.Tree,
  logits: jax.Array | None = None,
) -> at.Tree:
  """`fn(logits, *rows)`, a function of every token alone.

  If there are few logits they are computed at once. Otherwise columns are taken
  some at a time, and the backward pass computes their logits again.

  Args:
    fn: from leaves `[B, C, ...]` to leaves `[B, C, ...]`; finite, with a finite
      gradient, where all inputs are 0.
    hidden: what the logits are of.
    unembedding: their matrix.
    *rows: leaves `[B, T, ...]`.
    logits: those of `hidden`, for the case that they are few.

  Returns:
    Leaves `[B, T, ...]`.
  """
  batch, length = hidden.shape[:2]

  def with_logits(inputs: tuple[Any, ...]) -> at.Tree:
    x, *rest = inputs
    matrix = unembedding.T.astype(x.dtype)
    logits = layers.by_token(lambda x: x @ matrix, x)
    return fn(logits.astype(jnp.float32), *rest)

  columns = columns_at_once(batch, len(unembedding))
  if length <= columns:
    if logits is not None:
      return fn(logits, *rows)
    return with_logits((hidden, *rows))
  return map_columns(with_logits, (hidden, *rows), columns)


def map_columns(
  fn: Callable[[Any], at.Tree], rows: at.Tree, columns: int
) -> at.Tree:
  """`fn(rows)`, a function of every token alone, some columns at a time.

  Rows stay on the devices where they are. The backward pass computes what `fn`
  computes again.

  Args:
    fn: from leaves `[B, C, ...]` to leaves `[B, C, ...]`.
    rows: leaves `[B, T, ...]`.
    columns: C.

  Returns:
    Leaves `[B, T, ...]`.
  """
  batch, length = jax.tree.leaves(rows)[0].shape[:2]

  def split(x: at.Array) -> jax.Array:
    """`[B, T, ...]` as `[chunks, B, C, ...]`."""
    extra = [(0, 0)] * x.ndim
    extra[1] = (0, -length % columns)
    x = jnp.pad(x, extra).reshape(batch, -1, columns, *x.shape[2:])
    return x.swapaxes(0, 1)

  def join(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

  step = jax.checkpoint(fn, prevent_cse=False)
  return jax.tree.map(join, jax.lax.map(step, jax.tree.map(split, rows)))


def columns_at_once(batch: int, vocab: int) -> int:
  """Of how many columns a batch's logits may exist; at least one."""
  local = batch * vocab
  local //= mesh_axes.shards(batch, mesh_axes.ROWS)
  local //= mesh_axes.shards(vocab, mesh_axes.INNER)
  return max(1, MOST // local)
