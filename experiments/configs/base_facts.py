"""Pretrains the base model of `facts`: facts of a fixed world, and their form.

Every third document is about entities that are drawn anew, so that the model
also learns to read facts from its context. Cost: about 5 minutes on one CPU
core.

  python -m experiments.run --config=experiments/configs/base_facts.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model() -> common.Config:
  """The backbone of every `facts` experiment."""
  return ml_collections.ConfigDict(
    dict(
      vocab=168,
      dim=64,
      layers=2,
      heads=4,
      unroll=2,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=128) for _ in range(2)
      ),
    )
  )


def get_config() -> common.Config:
  """Settings of the recipe."""
  return common.corpus(
    'base_facts', model(), corpus='facts', length=64, steps=4000
  )
