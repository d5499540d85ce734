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
  # The tokens are shifted, not the logits: slicing those would copy them.
  logp = logprobs(logits_BxTxV, jnp.roll(tokens_BxT, -1, axis=1))
  mask = jnp.asarray(mask_BxT).astype(logp.dtype)
  weight = jnp.roll(mask.at[:, 0].set(0.0), -1, axis=1)
  return -(logp * weight).sum() / jnp.maximum(weight.sum(), 1.0)
