"""frozen: the base as it is; it reads, and learns nothing."""

import dataclasses
from typing import ClassVar

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
  """There is nothing to set."""


class Frozen(base.Learner):
  """A learner whose model never changes."""

  name: ClassVar[str] = 'frozen'
  Config: ClassVar[type] = FrozenConfig

  @property
  def trains_backbone(self) -> bool:
    return False

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    del experience
    return life, {}
