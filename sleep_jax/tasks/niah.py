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
import uuid

import numpy as np

from sleep_jax import config
from sleep_jax.tasks import long_text

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
# By task: how values and keys are drawn, what lies around, and how many keys.
_KINDS = {
  'multikey_1': ('number', 'word', 'essay', 4),
  'multikey_2': ('number', 'word', 'needles', 1),
  'multikey_3': ('uuid', 'uuid', 'needles', 1),
}


@dataclasses.dataclass(frozen=True)
class NiahConfig(long_text.LongTextConfig):
  """Which of RULER's tasks; `context` has room for an answer of 128 tokens."""

  kind: str = 'multikey_1'  # | multikey_2 | multikey_3.
  haystack: str = ''  # A text file of essays; '' = noise.

  def __post_init__(self):
    config.lookup(self.kind, _KINDS, 'task.kind')
    if self.haystack and not pathlib.Path(self.haystack).is_file():
      raise config.ConfigError(
        f'task.haystack={self.haystack} is not a file; name a text of essays, '
        "or '' for noise."
      )


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


def make_sample(
  kind: str, size: int, essay: list[str], seed: str
) -> long_text.Sample:
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
  sample = functools.partial(
    long_text.Sample,
    before=_PROMPT.format(kind=value_kind, text='{text}'),
    question=_QUESTION.format(kind=value_kind, key=key),
    prefix=_ANSWER.format(kind=value_kind, key=key),
    answer=value,
  )
  if around == 'essay':
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    repeated = essay * (size // len(essay) + 1)
    whole = long_text.sentences(' '.join(repeated[:size]))
    places = [int(len(whole) * depth / 100) for depth in depths]
    for place, text in reversed(list(zip(places, needles))):
      whole.insert(place, text)
    return sample(' '.join(whole))
  lines = [
    needle(key=_draw(key_kind, rng), value=_draw(value_kind, rng))
    for _ in range(size)
  ]
  for place, text in zip(
    sorted(rng.sample(range(size), len(needles)), reverse=True), needles
  ):
    lines.insert(place, text)
  return sample('\n'.join(lines))


def largest(fits: Callable[[int], bool]) -> int:
  """The largest size from 1 on that fits; 0 if none does."""
  low, high = 0, 1
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


class Niah(long_text.LongText):
  """The task; see the module's docstring."""

  name = 'niah'
  Config = NiahConfig
  max_answer = 128  # What RULER leaves for it.
  cfg: NiahConfig

  def __init__(self, cfg: NiahConfig, seed: int):
    super().__init__(cfg, seed)
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
    self.make_samples()

  def sample(self, number: int) -> long_text.Sample:
    """See `LongText.sample`."""
    return self._of_size(number, self._size)

  def _of_size(self, number: int, size: int) -> long_text.Sample:
    seed = f'{self.cfg.sample_seed} {number}'
    return make_sample(self.cfg.kind, size, self._essay, seed)

  def _fits(self, size: int) -> bool:
    context = self.format.context('', self._of_size(0, size))
    return len(context.prompt) + self.max_answer <= self.cfg.context

  def is_right(self, sample: long_text.Sample, answer: str) -> bool:
    """RULER's `string_match_all`: whether the value occurs, in either case."""
    return sample.answer.lower() in answer.lower()
