"""Tokens of a stream in whole chunks, however the stream is cut.

A memory whose gradients are taken where a chunk begins depends on where that
is. Chunks are counted from the first token of a window, without padding; so a
piece of a stream may begin and end in the middle of one, and rows may be padded
anywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
  """Where T tokens stand in chunks of C slots, of which some are empty.

  chunk: C, slots of each.
  seen: `[B, T]`, tokens since the first of these chunks began, up to each.
  slot: `[B, T]`, of each token; beyond the last for padding.
  token: `[B, S]`, that stands in each slot; T where it is empty.
  """

  chunk: int
  seen: jax.Array
  slot: jax.Array
  token: jax.Array

  @property
  def chunks(self) -> int:
    """How many chunks there are."""
    return self.token.shape[1] // self.chunk

  def split(self, x_BxHxTx: jax.Array) -> jax.Array:
    """`[B, H, T, ...]` to `[chunks, B, H, C, ...]`, 0 in empty slots."""
    rows, heads, _, *rest = x_BxHxTx.shape
    x = jnp.pad(x_BxHxTx, [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * len(rest))
    row, head = jnp.arange(rows)[:, None, None], jnp.arange(heads)[:, None]
    x = x[row, head, self.token[:, None]]
    x = x.reshape(rows, heads, self.chunks, self.chunk, *rest)
    return jnp.moveaxis(x, 2, 0)

  def join(self, x_chunks: jax.Array) -> jax.Array:
    """`[chunks, B, H, C, X]` to `[B, H, T, X]`; of padding it means nothing."""
    x = jnp.moveaxis(x_chunks, 0, 2)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    slot = jnp.minimum(self.slot, x.shape[2] - 1)
    return jnp.take_along_axis(x, slot[:, None, :, None], axis=2)

  def ends(self, number: jax.Array | int) -> jax.Array:
    """`[B]`, whether chunk `number` is full after these tokens."""
    return self.seen[:, -1] >= (number + 1) * self.chunk


def of_stream(count_B: jax.Array, real_BxT: jax.Array, chunk: int) -> Slots:
  """The slots of tokens that follow `count_B` others of their window.

  Args:
    count_B: tokens before.
    real_BxT: 0 where a token is padding.
    chunk: C.
  """
  real = real_BxT.astype(jnp.int32)
  seen = count_B[:, None] % chunk + jnp.cumsum(real, axis=1)
  return _filled(chunk, chunk, seen, seen - 1, real)


def of_pieces(count_B: jax.Array, real_BxT: jax.Array, chunk: int) -> Slots:
  """As `of_stream`, but what there is of a chunk begins at its first slot.

  So a chunk has no more slots than there are tokens.
  """
  before = (count_B % chunk)[:, None]
  real, size = real_BxT.astype(jnp.int32), min(chunk, real_BxT.shape[1])
  seen = before + jnp.cumsum(real, axis=1)
  number, place = jnp.divmod(seen - 1, chunk)
  place -= jnp.where(number == 0, before, 0)
  return _filled(size, chunk, seen, number * size + place, real)


def _filled(
  size: int, chunk: int, seen: jax.Array, slot: jax.Array, real: jax.Array
) -> Slots:
  """The slots, `size` for each of the chunks that T tokens may be in."""
  rows, length = real.shape
  total = -(-(length + chunk - 1) // chunk) * size
  slot = jnp.where(real > 0, slot, total)
  token = jnp.full((rows, total), length)
  token = token.at[jnp.arange(rows)[:, None], slot].set(
    jnp.arange(length)[None], mode='drop'
  )
  return Slots(size, seen, slot, token)
