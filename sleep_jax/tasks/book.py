"""`book`: a real book, read stretch by stretch, once.

A day is a stretch of the book in reading order, cut into rows of `length`
tokens. Every tenth row of a stretch is held out: nobody ever reads it. The exam
asks for each of its tokens, from BOS on and with the rest of the book out of
sight, and does the same on rows that were read, on the text that follows the
last day, and on text of the kind that the base was trained on. Where in the
book a life begins is drawn by seed.
"""

import dataclasses
import itertools
import re

import numpy as np

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import catalog
from sleep_jax.data.datasets import gutenberg
from sleep_jax.tasks import base as task_lib

_HELD_OUT = 10  # One row of so many.
_END_OF_STORY = re.compile(r'<\|endoftext\|>')


@dataclasses.dataclass(frozen=True)
class BookConfig:
  """Which book, and how much of it is a day."""

  book: str = 'gutenberg/Pride-and-Prejudice_1342.txt'  # Listed, or a path.
  known: str = 'tinystories/tinystories_10k.txt'  # What the base knows.
  tokenizer: str = 'stories260k/tok512.bin'
  episodes: int = 3
  rows: int = 360  # Read in a day; a ninth of that is held out besides.
  length: int = 128  # Tokens of a row, BOS included.
  ahead: int = 64  # Rows after the last day that nobody reads.
  known_rows: int = 128
  read_probes: int = 40  # Rows of each day that the exam asks again.
  data_dir: str = ''

  def __post_init__(self):
    if self.rows % (_HELD_OUT - 1):
      raise config.ConfigError(
        f'task.rows={self.rows} is not a multiple of {_HELD_OUT - 1}: one row '
        f'of {_HELD_OUT} is held out.'
      )
    if self.read_probes > self.rows:
      raise config.ConfigError(
        f'task.read_probes={self.read_probes} is more than task.rows='
        f'{self.rows}.'
      )


class Book:
  """The task; see the module's docstring."""

  def __init__(self, cfg: BookConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    tok = self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    day = cfg.rows * _HELD_OUT // (_HELD_OUT - 1)
    text = catalog.read(cfg.book, cfg.data_dir).decode('utf-8')
    ids = tok.encode('\n'.join(gutenberg.paragraphs(text)))
    needed = (day * cfg.episodes + cfg.ahead) * (cfg.length - 1)
    if needed > len(ids):
      raise config.ConfigError(
        f'{cfg.book} has {len(ids)} tokens, and {cfg.episodes} days of '
        f'{cfg.rows} rows need {needed}; lower task.episodes, task.rows or '
        'task.length.'
      )
    first = int(
      np.random.default_rng([seed, 1]).integers(0, len(ids) - needed + 1)
    )
    rows = self._rows(np.array(ids[first : first + needed], np.int32))
    days, self._ahead = np.split(rows, [day * cfg.episodes])
    held_out = np.arange(day) % _HELD_OUT == _HELD_OUT - 1
    days = days.reshape(cfg.episodes, day, cfg.length)
    self._read, self._held_out = days[:, ~held_out], days[:, held_out]
    self._known = self._known_rows()

  def _rows(self, ids: np.ndarray) -> np.ndarray:
    """A stream as rows that each begin with BOS, `[N, length]`."""
    rows = ids.reshape(-1, self.cfg.length - 1)
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=self.tokenizer.bos)

  def _known_rows(self) -> np.ndarray:
    """How documents of the kind that the base was trained on begin."""
    cfg, room = self.cfg, self.cfg.length - 1
    text = catalog.read(cfg.known, cfg.data_dir).decode('utf-8')
    stories = _END_OF_STORY.split(text)
    order = np.random.default_rng([self._seed, 2]).permutation(len(stories))
    encoded = (self.tokenizer.encode(stories[i].strip()) for i in order)
    long = (ids[:room] for ids in encoded if len(ids) >= room)
    found = list(itertools.islice(long, cfg.known_rows))
    if len(found) < cfg.known_rows:
      raise config.ConfigError(
        f'{cfg.known} has {len(found)} documents of {room} tokens, and task.'
        f'known_rows={cfg.known_rows}; lower that or task.length.'
      )
    return self._rows(np.array(found, np.int32))

  def experience(self, episode: int) -> experience_lib.Experience:
    tokens = self._read[episode]
    return experience_lib.Experience(tokens, np.ones(tokens.shape, np.float32))

  def exam(
    self, respond: task_lib.Respond, episode: int
  ) -> experience_lib.EvalResult:
    seen = slice(0, episode + 1)
    rng = np.random.default_rng([self._seed, 3])
    again = rng.permutation(self.cfg.rows)[: self.cfg.read_probes]
    groups = {
      **{f'day {i}': rows for i, rows in enumerate(self._held_out[seen])},
      'read': self._read[seen][:, again].reshape(-1, self.cfg.length),
      'ahead': self._ahead,
      'known': self._known,
    }
    rows = np.concatenate(list(groups.values()))
    got = respond([[int(row[0])] for row in rows], rows[:, 1:].tolist())
    ends = np.cumsum([len(rows) for rows in groups.values()])[:-1]
    logprob = dict(zip(groups, np.split(got.answer_logprob, ends)))
    right = dict(zip(groups, np.split(got.token_accuracy, ends)))

    def perplexity(*names: str) -> float:
      logp = np.concatenate([logprob[n] for n in names]).astype(np.float64)
      return float(np.exp(-logp.mean() / (self.cfg.length - 1)))

    days = [name for name in groups if name.startswith('day')]
    by_episode = [float(right[name].mean()) for name in days]
    return experience_lib.EvalResult(
      by_episode=by_episode,
      metrics={
        'held_out_ppl': perplexity(*days),
        'first_ppl': perplexity(days[0]),
        'newest_ppl': perplexity(days[-1]),
        'read_ppl': perplexity('read'),
        'ahead_ppl': perplexity('ahead'),
        'known_ppl': perplexity('known'),
        'accuracy': float(np.mean(by_episode)),
        'known_accuracy': float(right['known'].mean()),
      },
    )
