"""sleep_jax.training.fisher."""

import functools

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import transformer
from sleep_jax.objectives import losses


@functools.partial(jax.jit, static_argnums=0)
def diagonal_fisher(
  cfg: config.ModelConfig,
  params: at.Params,
  tokens: at.Int[jax.Array, 'N T'],
  weight: at.Float[jax.Array, 'N T'],
) -> at.Params:
  """Empirical Fisher: the mean over rows of the squared row gradient.

  Squared row by row: the square of a batch's mean gradient would be smaller by
  about the batch size.
  """

  def add_row(fisher, row):
    def objective(params):
      logits = transformer.forward(cfg, params, row[0][None]).logits
      return losses.next_token_loss(logits, row[0][None], row[1][None])

    grads = jax.grad(objective)(params)
    return jax.tree.map(lambda f, g: f + g * g, fisher, grads), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  fisher, _ = jax.lax.scan(add_row, zeros, (tokens, weight))
  return jax.tree.map(lambda f: f / tokens.shape[0], fisher)
