"""A task to dream about: a context C and an evaluation tau (Sleep section 6).

The *reader* of a task knows what a dream about one of its contexts means: which
rows it asks to be trained on, or why it is no dream at all, and how an answer
is marked. Everything that dreams sees tokens only.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

TokenIds = list[int]


@dataclasses.dataclass(frozen=True)
class Context:
  """C and tau.

  name: for messages.
  prompt: what a dreamer reads: C, and the request to dream about it.
  questions, answers: tau, closed book; an answer ends with its stop token.
  source: what the task's own reader keeps of C.
  """

  name: str
  prompt: TokenIds
  questions: list[TokenIds]
  answers: list[TokenIds]
  source: Any = None


@dataclasses.dataclass(frozen=True)
class TrainingRows:
  """What a dream asks for: rows to train on, and how.

  tokens: `[N, T]` int32, every row begins with BOS; all of a reader's edits
    have one T.
  weight: `[N, T]` float32, weight of each token as a target.
  epochs, learning_rate: 0 = as the trial's config says.
  """

  tokens: np.ndarray
  weight: np.ndarray
  epochs: int = 0
  learning_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A dream that asks for nothing that can be done.

  reason: one of few words, since reports count them: `empty`, `unreadable`.
  """

  reason: str


class SelfEditFormat(Protocol):
  """What the dreams of one task mean.

  max_dream: tokens of the longest dream.
  max_answer: tokens of the longest answer.
  stop: the token that ends a dream and an answer; -1 = none does.
  """

  max_dream: int
  max_answer: int
  stop: int

  def parse(self, context: Context, dream: TokenIds) -> TrainingRows | Rejected:
    """The update that `dream`, without its stop token, asks for."""
    ...

  def from_context(self, context: Context) -> TrainingRows:
    """An update on the context itself, without any dream."""
    ...

  def grade(self, context: Context, said: list[TokenIds]) -> np.ndarray:
    """Marks in [0, 1] of an answer to each of the context's questions."""
    ...


def concat(edits: list[TrainingRows]) -> TrainingRows:
  """One edit with the rows of all; the first one tells how to train."""
  return dataclasses.replace(
    edits[0],
    tokens=np.concatenate([e.tokens for e in edits]),
    weight=np.concatenate([e.weight for e in edits]),
  )


@dataclasses.dataclass(frozen=True)
class StudyRequest:
  """Contexts to learn together, and what is asked afterwards, closed book.

  attempts: how often, each time from the same life and by other dreams.
  """

  contexts: tuple[Context, ...]
  attempts: int = 1

  @property
  def questions(self) -> list[TokenIds]:
    """Those of all contexts, in order."""
    return [q for c in self.contexts for q in c.questions]
