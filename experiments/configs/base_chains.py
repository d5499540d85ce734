"""Pretrains the base model of `modular_chains`: shallow problems, and copies.

Every second row is problems with their solutions, one in a hundred of depth 5
or 6 and the others of depth 1 to 4; the rest of the rows show the solution of
one of depth 1 to 6 and ask for it again. At the end it solves 0.98 of the
shallow ones, 0.11 of depths 5 and 6, and all of these with the solution before
it (`accuracy_privileged`): that is what a teacher of its own has to teach. Muon
trains it. Cost: about 8 minutes on one CPU core.

  python -m experiments.run --config=experiments/configs/base_chains.py
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config
from sleep_jax.tasks import modular_chains

_STEPS, _BATCH, _EVALS = 9000, 8, 3


def model() -> common.Config:
  """The backbone of every experiment on `modular_chains`."""
  return ml_collections.ConfigDict(
    dict(
      vocab=modular_chains.build_tokenizer().vocab,
      dim=128,
      layers=3,
      heads=4,
      unroll=3,
      max_len=160,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=192) for _ in range(2)
      ),
    )
  )


def get_config() -> common.Config:
  """Settings of the recipe."""
  c = common.corpus(
    'base_chains', model(), steps=_STEPS, batch=_BATCH, learning_rate=1e-2
  )
  c.finetune.optimizer = 'muon'
  c.task = common.settings(
    modular_chains.ChainsBaseConfig,
    episodes=_EVALS,
    rows=_STEPS * _BATCH // _EVALS,
    eval_problems=32,
    samples=2,
  )
  c.task.name = 'modular_chains_base'
  return c
