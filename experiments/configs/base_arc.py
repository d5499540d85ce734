"""Pretrains the base model of `arc_few_shot`'s generated twin.

It learns to continue puzzles whose rule recolours at most one colour, from the
pairs that it is shown, and to write self-edits with values drawn blindly. Cost:
about 8 minutes on one CPU core.

  python -m experiments.pretrain --config=experiments/configs/base_arc.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model() -> ml_collections.ConfigDict:
  """The backbone of the twin's experiments."""
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


def get_config() -> ml_collections.ConfigDict:
  """Settings of the recipe."""
  c = ml_collections.ConfigDict()
  c.corpus = 'arc'
  c.out = 'sleep_jax/assets/base_arc.npz'
  c.model = model()
  c.seed = 0
  c.steps = 4000
  c.batch = 16
  c.length = 104
  c.learning_rate = 2e-3
  c.weight_decay = 0.01
  c.data_dir = ''
  return c
