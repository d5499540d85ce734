"""The evaluation of knowledge incorporation (SEAL, arXiv 2506.10943).

A passage is studied, and then its questions are answered without it: each test
passage by itself (n = 1), and all of them after one joint study (n = many).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.tasks import base as task_lib

# (context, answers to its questions) -> a grade in [0, 1] of each.
Grade = Callable[[contexts.Context, list[contexts.TokenIds]], np.ndarray]


def build_stream(
  format: contexts.SelfEditFormat,
  trained_contexts: tuple[contexts.Context, ...],
  reads: int,
  seed: list[int],
) -> experience_lib.Experience:
  """A stream of each context's rows, `reads` times, shuffled each time."""
  rows = contexts.concat([format.from_context(c) for c in trained_contexts])
  rng = np.random.default_rng(seed)
  order = [rng.permutation(len(rows.tokens)) for _ in range(reads)]
  order = np.concatenate(order)
  return experience_lib.Experience(
    rows.tokens[order], rows.weight[order], trained_contexts
  )


@dataclasses.dataclass(frozen=True)
class KnowledgeIncorporation:
  """How test passages are studied and graded.

  test: passages in no stream; one study learns all of them.
  singles: the first so many are also studied one by one.
  attempts: studies of each single passage.
  grades: by the suffix of their metric; that of the main grade is empty.
  """

  test: tuple[contexts.Context, ...]
  singles: int
  attempts: int
  grades: Mapping[str, Grade]

  def evaluate(
    self,
    student: task_lib.Student,
    trained_contexts: Sequence[Sequence[contexts.Context]],
    base_contexts: Sequence[contexts.Context] = (),
    *,
    last: bool,
  ) -> experience_lib.EvalResult:
    """Scores after a night; only the last evaluation studies, for its cost.

    Args:
      student: answers closed book, and after study.
      trained_contexts: those of each episode so far.
      base_contexts: contexts that the base was pretrained on.
      last: whether this is the last night.

    Returns:
      `by_episode`: closed-book accuracy on each episode's contexts, to the
      token. Metrics: `closed_book` of the test passages before study and
      `base_accuracy` of `base_contexts`, to the token as well; and if `last`
      `n1` and `n<joint>`, and these with the suffix of each other grade.
    """
    groups: dict[str, Sequence[contexts.Context]] = {'closed_book': self.test}
    if base_contexts:
      groups['base_accuracy'] = base_contexts
    accuracy = _closed_book(student, [*trained_contexts, *groups.values()])
    episodes = len(trained_contexts)
    metrics = dict(zip(groups, accuracy[episodes:]))
    if last:
      metrics |= self._after_study(student)
    return experience_lib.EvalResult(accuracy[:episodes], metrics)

  def _after_study(self, student: task_lib.Student) -> dict[str, float]:
    requests = [
      contexts.StudyRequest((c,), self.attempts)
      for c in self.test[: self.singles]
    ]
    requests.append(contexts.StudyRequest(self.test))
    answers = student.study(requests)
    metrics = {}
    for suffix, grade in self.grades.items():
      *singles, joint = (
        _grades(request, attempts, grade)
        for request, attempts in zip(requests, answers, strict=True)
      )
      metrics[f'n1{suffix}'] = float(np.concatenate(singles).mean())
      metrics[f'n{len(self.test)}{suffix}'] = float(joint.mean())
    return metrics


def _closed_book(
  student: task_lib.Student, groups: list[Sequence[contexts.Context]]
) -> list[float]:
  """Accuracy of each group, by one call of `respond`."""
  flat = [c for group in groups for c in group]
  response = student.respond(
    [q for c in flat for q in c.questions],
    [a for c in flat for a in c.answers],
  )
  sizes = [sum(len(c.questions) for c in group) for group in groups]
  parts = np.split(response.exact.astype(float), np.cumsum(sizes)[:-1])
  return [float(part.mean()) for part in parts]


def _grades(
  request: contexts.StudyRequest,
  attempts: list[list[contexts.TokenIds]],
  grade: Grade,
) -> np.ndarray:
  """Grades of all attempts at a request's questions, flat."""
  grades = []
  for attempt in attempts:
    answers = iter(attempt)
    for context in request.contexts:
      grades.append(grade(context, [next(answers) for _ in context.questions]))
  return np.concatenate(grades)
