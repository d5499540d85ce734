"""Questions about long texts, in context or read into weights.

Each sample is a text with one question. It is studied by a copy of the life of
its own: `icl` has the text before the question; a learner that sleeps reads it,
sleeps, and is asked with nothing in context. A task is a subclass that makes
samples and grades answers.
"""

import abc
from collections.abc import Callable
import dataclasses
import re

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib


@dataclasses.dataclass(frozen=True)
class LongTextConfig:
  """How long texts are, and how they are read."""

  tokenizer: str = ''  # See `tokenizers.load`; '' = the base's own.
  chat: bool = False  # Questions by its chat template, of an instruct model.
  context: config.Count = 2048  # Tokens of a sample.
  samples: config.Count = 500
  sample_seed: int = 42
  episodes: config.Count = 1  # Each reads a text that nobody asks about.
  length: config.Count = 256  # Tokens of a row that is read.
  reads: config.Count = 1  # Times that a text is read.
  data_dir: str = ''


@dataclasses.dataclass(frozen=True)
class Sample:
  """A text and its question, as strings.

  text: what is read.
  before: what stands before the question in context, with `{text}` in it.
  question: asked in context and without.
  prefix: of the answer, given to the model; may be ''.
  answer: the right one.
  """

  text: str
  before: str
  question: str
  prefix: str
  answer: str


def sentences(text: str) -> list[str]:
  """A text's sentences, white space collapsed."""
  return re.split(r'(?<=[.!?])\s+', ' '.join(text.split()))


class LongTextFormat:
  """Samples as contexts; see `contexts.SelfEditFormat`.

  Args:
    cfg: of the task.
    tokenizer: of the base.
    max_answer: tokens of the longest answer.
    grade: (sample, answer) -> whether it is right.
  """

  def __init__(
    self,
    cfg: LongTextConfig,
    tokenizer: tokenizers.Tokenizer,
    max_answer: int,
    grade: Callable[[Sample, str], bool],
  ):
    self._cfg, self._tokenizer, self._grade = cfg, tokenizer, grade
    self._chat = tokenizers.chat_of(tokenizer) if cfg.chat else None
    self.max_dream, self.max_answer = cfg.context, max_answer
    self.stop = tokenizer.stop

  def context(self, name: str, sample: Sample) -> contexts.Context:
    """A sample as tokens; its question has no text before it."""
    stop = [self.stop] if self.stop >= 0 else []
    return contexts.Context(
      name=name,
      prompt=self._prompt(sample, with_text=True),
      questions=[self._prompt(sample)],
      answers=[[*self._tokenizer.encode(f' {sample.answer}'), *stop]],
      source=sample,
    )

  def _prompt(
    self, sample: Sample, with_text: bool = False
  ) -> contexts.TokenIds:
    """The question, perhaps after its text, and the answer's prefix."""
    asked = sample.question
    if with_text:
      asked = sample.before.format(text=sample.text) + asked
    encode = self._tokenizer.encode
    if self._chat is not None:
      return [*self._chat.prompt(asked), *encode(sample.prefix)]
    between = ' ' if sample.prefix else ''
    text = f'{asked}{between}{sample.prefix}'
    return [self._tokenizer.bos, *encode(text)]

  def parse(
    self, context: contexts.Context, dream: contexts.TokenIds
  ) -> contexts.TrainingRows | contexts.Rejected:
    """A dream as it is, in rows."""
    del context
    return self._rows(dream) if dream else contexts.Rejected('empty')

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    """The text, in rows, `reads` times."""
    rows = self._rows(self._tokenizer.encode(context.source.text))
    return contexts.concat([rows] * self._cfg.reads)

  def _rows(self, ids: contexts.TokenIds) -> contexts.TrainingRows:
    size = self._cfg.length - 1
    count = -(-len(ids) // size)
    tokens = np.full((count, size + 1), self._tokenizer.pad, np.int32)
    weight = np.zeros(tokens.shape, np.float32)
    tokens[:, 0] = self._tokenizer.bos
    for i in range(count):
      part = ids[i * size : (i + 1) * size]
      tokens[i, 1 : len(part) + 1] = part
      weight[i, 1 : len(part) + 1] = 1.0
    return contexts.TrainingRows(tokens, weight)

  def grade(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """Of each answer 1 or 0."""
    texts = map(self._tokenizer.decode, answers)
    return np.array([float(self._grade(context.source, t)) for t in texts])

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The text, and then the question."""
    del question  # There is one.
    return context.prompt


class LongText(task_lib.Task, abc.ABC):
  """Samples to study one by one. The seed is of the rows' order.

  A subclass has `name` and `Config`, a `LongTextConfig`, and calls
  `make_samples` once it can.

  max_answer: tokens of the longest answer.
  """

  columns = ('accuracy', 'unread')
  headline = ('accuracy',)
  format: LongTextFormat
  max_answer: int

  def __init__(self, cfg: LongTextConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self.format = LongTextFormat(
      cfg, self.tokenizer, self.max_answer, self.is_right
    )
    self.samples: tuple[contexts.Context, ...] = ()

  @abc.abstractmethod
  def sample(self, number: int) -> Sample:
    """Sample `number`; below 0 are texts that nobody asks about."""

  @abc.abstractmethod
  def is_right(self, sample: Sample, answer: str) -> bool:
    """Whether an answer counts."""

  def make_samples(self) -> None:
    """Fills `samples`."""
    self.samples = tuple(map(self._context, range(self.cfg.samples)))

  def _context(self, number: int) -> contexts.Context:
    return self.format.context(f'sample {number}', self.sample(number))

  def experience(self, episode: int) -> experience_lib.Experience:
    """A text of the same kind that is not among the samples."""
    rows = self.format.from_context(self._context(-1 - episode))
    order = np.random.default_rng([self._seed, episode]).permutation(
      len(rows.tokens)
    )
    return experience_lib.Experience(rows.tokens[order], rows.weight[order])

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """`accuracy` after each text was studied; `unread`, with none, a control.

    Only the last evaluation has the former, for its cost.
    """
    questions = [context.questions[0] for context in self.samples]
    answers = student.complete(questions, self.max_answer)
    metrics = {'unread': self._share_right(answers)}
    if episode == self.episodes - 1:
      studied = student.study(
        [contexts.StudyRequest((context,)) for context in self.samples]
      )
      answers = [attempts[0][0] for attempts in studied]
      metrics['accuracy'] = self._share_right(answers)
    return experience_lib.EvalResult([], metrics)

  def _share_right(self, answers: list[contexts.TokenIds]) -> float:
    grades = [
      self.format.grade(context, [answer])
      for context, answer in zip(self.samples, answers, strict=True)
    ]
    return float(np.mean(grades))
