"""The diagonal of the empirical Fisher information."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import losses


@jax.jit
def diagonal_fisher(
  model: model_lib.Model,
  tokens: at.Int[jax.Array, 'N T'],
  weight: at.Float[jax.Array, 'N T'],
) -> at.Params:
  """Empirical Fisher of the weights: the mean of the squared row gradients.

  Squared row by row: the square of a batch's mean gradient would be smaller by
  about the batch size.

  Returns:
    A tree like `model.params`.
  """

  def add_row(fisher, row):
    def loss_fn(params):
      logits = model.replace(params=params).forward(row[0][None]).logits
      return losses.next_token_loss(logits, row[0][None], row[1][None])

    grads = jax.grad(loss_fn)(model.params)
    return jax.tree.map(lambda f, g: f + g * g, fisher, grads), None

  zeros = jax.tree.map(jnp.zeros_like, model.params)
  fisher, _ = jax.lax.scan(add_row, zeros, (tokens, weight))
  return jax.tree.map(lambda f: f / tokens.shape[0], fisher)
