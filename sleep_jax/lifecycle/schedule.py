"""Clocks: when a level updates, and when it is consolidated (Sleep 2 and 5)."""

from typing import NamedTuple

import jax

from sleep_jax import config

STATES = -1  # As a sender: the states of recurrent mixers, faster than all.


class Transfer(NamedTuple):
  """Consolidation of level `sender` into level `receiver` (0 = fastest)."""

  sender: int
  receiver: int


def base_chunk(cfg: config.ModelConfig, row_length: int) -> int:
  """Tokens between two checks of the clock: the fastest level's chunk.

  Raises:
    ConfigError: if a row does not hold a whole number of base chunks.
  """
  chunks = [level.chunk for level in cfg.levels if level.chunk]
  chunk = min(chunks, default=row_length)
  if row_length % chunk:
    raise config.ConfigError(
      f'rows of {row_length} tokens do not hold a whole number of chunks of '
      f'{chunk} (model.levels[].chunk); change one of them, or pack short rows '
      'into long ones (wake.window).'
    )
  return chunk


def sleep_period(level: config.LevelConfig) -> int:
  """Tokens between two consolidations of a sender: b * C^(l)."""
  return level.sleep_every * level.chunk


def updates_now(
  level: config.LevelConfig, tokens: jax.Array, *, defer_due_update: bool
) -> jax.Array:
  """Whether `level` applies its accumulated change at this tick (Eq. 2).

  With `defer_due_update`, an update that coincides with the level's own
  consolidation is left pending: a level must be consolidated before it is
  updated, and the night itself computes, and then commits, that update.
  """
  due = tokens % level.chunk == 0
  if defer_due_update and level.sleep_every:
    due &= tokens % sleep_period(level) != 0
  return due


def transfers(
  cfg: config.ModelConfig, tokens_at_last_sleep: int, tokens: int
) -> list[Transfer]:
  """What tonight consolidates, slowest pair first.

  A sender is due when the clock has passed a multiple of b * C^(l) since the
  last sleep. Slowest first, so that nothing is overwritten before it was saved.
  """
  due = [
    Transfer(i, i + 1)
    for i, level in enumerate(cfg.levels)
    if level.sleep_every
    and tokens // sleep_period(level)
    > tokens_at_last_sleep // sleep_period(level)
  ]
  return due[::-1]


def transfer_of_states(cfg: config.ModelConfig) -> Transfer:
  """Consolidation of recurrent states into the fastest level that has slots.

  Raises:
    ConfigError: if no level has slots.
  """
  with_slots = [i for i, level in enumerate(cfg.levels) if level.slots]
  if not with_slots:
    raise config.ConfigError(
      'consolidating recurrent states needs an expert to seed: no level has '
      'slots; set model.levels[].slots and rank.'
    )
  return Transfer(STATES, with_slots[0])
