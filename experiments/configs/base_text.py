"""Pretrains the small base model of the real-text tasks on old novels.

A sentencepiece vocabulary of 1,024 pieces and a decoder of 0.4M parameters, on
the books that `sleep_jax/data/catalog.py` lists. Cost: under 30 minutes on 2
CPU cores. Prints the loss on a book that it never saw.

  python -m experiments.pretrain --config=experiments/configs/base_text.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model() -> ml_collections.ConfigDict:
  """The backbone of every small real-text experiment."""
  return ml_collections.ConfigDict(
    dict(
      vocab=1024,
      dim=96,
      layers=2,
      heads=4,
      unroll=2,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=192) for _ in range(2)
      ),
    )
  )


def get_config() -> ml_collections.ConfigDict:
  """Settings of the recipe."""
  c = ml_collections.ConfigDict()
  c.corpus = 'text'
  c.out = 'sleep_jax/assets/base_text.npz'
  c.tokenizer = 'sleep_jax/assets/text.model'
  c.held_out = ('Great-Expectations_1400',)
  c.model = model()
  c.seed = 0
  c.steps = 4500
  c.batch = 32
  c.length = 64
  c.learning_rate = 3e-3
  c.weight_decay = 0.01
  c.data_dir = ''
  return c
