"""`babilong`: facts of bAbI between the sentences of a book.

A question of bAbI, and the facts that precede it, hidden in a text of so many
tokens (`long_text`). Samples are made and scored as in BABILong (arXiv
2406.10149, github.com/booydar/babilong): sentences of ten tokens or more from a
random place in a random book, as many as leave room for the facts, the last one
cut; a place for each fact drawn with replacement, in the order of the story;
right is an answer whose first sentence names the target and no other label but
those of the question.

Three things differ. Books are Project Gutenberg's (`data.datasets.gutenberg`)
or those of a folder, PG19's say; sentences are told apart by their punctuation;
and an instruct model gets an instruction of our own, without examples.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
from typing import TypeVar

import numpy as np

from sleep_jax import config
from sleep_jax.data import datasets
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg
from sleep_jax.tasks import long_text

_Text = TypeVar('_Text', str, list[int])

_PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
LABELS = {
  **dict.fromkeys(('qa1', 'qa2', 'qa3', 'qa4'), _PLACES),
  'qa5': ('bill', 'fred', 'jeff', 'mary', 'apple', 'football', 'milk'),
}
_INSTRUCTION = (
  'Between the sentences of a book there are a few facts about people, things '
  'and places. Answer the question by these facts alone, with one word.\n'
  '{text}\n'
)
_SHORTEST = 10  # Tokens of a sentence of a book.
_PART = 1000  # Characters that have a whole sentence, but for odd places.


@dataclasses.dataclass(frozen=True)
class BabilongConfig(long_text.LongTextConfig):
  """Which question of bAbI; `context` are tokens of facts and book."""

  kind: str = 'qa1'  # To qa5.
  split: str = 'test'  # Of bAbI. BABILong's own samples are of `train`.
  books: str = ''  # A folder of .txt files; '' = Project Gutenberg's.

  def __post_init__(self):
    config.lookup(self.kind, LABELS, 'task.kind')
    config.lookup(self.split, dict.fromkeys(('train', 'test')), 'task.split')
    if (self.kind, self.split) == ('qa3', 'train'):
      raise config.ConfigError(
        'task.split=train: of qa3 there is no training file here; use '
        'task.split=test, or another task.kind.'
      )


def is_right(target: str, answer: str, question: str, kind: str) -> bool:
  """BABILong's rule, see the module's docstring."""
  first = answer.lower().split('.')[0]
  first = first.split('<context>')[0].split('<example>')[0]
  labels = {label for label in LABELS[kind] if label not in question.lower()}
  return {label for label in labels if label in first} == {target.lower()}


def hide(
  facts: list[_Text], sentences: list[_Text], rng: np.random.Generator
) -> list[_Text]:
  """All of them; the facts, in order, each before a sentence or at the end."""
  places = np.sort(rng.choice(len(sentences) + 1, len(facts)))
  parts: list[list[_Text]] = [[] for _ in range(len(sentences) + 1)]
  for place, fact in zip(places, facts):
    parts[place].append(fact)
  for part, sentence in zip(parts, sentences):
    part.append(sentence)
  return [text for part in parts for text in part]


def from_book(
  folder: str,
  data_dir: str,
  tokenizer: tokenizers.Tokenizer,
  room: int,
  rng: np.random.Generator,
) -> Iterator[list[int]]:
  """Sentences of a random book from a random place on, `room` tokens.

  Args:
    folder: of books; '' = Project Gutenberg's.
    data_dir: see `download.data_dir`.
    tokenizer: of the sentences, each of which follows another.
    room: tokens in all; none if it is not positive.
    rng: randomness.
  """
  books = _books(folder, data_dir)
  while room > 0:
    book = books[rng.integers(len(books))]
    start = int(rng.integers(len(book)))
    part = book[start : start + max(10 * room, _PART)]
    for sentence in long_text.sentences(part)[1:-1]:
      ids = tokenizer.encode(f' {sentence}')
      if len(ids) < _SHORTEST:
        continue
      yield ids[:room]
      room -= len(ids)
      if room <= 0:
        return


class Babilong(long_text.LongText):
  """The task; see the module's docstring."""

  name = 'babilong'
  Config = BabilongConfig
  max_answer = 20
  cfg: BabilongConfig

  def __init__(self, cfg: BabilongConfig, seed: int):
    super().__init__(cfg, seed)
    records = datasets.load(f'babi/{cfg.kind}', cfg.split, cfg.data_dir)
    # BABILong's public sets leave out stories with more facts.
    most = (cfg.context - 300) // 8 if cfg.context > 300 else len(records)
    self._records = [r for r in records if len(r['facts']) <= most]
    if cfg.samples + cfg.episodes > len(self._records):
      raise config.ConfigError(
        f'task.samples={cfg.samples} and a text for each of task.episodes='
        f'{cfg.episodes}, but there are {len(self._records)} stories of '
        f'{cfg.kind} that fit task.context={cfg.context}; lower them.'
      )
    self.make_samples()

  def sample(self, number: int) -> long_text.Sample:
    """See `LongText.sample`."""
    rng = np.random.default_rng([self.cfg.sample_seed, number % 2**32])
    record = self._records[number]
    room = self.cfg.context - sum(map(self._count, record['facts']))
    ids = from_book(
      self.cfg.books, self.cfg.data_dir, self.tokenizer, room, rng
    )
    book = [self.tokenizer.decode(sentence).strip() for sentence in ids]
    text = ' '.join(hide(record['facts'], book, rng))
    return long_text.Sample(
      text,
      before=_INSTRUCTION if self.cfg.chat else '{text} ',
      question=record['question'],
      prefix='',
      answer=record['answer'],
    )

  def _count(self, text: str) -> int:
    return len(self.tokenizer.encode(f' {text}'))

  def is_right(self, sample: long_text.Sample, answer: str) -> bool:
    """By `is_right`."""
    return is_right(sample.answer, answer, sample.question, self.cfg.kind)


@functools.lru_cache(2)
def _books(folder: str, data_dir: str) -> list[str]:
  """The texts of all books.

  Raises:
    ConfigError: if the folder has none.
  """
  if not folder:
    return [
      download.read(file, data_dir).decode()
      for _, file in sorted(gutenberg.BOOKS.items())
    ]
  files = sorted(pathlib.Path(folder).glob('*.txt'))
  if not files:
    raise config.ConfigError(
      f'task.books={folder} has no .txt files; name a folder of books.'
    )
  return [file.read_text(encoding='utf-8') for file in files]
