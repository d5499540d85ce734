"""How a hybrid learns to sleep: back-propagation through windows and passes.

By the recipe of arXiv 2605.26099: Muon for the matrices inside the blocks,
AdamW for embeddings, head, norms, gates and convolutions; warm-up, plateau,
linear decay. At sleep itself nothing is trained.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import windows as windows_lib
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import flops
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.tasks.algorithmic import base as algorithmic
from sleep_jax.training import optimizers


class Predictions(NamedTuple):
  """What the model makes of the prediction windows of a batch."""

  loss: jax.Array  # Mean over the targets, nats; what training lowers.
  nll: jax.Array  # [B, P]
  chosen: jax.Array  # [B, P], the likeliest tokens.
  passes: jax.Array  # [B], mean over windows.


def check(
  cfg: config.ModelConfig, how: recurrence_config.RecurrenceConfig
) -> None:
  """Refuses a model that cannot sleep so.

  Raises:
    ConfigError: if it has nothing to keep a window in, or no such blocks.
  """
  if not cfg.recurrent_layers:
    raise config.ConfigError(
      f'model.mixers={cfg.mixers} has no recurrent layer, so nothing would '
      "stay of an evicted window; add 'gdn' or 'jet'."
    )
  how.looped(cfg.layers)


def init(
  cfg: config.ModelConfig, how: recurrence_config.RecurrenceConfig, rng: at.Key
) -> at.Params:
  """Fresh weights, with a rule that stops a window if `how` has one."""
  check(cfg, how)
  params = transformer.init(cfg, rng)
  if how.halting:
    params |= {'halt': halting.init_halting(cfg)}
  return params


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def train_steps(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  training: recurrence_config.TrainingConfig,
  params: at.Params,
  opt_state: Any,
  batches: windows_lib.WindowBatch,
) -> tuple[at.Params, Any, jax.Array]:
  """One optimizer step per leading row of `batches`, in one program.

  Returns:
    Weights, optimizer state, and the loss of each step before its update.
  """

  def step(carry, batch):
    params, opt_state = carry
    loss, grads = jax.value_and_grad(
      lambda p: evaluate(cfg, how, p, batch).loss
    )(params)
    update, opt_state = optimizers.muon_adamw(training).update(
      grads, opt_state, params
    )
    return (optax.apply_updates(params, update), opt_state), loss

  (params, opt_state), loss = jax.lax.scan(step, (params, opt_state), batches)
  return params, opt_state, loss


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate_batch(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  params: at.Params,
  batch: windows_lib.WindowBatch,
) -> Predictions:
  """What trained weights make of a batch; a stopping rule decides."""
  if how.halting:
    params = halting.make_halting_hard(params)
  return evaluate(cfg, how, params, batch)


def forward_flops(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  puzzle: algorithmic.WindowTask,
) -> float:
  """Forward FLOPs of one sequence; a training step costs three times that."""
  looped = len(how.looped(cfg.layers)) / cfg.layers
  context = puzzle.windows * puzzle.window
  read = flops.forward_flops(cfg, puzzle.window / 2)
  read -= 2.0 * cfg.dim * cfg.vocab  # A slept window is never read out.
  read *= 1 + (how.passes - 1) * looped
  told = flops.forward_flops(cfg, puzzle.prediction / 2)
  return context * read + puzzle.prediction * told


def evaluate(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  params: at.Params,
  batch: windows_lib.WindowBatch,
  memory: memory_lib.Memory | None = None,
) -> Predictions:
  """Algorithm 1: reads and sleeps through the context, then predicts."""
  rows, _, length = batch.context.shape
  views = None if memory is None else cms.per_layer_memory(memory)
  states = cache_lib.broadcast_states(memory, rows)
  kept = passes_lib.init_window_state(cfg, how, rows, length, states)
  kept, passes = passes_lib.read(
    cfg, how, params, views, kept, batch.context, batch.token_mask
  )
  first = batch.context.shape[1] * length
  logits = passes_lib.predict(
    cfg, how, params, views, kept, batch.inputs, batch.input_mask, first
  )
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
  weight = batch.weight
  loss = (nll * weight).sum() / jnp.maximum(weight.sum(), 1.0)
  if how.halting:
    loss += how.ponder * passes.mean()
  return Predictions(loss, nll, logits.argmax(-1), passes)
