"""The Learner: one way to live, behind a few verbs.

Every baseline stands behind it, so each is compared on the same stream, with
the same evaluation and the same costs. `sleep` takes no data: its type says so.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows
from sleep_jax.inference import scoring
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib


@dataclasses.dataclass(frozen=True)
class Setup:
  """What every learner is made of, whatever its settings.

  model: the pretrained base; a life begins with it.
  tokenizer: of the task.
  costs: where tokens, FLOPs and seconds are written down.
  episodes: nights of a life.
  seed: of the life.
  format: of a task with contexts to dream about.
  """

  model: model_lib.Model
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker
  episodes: int = 1
  seed: int = 0
  format: contexts.SelfEditFormat | None = None

  def __post_init__(self):
    tokenizers.check_fits(self.tokenizer, self.model.cfg.vocab)


class Learner:
  """A way to live. Lives are values: each verb returns a new one.

  A learner is a class `L(cfg, setup)`; `registry.find` knows it by `name`. A
  field of `Config` that is a dataclass is the config section of that name,
  which learners share; all other fields are read from `learner_config`.
  """

  name: ClassVar[str]
  Config: ClassVar[type]

  def __init__(self, cfg: Any, setup: Setup):
    self.cfg, self.setup = cfg, setup

  def check(self) -> None:
    """Refuses, before the first day, settings that cannot work together.

    Raises:
      ConfigError: naming the setting, and the way out.
    """

  def init(self, rng: at.Key) -> life_lib.Life:
    """A new life."""
    return life_lib.init_life(self.setup.model, rng)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    """The life after it has read one episode's stream."""
    raise NotImplementedError

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    """The life after a night; by default nothing happens but the night."""
    return life_lib.end_night(life), {}

  def respond(
    self, life: life_lib.Life, prompts: list[list[int]], answers: list[list[int]]
  ) -> experience_lib.Response:
    """Closed-book answers."""
    return scoring.score(
      life.model.merged(),
      prompts,
      answers,
      pad=self.setup.tokenizer.pad,
      costs=self.setup.costs,
    )
