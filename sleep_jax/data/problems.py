"""Problems with reference solutions, and what a completion of one is worth."""

from collections.abc import Callable
import dataclasses
import operator
from typing import Any

import numpy as np

from sleep_jax.data import contexts


@dataclasses.dataclass(frozen=True)
class Problems:
  """N problems to be solved.

  prompts: token ids that a solution follows.
  privileged: the same with the reference solution before it; what a teacher is
    given in OPSD (arXiv 2601.18734).
  solutions: the reference solutions; each ends with the stop token.
  answers: what the solutions come to.
  read: the answer of a completion; None where it has none.
  agree: whether an answer, the second, is the wanted one.
  max_new: tokens of the longest completion.
  stop: the token that ends a completion.
  """

  prompts: list[contexts.TokenIds]
  privileged: list[contexts.TokenIds]
  solutions: list[contexts.TokenIds]
  answers: list[Any]
  read: Callable[[contexts.TokenIds], Any | None]
  max_new: int
  stop: int
  agree: Callable[[Any, Any], bool] = operator.eq

  def __len__(self) -> int:
    return len(self.prompts)

  def some(self, which: slice) -> 'Problems':
    """Those of a slice."""
    lists = ('prompts', 'privileged', 'solutions', 'answers')
    return dataclasses.replace(
      self, **{name: getattr(self, name)[which] for name in lists}
    )

  def grade(
    self, index: np.ndarray, completions: list[contexts.TokenIds]
  ) -> 'Grades':
    """Grades of completions of the problems with these numbers."""
    found = [self.read(tokens) for tokens in completions]
    wanted = [self.answers[i] for i in index]
    ended = [bool(t) and t[-1] == self.stop for t in completions]
    return Grades(
      right=np.array(
        [
          b is not None and self.agree(a, b)
          for a, b in zip(wanted, found, strict=True)
        ]
      ),
      truncated=~np.array(ended),
      unreadable=np.array([x is None for x in found]),
    )


@dataclasses.dataclass(frozen=True)
class Grades:
  """Of N completions, each bool `[N]`.

  right: whether the answer is the problem's.
  truncated: whether it did not end.
  unreadable: whether it has no answer, be it for having been cut off.
  """

  right: np.ndarray
  truncated: np.ndarray
  unreadable: np.ndarray
