"""A learned rule that stops the passes over a window."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config


def init_halting(cfg: config.ModelConfig) -> at.Params:
  """The rule that stops a window, before it has learnt: odds of 1 to 3."""
  return {'kernel': jnp.zeros((cfg.dim,)), 'bias': jnp.array(-1.1)}


def halting_probs(
  halt: at.Params,
  features: at.Float[jax.Array, 'N B L D'],
  token_mask: jax.Array,
) -> at.Float[jax.Array, 'N B']:
  """The probability that a window stops after pass n, from its features.

  In training states are mixed by it (so a gradient tells when more passes were
  worth their price); `make_halting_hard` makes it a decision.
  """
  fraction = token_mask / jnp.maximum(token_mask.sum(-1, keepdims=True), 1)
  norm = jax.lax.rsqrt(jnp.mean(features**2, -1, keepdims=True) + 1e-5)
  pooled = jnp.einsum('nbld,bl->nbd', features * norm, fraction)
  p = jax.nn.sigmoid(pooled @ halt['kernel'] + halt['bias'])
  p = jnp.where(halt.get('hard', False), (p > 0.5).astype(p.dtype), p)
  p = p.at[-1].set(1.0)
  going = jnp.cumprod(1.0 - p, axis=0)
  return p * jnp.concatenate([jnp.ones_like(p[:1]), going[:-1]])


def make_halting_hard(params: at.Params) -> at.Params:
  """Weights under which `halting` decides: each window stops at one pass."""
  return params | {'halt': params['halt'] | {'hard': jnp.array(True)}}
