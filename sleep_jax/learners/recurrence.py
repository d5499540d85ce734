"""Learners that sleep by recurrence (arXiv 2605.26099), alone or with seeding.

A life of these reads its day in windows, a row each. Before a window is
forgotten the blocks pass over it N times, and its fast weights are what stays:
`memory.states`. The last window of a day is slept on at night.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import sleep as sleep_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle.consolidation import night as consolidation_night
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.lifecycle.recurrence import training as recurrent_training
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.runtime import finite


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
  cfg: config.ModelConfig,
  how: recurrence_config.RecurrenceConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  windows: at.Int[jax.Array, 'J 2 L'],
) -> memory_lib.Memory:
  """The memory after sleeping on every window; see `Recurrence` for those."""
  tokens, present = windows[None, :, 0], windows[None, :, 1] > 0
  states = cache_lib.broadcast_states(memory, 1)
  kept = passes_lib.init_window_state(cfg, how, 1, tokens.shape[2], states)
  kept, _ = passes_lib.read(
    cfg, how, params, cms.per_layer_memory(memory), kept, tokens, present
  )
  return memory.replace(states=tuple(s[0] for s in kept.states))


class Recurrence(sleep_lib.WakeOnly):
  """recurrence: the states are all that ever learns.

  `notes['window']` is what is not slept on yet, `[1 or 0, 2, L]`: tokens, and
  where they are no padding.
  """

  def init(self, rng: at.Key) -> life_lib.Life:
    s = self.setup
    recurrent_training.check(s.model, s.recurrence)
    if s.recurrence.eviction != 'hard':
      raise config.ConfigError(
        f'recurrence.eviction={s.recurrence.eviction!r}: a life keeps no keys '
        "from day to day; use recurrence.eviction='hard'."
      )
    notes = {'window': jnp.zeros((0, 2, 0), jnp.int32)}
    return life_lib.init_life(s.model, s.params, rng, notes=notes)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    tokens = experience.tokens
    present = (experience.weight > 0) | (tokens == self.setup.tokenizer.bos)
    windows = np.stack([tokens, present.astype(tokens.dtype)], axis=1)
    if life.notes['window'].size:  # Of a day without a night.
      windows = np.concatenate([life.notes['window'], windows])
    life = self._sleep_on(life, jnp.asarray(windows[:-1]))
    clock = life.clock.replace(tokens=life.clock.tokens + tokens.size)
    notes = {'window': jnp.asarray(windows[-1:])}
    return life.replace(notes=notes, clock=clock), {}

  def _sleep_on(self, life: life_lib.Life, windows: jax.Array) -> life_lib.Life:
    """N passes over each window, and its keys are gone."""
    s = self.setup
    if not windows.size:
      return life
    with s.costs.phase('wake') as account:
      memory = _read(s.model, s.recurrence, life.params, life.memory, windows)
      memory = jax.block_until_ready(memory)
      looped = len(s.recurrence.looped(s.model.layers)) / s.model.layers
      passes = 1 + (s.recurrence.passes - 1) * looped
      account.add_forward(windows[:, 0].size * passes)
    finite.check_finite('wake', jnp.zeros((1,)), memory)
    return life.replace(memory=memory)

  def _finish_day(self, life: life_lib.Life) -> life_lib.Life:
    """The last window is slept on like the others."""
    life = self._sleep_on(life, life.notes['window'])
    return life.replace(notes={'window': life.notes['window'][:0]})

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    return life_lib.end_night(self._finish_day(life)), {}


class RecurrenceAndSeeding(Recurrence):
  """recurrence_seeding: what the states hold is seeded into an expert a night.

  The states are a level faster than all others: their consolidation empties
  them, and the fastest level that has slots receives.
  """

  def init(self, rng: at.Key) -> life_lib.Life:
    if not any(level.slots for level in self.setup.model.levels):
      raise config.ConfigError(
        'recurrence_seeding needs an expert to seed: no level has slots; set '
        'model.levels[].slots and rank.'
      )
    return super().init(rng)

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    s, life = self.setup, self._finish_day(life)
    slots = [bool(level.slots) for level in s.model.levels]
    transfer = schedule.Transfer(schedule.STATES, slots.index(True))
    rng = jax.random.fold_in(life.rng, life.clock.nights)
    life, report = transfer_lib.transfer(
      s.model, s.sleep, life, transfer, s.tokenizer, rng, s.costs
    )
    return life_lib.end_night(life), consolidation_night.transfer_metrics(
      report, s.sleep.steps
    )
