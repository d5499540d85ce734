"""A config: one short life with everything in it, for tests that end lives.

Two nights of `bulletins` under `sleep`: two levels read, the faster one is
consolidated with rollouts of its own, and then it dreams. With an argument
(`:wake_only`), two short nights of `facts` in that arm.
"""

import ml_collections

from experiments.configs import bulletins
from experiments.configs import common
from experiments.configs import facts

_ARMS = {'wake_only': common.WAKE_ONLY}


def get_config(learner: str = '') -> ml_collections.ConfigDict:
  """Settings; any may be changed by flag."""
  return _short(learner) if learner else _whole()


def _short(learner: str) -> ml_collections.ConfigDict:
  c = facts.get_config()
  c.name = f'small_life_{learner}'
  c.seeds = (1,)
  c.workers = 1
  c.reference = learner
  c.arms = {learner: _ARMS.get(learner, {})}
  c.task.update(episodes=2, rows=16, probes=1)
  return c


def _whole() -> ml_collections.ConfigDict:
  c = bulletins.get_config()
  c.name = 'small_life'
  c.seeds = (1,)
  c.workers = 1
  c.arms = {'sleep': {}}
  c.model.levels[0].sleep_every = 2
  c.task.update(episodes=2, train=2, reads=8, test=1, joint=50, attempts=1)
  c.sleep.update(
    dreams=32,
    steps=6,
    batch=4,
    rollout_every=3,
    prefixes=4,
    continuation=6,
    alpha=0.9,
    lam=0.25,
    max_kl_share=9.0,
  )
  c.trial.update(epochs=2, joint_epochs=2)
  c.dreaming.update(dreams=4, keep=2, epochs=2, retention_margin=9.0)
  c.dreaming.update(retention_rows=8)
  return c
