"""Pretrains the base model of `facts`: facts of a fixed world, and their form.

Every third document is about entities that are drawn anew, so that the model
also learns to read facts from its context. `:words` has relations in three
wordings (`facts.py:hard`). Cost: about 5 minutes on one CPU core each.

  python -m experiments.run --config=experiments/configs/base_facts.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config
from sleep_jax.tasks import facts

WORDINGS = 3  # Of `:words`.


def model(wordings: int = 1) -> common.Config:
  """The backbone of every `facts` experiment."""
  # The shipped base with one wording has a row that no word uses.
  vocab = 168 if wordings == 1 else facts.build_tokenizer(wordings).vocab
  return ml_collections.ConfigDict(
    dict(
      vocab=vocab,
      dim=64,
      layers=2,
      heads=4,
      unroll=2,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=128) for _ in range(2)
      ),
    )
  )


def get_config(variant: str = '') -> common.Config:
  """Settings of the recipe."""
  wordings = 1
  if variant:
    wordings = config.lookup(variant, {'words': WORDINGS}, 'variant')
  return common.corpus(
    f'base_facts_{variant}' if variant else 'base_facts',
    model(wordings),
    corpus='facts',
    length=64,
    wordings=wordings,
    steps=4000,
  )
