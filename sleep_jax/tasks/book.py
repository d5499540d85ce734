"""`book`: a book in consecutive parts, each read once.

An episode is a part of the book in reading order, cut into rows of `length`
tokens. Every tenth row is held out and in no stream. The evaluation predicts
each token of the held-out rows, with only the row itself as context, and does
the same on rows that were read, on the text that follows the last episode, and
on text of the base's pretraining distribution. The position in the book at
which a life begins is drawn by seed.
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
  """The book, and the size of an episode and of the evaluation."""

  book: str = 'gutenberg/Pride-and-Prejudice_1342.txt'  # Listed, or a path.
  known: str = 'tinystories/tinystories_10k.txt'  # As the base's pretraining.
  tokenizer: str = 'stories260k/tok512.bin'
  episodes: config.Count = 3
  # Read in an episode; a ninth of that is held out besides.
  rows: config.Count = 360
  length: config.Count = 128  # Tokens of a row, BOS included.
  ahead: config.Count = 64  # Rows after the last episode, in no stream.
  known_rows: config.Count = 128
  # Rows of each episode's stream in an evaluation.
  read_probes: config.Count = 40
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


class Book(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'book'
  Config = BookConfig
  columns = ('held_out_ppl', 'ahead_ppl', 'read_ppl', 'known_ppl', 'accuracy')
  headline = ('held_out_ppl', 'ahead_ppl', 'known_ppl')

  def __init__(self, cfg: BookConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    tok = self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    per_episode = cfg.rows * _HELD_OUT // (_HELD_OUT - 1)
    text = catalog.read_text(cfg.book, cfg.data_dir)
    ids = tok.encode('\n'.join(gutenberg.paragraphs(text)))
    needed = (per_episode * cfg.episodes + cfg.ahead) * (cfg.length - 1)
    if needed > len(ids):
      raise config.ConfigError(
        f'{cfg.book} has {len(ids)} tokens, and {cfg.episodes} episodes of '
        f'{cfg.rows} rows need {needed}; lower task.episodes, task.rows or '
        'task.length.'
      )
    first = int(
      np.random.default_rng([seed, 1]).integers(0, len(ids) - needed + 1)
    )
    rows = self._rows(np.array(ids[first : first + needed], np.int32))
    rows, self._ahead = np.split(rows, [per_episode * cfg.episodes])
    held_out = np.arange(per_episode) % _HELD_OUT == _HELD_OUT - 1
    rows = rows.reshape(cfg.episodes, per_episode, cfg.length)
    self._read, self._held_out = rows[:, ~held_out], rows[:, held_out]
    self._known = self._known_rows()

  def _rows(self, ids: np.ndarray) -> np.ndarray:
    """A stream as rows that each begin with BOS, `[N, length]`."""
    rows = ids.reshape(-1, self.cfg.length - 1)
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=self.tokenizer.bos)

  def _known_rows(self) -> np.ndarray:
    """The beginnings of `known_rows` documents, `[known_rows, length]`."""
    cfg, size = self.cfg, self.cfg.length - 1
    text = catalog.read_text(cfg.known, cfg.data_dir)
    stories = _END_OF_STORY.split(text)
    order = np.random.default_rng([self._seed, 2]).permutation(len(stories))
    encoded = (self.tokenizer.encode(stories[i].strip()) for i in order)
    beginnings = (ids[:size] for ids in encoded if len(ids) >= size)
    rows = list(itertools.islice(beginnings, cfg.known_rows))
    if len(rows) < cfg.known_rows:
      raise config.ConfigError(
        f'{cfg.known} has {len(rows)} documents of {size} tokens, and task.'
        f'known_rows={cfg.known_rows}; lower that or task.length.'
      )
    return self._rows(np.array(rows, np.int32))

  def experience(self, episode: int) -> experience_lib.Experience:
    """The episode's rows in reading order, held-out ones left out."""
    tokens = self._read[episode]
    return experience_lib.Experience(tokens, np.ones(tokens.shape, np.float32))

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Perplexity per token, and the share of tokens predicted first.

    held_out_ppl, first_ppl, last_ppl: of the held-out rows of all episodes so
      far, of the first and of the newest one.
    read_ppl, ahead_ppl, known_ppl: see the module's docstring.
    accuracy: `by_episode`, mean; known_accuracy: on `known_ppl`'s rows.
    """
    past = slice(0, episode + 1)
    rng = np.random.default_rng([self._seed, 3])
    probes = rng.permutation(self.cfg.rows)[: self.cfg.read_probes]
    groups = {
      **{f'episode {i}': rows for i, rows in enumerate(self._held_out[past])},
      'read': self._read[past][:, probes].reshape(-1, self.cfg.length),
      'ahead': self._ahead,
      'known': self._known,
    }
    rows = np.concatenate(list(groups.values()))
    response = student.respond(
      [[int(row[0])] for row in rows], rows[:, 1:].tolist()
    )
    ends = np.cumsum([len(rows) for rows in groups.values()])[:-1]
    logprob = dict(zip(groups, np.split(response.answer_logprob, ends)))
    accuracy = dict(zip(groups, np.split(response.token_accuracy, ends)))

    def perplexity(*names: str) -> float:
      logp = np.concatenate([logprob[n] for n in names]).astype(np.float64)
      return float(np.exp(-logp.mean() / (self.cfg.length - 1)))

    episodes = [name for name in groups if name.startswith('episode')]
    by_episode = [float(accuracy[name].mean()) for name in episodes]
    return experience_lib.EvalResult(
      by_episode=by_episode,
      metrics={
        'held_out_ppl': perplexity(*episodes),
        'first_ppl': perplexity(episodes[0]),
        'last_ppl': perplexity(episodes[-1]),
        'read_ppl': perplexity('read'),
        'ahead_ppl': perplexity('ahead'),
        'known_ppl': perplexity('known'),
        'accuracy': float(np.mean(by_episode)),
        'known_accuracy': float(accuracy['known'].mean()),
      },
    )
