"""Pretrains the hybrid base of `both_sleeps`, through windows and passes.

A sequence states facts about new entities in up to four windows; the prediction
window asks for them, and for facts of the base's own world. The number of new
entities grows over the training: with four from the start the model recalled
hardly any after 1,000 steps. The recurrent layer comes first, so attention sees
what the fast weights recall. Cost: about half an hour on one busy CPU core.

  python -m experiments.run \
      --config=experiments/configs/base_facts_hybrid.py
"""

from experiments.configs import common
from sleep_jax.lifecycle.recurrence import config as recurrence_config

LENGTH = 32  # Tokens of a window, and of a document.


def model() -> common.Config:
  """The backbone of `both_sleeps`."""
  c = common.hybrid(64, 2, 128, vocab=168)
  c.levels *= 2
  c.mixers = ('gdn', 'attention')
  c.recurrent.update(heads=4, key=32, value=32)
  return c


def get_config() -> common.Config:
  """Settings of the recipe."""
  c = common.pretraining(
    'base_facts_hybrid',
    model(),
    corpus='facts_windows',
    length=LENGTH,
    windows=4,  # At most, in a sequence.
    new_entities=(1, 8),  # At most, in the first and in the last steps.
  )
  c.learner = 'recurrent_training'
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
