"""The state of a life: one pytree, saved, restored and sharded as a whole."""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.data import contexts as contexts_lib
from sleep_jax.data import experience as experience_lib
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding


class Clock(at.Pytree):
  """Where a life stands."""

  tokens: at.Int[jax.Array, '']  # Read so far, per row of a batch.
  tokens_at_last_sleep: at.Int[jax.Array, '']
  nights: at.Int[jax.Array, '']


class Life(at.Pytree):
  """Everything that a life is.

  model: the model as it is now.
  fast_at_wake: `memory.fast_state()` when it last awoke.
  opt_state: of a learner that trains `model.params`; else None.
  learner_state: what one kind of learner keeps: a context, a Fisher, a buffer.
  archive: dreams of earlier nights, where `sleep.archive` keeps them.
  contexts: what the day was about; empty in the morning.
  frames: of all documents that were read so far, see `experience.Frame`.
  """

  model: model_lib.Model
  fast_at_wake: at.Tree
  clock: Clock
  rng: at.Key
  opt_state: Any = None
  learner_state: Any = None
  archive: archive_lib.Archive | None = None
  contexts: tuple[contexts_lib.Context, ...] = struct.field(
    pytree_node=False, default=()
  )
  frames: tuple[experience_lib.Frame, ...] = struct.field(
    pytree_node=False, default=()
  )

  @property
  def memory(self) -> memory_lib.Memory:
    """The model's memory; a life always has one."""
    return self.model.required_memory()

  def with_memory(self, memory: memory_lib.Memory) -> 'Life':
    """This life with another memory."""
    return self.replace(model=self.model.with_memory(memory))

  def with_room(self, level: int) -> 'Life':
    """This life with a larger bank of `level`, if that is full and may grow.

    It is doubled: half of what is computed is in use at least, and few shapes
    are compiled.
    """
    bank, most = self.memory.bank(level), self.model.cfg.levels[level].slots
    slots = len(bank.status)
    if bank.free_slot() is not None or slots == most:
      return self
    bank = sharding.shard_params(bank.grown(min(2 * slots, most)))
    return self.with_memory(self.memory.with_level(level, bank=bank))

  def with_frames(self, frames: tuple[experience_lib.Frame, ...]) -> 'Life':
    """This life after it has read documents of these frames."""
    return self.replace(frames=tuple(dict.fromkeys(self.frames + frames)))

  def previous_memory(self) -> memory_lib.Memory:
    """The memory as it was before this day.

    Experts do not change while awake, so it costs one copy of the fast weights.
    """
    return self.memory.with_fast_state(self.fast_at_wake)


def init_life(
  model: model_lib.Model,
  rng: at.Key,
  *,
  opt_state: Any = None,
  learner_state: Any = None,
) -> Life:
  """A new life on a pretrained model, with a memory that holds nothing.

  Each bank has one slot a device, and grows: see `Life.with_room`.
  """
  empty = functools.partial(
    memory_init.init_memory, model.cfg, slots=sharding.num_shards('slots')
  )
  memory = sharding.init(empty)
  return Life(
    model=model.with_memory(memory),
    fast_at_wake=jax.tree.map(jnp.copy, memory.fast_state()),
    clock=Clock(*(jnp.zeros((), jnp.int32) for _ in range(3))),
    rng=rng,
    opt_state=opt_state,
    learner_state=learner_state,
  )


def end_night(life: Life) -> Life:
  """Ends the night: the next day begins with the fast weights as they are."""
  return life.replace(
    fast_at_wake=jax.tree.map(jnp.copy, life.memory.fast_state()),
    clock=life.clock.replace(
      tokens_at_last_sleep=life.clock.tokens, nights=life.clock.nights + 1
    ),
    contexts=(),
  )
