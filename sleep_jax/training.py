"""Plain next-token training of a backbone: pretraining, sft, ewc and joint."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.runtime import sharding

Penalty = Callable[[t.Params, Any], jax.Array]


def adamw(
  learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """AdamW under a global-norm clip of 1."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(learning_rate, b2=0.98, weight_decay=weight_decay),
  )


@functools.partial(
  jax.jit,
  static_argnums=(0, 1),
  static_argnames=('penalty',),
  donate_argnums=(2, 3),
)
def train_steps(
  cfg: config.ModelConfig,
  optimizer: optax.GradientTransformation,
  params: t.Params,
  opt_state: Any,
  tokens: t.Int[jax.Array, 'K B T'],
  weight: t.Float[jax.Array, 'K B T'],
  *,
  penalty: Penalty | None = None,
  penalty_state: Any = None,
) -> tuple[t.Params, Any, jax.Array]:
  """K optimizer steps in one program, one per leading row of `tokens`.

  `penalty(params, penalty_state)` is added to the loss (EWC's pull, say).

  Returns:
    Weights, optimizer state, and the loss of each step in nats per token,
    without the penalty, taken before that step's update.
  """

  def step(carry, batch):
    params, opt_state = carry

    def objective(params):
      logits = transformer.forward(cfg, params, batch[0]).logits
      loss = losses.next_token_loss(logits, *batch)
      extra = penalty(params, penalty_state) if penalty else 0.0
      return loss + extra, loss

    grads, loss = jax.grad(objective, has_aux=True)(params)
    update, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, update), opt_state), loss

  (params, opt_state), loss = jax.lax.scan(
    step, (params, opt_state), sharding.split((tokens, weight), None, 'batch')
  )
  return *sharding.lay((params, opt_state)), loss


@functools.partial(jax.jit, static_argnums=0)
def diagonal_fisher(
  cfg: config.ModelConfig,
  params: t.Params,
  tokens: t.Int[jax.Array, 'N T'],
  weight: t.Float[jax.Array, 'N T'],
) -> t.Params:
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
