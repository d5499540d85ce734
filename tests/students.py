"""Students for evaluations: functions in place of a learner and its life."""

from collections.abc import Callable

import numpy as np

from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import windows


def refuse_study(
  requests: list[contexts.StudyRequest],
) -> experience_lib.Answers:
  raise AssertionError(f'{len(requests)} studies before the last evaluation')


class FakeStudent:
  """Answers by a rule, and records the prompts and answers it was given.

  Args:
    is_right: (prompt, answer) -> whether the completion is exact.
    study: as `Student.study`.
    logprob: of each answer.
    predict: (batch, passes) -> as `Student.predict`.
    complete: prompt -> what follows it.
  """

  def __init__(
    self,
    is_right: Callable[[list[int], list[int]], bool] = lambda p, a: False,
    study: Callable[..., experience_lib.Answers] = refuse_study,
    logprob: float = 0.0,
    predict: Callable[..., experience_lib.WindowPredictions] | None = None,
    complete: Callable[[list[int]], list[int]] = lambda p: [],
  ):
    self._is_right, self._study, self._predict = is_right, study, predict
    self._logprob, self._complete = logprob, complete
    self.prompts: list[list[int]] = []
    self.answers: list[list[int]] = []

  def respond(
    self, prompts: list[list[int]], answers: list[list[int]]
  ) -> experience_lib.Response:
    self.prompts.extend(prompts)
    self.answers.extend(answers)
    n = len(prompts)
    exact = [self._is_right(p, a) for p, a in zip(prompts, answers)]
    return experience_lib.Response(
      np.array(exact, bool), np.full(n, self._logprob), np.arange(n) / n
    )

  def complete(
    self, prompts: list[list[int]], max_new: int, seed: int | None = None
  ) -> list[list[int]]:
    del seed
    self.prompts.extend(prompts)
    return [self._complete(p)[:max_new] for p in prompts]

  def study(
    self, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    return self._study(requests)

  def predict(
    self, batch: windows.WindowBatch, passes: int | None = None
  ) -> experience_lib.WindowPredictions:
    assert self._predict is not None
    return self._predict(batch, passes)
