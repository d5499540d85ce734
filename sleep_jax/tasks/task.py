"""The Task protocol. No task knows a learner."""

import dataclasses
from typing import Protocol

import numpy as np

from sleep_jax.data import contexts as contexts_lib
from sleep_jax.data import tokenizers


@dataclasses.dataclass(frozen=True)
class Experience:
  """One episode's stream, in the order in which it is read, once.

  tokens: `[N, T]` int32 rows, each a document that begins with BOS.
  weight: `[N, T]` float32, weight of each token as a target; 0 on padding.
  contexts: what the stream was about, for the dreams of the coming night.
  """

  tokens: np.ndarray
  weight: np.ndarray
  contexts: tuple[contexts_lib.Context, ...] = ()


@dataclasses.dataclass(frozen=True)
class Response:
  """A learner's answers to N prompts.

  exact: `[N]` bool, whether the greedy completion is the answer, to the token.
  answer_logprob: `[N]` log-probability of the answer in nats.
  token_accuracy: `[N]` share of the answer's tokens that are the greedy choice
    after the prompt and the answer's own tokens before.
  """

  exact: np.ndarray
  answer_logprob: np.ndarray
  token_accuracy: np.ndarray


class Respond(Protocol):
  """How an exam asks: prompts, and the answers to be scored against."""

  def __call__(
    self, prompts: list[list[int]], answers: list[list[int]]
  ) -> Response: ...


class Learn(Protocol):
  """How an exam has a life study something first, and then asks.

  Each study begins with a copy of the life, which ends with it. What comes back
  are the completions: `[study][attempt][question]`.
  """

  def __call__(
    self, studies: list[contexts_lib.Study]
  ) -> list[list[list[list[int]]]]: ...


@dataclasses.dataclass(frozen=True)
class Exam:
  """Marks after one night.

  by_episode: score in [0, 1] of each episode seen so far, oldest first.
  metrics: further named figures.
  """

  by_episode: list[float]
  metrics: dict[str, float]


class Task(Protocol):
  """A stream of episodes and an exam over those seen so far."""

  tokenizer: tokenizers.Tokenizer
  episodes: int

  def experience(self, episode: int) -> Experience:
    """The stream of one episode; a pure function of seed and episode."""
    ...

  def exam(self, respond: Respond, episode: int) -> Exam:
    """Closed-book exam over episodes 0..episode."""
    ...


class ReadingTask(Task, Protocol):
  """A task whose episodes are contexts that a life can dream about.

  Its exam is `study_exam(respond, learn, episode)` in place of `exam`.
  """

  reader: contexts_lib.Reader

  def study_exam(
    self, respond: Respond, learn: Learn, episode: int
  ) -> Exam: ...
