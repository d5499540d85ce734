"""privileged_sleep: sleep whose day is on-policy self-distillation.

The paper's mathematics (Sleep section 6.2): the teacher is the model itself
with the reference solution in its prompt. Awake, the fast weights are corrected
towards it on the model's own solutions (`opsd`); asleep, knowledge seeding
moves what they learnt into an expert of slower memory, as ever. The day's
problems are read too, without their solutions: a model that has read problems
dreams of problems that it makes up, and of how it solves them.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import base
from sleep_jax.learners import opsd
from sleep_jax.learners import sleep
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib


@dataclasses.dataclass(frozen=True)
class PrivilegedSleepConfig(sleep.SleepConfig, opsd.OPSDConfig):
  """Sections of `sleep`, and how the day's problems are solved."""

  teacher: str = 'morning'
  # Weight of a problem's own tokens beside those of a solution, 0 = none. With
  # none a night dreams of the problems that it knew, and so does not practise
  # what the day was about.
  prompt_weight: config.Fraction = 0.1


class _Solver(opsd.OPSD):
  """Trains all weights beside the experts of earlier nights."""

  cfg: PrivilegedSleepConfig

  def loss(
    self, model: model_lib.Model, batch: opsd.Batch, shared: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss, metrics = super().loss(model, batch, shared)
    if not self.cfg.prompt_weight:
      return loss, metrics
    prompts = batch.rollouts.prompts
    nothing = jnp.zeros((len(prompts.tokens), 0), prompts.tokens.dtype)
    tokens, positions = prompts.followed_by(nothing)
    logprobs = loss_lib.token_logprobs(model, tokens, positions)
    inside = positions[:, 1:] > 0
    reading = -(logprobs * inside).sum() / inside.sum()
    loss += self.cfg.prompt_weight * reading
    return loss, metrics | {'loss': loss, 'reading': reading}

  def solver(self, life: life_lib.Life) -> model_lib.Model:
    return life.model


class PrivilegedSleep(sleep.Sleep):
  """Fast weights that learn by OPSD, and nights of `sleep`."""

  name: ClassVar[str] = 'privileged_sleep'
  Config: ClassVar[type] = PrivilegedSleepConfig

  def __init__(self, cfg: PrivilegedSleepConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    self._solver = _Solver(cfg, setup)

  def batch_rows(self) -> dict[str, int]:
    return super().batch_rows() | self._solver.batch_rows()

  def check(self) -> None:
    super().check()
    fast, *_ = self.setup.model.cfg.levels
    if fast.fast_weights != 'backbone':
      raise config.ConfigError(
        f'learner {self.name}: model.levels[0].fast_weights='
        f'{fast.fast_weights!r}, and a day trains all weights; set '
        "fast_weights='backbone'."
      )
    for name, value, allowed in (
      ('finetune.target', self.cfg.finetune.target, ('all',)),
      ('learner_config.teacher', self.cfg.teacher, ('morning', 'base')),
      ('wake.reads', self.cfg.wake.reads, ('updates',)),
    ):
      if value not in allowed:
        raise config.ConfigError(
          f'learner {self.name}: {name}={value}; choose from '
          f'{", ".join(allowed)}.'
        )

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    experience = experience_lib.in_memory(experience, self.name)
    life = self._with_dreams_of_base(life, experience.frames)
    model = life.model.merged()
    weights = jax.tree.map(jnp.array, model.weights())
    opt_state = sharding.init(self._solver.optimizer.init, weights)
    memory = _without_changes(life.memory)
    awake, metrics = self._solver.wake(
      life.replace(
        model=model.replace(params=weights, memory=memory), opt_state=opt_state
      ),
      experience,
    )
    delta = jax.tree.map(jnp.subtract, awake.model.params, model.params)
    fast = life.memory.fast(0).replace(delta={'backbone': delta})
    # The clock counts what was to be read, however long the solutions are.
    clock = life.clock.replace(
      tokens=life.clock.tokens + experience.tokens.size // self.cfg.wake.batch
    )
    life = life.with_memory(life.memory.with_level(0, fast=fast))
    life = life.replace(clock=clock, contexts=experience.contexts)
    return life.with_frames(experience.frames), metrics


def _without_changes(memory: memory_lib.Memory) -> memory_lib.Memory:
  """The experts alone."""
  return memory.replace(
    levels=tuple(level.replace(fast=None) for level in memory.levels)
  )
