"""Pretrains the base model of `arc_few_shot` on generated puzzles.

It learns to continue puzzles whose rule recolours at most one colour from their
example pairs, and to write self-edits whose values are drawn at random. Cost:
about 8 minutes on one CPU core.

  python -m experiments.run --config=experiments/configs/base_arc.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model() -> common.Config:
  """The backbone of the experiments on generated puzzles."""
  return ml_collections.ConfigDict(
    dict(
      vocab=40,
      dim=64,
      layers=3,
      heads=4,
      unroll=3,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=128) for _ in range(2)
      ),
    )
  )


def get_config() -> common.Config:
  """Settings of the recipe."""
  return common.corpus(
    'base_arc',
    model(),
    corpus='arc',
    length=104,
    steps=4000,
    batch=16,
    learning_rate=2e-3,
  )
