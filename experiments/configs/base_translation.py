"""Pretrains the base model of `translation`: English, and to read a language.

Every other document has a few words of a language that is drawn anew, and
sentences of them with their translation. Cost: about 20 minutes on a CPU core.

  python -m experiments.run --config=experiments/configs/base_translation.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config
from sleep_jax.tasks import translation


def model() -> common.Config:
  """The backbone of `translation`."""
  return ml_collections.ConfigDict(
    dict(
      vocab=translation.build_tokenizer().vocab,
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
    'base_translation',
    model(),
    corpus='translation',
    length=128,
    steps=2500,
  )
