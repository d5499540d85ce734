"""What tasks and learners exchange: streams, answers, scores."""

import collections
from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts as contexts_lib
from sleep_jax.data import problems as problems_lib
from sleep_jax.data import windows

_BLOCK = 1024  # Rows drawn at a time of a stream that is wanted whole.


# The fixed parts of a kind of document, in order: what a model writes after
# each of them, up to the token that ends it, is the content. A frame has none.
Frame = tuple[tuple[int, ...], ...]


def gap_ends(frame: Frame, stop: int) -> tuple[int, ...]:
  """The token that ends what is written after each part of a frame.

  A part of one token is a mark that ends what stands before it, like the colon
  in `text : label`; everything else ends with `stop`.
  """
  return *(part[0] if len(part) == 1 else stop for part in frame[1:]), stop


def with_openings(
  frame: Frame, contents: list[list[int]], tokens: int
) -> tuple[Frame, ...]:
  """A frame, and the same frame with each usual opening of a content.

  "Where is" opens many questions and says nothing about any one of them: it
  belongs to the form.

  Args:
    frame: of documents.
    contents: what stands in the frame's first gap, one of each document.
    tokens: how long an opening is. One that fewer than two different contents
      share is left out.
  """
  different = {tuple(x) for x in contents if len(x) > tokens}
  counts = collections.Counter(x[:tokens] for x in sorted(different))
  return frame, *(
    ((*frame[0], *opening), *frame[1:])
    for opening, count in counts.items()
    if count > 1
  )


@dataclasses.dataclass(frozen=True)
class Experience:
  """One episode's stream of N rows, read once, in order.

  tokens: `[N, T]` int32 rows, each a document that begins with BOS.
  weight: `[N, T]` float32, weight of each token as a target; 0 on padding.
  contexts: those of the stream, for the dreams of the next night.
  frames: of the stream's documents, see `Frame`.
  problems: those that the rows solve, where a learner may solve them itself.
  """

  tokens: np.ndarray
  weight: np.ndarray
  contexts: tuple[contexts_lib.Context, ...] = ()
  frames: tuple[Frame, ...] = ()
  problems: problems_lib.Problems | None = None

  def blocks(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weight) of all rows, as one block; `rows` has no effect."""
    del rows
    yield self.tokens, self.weight


@dataclasses.dataclass(frozen=True)
class LazyExperience:
  """A stream that is drawn block by block, not held in memory as a whole.

  num_rows: N.
  draw: `(rng, rows) -> (tokens, weight)`, the next rows of the stream.
  seed: of the generator; the stream is a function of it and of the blocks'
    size.
  contexts, frames: see `Experience`.
  """

  num_rows: int
  draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
  seed: tuple[int, ...]
  contexts: tuple[contexts_lib.Context, ...] = ()
  frames: tuple[Frame, ...] = ()

  def blocks(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weight) of `rows` rows each; the last block may be smaller."""
    rng = np.random.default_rng(self.seed)
    for start in range(0, self.num_rows, rows):
      yield self.draw(rng, min(rows, self.num_rows - start))


DrawWindows = Callable[[np.random.Generator, int], windows.WindowBatch]


@dataclasses.dataclass(frozen=True)
class WindowStream:
  """An endless stream of sequences to train on through windows.

  draw: `(rng, rows) -> WindowBatch`, the next sequences; or several such, whose
    batches have different shapes.
  seed: of the generator; the stream is a function of it, of the batches' size,
    and, with several, of how many in a row have one shape.
  contexts, frames: see `Experience`.
  """

  draw: DrawWindows | tuple[DrawWindows, ...]
  seed: tuple[int, ...]
  contexts: tuple[contexts_lib.Context, ...] = ()
  frames: tuple[Frame, ...] = ()

  def batches(self, rows: int, alike: int = 1) -> Iterator[windows.WindowBatch]:
    """Batches of `rows` sequences, endlessly; of one shape `alike` at a time.

    With several draws one is chosen for these, uniformly.
    """
    draws = self.draw if isinstance(self.draw, tuple) else (self.draw,)
    rng = np.random.default_rng(self.seed)
    while True:
      draw = draws[0] if len(draws) == 1 else draws[rng.integers(len(draws))]
      for _ in range(alike):
        yield draw(rng, rows)


AnyExperience = Experience | LazyExperience | WindowStream


def in_memory(experience: AnyExperience, learner: str) -> Experience:
  """All rows of a stream, for a learner that needs them at once.

  Raises:
    ConfigError: if it is an endless stream of windows.
  """
  if isinstance(experience, Experience):
    return experience
  stream = row_stream(experience, learner)
  tokens, weight = zip(*stream.blocks(_BLOCK))
  return Experience(
    np.concatenate(tokens),
    np.concatenate(weight),
    stream.contexts,
    stream.frames,
  )


def row_stream(
  experience: AnyExperience, learner: str
) -> Experience | LazyExperience:
  """The same stream, for a learner that reads rows.

  Raises:
    ConfigError: if the stream is one of windows.
  """
  if isinstance(experience, WindowStream):
    raise config.ConfigError(
      f'learner {learner} reads rows, but this task has windows to train on; '
      'use learner recurrent_training.'
    )
  return experience


@dataclasses.dataclass(frozen=True)
class Response:
  """A learner's answers to N prompts.

  exact: `[N]` bool, whether the greedy completion is the answer, to the token.
  answer_logprob: `[N]` log-probability of the answer in nats.
  token_accuracy: `[N]` share of the answer's tokens that are the argmax after
    the prompt and the answer's previous tokens.
  """

  exact: np.ndarray
  answer_logprob: np.ndarray
  token_accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class WindowPredictions:
  """What a learner predicts in the prediction windows of B sequences.

  argmax: `[B, P]` the likeliest token after each input.
  nll: `[B, P]` nats, minus the log-probability of each target.
  passes: `[B]` passes over each window, mean over windows.
  loss: mean nats over the weighted targets, and the penalty of a halting rule.
  """

  argmax: np.ndarray
  nll: np.ndarray
  passes: np.ndarray
  loss: float


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """Scores after one night.

  by_episode: accuracy in [0, 1] on each episode so far, oldest first; empty for
    a task without scores by episode.
  metrics: further metrics by name.
  """

  by_episode: list[float]
  metrics: dict[str, float]


Answers = list[list[list[Any]]]  # [request][attempt][question], token ids.
