"""The loss of a model on rows of tokens."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import losses


def next_token_loss(
  model: model_lib.Model, tokens: at.Array, mask: at.Array
) -> at.Float[jax.Array, '']:
  """Mean cross-entropy in nats over the targets that `mask` selects.

  Args:
    model: who predicts.
    tokens: `[B, T]`.
    mask: `[B, T]`, of every token as a target; column 0 is never one.
  """
  out = model.forward(tokens)
  # The tokens are shifted, not the logits: slicing those would copy them.
  targets = jnp.roll(tokens, -1, axis=1)
  logp = model.map_logits(losses.logprobs, out, targets)
  return losses.mean_nll(logp, mask)


def token_logprobs(
  model: model_lib.Model,
  tokens: at.Array,
  positions: at.Array | None = None,
) -> at.Float[jax.Array, 'B _']:
  """Log-probability of token t+1 given tokens up to t, `[B, T-1]`."""
  out = model.forward(tokens, positions=positions)
  index = slice(None), slice(None, -1)
  return model.map_logits(losses.logprobs, out.select(*index), tokens[:, 1:])
