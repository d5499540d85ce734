"""Pretrains the base model of `bulletins`.

Of a fixed set of people it memorises statements and answers; about people that
are drawn anew for every document it reads records and writes what they imply.
Cost: about 5 minutes on one CPU core.

  python -m experiments.run --config=experiments/configs/base_bulletins.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model() -> common.Config:
  """The backbone of every `bulletins` experiment."""
  return ml_collections.ConfigDict(
    dict(
      vocab=177,
      dim=64,
      layers=2,
      heads=4,
      unroll=2,
      # Plain; experiments put faster levels with zero output before it.
      levels=(common.settings(config.LevelConfig, hidden=256),),
    )
  )


def get_config() -> common.Config:
  """Settings of the recipe."""
  return common.corpus(
    'base_bulletins', model(), corpus='bulletins', length=64, steps=4000
  )
