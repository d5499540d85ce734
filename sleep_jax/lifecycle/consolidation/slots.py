"""What is done about a bank without a free slot.

It grows, up to the slots of its level; then `sleep.slot_policy` decides.
"""

import dataclasses

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import rehearsal as rehearsal_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib


def free_up_slot(
  cfg: consolidation_config.SeedingConfig,
  life: life_lib.Life,
  level: int,
  previous: memory_lib.Memory,
  tokenizer: tokenizers.Tokenizer,
  costs: costs_lib.CostTracker,
  rng: at.Key,
) -> tuple[life_lib.Life, at.Metrics]:
  """Frees a slot of a full bank as the policy says; never silently.

  A bank that may still grow does.

  `recycle` drops the oldest expert; `merge` first distils it into the next
  oldest, `fold` all of them into the level's dense base. The teacher is the
  model before this day: today's news belongs to the new slot.

  Returns:
    The life with a free slot, and KL(teacher || student) before and after, in
    nats per token, where something was distilled.

  Raises:
    ConfigError: if the policy is `error`, or cannot work.
  """
  if not cfg.expand:
    return life, {}
  life = life.with_room(level)
  bank = life.memory.bank(level)
  if bank.free_slot() is not None:
    return life, {}
  oldest, *younger = map(int, np.argsort(np.asarray(bank.created_night)))
  _check(cfg, life, level)
  logging.warning(
    'Night %d: level %d is full; %s.',
    int(life.clock.nights),
    level + 1,
    'all its experts are folded into its base'
    if cfg.slot_policy == 'fold'
    else f'slot {oldest} is {cfg.slot_policy}d',
  )
  if cfg.slot_policy == 'fold':
    rest, target = bank.prune(), job_lib.DenseBase(level)
  else:
    empty = jax.tree.map(jnp.zeros_like, bank.expert(oldest))
    rest = bank.with_expert(oldest, empty)
    rest = rest.set_status(oldest, memory_lib.LOCKED)
    target = job_lib.SlotId(level, younger[0]) if younger else None
  if cfg.slot_policy == 'recycle' or target is None:
    return life.with_memory(life.memory.with_level(level, bank=rest)), {}
  teacher = life.model.merged().with_memory(previous)
  job = job_lib.SeedingJob(
    dataclasses.replace(cfg, alpha=1.0, lam=0.0, router_weight=0.0),
    replay_lib.Teachers(teacher, previous_memory=None),
    target,
    0,
    tokenizer,
    costs,
    life.frames,
    rehearsal_lib.archive_of(cfg, life),
  )
  seeded = seeding.seed(job, teacher.with_level(level, bank=rest), rng)
  after = seeded.student.required_memory().levels[level]
  first, last = map(float, seeded.curves['probe'])
  return life.with_memory(
    life.memory.with_level(level, bank=after.bank, folded=after.folded)
  ), {'freeing_kl_first': first, 'freeing_kl_last': last}


def _check(
  cfg: consolidation_config.SeedingConfig, life: life_lib.Life, level: int
) -> None:
  """Refuses what the policy cannot do with a full bank of `level`."""
  slots = len(life.memory.bank(level).status)
  setting = f'model.levels[{level}]'
  if cfg.slot_policy == 'error':
    raise config.ConfigError(
      f'night {int(life.clock.nights)}: all {slots} slots of level {level + 1} '
      f'are in use; raise {setting}.slots, or set sleep.slot_policy=merge, '
      'fold or recycle.'
    )
  if cfg.slot_policy == 'merge' and slots == 1:
    raise config.ConfigError(
      f'sleep.slot_policy=merge needs two slots, but {setting}.slots=1; raise '
      'it, or set sleep.slot_policy=recycle.'
    )
  if cfg.slot_policy == 'fold' and not life.model.cfg.levels[level].folds:
    raise config.ConfigError(
      f'sleep.slot_policy=fold needs {setting}.folds=True, which gives that '
      'level a base that changes; set it, or sleep.slot_policy=merge.'
    )
