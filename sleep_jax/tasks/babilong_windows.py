"""`babilong_windows`: BABILong to train on, segment by segment.

Samples are made as in `babilong`, and read in windows that are evicted: a model
must carry the facts to the question, which the prediction window holds with its
answer. Only the answer is a target. Trained on are stories of bAbI's `train`,
evaluated ones are of `test`.

Sequences grow stage by stage, as those of RMT and ARMT (arXiv 2207.06881,
2407.04841): each stage goes on from the weights of the last, for as many
episodes, and has `segments[stage]` windows. With `vary_segments` a sequence has
from 1 to so many, drawn uniformly for 20 batches at a time. Empty windows
before its text then make it as long as the next of `segments`, so that there
are as many programs as stages. A story is drawn among those that fit.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from sleep_jax import config
from sleep_jax.data import datasets
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows as windows_lib
from sleep_jax.tasks import babilong
from sleep_jax.tasks import base as task_lib

_KINDS = {k: v for k, v in babilong.LABELS.items() if k != 'qa3'}
# Second entry of the seed of a generator.
_STREAM, _EVAL = 1, 3


@dataclasses.dataclass(frozen=True)
class BabilongWindowsConfig:
  """Which question, the stages, and the lengths that are evaluated."""

  kind: str = 'qa1'  # | qa2 | qa4 | qa5; of qa3 there is no training file.
  books: str = ''  # A folder of .txt files; '' = Project Gutenberg's.
  tokenizer: str = 'sleep_jax/assets/text.model'
  window: config.Count = 128  # Tokens of a window.
  segments: tuple[config.Count, ...] = (2, 3, 5, 8)  # Windows, by stage.
  vary_segments: bool = True
  episodes: config.Count = 8  # Evaluations, as many in each stage.
  eval_rows: config.Count = 64  # Sequences of an evaluation.
  # Tokens of contexts evaluated after the last episode; 0 = the facts alone.
  lengths: tuple[int, ...] = (0, 1024, 4096, 16_384)
  data_dir: str = ''

  def __post_init__(self):
    for name in ('segments', 'lengths'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    config.lookup(self.kind, _KINDS, 'task.kind')
    if not self.segments or sorted(set(self.segments)) != [*self.segments]:
      raise config.ConfigError(
        f'task.segments={self.segments} must grow from stage to stage.'
      )
    if self.episodes % len(self.segments):
      raise config.ConfigError(
        f'task.episodes={self.episodes} is not a multiple of the '
        f'{len(self.segments)} stages of task.segments={self.segments}; '
        'change one of them.'
      )


@dataclasses.dataclass(frozen=True)
class _Story:
  """Facts, and a question with its answer, as tokens."""

  facts: list[list[int]]
  prediction: list[int]
  answer: int  # Tokens at the end of `prediction`, with the stop.

  @property
  def size(self) -> int:
    return sum(map(len, self.facts))


class BabilongWindows(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'babilong_windows'
  Config = BabilongWindowsConfig
  headline = ('accuracy', 'loss')
  cfg: BabilongWindowsConfig

  def __init__(self, cfg: BabilongWindowsConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    at_length = (_metric(length) for length in cfg.lengths)
    self.columns = (*self.headline, *at_length)
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self._stories = {x: self._load(x) for x in ('train', 'test')}
    stories = self._stories['train'] + self._stories['test']
    self._prediction = max(len(x.prediction) for x in stories) - 1
    shortest = self._stories['train'][0].size
    if shortest > cfg.window * cfg.segments[0]:
      raise config.ConfigError(
        f'task.window={cfg.window}: the shortest story of {cfg.kind} has '
        f'{shortest} tokens, which task.segments[0]={cfg.segments[0]} windows '
        'do not hold; raise one of them.'
      )

  @property
  def row_length(self) -> int:
    """Tokens of the longest sequence to train on."""
    return self.cfg.segments[-1] * self.cfg.window + self._prediction

  def _load(self, split: str) -> list[_Story]:
    """All stories, the shortest first."""
    encode = functools.cache(lambda text: self.tokenizer.encode(f' {text}'))
    records = datasets.load(f'babi/{self.cfg.kind}', split, self.cfg.data_dir)
    stop = [self.tokenizer.stop] if self.tokenizer.stop >= 0 else []
    stories = []
    for record in records:
      answer = [*encode(record['answer']), *stop]
      question = [self.tokenizer.bos, *encode(record['question'])]
      facts = [encode(fact) for fact in record['facts']]
      stories.append(_Story(facts, question + answer, len(answer)))
    return sorted(stories, key=lambda x: x.size)

  def experience(self, episode: int) -> experience_lib.WindowStream:
    """Sequences of the episode's stage, without end."""
    segments = self.cfg.segments
    largest = segments[episode * len(segments) // self.episodes]
    first = 1 if self.cfg.vary_segments else largest
    draws = tuple(
      functools.partial(self._batch, 'train', size)
      for size in range(first, largest + 1)
    )
    return experience_lib.WindowStream(
      draw=draws, seed=(self._seed, _STREAM, episode)
    )

  def _batch(
    self, split: str, segments: int, rng: np.random.Generator, rows: int
  ) -> windows_lib.WindowBatch:
    """`rows` sequences of `segments` windows, and empty ones before them."""
    size = segments * self.cfg.window
    drawn = self._draw(split, size, rng, rows)
    longest = min(x for x in self.cfg.segments if x >= segments)
    return self._sequences(drawn, size, longest, rng)

  def _draw(
    self, split: str, size: int, rng: np.random.Generator, rows: int
  ) -> list[_Story]:
    """Stories of at most `size` tokens, or the shortest."""
    stories = self._stories[split]
    number = bisect.bisect_right(stories, size, key=lambda x: x.size)
    return [stories[i] for i in rng.integers(max(number, 1), size=rows)]

  def _sequences(
    self,
    stories: Sequence[_Story],
    size: int,
    windows: int,
    rng: np.random.Generator,
  ) -> windows_lib.WindowBatch:
    """Stories in so many tokens at the end of so many windows."""
    contexts = [self._context(story, size, rng) for story in stories]
    length = windows * self.cfg.window
    context = np.full((len(stories), length), windows_lib.PAD, np.int32)
    mask = np.zeros(context.shape, bool)
    shape = len(stories), self._prediction
    inputs, targets = np.full((2, *shape), windows_lib.PAD, np.int32)
    input_mask, weight = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for i, (ids, story) in enumerate(zip(contexts, stories, strict=True)):
      context[i, length - len(ids) :], mask[i, length - len(ids) :] = ids, True
      end = len(story.prediction) - 1
      inputs[i, :end] = story.prediction[:-1]
      targets[i, :end] = story.prediction[1:]
      input_mask[i, :end] = True
      weight[i, end - story.answer : end] = 1.0
    cut = len(stories), windows, self.cfg.window
    return windows_lib.WindowBatch(
      context=context.reshape(cut),
      token_mask=mask.reshape(cut),
      inputs=inputs,
      input_mask=input_mask,
      targets=targets,
      weight=weight,
      depth=(weight > 0).astype(np.int32),
    )

  def _context(
    self, story: _Story, size: int, rng: np.random.Generator
  ) -> list[int]:
    """Facts and sentences of a book, `size` tokens or all facts."""
    book = babilong.from_book(
      self.cfg.books,
      self.cfg.data_dir,
      self.tokenizer,
      size - story.size,
      rng,
    )
    parts = babilong.hide(story.facts, list(book), rng)
    return [token for part in parts for token in part]

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """`accuracy` and `loss` (nats) at the last stage's number of windows.

    Right is an answer of which every token is the likeliest. The sequences are
    the same in each episode. After the last also at each of `lengths`.
    """
    metrics = self._eval(student, self.cfg.segments[-1] * self.cfg.window)
    if episode == self.episodes - 1:
      for length in self.cfg.lengths:
        at_length = self._eval(student, length)
        metrics[_metric(length)] = at_length['accuracy']
    return experience_lib.EvalResult([], metrics)

  def _eval(self, student: task_lib.Student, size: int) -> dict[str, float]:
    """Metrics over `eval_rows` sequences with contexts of `size` tokens."""
    rng = np.random.default_rng([self._seed, _EVAL, size])
    drawn = self._draw('test', size or self.row_length, rng, self.cfg.eval_rows)
    longest = max(size, *(x.size for x in drawn))
    windows = -(-longest // self.cfg.window)
    batch = self._sequences(drawn, size, windows, rng)
    predicted = student.predict(batch)
    counts = batch.weight > 0
    right = (predicted.argmax == batch.targets) | ~counts
    return {
      'accuracy': float(right.all(1).mean()),
      'loss': float(predicted.nll[counts].mean()),
    }

  def chance_level(self) -> dict[str, float]:
    """Of a guess among all labels."""
    chance = 1.0 / len(_KINDS[self.cfg.kind])
    of_length = dict.fromkeys(map(_metric, self.cfg.lengths), chance)
    return of_length | {'accuracy': chance}


def _metric(length: int) -> str:
  """The name of the accuracy at so many tokens: `accuracy@4k`."""
  if length % 1024:
    return f'accuracy@{length}'
  return f'accuracy@{length // 1024}k'
