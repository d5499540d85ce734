"""The Task protocol. No task knows a learner."""

from typing import Any, ClassVar, Protocol

from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows


class Student(Protocol):
  """A life as an evaluation sees it: what it is asked never changes it."""

  def respond(
    self, prompts: list[list[int]], answers: list[list[int]]
  ) -> experience_lib.Response:
    """Closed-book answers, scored against `answers`."""
    ...

  def study(
    self, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Greedy answers of copies of the life that first study contexts.

    Each request begins with a copy of its own, which ends with it.
    """
    ...

  def predict(
    self, batch: windows.WindowBatch, passes: int | None = None
  ) -> experience_lib.WindowPredictions:
    """Reads the context window by window, then predicts (arXiv 2605.26099).

    Args:
      batch: sequences in windows.
      passes: N, if it is not the learner's own.
    """
    ...


class Task(Protocol):
  """A stream of episodes, and an evaluation over those seen so far.

  A task is a class `T(cfg, seed)`; `registry.find` knows it by `name`, and
  builds `cfg` from `Config`.
  """

  name: ClassVar[str]
  Config: ClassVar[type]
  # Metrics of the table, and those whose paired differences are reported; a
  # metric that a variant lacks is left out.
  columns: ClassVar[tuple[str, ...]]
  headline: ClassVar[tuple[str, ...]]

  cfg: Any
  tokenizer: tokenizers.Tokenizer
  episodes: int
  # What dreams about this task's contexts mean; None: it has no contexts.
  format: contexts.SelfEditFormat | None

  def experience(self, episode: int) -> experience_lib.AnyExperience:
    """The stream of one episode; a pure function of seed and episode."""
    ...

  def evaluate(
    self, student: Student, episode: int
  ) -> experience_lib.EvalResult:
    """Scores over episodes 0..episode, after the night of `episode`."""
    ...
