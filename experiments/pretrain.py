"""Trains a small base model by its recipe.

python -m experiments.pretrain --config=experiments/configs/base_facts.py

A recipe with a section `recurrence` is a hybrid's: it is trained through
windows and passes, so that it learns to sleep by recurrence.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import time

from absl import app
from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_flags
import numpy as np
import optax
import sentencepiece
import tqdm

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import training as recurrent_training
from sleep_jax.models import transformer
from sleep_jax.tasks import bulletins
from sleep_jax.tasks import facts
from sleep_jax.tasks.arc import synthetic
from sleep_jax.training import fit
from sleep_jax.training import optimizers
from sleep_jax.weights import npz

_CONFIG = config_flags.DEFINE_config_file('config')
_STEPS_PER_CALL = 20

# (random generator, rows) -> tokens [rows, length].
Corpus = Callable[[np.random.Generator, int], np.ndarray]


def facts_corpus(c: ml_collections.ConfigDict) -> tuple[Corpus, Corpus]:
  """Documents of the world of `facts`, for training and for validation."""
  world = facts.World(facts.build_tokenizer())
  cfg = facts.FactsConfig(length=c.length)

  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return facts.pretraining_rows(world, cfg, rng, rows)

  return draw, draw


def bulletins_corpus(c: ml_collections.ConfigDict) -> tuple[Corpus, Corpus]:
  """Documents of the world of `bulletins`, for training and for validation."""
  world = bulletins.World(bulletins.BulletinsConfig())

  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return bulletins.pretraining_rows(world, rng, rows, c.length)

  return draw, draw


def arc_corpus(c: ml_collections.ConfigDict) -> tuple[Corpus, Corpus]:
  """Puzzles of `arc_few_shot`'s twin and self-edits."""

  def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return synthetic.pretraining_rows(rng, rows, c.length)

  return draw, draw


def train_tokenizer(text: list[str], path: pathlib.Path, vocab: int) -> None:
  """A sentencepiece vocabulary with padding 0, BOS 1 and EOS 2."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [line for book in text for line in book.splitlines() if line.strip()]
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


def paragraphs(
  texts: list[str], tokenizer: tokenizers.Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  """All paragraphs as one stream, each ended by EOS, and where they begin."""
  parts = [
    [*tokenizer.encode(p), tokenizer.stop]
    for text in texts
    for p in gutenberg.paragraphs(text)
  ]
  starts = np.cumsum([0, *(len(p) for p in parts)])[:-1]
  return np.concatenate(parts).astype(np.int32), starts[1:]


def text_corpus(c: ml_collections.ConfigDict) -> tuple[Corpus, Corpus]:
  """Windows of the books, and of the held-out book."""
  train, held_out = [], []
  for name, file in gutenberg.BOOKS.items():
    text = download.read(file, c.data_dir).decode()
    (held_out if name in c.held_out else train).append(text)
  train_tokenizer(train, pathlib.Path(c.tokenizer), c.model.vocab)
  tokenizer = tokenizers.SentencePieceTokenizer(c.tokenizer)

  def windows(texts: list[str]) -> Corpus:
    ids, starts = paragraphs(texts, tokenizer)

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
      # Every row begins where a paragraph does, as a document would.
      at = rng.choice(starts[starts < len(ids) - c.length], rows)[:, None]
      tokens = ids[at + np.arange(c.length) - 1]
      tokens[:, 0] = tokenizer.bos
      return tokens

    return draw

  return windows(train), windows(held_out)


def _to_read(
  c: ml_collections.ConfigDict, cfg: config.ModelConfig
) -> tuple[at.Params, float]:
  """Weights after next-token prediction, and the held-out loss."""
  corpora = {
    'arc': arc_corpus,
    'bulletins': bulletins_corpus,
    'facts': facts_corpus,
    'text': text_corpus,
  }
  draw, draw_held_out = config.lookup(c.corpus, corpora, 'corpus')(c)
  params = transformer.init(cfg, jax.random.key(c.seed))
  warm = min(200, c.steps // 10)
  optimizer = optimizers.adamw(
    optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, warm, c.steps),
    c.weight_decay,
  )
  opt_state = optimizer.init(params)
  rng = np.random.default_rng(c.seed)
  bar = tqdm.trange(0, c.steps, _STEPS_PER_CALL, desc='pretrain', unit='call')
  for _ in bar:
    rows = draw(rng, _STEPS_PER_CALL * c.batch)
    tokens = rows.reshape(_STEPS_PER_CALL, c.batch, c.length)
    params, opt_state, loss = fit.train_steps(
      cfg,
      optimizer,
      params,
      opt_state,
      jnp.asarray(tokens),
      jnp.ones(tokens.shape),
    )
    bar.set_postfix(loss=f'{float(loss.mean()):.3f}')
  held_out = draw_held_out(np.random.default_rng([c.seed, 1]), 20 * c.batch)
  held_out = jnp.asarray(held_out.reshape(20, c.batch, c.length))
  frozen = optimizers.adamw(0.0)
  _, _, loss = fit.train_steps(
    cfg,
    frozen,
    jax.tree.map(jnp.copy, params),
    frozen.init(params),
    held_out,
    jnp.ones(held_out.shape),
  )
  return params, float(loss.mean())


def _to_sleep(
  c: ml_collections.ConfigDict, cfg: config.ModelConfig
) -> tuple[at.Params, float]:
  """Weights of a hybrid that keeps what it read, and the held-out loss.

  The most strangers of a sequence grow from the first of `c.strangers` to the
  second over three fifths of the training.
  """
  config.lookup(c.corpus, {'facts': None}, 'corpus')
  how = config.from_mapping(
    recurrence_config.RecurrenceConfig, c.recurrence, 'recurrence'
  )
  plan = config.from_mapping(
    recurrence_config.TrainingConfig, c.training, 'training'
  )
  world = facts.World(facts.build_tokenizer())
  task = facts.FactsConfig(length=c.length)

  def draw(rng: np.random.Generator, rows: int, strangers: int):
    return facts.pretraining_windows(
      world, task, rng, rows, c.windows, strangers
    )

  params = recurrent_training.init(cfg, how, jax.random.key(c.seed))
  opt_state = optimizers.muon_adamw(plan).init(params)
  rng = np.random.default_rng(c.seed)
  least, most = c.strangers
  bar = tqdm.trange(
    0, plan.steps, _STEPS_PER_CALL, desc='pretrain', unit='call'
  )
  for step in bar:
    grown = min(1.0, step / (0.6 * plan.steps))
    strangers = least + round(grown * (most - least))
    batches = [draw(rng, plan.batch, strangers) for _ in range(_STEPS_PER_CALL)]
    passes = int(rng.choice(plan.random_passes or (how.passes,)))
    params, opt_state, loss = recurrent_training.train_steps(
      cfg,
      dataclasses.replace(how, passes=passes),
      plan,
      params,
      opt_state,
      jax.tree.map(lambda *x: np.stack(x), *batches),
    )
    bar.set_postfix(loss=f'{float(loss.mean()):.3f}', strangers=strangers)
  held_out = draw(np.random.default_rng([c.seed, 1]), 20 * plan.batch, most)
  return params, float(
    recurrent_training.evaluate_batch(cfg, how, params, held_out).loss
  )


def main(_) -> None:
  c = _CONFIG.value
  cfg = config.ModelConfig.from_mapping(c.model.to_dict())
  start = time.time()
  params, loss = (_to_sleep if 'recurrence' in c else _to_read)(c, cfg)
  npz.save(pathlib.Path(c.out), jax.device_get(params), cfg)
  logging.info(
    '%s: %d parameters, held-out loss %.4f nats per token, %.0f s',
    c.out,
    transformer.count(params),
    loss,
    time.time() - start,
  )


if __name__ == '__main__':
  app.run(main)
