"""ReST^EM's M step: fine-tuning on what was rewarded (Sleep section 6, step 5).

Supervised fine-tuning on prompt and dream of one small thing: an adapter, kept
beside the backbone or merged into it, or an expert in a new slot. Beside it the
model may stay close to what it was on documents of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import order as order_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.metrics import observation
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import token_logits
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding
from sleep_jax.training import fit
from sleep_jax.training import loss as loss_lib
from sleep_jax.training import optimizers


@dataclasses.dataclass(frozen=True)
class UpdateTarget:
  """Where dreaming's update goes: an adapter, or an expert in a new slot."""

  level: int = -1
  slot: int = -1

  def base(self, model: model_lib.Model) -> model_lib.Model:
    """The weights beside the update, without an adapter that it replaces."""
    if self.slot < 0:
      return model.replace(adapter=None)
    return model.merged()

  def insert(
    self, model: model_lib.Model, trainable: at.Tree
  ) -> model_lib.Model:
    """The model with `trainable` in force."""
    if self.slot < 0:
      return model.replace(adapter=trainable)
    bank = model.bank(self.level).with_expert(self.slot, trainable)
    bank = bank.set_status(self.slot, memory_lib.ACTIVE)
    return model.with_level(self.level, bank=bank)


def allocate(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life, rng: at.Key
) -> tuple[life_lib.Life, UpdateTarget, at.Tree]:
  """The life with a place for the update, that place, and its first value.

  Raises:
    ConfigError: target `slot`, and no level has a free one.
  """
  model = life.model
  if dreamer.cfg.target != 'slot':
    trainable = model.adapter
    if trainable is None or dreamer.cfg.restart:
      trainable = lora.init_adapter(model.cfg, dreamer.lora, model.params, rng)
    return life, UpdateTarget(), trainable
  for level in reversed(range(len(model.cfg.levels))):
    if life.memory.levels[level].bank is None:
      continue
    room = life.with_room(level)
    bank = room.memory.bank(level)
    slot = bank.free_slot()
    if slot is not None:
      bank = bank.unlock(slot, life.clock.nights, rng)
      life = room.with_memory(room.memory.with_level(level, bank=bank))
      return life, UpdateTarget(level, slot), bank.expert(slot)
  raise config.ConfigError(
    f'night {int(life.clock.nights)}: dreaming.target=slot, but no level has a '
    'free slot; raise model.levels[].slots, or use dreaming.target=lora.'
  )


def commit(
  cfg: dreaming_config.DreamingConfig,
  life: life_lib.Life,
  target: UpdateTarget,
  trainable: at.Tree,
) -> life_lib.Life:
  """The life with the update in force."""
  model = target.insert(life.model, trainable)
  if cfg.target == 'fold':
    model = model.merged()
  return life.replace(model=model)


class Known(at.Pytree):
  """What a model generated before dreaming, and that model, its adapter merged.

  order: numbers of the rows beside each batch.
  """

  model: model_lib.Model
  tokens: at.Int[jax.Array, 'K T']
  weight: at.Float[jax.Array, 'K T']
  order: at.Int[jax.Array, 'S R'] | None = None


def finetune(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  target: UpdateTarget,
  trainable: at.Tree,
  rows: contexts.TrainingRows,
  rng: at.Key,
  known: Known | None = None,
) -> at.Tree:
  """`trainable` after fine-tuning on rows of prompt and dream."""
  cfg, draw = dreamer.cfg, order_lib.numpy_rng(rng)
  order = _batches(len(rows.tokens), cfg, draw)
  if known is not None:
    beside = draw.integers(0, len(known.tokens), (len(order), cfg.rehearsed))
    known = known.replace(order=jnp.asarray(beside))
  with dreamer.costs.phase('update') as cost:
    trainable, loss = finetune_steps(
      _optimizer(cfg),
      target,
      target.base(model),
      trainable,
      (jnp.asarray(rows.tokens), jnp.asarray(rows.weight)),
      jnp.asarray(order),
      known,
    )
    loss = jax.block_until_ready(loss)
    size = loss.size * cfg.batch * rows.tokens.shape[1]
    cost.add_partial_training(size, steps=loss.size)
    if known is not None:
      size = loss.size * cfg.rehearsed * known.tokens.shape[1]
      cost.add_partial_training(size, steps=0)
      cost.add_forward(size)  # Of the model before.
  observation.steps({'dreaming/loss': sharding.fetch(loss)})
  return trainable


@functools.partial(jax.jit, static_argnums=(0, 1))
def finetune_steps(
  optimizer: optax.GradientTransformation,
  target: UpdateTarget,
  model: model_lib.Model,
  trainable: at.Tree,
  dreams: tuple[at.Int[jax.Array, 'N T'], at.Float[jax.Array, 'N T']],
  order: at.Int[jax.Array, 'S B'],
  known: Known | None = None,
) -> tuple[at.Tree, at.Float[jax.Array, 'S']]:
  """S steps on dreams; gradients exist for `trainable` alone.

  Args:
    optimizer: of `trainable` (static).
    target: where it goes (static).
    model: the weights beside it.
    trainable: its first value.
    dreams: rows of prompt and dream, and each token's weight as a target.
    order: rows of every step; a number of -1 is no row.
    known: on these rows a step adds the KL of the model before to it.

  Returns:
    The trainable, and the loss on dreams in each step, in nats per token.
  """
  tokens, weight = dreams

  def loss_fn(trainable, rows):
    rows, beside = rows
    row_weight = weight[rows] * (rows >= 0)[:, None]
    batch = sharding.shard_batch((tokens[rows], row_weight), 'batch')
    student = target.insert(model, trainable)
    loss = loss_lib.next_token_loss(student, *batch)
    if known is None:
      return loss, loss
    return loss + _distance(student, known, beside), loss

  opt_state = optimizer.init(trainable)
  beside = None if known is None else known.order
  trainable, _, loss = fit.fit(
    loss_fn, optimizer, trainable, opt_state, (order, beside)
  )
  return trainable, loss


def _distance(
  student: model_lib.Model, known: Known, rows: at.Int[jax.Array, 'R']
) -> jax.Array:
  """KL(model before || student) on known rows, in nats per token."""
  tokens, weight = sharding.shard_batch(
    (known.tokens[rows], known.weight[rows]), 'batch'
  )
  before, after = (x.forward(tokens) for x in (known.model, student))
  kl = divergences.from_hidden(
    divergences.forward_kl,
    (before.hidden, known.model.unembedding()),
    (after.hidden, student.unembedding()),
    chunk=token_logits.columns_at_once(1, student.cfg.vocab),
  )
  return (kl * weight).sum() / jnp.maximum(weight.sum(), 1.0)


@functools.lru_cache
def _optimizer(
  cfg: dreaming_config.DreamingConfig,
) -> optax.GradientTransformation:
  return optimizers.adamw(cfg.learning_rate)  # One object: jit keys on it.


def _batches(
  rows: int, cfg: dreaming_config.DreamingConfig, rng: np.random.Generator
) -> np.ndarray:
  """Row numbers of every step `[S, batch]`, -1 where an epoch's last is short.

  Every epoch has all rows, in an order of its own.
  """
  per_epoch = -(-rows // cfg.batch)
  order = np.full((cfg.epochs, per_epoch * cfg.batch), -1, np.int32)
  for epoch in order:
    epoch[:rows] = rng.permutation(rows)
  return order.reshape(-1, cfg.batch)
