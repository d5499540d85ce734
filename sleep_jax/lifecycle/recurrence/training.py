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

from sleep_jax import config
from sleep_jax.data import windows as windows_lib
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.models import flops
from sleep_jax.models import model as model_lib
from sleep_jax.training import fit
from sleep_jax.training import optimizers


class Predictions(NamedTuple):
  """What the model makes of the prediction windows of a batch."""

  loss: jax.Array  # Mean over the targets, nats; what training lowers.
  nll: jax.Array  # [B, P]
  argmax: jax.Array  # [B, P], the likeliest tokens.
  passes: jax.Array  # [B], mean over windows.


def check(
  model: config.ModelConfig, cfg: recurrence_config.RecurrenceConfig
) -> None:
  """Refuses a model that cannot sleep so.

  Raises:
    ConfigError: if it has nothing to keep a window in, or no such blocks.
  """
  if not model.recurrent_layers:
    raise config.ConfigError(
      f'model.mixers={model.mixers} has no recurrent layer, so nothing would '
      "stay of an evicted window; add 'gdn' or 'jet'."
    )
  looped = cfg.looped_layers(model.layers)
  if model.segmented and looped != range(model.layers):
    raise config.ConfigError(
      f'recurrence.loop={cfg.loop}: model.mixers={model.mixers} read segments '
      'through all layers; set it to (0, 0).'
    )


def optimizer(
  cfg: recurrence_config.TrainingConfig,
) -> optax.GradientTransformation:
  """Muon and AdamW, each with warm-up, plateau and decay."""
  schedule = functools.partial(
    optimizers.warmup_stable_decay,
    steps=cfg.steps,
    warmup_steps=cfg.warmup_steps,
    decay_steps=cfg.decay_steps,
  )
  return optimizers.muon_adamw(
    schedule(cfg.muon_learning_rate),
    schedule(cfg.adam_learning_rate),
    cfg.weight_decay,
  )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_steps(
  cfg: recurrence_config.RecurrenceConfig,
  training: recurrence_config.TrainingConfig,
  model: model_lib.Model,
  opt_state: Any,
  batches: windows_lib.WindowBatch,
) -> tuple[model_lib.Model, Any, jax.Array]:
  """One optimizer step per leading row of `batches`, in one program.

  Returns:
    Model, optimizer state, and the loss of each step before its update.
  """

  def loss_fn(params, batch):
    loss = evaluate(cfg, model.replace(params=params), batch).loss
    return loss, loss

  params, opt_state, loss = fit.fit(
    loss_fn, optimizer(training), model.params, opt_state, batches
  )
  return model.replace(params=params), opt_state, loss


@functools.partial(jax.jit, static_argnums=0)
def evaluate_batch(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  batch: windows_lib.WindowBatch,
) -> Predictions:
  """What a trained model makes of a batch; a stopping rule decides."""
  if cfg.halting:
    model = model.replace(params=halting.make_halting_hard(model.params))
  return evaluate(cfg, model, batch)


def evaluate(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  batch: windows_lib.WindowBatch,
) -> Predictions:
  """Algorithm 1: reads and sleeps through the context, then predicts."""
  rows, num_windows, length = batch.context.shape
  state = passes_lib.init_window_state(cfg, model, rows, length)
  state, passes = passes_lib.read(
    cfg, model, state, jnp.asarray(batch.context), jnp.asarray(batch.token_mask)
  )
  logits = passes_lib.predict(
    cfg,
    model,
    state,
    jnp.asarray(batch.inputs),
    jnp.asarray(batch.input_mask),
    num_windows * length,
  )
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
  weight = batch.weight
  loss = (nll * weight).sum() / jnp.maximum(weight.sum(), 1.0)
  if cfg.halting:
    loss += cfg.ponder * passes.mean()
  return Predictions(loss, nll, logits.argmax(-1), passes)


def forward_flops(
  model: config.ModelConfig,
  cfg: recurrence_config.RecurrenceConfig,
  batch: windows_lib.WindowBatch,
) -> float:
  """Forward FLOPs of one sequence; a training step costs three times that."""
  _, num_windows, window = batch.context.shape
  prediction = batch.inputs.shape[1]
  looped = len(cfg.looped_layers(model.layers)) / model.layers
  read = flops.forward_flops(model, window / 2)
  read -= 2.0 * model.dim * model.vocab  # Logits of a read window are unused.
  read *= 1 + (cfg.passes - 1) * looped
  predict = flops.forward_flops(model, prediction / 2)
  return num_windows * window * read + prediction * predict
