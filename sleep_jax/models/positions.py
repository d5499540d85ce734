"""Positions of tokens: their defaults, those of padded rows, and the mask."""

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at

PAD_POSITION = -1  # A cache entry or token that nobody may attend to.


def default_positions(
  tokens_BxT: jax.Array, first: jax.Array | int = 0
) -> at.Int[jax.Array, 'B T']:
  """`first`, `first` + 1, ... for every row."""
  return jnp.broadcast_to(
    first + jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape
  )


def left_padded_positions(
  lengths_B: jax.Array, width: int, first: jax.Array | int = 0
) -> at.Int[jax.Array, 'B T']:
  """Positions of right-aligned rows: padding, then 0 to length - 1.

  Args:
    lengths_B: how many tokens of each row are real.
    width: T, padding included.
    first: of the first real token, in place of 0.
  """
  positions = jnp.arange(width) - (width - lengths_B[:, None])
  return jnp.where(positions < 0, PAD_POSITION, first + positions)


class PositionMask(at.Pytree):
  """Which keys a query sees: not later than it, no padding, in its window.

  queries: positions of the queries.
  keys: positions of the keys; in the order of their columns they do not fall,
    but for padding.
  window: a query sees the last `window` tokens, itself included; None = all.
  sinks: so many first tokens are seen by every query after them.
  """

  queries: at.Int[jax.Array, 'B T']
  keys: at.Int[jax.Array, 'B C']
  window: int | None = struct.field(pytree_node=False, default=None)
  sinks: int = struct.field(pytree_node=False, default=0)

  def dense(self) -> at.Bool[jax.Array, 'B T C']:
    """The same as one matrix a row."""
    keys, queries = self.keys[:, None], self.queries[..., None]
    seen = (keys <= queries) & (keys != PAD_POSITION)
    if self.window is not None:
      seen &= (queries - keys < self.window) | (keys < self.sinks)
    return seen


def causal_mask(
  query_positions_BxT: jax.Array, key_positions_BxC: jax.Array
) -> at.Bool[jax.Array, 'B T C']:
  """Which keys a query attends to: not later than it, and no padding."""
  return PositionMask(query_positions_BxT, key_positions_BxC).dense()
