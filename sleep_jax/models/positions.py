"""Positions of tokens, and what marks padding."""

import jax
import jax.numpy as jnp

PAD_POSITION = -1  # A cache entry or token that nobody may attend to.


def left_padded_positions(lengths_B: jax.Array, width: int) -> jax.Array:
  """Positions `[B, width]` of right-aligned rows; PAD_POSITION before them."""
  positions = jnp.arange(width) - (width - lengths_B[:, None])
  return jnp.where(positions < 0, PAD_POSITION, positions)
