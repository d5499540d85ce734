"""Pretrains the base model of `translation`: English, and to read a language.

Every other document has a few words of a language that is drawn anew, and
sentences of them with their translation. Cost: about 20 minutes on a CPU core.

  python -m experiments.run --config=experiments/configs/base_translation.py
"""

from experiments.configs import base_text
from experiments.configs import common
from sleep_jax.tasks import translation


def model() -> common.Config:
  """The backbone of `translation`."""
  return base_text.model(translation.build_tokenizer().vocab)


def get_config() -> common.Config:
  """Settings of the recipe."""
  return common.corpus(
    'base_translation',
    model(),
    corpus='translation',
    length=128,
    steps=2500,
  )
