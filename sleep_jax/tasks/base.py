"""The Task and Student protocols. No task knows a learner."""

from typing import Any, ClassVar, Protocol, runtime_checkable

from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows


@runtime_checkable
class Student(Protocol):
  """A learner with its life, as an evaluation uses it; no call changes it."""

  def respond(
    self, prompts: list[list[int]], answers: list[list[int]]
  ) -> experience_lib.Response:
    """Closed-book answers to N prompts, scored against N `answers`."""
    ...

  def complete(
    self, prompts: list[list[int]], max_new: int, seed: int | None = None
  ) -> list[list[int]]:
    """Completions of N prompts, at most `max_new` tokens each.

    Where a completion ended, its last token is the tokenizer's stop token.

    Args:
      prompts: token ids.
      max_new: tokens of the longest.
      seed: None: greedy; else they are drawn at temperature 1 by this seed.
    """
    ...

  def study(
    self, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Greedy answers after study, `[request][attempt][question]` token ids.

    Each attempt trains a separate copy of the life, which is then discarded.
    An answer has no stop token.
    """
    ...

  def predict(
    self, batch: windows.WindowBatch, passes: int | None = None
  ) -> experience_lib.WindowPredictions:
    """Reads the context window by window, then predicts (arXiv 2605.26099).

    Args:
      batch: B sequences in windows.
      passes: N, passes over each window; None = as the learner is configured.
    """
    ...


@runtime_checkable
class Task(Protocol):
  """A stream of episodes, and an evaluation over the episodes so far.

  A task is a subclass `T(cfg, seed)` in a module of its own;
  `registry.find` knows it by `name`, and builds `cfg` from `Config`.

  columns: metrics of the results table; one that no life has is left out.
  headline: metrics whose paired differences between learners are reported.
  cfg: the instance of `Config`.
  episodes: number of episodes, one night each.
  tokenizer: its ids are those of all rows, prompts and answers.
  format: what dreams about this task's contexts mean; None: no contexts.
  """

  name: ClassVar[str]
  Config: ClassVar[type]

  columns: tuple[str, ...]
  headline: tuple[str, ...]
  cfg: Any
  tokenizer: tokenizers.Tokenizer
  episodes: int
  format: contexts.SelfEditFormat | None = None

  @property
  def row_length(self) -> int:
    """Tokens of a typical row; attention FLOPs are counted at half of it."""
    return self.cfg.length

  def experience(self, episode: int) -> experience_lib.AnyExperience:
    """The stream of one episode; a pure function of seed and episode."""
    ...

  def evaluate(
    self, student: Student, episode: int
  ) -> experience_lib.EvalResult:
    """Scores over episodes 0..episode, after the night of `episode`."""
    ...

  def chance_level(self) -> dict[str, float]:
    """Metrics of a guess without the context; empty where none is known."""
    return {}


@runtime_checkable
class Audited(Protocol):
  """A task that can tell whether what a model says by itself is true."""

  def audit(
    self, student: Student, episode: int, documents: list[list[int]]
  ) -> dict[str, float]:
    """Shares of the statements in documents, after `episode`.

    true: as the newest day that spoke of it told it, or the base knows it.
    outdated: as an earlier day told it.
    false: of something that was told, and never so; a wrong solution.
    unread: of something that nobody told; a problem that has no solution.
    unreadable: no statement.
    believed: of the different outdated and false ones, what `student` says so
      when it is asked; NaN if there is none, or none is asked.
    """
    ...
