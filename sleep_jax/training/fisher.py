"""The diagonal of the empirical Fisher information."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.models import model as model_lib
from sleep_jax.training import fit
from sleep_jax.training import loss as loss_lib


@jax.jit
def diagonal_fisher(
  model: model_lib.Model,
  tokens: at.Int[jax.Array, 'N T'],
  weight: at.Float[jax.Array, 'N T'],
) -> at.Tree:
  """Empirical Fisher of what trains: the mean of the squared row gradients.

  Squared row by row: the square of a batch's mean gradient would be smaller by
  about the batch size.

  Returns:
    A tree like `fit.trainable(model)`: the weights', or the adapter's.
  """

  def add_row(fisher, row):
    def loss_fn(tree):
      instance = fit.with_trainable(model, tree)
      return loss_lib.next_token_loss(instance, row[0][None], row[1][None])

    grads = jax.grad(loss_fn)(fit.trainable(model))
    return jax.tree.map(lambda f, g: f + g * g, fisher, grads), None

  zeros = jax.tree.map(jnp.zeros_like, fit.trainable(model))
  fisher, _ = jax.lax.scan(add_row, zeros, (tokens, weight))
  return jax.tree.map(lambda f: f / tokens.shape[0], fisher)
