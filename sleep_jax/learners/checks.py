"""Checks that learners make before the first day."""

from collections.abc import Mapping

import jax

from sleep_jax import config
from sleep_jax.inference import encoder
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import memory_init
from sleep_jax.runtime import sharding


def check_slots(
  cfg: config.ModelConfig,
  seeding: consolidation_config.SeedingConfig,
  nights: int,
) -> None:
  """Refuses a life that would run out of expert slots.

  Args:
    cfg: the model, with its banks.
    seeding: its slot policy, and whether nights grow experts.
    nights: consolidations of a life, that of a study included.

  Raises:
    ConfigError: if a receiver has fewer slots than `nights`.
  """
  for i, level in enumerate(cfg.levels[:-1]):
    slots = cfg.levels[i + 1].slots
    # What the receiver's own transfer prunes is free again.
    frees = bool(cfg.levels[i + 1].sleep_every)
    limited = seeding.slot_policy == 'error' and seeding.expand
    if level.sleep_every and limited and not frees and nights > slots:
      raise config.ConfigError(
        f'{nights} nights need {nights} slots, but model.levels[{i + 1}].'
        f'slots={slots} and sleep.slot_policy=error; raise slots, or set '
        'sleep.slot_policy=merge, fold or recycle.'
      )


def check_mesh(cfg: config.ModelConfig, rows: Mapping[str, int]) -> None:
  """Refuses what does not divide over the mesh; without one nothing is refused.

  Args:
    cfg: the model, whose memory is sharded.
    rows: rows of a batch by the name of the setting.

  Raises:
    ConfigError: naming the setting or the leaf, and the sizes of the mesh.
  """
  sharding.check_rows(rows)
  sharding.check_leaves(jax.eval_shape(lambda: memory_init.init_memory(cfg)))


def check_judge(seeding: consolidation_config.SeedingConfig) -> None:
  """Fetches the encoder that judges rollouts, if any will be judged by it.

  Raises:
    ConfigError: if it cannot be fetched.
  """
  if seeding.semantic == 'encoder' and seeding.uses_rollouts:
    encoder.load()


def seeding_rows(
  seeding: consolidation_config.SeedingConfig,
) -> dict[str, int]:
  """The batches of Knowledge Seeding, by setting, for `check_mesh`."""
  return {
    'sleep.batch': seeding.batch,
    'half of sleep.dreams': seeding.dreams // 2,
    'sleep.prefixes x sleep.group': seeding.prefixes * seeding.group,
    'sleep.rollout_groups x sleep.group': (
      seeding.rollout_groups * seeding.group
    ),
  }
