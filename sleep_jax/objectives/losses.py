"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp


def logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability of `tokens` `[...]` under logits `[..., V]`."""
  logp = jax.nn.log_softmax(logits, axis=-1)
  return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def token_logprobs(logits_BxTxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
  """Log-probability of token t+1 given tokens up to t, `[B, T-1]`."""
  return logprobs(logits_BxTxV[:, :-1], tokens_BxT[:, 1:])


def next_token_loss(
  logits_BxTxV: jax.Array, tokens_BxT: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
  """Mean cross-entropy in nats over the targets that `mask` selects.

  `mask[:, t]` weighs token t as a target; column 0 is never one.
  """
  logp = token_logprobs(logits_BxTxV, tokens_BxT)
  weight = mask_BxT[:, 1:].astype(logp.dtype)
  return -(logp * weight).sum() / jnp.maximum(weight.sum(), 1.0)
