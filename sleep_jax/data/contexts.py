"""Contexts to dream about, and self-edits (Sleep section 6).

A context is a text C with questions about it, the evaluation tau. The
`SelfEditFormat` of a task says which training rows a dream about a context
stands for, or why it is rejected, and grades answers. All code that dreams
handles tokens only.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

TokenIds = list[int]


@dataclasses.dataclass(frozen=True)
class Context:
  """C and tau.

  name: for messages.
  prompt: of a dream: C, and the request to dream about it.
  questions, answers: tau, closed book; an answer ends with its stop token.
  source: the form of C that the task's `SelfEditFormat` uses.
  """

  name: str
  prompt: TokenIds
  questions: list[TokenIds]
  answers: list[TokenIds]
  source: Any = None


@dataclasses.dataclass(frozen=True)
class TrainingRows:
  """The update that a dream stands for.

  tokens: `[N, T]` int32, rows that begin with BOS; T is the same for all
    updates of a format.
  weight: `[N, T]` float32, weight of each token as a target.
  epochs, learning_rate: 0 = those of the trial's config.
  """

  tokens: np.ndarray
  weight: np.ndarray
  epochs: int = 0
  learning_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A dream that stands for no update.

  reason: one of few strings, which reports count: `empty`, `unreadable`.
  """

  reason: str


@runtime_checkable
class SelfEditFormat(Protocol):
  """What the dreams of one task stand for.

  max_dream: tokens of the longest dream.
  max_answer: tokens of the longest answer.
  stop: the token that ends a dream and an answer; -1 = none does.
  """

  max_dream: int
  max_answer: int
  stop: int

  def parse(self, context: Context, dream: TokenIds) -> TrainingRows | Rejected:
    """The update that `dream`, without its stop token, stands for."""
    ...

  def from_context(self, context: Context) -> TrainingRows:
    """An update on the context itself, without a dream."""
    ...

  def grade(self, context: Context, answers: list[TokenIds]) -> np.ndarray:
    """Grades in [0, 1] of an answer to each of the context's questions."""
    ...

  def open_book(self, context: Context, question: TokenIds) -> TokenIds:
    """A prompt of the context and one of its questions."""
    ...


def concat(updates: list[TrainingRows]) -> TrainingRows:
  """An update with the rows of all, and the first one's training settings."""
  return dataclasses.replace(
    updates[0],
    tokens=np.concatenate([u.tokens for u in updates]),
    weight=np.concatenate([u.weight for u in updates]),
  )


@dataclasses.dataclass(frozen=True)
class StudyRequest:
  """Contexts to learn together; their questions follow, closed book.

  attempts: number of studies, each of a new copy of the life, with new dreams.
  """

  contexts: tuple[Context, ...]
  attempts: int = 1

  @property
  def questions(self) -> list[TokenIds]:
    """Those of all contexts, in order."""
    return [q for c in self.contexts for q in c.questions]
