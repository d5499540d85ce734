"""joint: the upper bound, which may read the whole past again every day."""

from typing import ClassVar

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib


class Joint(finetune.Finetune):
  """Each day trains on as many rows as it brings, drawn evenly from all days.

  `learner_state` holds the tokens and weights of all that was read.
  """

  name: ClassVar[str] = 'joint'

  def init(self, rng: at.Key) -> life_lib.Life:
    empty = {'tokens': np.zeros((0, 0), np.int32), 'weight': np.zeros((0, 0))}
    return super().init(rng).replace(learner_state=empty)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    experience = experience_lib.in_memory(experience, self.name)
    tokens, weight, past = (
      experience.tokens, experience.weight, life.learner_state
    )  # fmt: skip
    if np.size(past['tokens']):
      tokens = np.concatenate([np.asarray(past['tokens']), tokens])
      weight = np.concatenate([np.asarray(past['weight']), weight])
    key = jax.random.fold_in(life.rng, life.clock.nights)
    rows = order_lib.numpy_rng(key).permutation(len(tokens))
    rows = rows[: len(experience.tokens)]
    life, metrics = super().wake(
      life.replace(learner_state=None),
      experience_lib.Experience(tokens[rows], weight[rows]),
    )
    state = {'tokens': tokens, 'weight': weight}
    return life.replace(learner_state=state), metrics
