"""The one training loop: optimizer steps on part of a model, in one program.

Pretraining trains all weights, fine-tuning these or an adapter, knowledge
seeding one expert, trials and ReST^EM an adapter, offline recurrence a hybrid
through its windows.
They differ in what is trained and in the loss; the loop is the same.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import optax

from sleep_jax import array_typing as at
from sleep_jax.models import lora
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib

# (trainable, batch) -> (loss, whatever else a step measures).
LossFn = Callable[[Any, Any], tuple[jax.Array, Any]]
Penalty = Callable[[at.Tree, Any], jax.Array]


def fit(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  trainable: at.Tree,
  opt_state: Any,
  batches: at.Tree,
  *,
  rates: jax.Array | None = None,
) -> tuple[at.Tree, Any, Any]:
  """One optimizer step per leading row of `batches`, as one scan.

  Not compiled by itself: whoever calls it compiles it with its loss.

  Args:
    loss_fn: its first value is differentiated with respect to `trainable`
      alone; everything else it uses is a constant.
    optimizer: of `trainable`.
    trainable: what the steps change.
    opt_state: `optimizer.init(trainable)`, or what earlier steps left.
    batches: leaves `[K, ...]`, one row a step.
    rates: `[K]`, learning rates of steps whose optimizer has none.

  Returns:
    The trainable after K steps, its optimizer state, and what `loss_fn`
    measured in each step, before its update, `[K, ...]`.
  """

  def step(carry, inputs):
    trainable, opt_state = carry
    batch, rate = inputs
    grads, aux = jax.grad(loss_fn, has_aux=True)(trainable, batch)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    if rate is not None:
      updates = jax.tree.map(lambda u: -rate * u, updates)
    trainable = optax.apply_updates(trainable, updates)
    return sharding.shard_params((trainable, opt_state)), aux

  (trainable, opt_state), aux = jax.lax.scan(
    step, (trainable, opt_state), (batches, rates)
  )
  return trainable, opt_state, aux


def trainable(model: model_lib.Model) -> at.Tree:
  """What fine-tuning changes: the adapter where there is one, else all weights.

  A model with an adapter has a frozen backbone.
  """
  return model.params if model.adapter is None else model.adapter


def with_trainable(
  model: model_lib.Model, trainable: at.Tree
) -> model_lib.Model:
  """The model with another value of what `trainable` gives."""
  name = 'params' if model.adapter is None else 'adapter'
  return model.replace(**{name: trainable})


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=('penalty',),
  donate_argnums=(1, 2),
)
def train_steps(
  optimizer: optax.GradientTransformation,
  model: model_lib.Model,
  opt_state: Any,
  tokens: at.Int[jax.Array, 'K B T'],
  weight: at.Float[jax.Array, 'K B T'],
  *,
  penalty: Penalty | None = None,
  penalty_state: Any = None,
) -> tuple[model_lib.Model, Any, at.Float[jax.Array, 'K']]:
  """K steps of next-token training of all weights, in one program.

  Args:
    optimizer: of the weights (static).
    model: without memory and adapter; its weights are donated.
    opt_state: donated.
    tokens: one batch a step.
    weight: of every token as a target.
    penalty: `penalty(params, penalty_state)` is added to the loss (EWC, say).
    penalty_state: what the penalty needs.

  Returns:
    Model, optimizer state, and the loss of each step in nats per token,
    without the penalty, taken before that step's update.
  """
  return _train(
    optimizer, model, opt_state, (tokens, weight), penalty, penalty_state
  )


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=('penalty',),
  donate_argnums=(2, 3),
)
def train_adapter_steps(
  optimizer: optax.GradientTransformation,
  backbone: model_lib.Model,
  adapter: lora.Adapter,
  opt_state: Any,
  batches: tuple[at.Int[jax.Array, 'K B T'], at.Float[jax.Array, 'K B T']],
  *,
  penalty: Penalty | None = None,
  penalty_state: Any = None,
) -> tuple[lora.Adapter, Any, at.Float[jax.Array, 'K']]:
  """`train_steps` of an adapter: the backbone is neither changed nor copied.

  Args:
    optimizer: of the adapter (static).
    backbone: without memory and adapter.
    adapter: donated.
    opt_state: donated.
    batches: tokens and weights.
    penalty: see `train_steps`; it is given the adapter.
    penalty_state: see `train_steps`.

  Returns:
    Adapter, optimizer state, and the loss of each step.
  """
  model, opt_state, loss = _train(
    optimizer,
    backbone.replace(adapter=adapter),
    opt_state,
    batches,
    penalty,
    penalty_state,
  )
  return trainable(model), opt_state, loss


def _train(
  optimizer: optax.GradientTransformation,
  model: model_lib.Model,
  opt_state: Any,
  batches: tuple[jax.Array, jax.Array],
  penalty: Penalty | None,
  penalty_state: Any,
) -> tuple[model_lib.Model, Any, jax.Array]:
  """Steps of next-token training of the model's `trainable`."""

  def loss_fn(tree, batch):
    loss = loss_lib.next_token_loss(with_trainable(model, tree), *batch)
    extra = penalty(tree, penalty_state) if penalty else 0.0
    return loss + extra, loss

  tree, opt_state, loss = fit(
    loss_fn,
    optimizer,
    trainable(model),
    opt_state,
    sharding.shard_batch(batches, None, 'batch'),
  )
  return with_trainable(model, tree), opt_state, loss
