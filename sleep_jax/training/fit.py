"""Plain next-token training of a backbone: pretraining, sft, ewc and joint."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.runtime import sharding

Penalty = Callable[[at.Params, Any], jax.Array]


@functools.partial(
  jax.jit,
  static_argnums=(0, 1),
  static_argnames=('penalty',),
  donate_argnums=(2, 3),
)
def train_steps(
  cfg: config.ModelConfig,
  optimizer: optax.GradientTransformation,
  params: at.Params,
  opt_state: Any,
  tokens: at.Int[jax.Array, 'K B T'],
  weight: at.Float[jax.Array, 'K B T'],
  *,
  penalty: Penalty | None = None,
  penalty_state: Any = None,
) -> tuple[at.Params, Any, jax.Array]:
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
    step,
    (params, opt_state),
    sharding.shard_batch((tokens, weight), None, 'batch'),
  )
  return *sharding.shard_params((params, opt_state)), loss
