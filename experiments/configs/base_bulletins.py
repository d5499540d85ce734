"""Pretrains the base model of `bulletins`: its own people, and the forms.

Cost: about 5 minutes on one CPU core. Of its own people it knows statements and
answers by heart; about strangers, never the same twice, it reads records and
writes what they imply.

  python -m experiments.pretrain --config=experiments/configs/base_bulletins.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config


def model() -> ml_collections.ConfigDict:
  """The backbone of every `bulletins` experiment."""
  return ml_collections.ConfigDict(
    dict(
      vocab=177,
      dim=64,
      layers=2,
      heads=4,
      unroll=2,
      # Plain; experiments put faster, silent levels before this one.
      levels=(common.settings(config.LevelConfig, hidden=256),),
    )
  )


def get_config() -> ml_collections.ConfigDict:
  """Settings of the recipe."""
  c = ml_collections.ConfigDict()
  c.corpus = 'bulletins'
  c.out = 'sleep_jax/assets/base_bulletins.npz'
  c.model = model()
  c.seed = 0
  c.steps = 4000
  c.batch = 32
  c.length = 64
  c.learning_rate = 4e-3
  c.weight_decay = 0.01
  c.data_dir = ''
  return c
