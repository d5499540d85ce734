"""A real pretrained model, a real book that it has never seen, three nights.

`stories260K` (llama2.c, 260 thousand parameters) was trained on TinyStories. It
gains a fast level before its feed-forward blocks, whose output is zero at
first, and expert slots in these blocks. Every day it reads a stretch of *Pride
and Prejudice*, once. The evaluation is perplexity per token of the base's 512
pieces: on held-out rows of the stretches (`held_out_ppl`), on the text after
the last day (`ahead_ppl`), on rows it has read (`read_ppl`), and on
TinyStories, its pretraining data (`known_ppl`). `frozen` is the base;
`wake_only` keeps its fast level, `sleep` is evaluated with its fast level
reset. The seed draws where in the book a life begins.

Chosen on another book (*Wuthering Heights*), seed 100, one day, by
`held_out_ppl`: the learning rate of sft among 2e-3, 1e-3, 3e-4, 1e-4; of
wake_only among 3e-3, 1e-3, 3e-4; the lambda of ewc among 0.1, 1, 10, 100. Of
sleep, two numbers of steps and dreams. `sft_gentle` and `ewc_strong` show how
much of the book is learnt when less of the base is forgotten.

  python -m experiments.run --config=experiments/configs/stories.py \
      --workdir=runs/stories
  python -m experiments.report --workdir=runs/stories --out=results/stories
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.tasks import book

NIGHTS, ROWS, BATCH, LENGTH, CHUNK = 3, 288, 8, 128, 32


def _model() -> common.Config:
  """stories260K with a fast level before its feed-forward parts."""
  updates = ROWS // BATCH * LENGTH // CHUNK  # Of the fast level, in a day.
  return ml_collections.ConfigDict(
    dict(
      vocab=512,
      dim=64,
      layers=5,
      heads=8,
      kv_heads=4,
      max_len=512,
      unroll=5,
      levels=(
        common.settings(
          config.LevelConfig,
          hidden=172,
          chunk=CHUNK,
          # One less than a day has: no update is pending at night, and the
          # fast level is reset to its initial state.
          sleep_every=updates - 1,
          learning_rate=1e-3,
        ),
        common.settings(
          config.LevelConfig, hidden=172, slots=NIGHTS, rank=64, top_k=NIGHTS
        ),
      ),
    )
  )


def get_config() -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.experiment('stories')
  c.seeds = (1, 2, 3)
  c.reference = 'sleep'
  c.base = 'stories260k/stories260K.bin'
  c.model = _model()
  c.task = common.settings(
    book.BookConfig, episodes=NIGHTS, rows=ROWS, length=LENGTH
  )
  c.task.name = 'book'

  c.wake = common.settings(wake_lib.WakeConfig, batch=BATCH)
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    dreams=384,
    dream_length=LENGTH,
    splice=False,  # Prose has no segments that could be shuffled.
    steps=200,
    batch=16,
    learning_rate=5e-3,
    alpha=1.0,
    lam=0.0,
  )
  c.finetune = common.settings(
    finetune.FinetuneConfig, batch=BATCH, learning_rate=1e-3, ewc_lambda=0.1
  )
  c.arms = {
    'frozen': {},
    'sft': {},
    'sft_gentle': dict(learner='sft', finetune=dict(learning_rate=1e-4)),
    'replay': dict(finetune=dict(batch=2 * BATCH)),
    'ewc': {},
    'ewc_strong': dict(learner='ewc', finetune=dict(ewc_lambda=100.0)),
    'wake_only': common.WAKE_ONLY,
    'sleep': {},
  }
  return c
