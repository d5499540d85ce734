"""`corpus`: the pretraining data of a base model.

Streams are drawn while they are read; all tokens are targets. The evaluation is
the mean loss on held-out rows, in nats per token. Which corpus: `corpus=`

arc, bulletins, facts, translation: documents of the base of `arc_few_shot`
  (synthetic), of `bulletins`, of `facts` and of `translation`.
text: rows from old novels, each row beginning where a paragraph does; those of
  the books in `held_out` are held out. If the file `tokenizer` does not exist,
  a sentencepiece vocabulary of `vocab` pieces is trained on the other books.
facts_windows: the sequences of a hybrid base of `facts`, in windows. The
  maximum number of new entities of a sequence grows linearly over the first
  three fifths of the episodes, from the first of `new_entities` to the second.
"""

from collections.abc import Callable
import dataclasses
import pathlib

import numpy as np
import sentencepiece

from sleep_jax import config
from sleep_jax.data import assets
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import bulletins
from sleep_jax.tasks import facts
from sleep_jax.tasks import translation
from sleep_jax.tasks.arc import synthetic

_GROWTH = 0.6  # Share of the episodes in which `new_entities` grows.
# Second entry of the seed of a generator.
_HELD_OUT, _STREAM = 1, 2

Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """The corpus, and the size of an episode and of the evaluation."""

  corpus: str = 'facts'  # arc, bulletins, text, translation, facts_windows.
  episodes: config.Count = 10  # Evaluations.
  rows: config.Count = 12_800  # Of an episode; facts_windows has no end.
  length: config.Count = 64  # Tokens of a row, or of a window.
  wordings: config.Count = 1  # Of facts, see `facts.FactsConfig`.
  eval_rows: config.Count = 640
  windows: config.Count = 4  # Of facts_windows: the most that a sequence has.
  new_entities: tuple[int, int] = (1, 8)  # Of facts_windows: first, last.
  held_out: tuple[str, ...] = ('Great-Expectations_1400',)  # Of text.
  tokenizer: str = 'sleep_jax/assets/text.model'  # Of text.
  vocab: config.Count = 1024  # Of text: pieces, if the tokenizer is trained.
  data_dir: str = ''

  def __post_init__(self):
    for name in ('new_entities', 'held_out'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    options = dict.fromkeys((*_CORPORA, 'facts_windows'))
    config.lookup(self.corpus, options, 'task.corpus')
    if self.length < 2:
      raise config.ConfigError(
        f'task.length={self.length}: a row of one token has no target; use 2 '
        'or more.'
      )
    if len(self.new_entities) != 2 or not (
      1 <= self.new_entities[0] <= self.new_entities[1]
    ):
      raise config.ConfigError(
        f'task.new_entities={self.new_entities} must be two numbers, '
        '1 <= first <= last.'
      )
    if self.corpus == 'text' and not self.held_out:
      raise config.ConfigError(
        'task.held_out is empty; name at least one book to evaluate on.'
      )
    for name in self.held_out:
      config.lookup(name, gutenberg.BOOKS, 'task.held_out')


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows `[rows, length]` int32 for training and for evaluation."""

  tokenizer: tokenizers.Tokenizer
  draw: Draw
  draw_held_out: Draw


def _arc(cfg: CorpusConfig) -> Source:
  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return synthetic.pretraining_rows(rng, rows, cfg.length)

  return Source(synthetic.build_tokenizer(), draw, draw)


def _bulletins(cfg: CorpusConfig) -> Source:
  world = bulletins.World(bulletins.BulletinsConfig())

  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return bulletins.pretraining_rows(world, rng, rows, cfg.length)

  return Source(world.tokenizer, draw, draw)


def _facts(cfg: CorpusConfig) -> Source:
  tokenizer = facts.build_tokenizer(cfg.wordings)
  encoder = facts.FactEncoder(tokenizer, cfg.wordings)
  facts_cfg = facts.FactsConfig(length=cfg.length, wordings=cfg.wordings)

  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return facts.pretraining_rows(encoder, facts_cfg, rng, rows)

  return Source(tokenizer, draw, draw)


def _text(cfg: CorpusConfig) -> Source:
  train, held_out = [], []
  for name, file in gutenberg.BOOKS.items():
    text = download.read(file, cfg.data_dir).decode()
    (held_out if name in cfg.held_out else train).append(text)
  path = assets.find(cfg.tokenizer)
  if not path.exists():
    train_tokenizer(train, path, cfg.vocab)
  tokenizer = tokenizers.load(path, cfg.data_dir)
  return Source(
    tokenizer,
    _paragraph_rows(train, tokenizer, cfg.length),
    _paragraph_rows(held_out, tokenizer, cfg.length),
  )


def _translation(cfg: CorpusConfig) -> Source:
  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return translation.pretraining_rows(rng, rows, cfg.length)

  return Source(translation.build_tokenizer(), draw, draw)


_CORPORA = {
  'arc': _arc,
  'bulletins': _bulletins,
  'facts': _facts,
  'text': _text,
  'translation': _translation,
}


def train_tokenizer(texts: list[str], path: pathlib.Path, vocab: int) -> None:
  """Writes a sentencepiece vocabulary with padding 0, BOS 1 and EOS 2.

  Args:
    texts: what it is trained on.
    path: of the `.model` file.
    vocab: number of pieces.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [line for text in texts for line in text.splitlines() if line.strip()]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=str(path.with_suffix('')),
    vocab_size=vocab,
    model_type='bpe',
    byte_fallback=True,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    input_sentence_size=100_000,
    shuffle_input_sentence=False,
    minloglevel=2,
  )
  path.with_suffix('.vocab').unlink()


def _paragraph_rows(
  texts: list[str], tokenizer: tokenizers.Tokenizer, length: int
) -> Draw:
  """Rows of BOS and the text from the beginning of a random paragraph.

  Paragraphs are concatenated, each with a stop token.
  """
  parts = [
    [*tokenizer.encode(p), tokenizer.stop]
    for text in texts
    for p in gutenberg.paragraphs(text)
  ]
  ids = np.concatenate(parts).astype(np.int32)
  # The first paragraph is left out: BOS takes the place of the token before.
  starts = np.cumsum([0, *(len(p) for p in parts)])[1:-1]
  starts = starts[starts < len(ids) - length]

  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    start = rng.choice(starts, rows)[:, None]
    tokens = ids[start + np.arange(length) - 1]
    tokens[:, 0] = tokenizer.bos
    return tokens

  return draw


class Corpus(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'corpus'
  Config = CorpusConfig
  columns = headline = ('held_out_loss',)

  def __init__(self, cfg: CorpusConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    # The windows of `facts` have its tokenizer.
    self._source = _CORPORA.get(cfg.corpus, _facts)(cfg)
    self.tokenizer = self._source.tokenizer

  def experience(self, episode: int) -> experience_lib.AnyExperience:
    """Rows, or an endless stream of windows; all tokens are targets."""
    seed = (self._seed, _STREAM, episode)
    if self.cfg.corpus == 'facts_windows':
      return experience_lib.WindowStream(self._draw_windows(episode), seed)
    return experience_lib.LazyExperience(self.cfg.rows, self._draw, seed)

  def _draw(
    self, rng: np.random.Generator, rows: int
  ) -> tuple[np.ndarray, np.ndarray]:
    tokens = self._source.draw(rng, rows)
    return tokens, np.ones(tokens.shape, np.float32)

  def _draw_windows(
    self, episode: int
  ) -> Callable[[np.random.Generator, int], windows.WindowBatch]:
    """As `facts.pretraining_windows`, with an episode's new entities."""
    cfg = self.cfg
    first, last = cfg.new_entities
    grown = min(1.0, episode / (_GROWTH * cfg.episodes))
    new_entities = first + round(grown * (last - first))
    encoder = facts.FactEncoder(facts.build_tokenizer())
    facts_cfg = facts.FactsConfig(length=cfg.length)

    def draw(rng: np.random.Generator, rows: int) -> windows.WindowBatch:
      return facts.pretraining_windows(
        encoder, facts_cfg, rng, rows, cfg.windows, new_entities
      )

    return draw

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """`held_out_loss`, nats per token; of windows, with most new entities."""
    del episode
    rng = np.random.default_rng([self._seed, _HELD_OUT])
    if self.cfg.corpus == 'facts_windows':
      batch = self._draw_windows(self.episodes)(rng, self.cfg.eval_rows)
      loss = float(student.predict(batch).loss)
    else:
      rows = self._source.draw_held_out(rng, self.cfg.eval_rows)
      response = student.respond(rows[:, :1].tolist(), rows[:, 1:].tolist())
      logprob = np.asarray(response.answer_logprob, np.float64)
      loss = float(-logprob.mean() / (self.cfg.length - 1))
    return experience_lib.EvalResult([], {'held_out_loss': loss})
