"""A life as an evaluation sees it: the verbs that answer, and no others."""

import dataclasses

from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import windows
from sleep_jax.learners import base as learner_lib
from sleep_jax.lifecycle import life as life_lib


@dataclasses.dataclass(frozen=True)
class Student:
  """A learner bound to one of its lives; see `tasks.base.Student`."""

  learner: learner_lib.Learner
  life: life_lib.Life

  def respond(
    self, prompts: list[list[int]], answers: list[list[int]]
  ) -> experience_lib.Response:
    """Closed-book answers, scored against `answers`."""
    return self.learner.respond(self.life, prompts, answers)

  def complete(
    self, prompts: list[list[int]], max_new: int, seed: int | None = None
  ) -> list[list[int]]:
    """Completions of at most `max_new` tokens, greedy or drawn by `seed`."""
    return self.learner.complete(self.life, prompts, max_new, seed)

  def study(
    self, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Greedy answers of copies of the life that first study contexts."""
    return self.learner.study(self.life, requests)

  def predict(
    self, batch: windows.WindowBatch, passes: int | None = None
  ) -> experience_lib.WindowPredictions:
    """Predictions in the last window, after reading the windows before it."""
    return self.learner.predict(self.life, batch, passes)
