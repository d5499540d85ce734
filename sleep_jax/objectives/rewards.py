"""Rewards of Learning to Imitate (Sleep Eq. 3 and 4)."""

import jax
import jax.numpy as jnp


def levenshtein(
  a_M: jax.Array, a_len: jax.Array, b_N: jax.Array, b_len: jax.Array
) -> jax.Array:
  """Edit distance of two token sequences; entries past a length do not count.

  One row of the table per token of `a`. Within a row the left-to-right chain
  `new[j] = min(cand[j], new[j-1] + 1)` is a running minimum of `cand[j] - j`,
  so a row is a vector operation. `jax.vmap` it over pairs.
  """
  columns = jnp.arange(b_N.shape[0] + 1)

  def row(previous, token):
    index, symbol = token
    substitute = previous[:-1] + (b_N != symbol)
    cand = jnp.concatenate(
      [index[None] + 1, jnp.minimum(previous[1:] + 1, substitute)]
    )
    new = jax.lax.cummin(cand - columns) + columns
    return jnp.where(index < a_len, new, previous), None

  tokens = (jnp.arange(a_M.shape[0]), a_M)
  last, _ = jax.lax.scan(row, columns, tokens)
  return last[b_len]


def absolute(
  guess: jax.Array,
  guess_len: jax.Array,
  dream: jax.Array,
  dream_len: jax.Array,
  z0: float,
) -> jax.Array:
  """r_abs of Eq. 4 for a batch of pairs `[B, M]`, in [0, 1].

  1 - z / max(|guess|, |dream|) while z <= z_0, else 0; z_0 is given as a share
  of the longer sequence, so that one setting serves all lengths.
  """
  z = jax.vmap(levenshtein)(guess, guess_len, dream, dream_len)
  longest = jnp.maximum(jnp.maximum(guess_len, dream_len), 1)
  return jnp.where(z <= z0 * longest, 1.0 - z / longest, 0.0)


def exact(
  guess: jax.Array,
  guess_len: jax.Array,
  dream: jax.Array,
  dream_len: jax.Array,
) -> jax.Array:
  """The strictest r_sem: 1 where both sequences are equal."""
  inside = jnp.arange(guess.shape[1]) < guess_len[:, None]
  same = jnp.where(inside, guess == dream, True).all(axis=1)
  return (same & (guess_len == dream_len)).astype(jnp.float32)


def pooled_similarity(
  guess_BxMxD: jax.Array,
  guess_len: jax.Array,
  dream_BxMxD: jax.Array,
  dream_len: jax.Array,
) -> jax.Array:
  """Cosine of the mean-pooled hidden states of a frozen model, `[B]`."""

  def pool(h: jax.Array, length: jax.Array) -> jax.Array:
    inside = (jnp.arange(h.shape[1]) < length[:, None])[..., None]
    mean = (h * inside).sum(1) / jnp.maximum(length, 1)[:, None]
    return mean / (jnp.linalg.norm(mean, axis=-1, keepdims=True) + 1e-6)

  return (pool(guess_BxMxD, guess_len) * pool(dream_BxMxD, dream_len)).sum(-1)


def imitation(semantic: jax.Array, absolute_: jax.Array, gamma: float):
  """Eq. 3: gamma r_sem + (1 - gamma) r_abs."""
  return gamma * semantic + (1.0 - gamma) * absolute_
