"""Per-token divergences F(teacher || student) of GKD, summed over V, in nats.

The endpoints of the generalised JSD vanish (D_beta -> 0 as beta -> 0 or 1), so
forward and reverse KL are functions of their own and never limits of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sleep_jax import config

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL(teacher || student) of logits `[..., V]` -> `[...]`; covers mass."""
  t = jax.nn.log_softmax(teacher, axis=-1)
  s = jax.nn.log_softmax(student, axis=-1)
  return jnp.sum(jnp.exp(t) * (t - s), axis=-1)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL(student || teacher); seeks modes."""
  return forward_kl(student, teacher)


def jsd(teacher: jax.Array, student: jax.Array, beta: float) -> jax.Array:
  """beta KL(T || M) + (1-beta) KL(S || M) with M = beta T + (1-beta) S."""
  t = jax.nn.log_softmax(teacher, axis=-1)
  s = jax.nn.log_softmax(student, axis=-1)
  m = jnp.logaddexp(t + jnp.log(beta), s + jnp.log1p(-beta))
  to_t = jnp.sum(jnp.exp(t) * (t - m), axis=-1)
  to_s = jnp.sum(jnp.exp(s) * (s - m), axis=-1)
  return beta * to_t + (1.0 - beta) * to_s


def divergence(name: str, beta: float) -> Divergence:
  """The divergence that a config names."""
  return config.choose(
    name,
    {
      'forward_kl': forward_kl,
      'reverse_kl': reverse_kl,
      'jsd': lambda t, s: jsd(t, s, beta),
    },
    'sleep.divergence',
  )
