"""The exam of knowledge incorporation (SEAL, arXiv 2506.10943).

A passage is studied, and then its questions are asked without it: each test
passage by itself (n = 1), and all of them learnt together (n = many).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.tasks import base as task_lib

# (context, answers to its questions) -> a mark in [0, 1] of each.
Grade = Callable[[contexts.Context, list[contexts.TokenIds]], np.ndarray]


def build_stream(
  format: contexts.SelfEditFormat,
  met: tuple[contexts.Context, ...],
  reads: int,
  seed: list[int],
) -> experience_lib.Experience:
  """A stream that tells each context `reads` times, as it stands."""
  once = contexts.concat([reader.from_context(c) for c in met])
  rng = np.random.default_rng(seed)
  order = [rng.permutation(len(once.tokens)) for _ in range(reads)]
  order = np.concatenate(order)
  return experience_lib.Experience(once.tokens[order], once.weight[order], met)


@dataclasses.dataclass(frozen=True)
class KnowledgeIncorporation:
  """How test passages are studied and marked.

  test: passages that no day tells of; one study learns all of them.
  singles: the first so many are also studied one by one.
  attempts: of each such single study.
  grades: by the suffix of their metric; '' is the mark itself.
  """

  test: tuple[contexts.Context, ...]
  singles: int
  attempts: int
  grades: Mapping[str, Grade]

  def exam(
    self,
    respond: task_lib.Respond,
    learn: task_lib.Study,
    met: Sequence[Sequence[contexts.Context]],
    own: Sequence[contexts.Context] = (),
    *,
    last: bool,
  ) -> experience_lib.EvalResult:
    """Marks after a night; only the last exam studies, for its cost.

    Args:
      respond: asks closed book, without study.
      learn: asks after study.
      met: the passages of each day so far.
      own: what the base knew before its first day.
      last: whether this is the last night.

    Returns:
      `by_episode`: closed-book accuracy on each day's passages, to the token.
      Metrics: `closed_book` of the test passages before study and `base` of
      `own`, to the token as well; and if `last` `n1` and `n<joint>`, and these
      by the other grades.
    """
    groups = {'closed_book': self.test} | ({'base': own} if own else {})
    marks = _closed_book(respond, [*met, *groups.values()])
    metrics = dict(zip(groups, marks[len(met) :]))
    if last:
      metrics |= self._studied(learn)
    return experience_lib.EvalResult(marks[: len(met)], metrics)

  def _studied(self, learn: task_lib.Study) -> dict[str, float]:
    singles = [
      contexts.StudyRequest((c,), self.attempts)
      for c in self.test[: self.singles]
    ]
    said = learn([*singles, contexts.StudyRequest(self.test)])
    metrics = {}
    for suffix, grade in self.grades.items():
      one = [_grades(s, said[i], grade) for i, s in enumerate(singles)]
      metrics[f'n1{suffix}'] = float(np.concatenate(one).mean())
      joint = _grades(contexts.StudyRequest(self.test), said[-1], grade)
      metrics[f'n{len(self.test)}{suffix}'] = float(joint.mean())
    return metrics


def _closed_book(
  respond: task_lib.Respond, groups: list[Sequence[contexts.Context]]
) -> list[float]:
  """Accuracy of each group, in one round of questions."""
  everyone = [c for group in groups for c in group]
  got = respond(
    [q for c in everyone for q in c.questions],
    [a for c in everyone for a in c.answers],
  )
  sizes = [sum(len(c.questions) for c in group) for group in groups]
  parts = np.split(got.exact.astype(float), np.cumsum(sizes)[:-1])
  return [float(part.mean()) for part in parts]


def _grades(
  study: contexts.StudyRequest,
  said: list[list[contexts.TokenIds]],
  grade: Grade,
) -> np.ndarray:
  """Marks of all attempts at a study's questions, flat."""
  marks = []
  for attempt in said:
    answers = iter(attempt)
    for context in study.contexts:
      marks.append(grade(context, [next(answers) for _ in context.questions]))
  return np.concatenate(marks)
