"""ReST^EM's M step: what was rewarded is learnt (Sleep section 6, step 5).

Supervised fine-tuning on prompt and dream of one small thing: an adapter, kept
beside the backbone or folded into it, or an expert in a new slot.
"""

import dataclasses
import functools
from typing import Any

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
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.training import optimizers


@dataclasses.dataclass(frozen=True)
class UpdateTarget:
  """Where what dreaming learns goes: an adapter, or an expert in a new slot."""

  level: int = -1
  slot: int = -1

  def into(
    self, memory: memory_lib.Memory, learnt: Any
  ) -> tuple[memory_lib.Memory, lora.Adapter | None]:
    """The memory, and the adapter beside it, with `learnt` in force."""
    if self.slot < 0:
      return memory, learnt
    bank = memory.levels[self.level].bank.with_expert(self.slot, learnt)
    bank = bank.mark(self.slot, memory_lib.ACTIVE)
    return memory.with_level(self.level, bank=bank), None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def finetune_steps(
  cfg: config.ModelConfig,
  rule: optax.GradientTransformation,
  place: UpdateTarget,
  params: at.Params,
  memory: memory_lib.Memory,
  learnt: at.Tree,
  tokens: at.Int[jax.Array, 'N T'],
  weight: at.Float[jax.Array, 'N T'],
  order: at.Int[jax.Array, 'S B'],
) -> tuple[at.Tree, at.Float[jax.Array, 'S']]:
  """Step 5, M: S steps of fine-tuning on dreams; gradients for `learnt` alone.

  A row number of -1 is no row.
  """

  def objective(learnt, rows):
    now, adapter = place.into(memory, learnt)
    out = transformer.forward(cfg, params, tokens[rows], now, adapter=adapter)
    chosen = weight[rows] * (rows >= 0)[:, None]
    return losses.next_token_loss(out.logits, tokens[rows], chosen)

  def step(carry, rows):
    learnt, state = carry
    loss, grads = jax.value_and_grad(objective)(learnt, rows)
    update, state = rule.update(grads, state, learnt)
    return (optax.apply_updates(learnt, update), state), loss

  (learnt, _), loss = jax.lax.scan(step, (learnt, rule.init(learnt)), order)
  return learnt, loss


@functools.lru_cache
def _optimizer(
  how: dreaming_config.DreamingConfig,
) -> optax.GradientTransformation:
  return optimizers.adamw(how.learning_rate)  # One object: jit keys on it.


def finetune(
  cfg: config.ModelConfig,
  how: dreaming_config.DreamingConfig,
  life: life_lib.Life,
  place: UpdateTarget,
  learnt: at.Tree,
  rows: contexts.TrainingRows,
  rng: at.Key,
  costs: costs_lib.CostTracker,
) -> at.Tree:
  """Step 5, M: `learnt` after fine-tuning on rows of prompt and dream."""
  worth = len(rows.tokens)
  per_epoch = -(-worth // how.batch)
  order = np.full((how.epochs, per_epoch * how.batch), -1, np.int32)
  host = order_lib.numpy_rng(rng)
  for epoch in order:
    epoch[:worth] = host.permutation(worth)
  params = life.params if place.slot < 0 else life.merged_params()
  with ledger.phase('update') as account:
    learnt, loss = finetune_steps(
          cfg, _optimizer(how), place, params, life.memory, learnt,
          jnp.asarray(rows.tokens), jnp.asarray(rows.weight),
          jnp.asarray(order.reshape(-1, how.batch)),
        )  # fmt: skip
    loss = jax.block_until_ready(loss)
    size = loss.size * how.batch * rows.tokens.shape[1]
    account.add_partial_training(size, steps=loss.size)
  return learnt


def allocate(
  cfg: config.ModelConfig,
  how: dreaming_config.DreamingConfig,
  adapters: lora.LoraConfig,
  life: life_lib.Life,
  rng: at.Key,
) -> tuple[life_lib.Life, UpdateTarget, at.Tree]:
  """The life with room for what dreaming will learn, where, and its start.

  Raises:
    ConfigError: target `slot`, and no level has a free one.
  """
  if how.target != 'slot':
    learnt = life.adapter
    if learnt is None or how.restart:
      learnt = lora.init_adapter(cfg, adapters, life.params, rng)
    return life, UpdateTarget(), learnt
  for level in reversed(range(len(cfg.levels))):
    bank = life.memory.levels[level].bank
    slot = None if bank is None else memory_lib.free_slot(bank)
    if slot is not None:
      bank = bank.unlock(slot, life.clock.nights, rng)
      life = life.replace(memory=life.memory.with_level(level, bank=bank))
      return life, UpdateTarget(level, slot), bank.expert(slot)
  raise config.ConfigError(
    f'night {int(life.clock.nights)}: dreaming.target=slot, but no level has a '
    'free slot; raise model.levels[].slots, or use dreaming.target=lora.'
  )


def commit(
  how: dreaming_config.DreamingConfig,
  life: life_lib.Life,
  place: UpdateTarget,
  learnt: at.Tree,
) -> life_lib.Life:
  """The life with what dreaming has learnt in force."""
  memory, adapter = place.into(life.memory, learnt)
  if adapter is None:
    return life.replace(memory=memory)
  if how.target == 'fold':
    return life.replace(params=lora.merge(life.params, adapter), adapter=None)
  return life.replace(adapter=adapter)
