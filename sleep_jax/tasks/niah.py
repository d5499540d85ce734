"""`niah`: needles in a haystack, RULER's niah_multikey_1 to 3.

"One of the special magic numbers for KEY is: VALUE." stands in a long text, and
the text is asked for one of them. Every sample is studied by a copy of the life
of its own: `icl` has the text before the question, a learner that sleeps reads
it, sleeps, and is asked with nothing in context.

Texts, questions, depths and the score are those of RULER (arXiv 2404.06654,
`scripts/data/synthetic/niah.py`): its prompt, the prefix of the answer, words
of `wonderwords`, needles in one order for all samples. Two things differ:
sentences of an essay are told apart by their punctuation, and without
`haystack` the essays are RULER's noise sentences.
"""

from collections.abc import Callable
import dataclasses
import functools
from importlib import resources
import pathlib
import random
import re
import uuid

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib

_NEEDLE = 'One of the special magic {kind}s for {key} is: {value}.'
_PROMPT = (
  'A special magic {kind} is hidden within the following text. Make sure to '
  'memorize it. I will quiz you about the {kind} afterwards.\n{text}\n'
)
_QUESTION = (
  'What is the special magic {kind} for {key} mentioned in the provided text?'
)
_ANSWER = (
  ' The special magic {kind} for {key} mentioned in the provided text is'
)
_NOISE = (
  'The grass is green. The sky is blue. The sun is yellow. Here we go. There '
  'and back again.'
)
_DEPTHS = [round(x) for x in np.linspace(0, 100, 40)]
_ORDER_SEED = 42  # Of the needles, in every sample.
_MAX_ANSWER = 128  # Tokens that RULER leaves for it.
# By task: how values and keys are drawn, what lies around, and how many keys.
_KINDS = {
  'multikey_1': ('number', 'word', 'essay', 4),
  'multikey_2': ('number', 'word', 'needles', 1),
  'multikey_3': ('uuid', 'uuid', 'needles', 1),
}


@dataclasses.dataclass(frozen=True)
class NiahConfig:
  """Which of RULER's tasks, how long, and how it is read."""

  tokenizer: str = ''  # See `tokenizers.load`; '' = the base's own.
  chat: bool = False  # Questions by its chat template, of an instruct model.
  kind: str = 'multikey_1'  # | multikey_2 | multikey_3.
  context: config.Count = 2048  # Tokens of a sample, its answer included.
  samples: config.Count = 500
  sample_seed: int = 42
  haystack: str = ''  # A text file of essays; '' = noise.
  episodes: config.Count = 1  # Each reads a text that nobody asks about.
  length: config.Count = 256  # Tokens of a row that is read.
  reads: config.Count = 1  # Times that a text is read.
  data_dir: str = ''

  def __post_init__(self):
    config.lookup(self.kind, _KINDS, 'task.kind')
    if self.context <= _MAX_ANSWER:
      raise config.ConfigError(
        f'task.context={self.context} must be above {_MAX_ANSWER}, which an '
        'answer may take.'
      )
    if self.haystack and not pathlib.Path(self.haystack).is_file():
      raise config.ConfigError(
        f'task.haystack={self.haystack} is not a file; name a text of essays, '
        "or '' for noise."
      )


@dataclasses.dataclass(frozen=True)
class Sample:
  """A text with its needles, and the key and value that it is asked for."""

  text: str
  key: str
  value: str


@functools.cache
def words() -> list[str]:
  """RULER's keys: every adjective with every noun of `wonderwords`.

  Raises:
    ConfigError: if that package is not installed.
  """
  try:
    folder = resources.files('wonderwords') / 'assets'
  except ModuleNotFoundError as e:
    raise config.ConfigError(
      'task.kind: the keys of RULER are of the package wonderwords, which is '
      "not installed; run: pip install 'sleep_jax[niah]'."
    ) from e
  adjectives, nouns = (
    (folder / f'{kind}list.txt').read_text().split('\n')
    for kind in ('adjective', 'noun')
  )
  return sorted({f'{a}-{n}' for a in adjectives if a for n in nouns if n})


def _draw(kind: str, rng: random.Random) -> str:
  if kind == 'number':
    return str(rng.randint(10**6, 10**7 - 1))
  if kind == 'uuid':
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
  return rng.choice(words())


def sentences(text: str) -> list[str]:
  """A text's sentences, white space collapsed."""
  return re.split(r'(?<=[.!?])\s+', ' '.join(text.split()))


def make_sample(kind: str, size: int, essay: list[str], seed: str) -> Sample:
  """One sample.

  Args:
    kind: of `_KINDS`.
    size: words of the essay, or needles around the one that is asked for.
    essay: words, repeated as often as it takes.
    seed: of all draws; a larger size has the same needles.
  """
  value_kind, key_kind, around, keys = _KINDS[kind]
  rng = random.Random(seed)
  needle = functools.partial(_NEEDLE.format, kind=value_kind)
  pairs = [(_draw(key_kind, rng), _draw(value_kind, rng)) for _ in range(keys)]
  needles = [needle(key=key, value=value) for key, value in pairs]
  random.Random(_ORDER_SEED).shuffle(needles)
  key, value = rng.choice(pairs)
  if around == 'essay':
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    repeated = essay * (size // len(essay) + 1)
    whole = sentences(' '.join(repeated[:size]))
    places = [int(len(whole) * depth / 100) for depth in depths]
    for place, text in reversed(list(zip(places, needles))):
      whole.insert(place, text)
    return Sample(' '.join(whole), key, value)
  lines = [
    needle(key=_draw(key_kind, rng), value=_draw(value_kind, rng))
    for _ in range(size)
  ]
  for place, text in zip(
    sorted(rng.sample(range(size), len(needles)), reverse=True), needles
  ):
    lines.insert(place, text)
  return Sample('\n'.join(lines), key, value)


def largest(fits: Callable[[int], bool]) -> int:
  """The largest size from 1 on that fits; 0 if none does."""
  low, high = 0, 1
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


class NiahFormat:
  """Samples as contexts; see `contexts.SelfEditFormat`."""

  def __init__(self, cfg: NiahConfig, tokenizer: tokenizers.Tokenizer):
    self._cfg, self._tokenizer = cfg, tokenizer
    self._kind = _KINDS[cfg.kind][0]
    self._chat = tokenizers.chat_of(tokenizer) if cfg.chat else None
    self.max_dream, self.max_answer = cfg.context, _MAX_ANSWER
    self.stop = tokenizer.stop

  def context(self, number: int, sample: Sample) -> contexts.Context:
    """A sample as tokens; its question has no text before it."""
    stop = [self.stop] if self.stop >= 0 else []
    return contexts.Context(
      name=f'sample {number}',
      prompt=self._prompt(sample, sample.text),
      questions=[self._prompt(sample)],
      answers=[[*self._tokenizer.encode(f' {sample.value}.'), *stop]],
      source=sample,
    )

  def _prompt(self, sample: Sample, text: str = '') -> contexts.TokenIds:
    """The question, after `text` if there is one, and its answer's prefix."""
    names = dict(kind=self._kind, key=sample.key)
    before = _PROMPT.format(kind=self._kind, text=text) if text else ''
    asked, answer = before + _QUESTION.format(**names), _ANSWER.format(**names)
    if self._chat is not None:
      return [
        *self._chat.prompt(asked),
        *self._tokenizer.encode(answer.strip()),
      ]
    return [self._tokenizer.bos, *self._tokenizer.encode(asked + answer)]

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
    """RULER's `string_match_all`: whether the value occurs, in either case."""
    value = context.source.value.lower()
    texts = (self._tokenizer.decode(ids).lower() for ids in answers)
    return np.array([float(value in text) for text in texts])

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The text, and then the question."""
    del question  # There is one.
    return self._prompt(context.source, context.source.text)


class Niah(task_lib.Task):
  """The task; see the module's docstring. The seed is of the rows' order."""

  name = 'niah'
  Config = NiahConfig
  columns = ('accuracy', 'unread')
  headline = ('accuracy',)
  format: NiahFormat

  def __init__(self, cfg: NiahConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self.format = NiahFormat(cfg, self.tokenizer)
    text = pathlib.Path(cfg.haystack).read_text() if cfg.haystack else _NOISE
    self._essay = text.split()
    if not self._essay:
      raise config.ConfigError(
        f'task.haystack={cfg.haystack} has no words; name another text.'
      )
    self._size = largest(self._fits)
    if not self._size:
      raise config.ConfigError(
        f'task.context={cfg.context} tokens hold no sample of {cfg.kind}; '
        'raise it.'
      )
    self._samples = tuple(map(self._context, range(cfg.samples)))

  def _sample(self, number: int, size: int) -> Sample:
    seed = f'{self.cfg.sample_seed} {number}'
    return make_sample(self.cfg.kind, size, self._essay, seed)

  def _fits(self, size: int) -> bool:
    context = self.format.context(0, self._sample(0, size))
    return len(context.prompt) + _MAX_ANSWER <= self.cfg.context

  def _context(self, number: int) -> contexts.Context:
    return self.format.context(number, self._sample(number, self._size))

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
    questions = [c.questions[0] for c in self._samples]
    answers = student.complete(questions, _MAX_ANSWER)
    metrics = {'unread': self._grade(answers)}
    if episode == self.episodes - 1:
      studied = student.study(
        [contexts.StudyRequest((c,)) for c in self._samples]
      )
      metrics['accuracy'] = self._grade(
        [attempts[0][0] for attempts in studied]
      )
    return experience_lib.EvalResult([], metrics)

  def _grade(self, answers: list[contexts.TokenIds]) -> float:
    grades = [
      self.format.grade(context, [answer])
      for context, answer in zip(self._samples, answers, strict=True)
    ]
    return float(np.mean(grades))
