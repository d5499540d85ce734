"""Rewards of Learning to Imitate (Sleep Eq. 3 and 4)."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at

_BITS = 32
_Reward = TypeVar('_Reward', jax.Array, float)


def levenshtein(
  a_BxM: at.Array, a_len: at.Array, b_BxN: at.Array, b_len: at.Array
) -> at.Int[jax.Array, 'B']:
  """Edit distances of pairs of token rows; entries past a length do not count.

  Bit-parallel: a column of the table is stored as the signs of its differences,
  32 rows of the table per word, and is computed from the previous column by a
  few word operations (Myers 1999, in blocks as in Hyyro 2003). Each operation
  is vectorized over all pairs.
  """
  pairs, m = a_BxM.shape
  words = -(-m // _BITS)
  u32 = functools.partial(jnp.asarray, dtype=jnp.uint32)
  pattern = jnp.pad(a_BxM, ((0, 0), (0, words * _BITS - m)))
  pattern = pattern.T.reshape(words, _BITS, pairs)
  bit = (u32(1) << jnp.arange(_BITS, dtype=jnp.uint32))[:, None]
  # The table's last row, whose differences are summed: one bit of one word.
  last = jnp.maximum(a_len - 1, 0)
  in_word = last // _BITS == jnp.arange(words)[:, None]
  last_bit = jnp.where(in_word, u32(1) << u32(last % _BITS), u32(0))

  def word(carry, column):
    up_in, down_in, step = carry
    equal, up, down, last_bit = column
    x = equal | down
    equal |= down_in
    y = (((equal & up) + up) ^ up) | equal
    right, left = down | ~(y | up), up & y
    step += (right & last_bit > 0).astype(jnp.int32)
    step -= (left & last_bit > 0).astype(jnp.int32)
    carry = right >> (_BITS - 1), left >> (_BITS - 1), step
    right, left = right << 1 | up_in, left << 1 | down_in
    return carry, (left | ~(x | right), right & x)

  def column(state, token):
    distance, up, down = state
    j, symbol = token
    equal = jnp.where(pattern == symbol, bit, u32(0))
    equal = equal.sum(axis=1, dtype=jnp.uint32)
    first = jnp.ones_like(symbol, jnp.uint32)  # The first row counts upwards.
    first = (first, jnp.zeros_like(first), jnp.zeros_like(distance))
    (_, _, step), (up, down) = jax.lax.scan(
      word, first, (equal, up, down, last_bit), unroll=min(words, 8)
    )
    return (jnp.where(j < b_len, distance + step, distance), up, down), None

  up = jnp.full((words, pairs), 2**_BITS - 1, jnp.uint32)
  state = (a_len.astype(jnp.int32), up, jnp.zeros_like(up))
  tokens = (jnp.arange(b_BxN.shape[1]), b_BxN.T)
  (distance, _, _), _ = jax.lax.scan(column, state, tokens)
  return jnp.where(a_len == 0, b_len, distance)


def absolute(
  guess: at.Array,
  guess_len: at.Array,
  dream: at.Array,
  dream_len: at.Array,
  z0: float,
) -> jax.Array:
  """r_abs of Eq. 4 for a batch of pairs `[B, M]`, in [0, 1].

  1 - z / max(|guess|, |dream|) while z <= z_0, else 0; z_0 is given as a share
  of the longer sequence, so that it does not depend on the length.
  """
  z = levenshtein(guess, guess_len, dream, dream_len)
  longest = jnp.maximum(jnp.maximum(guess_len, dream_len), 1)
  return jnp.where(z <= z0 * longest, 1.0 - z / longest, 0.0)


def exact(
  guess: at.Array,
  guess_len: at.Array,
  dream: at.Array,
  dream_len: at.Array,
) -> jax.Array:
  """r_sem as exact match: 1 where both sequences are equal, `[B]`."""
  inside = jnp.arange(guess.shape[1]) < guess_len[:, None]
  same = jnp.where(inside, guess == dream, True).all(axis=1)
  return (same & (guess_len == dream_len)).astype(jnp.float32)


def pooled_similarity(
  guess_BxMxD: at.Array,
  guess_len: at.Array,
  dream_BxMxD: at.Array,
  dream_len: at.Array,
) -> jax.Array:
  """Cosine of the mean-pooled hidden states of a frozen model, `[B]`."""

  def pool(h: at.Array, length: at.Array) -> jax.Array:
    inside = (jnp.arange(h.shape[1]) < length[:, None])[..., None]
    mean = (h * inside).sum(1) / jnp.maximum(length, 1)[:, None]
    return mean / (jnp.linalg.norm(mean, axis=-1, keepdims=True) + 1e-6)

  return (pool(guess_BxMxD, guess_len) * pool(dream_BxMxD, dream_len)).sum(-1)


def imitation(semantic: _Reward, absolute: _Reward, gamma: float) -> _Reward:
  """Eq. 3: gamma r_sem + (1 - gamma) r_abs."""
  return gamma * semantic + (1.0 - gamma) * absolute
