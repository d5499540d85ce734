"""Pretrains the small base model of the real-text tasks on old novels.

A sentencepiece vocabulary of 1,024 pieces and a decoder of 0.4M parameters, on
the books of `sleep_jax/data/datasets/checksums.tsv`. `loss` is that of a
held-out book. Cost: under 30 minutes on 2 CPU cores.

  python -m experiments.run --config=experiments/configs/base_text.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model(vocab: int = 1024) -> common.Config:
  """The backbone of every small real-text experiment."""
  return ml_collections.ConfigDict(
    dict(
      vocab=vocab,
      dim=96,
      layers=2,
      heads=4,
      unroll=2,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=192) for _ in range(2)
      ),
    )
  )


def get_config() -> common.Config:
  """Settings of the recipe."""
  return common.corpus(
    'base_text',
    model(),
    corpus='text',
    length=64,
    tokenizer='sleep_jax/assets/text.model',
    held_out=('Great-Expectations_1400',),
    steps=4500,
    learning_rate=3e-3,
  )
