"""Pretrains the hybrid base of `both_sleeps`: it learns to keep what it read.

Sequences tell of strangers over up to four windows, and a document then asks
for them, and for the base's own world. How many strangers there are grows over
the training: with four from the start hardly any was kept after 1,000 steps.
Recurrence comes first in the stack, so attention sees what fast weights recall.
Cost: about half an hour on one busy CPU core.

  python -m experiments.pretrain \
      --config=experiments/configs/base_facts_hybrid.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax.lifecycle.recurrence import config as recurrence_config

LENGTH = 32  # Tokens of a window, and of a document.


def model() -> ml_collections.ConfigDict:
  """The backbone of `both_sleeps`."""
  c = common.hybrid(64, 2, 128, vocab=168)
  c.levels *= 2
  c.mixers = ('gdn', 'attention')
  c.recurrent.update(heads=4, key=32, value=32)
  return c


def get_config() -> ml_collections.ConfigDict:
  """Settings of the recipe."""
  c = ml_collections.ConfigDict()
  c.corpus = 'facts'
  c.out = 'sleep_jax/assets/base_facts_hybrid.npz'
  c.model = model()
  c.seed = 0
  c.length = LENGTH
  c.windows = 4  # The most that a sequence has.
  c.strangers = (1, 8)  # The most that it tells of, at first and at last.
  c.recurrence = common.settings(
    recurrence_config.RecurrenceConfig, remat=False
  )
  c.training = common.settings(
    recurrence_config.TrainingConfig,
    steps=4000,
    batch=32,
    muon_learning_rate=1e-2,
    adam_learning_rate=4e-3,
    random_passes=(1, 2),
  )
  return c
