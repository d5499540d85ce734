"""sleep_jax.learners.joint."""

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib


class Joint(finetune.Finetune):
  """joint: the upper bound, which may read the whole past again every day.

  Each day trains on as many tokens as the day brings, drawn evenly from all
  that the life has read so far.
  """

  def init(self, rng: at.Key) -> life_lib.Life:
    nothing = {'tokens': np.zeros((0, 0), np.int32), 'weight': np.zeros((0, 0))}
    return super().init(rng).replace(notes=nothing)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    tokens, weight = experience.tokens, experience.weight
    if np.size(life.notes['tokens']):
      tokens = np.concatenate([np.asarray(life.notes['tokens']), tokens])
      weight = np.concatenate([np.asarray(life.notes['weight']), weight])
    rng = order_lib.numpy_rng(jax.random.fold_in(life.rng, life.clock.nights))
    rows = rng.permutation(len(tokens))[: len(experience.tokens)]
    life, metrics = super().wake(
      life.replace(notes=None),
      experience_lib.Experience(tokens[rows], weight[rows]),
    )
    return life.replace(notes={'tokens': tokens, 'weight': weight}), metrics
