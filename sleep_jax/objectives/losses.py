"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at


def logprobs(logits: at.Array, tokens: at.Array) -> jax.Array:
  """Log-probability of `tokens` `[...]` under logits `[..., V]`."""
  selected = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return selected - jax.nn.logsumexp(logits, axis=-1)


def token_logprobs(logits_BxTxV: at.Array, tokens_BxT: at.Array) -> jax.Array:
  """Log-probability of token t+1 given tokens up to t, `[B, T-1]`."""
  return logprobs(logits_BxTxV[:, :-1], tokens_BxT[:, 1:])


def next_token_loss(
  logits_BxTxV: at.Array, tokens_BxT: at.Array, mask_BxT: at.Array
) -> jax.Array:
  """Mean cross-entropy in nats over the targets that `mask` selects.

  `mask[:, t]` weighs token t as a target; column 0 is never a target.
  """
  logp = logprobs(logits_BxTxV, jnp.roll(tokens_BxT, -1, axis=1))
  return mean_nll(logp, mask_BxT)


def mean_nll(logp_BxT: at.Array, mask_BxT: at.Array) -> jax.Array:
  """Mean of what each token gives its successor, in nats.

  Args:
    logp_BxT: log-probability of token t+1, in column t.
    mask_BxT: weight of token t as a target, in column t; column 0 is never one.
  """
  logp = jnp.asarray(logp_BxT)
  mask = jnp.asarray(mask_BxT).astype(logp.dtype)
  weight = jnp.roll(mask.at[:, 0].set(0.0), -1, axis=1)
  return -(logp * weight).sum() / jnp.maximum(weight.sum(), 1.0)
