"""The diagonal of the empirical Fisher information."""

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.data import padding
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
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
  about the batch size. On a mesh each device takes rows of its own where an
  adapter trains; where all weights do, `data` splits the rows, since `fsdp`
  splits the gradient of each.

  Returns:
    A tree like `fit.trainable(model)`: the weights', or the adapter's.
  """

  def squares(row):
    def loss_fn(tree):
      instance = fit.with_trainable(model, tree)
      return loss_lib.next_token_loss(instance, row[0][None], row[1][None])

    grads = jax.grad(loss_fn)(fit.trainable(model))
    return jax.tree.map(lambda g: g * g, grads)

  def add_row(fisher, row):
    return jax.tree.map(jnp.add, fisher, squares(row)), None

  def add_rows(fisher, rows):
    sums = jax.tree.map(lambda g: g.sum(axis=0), jax.vmap(squares)(rows))
    return sharding.shard_params(jax.tree.map(jnp.add, fisher, sums)), None

  rows = tokens, weight
  axis = 'gradients' if model.adapter is None else 'batch'
  step, parts = add_row, sharding.num_shards(axis)
  if parts > 1:
    step = add_rows
    rows = sharding.shard_batch(padding.groups(rows, parts), None, axis)
  zeros = jax.tree.map(jnp.zeros_like, fit.trainable(model))
  fisher, _ = jax.lax.scan(step, zeros, rows)
  return jax.tree.map(lambda f: f / tokens.shape[0], fisher)
