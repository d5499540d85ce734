"""A config: short lives, for tests that end lives.

Without an argument two nights of `bulletins` under `sleep`: two levels read,
the faster one is consolidated with rollouts of its own, and then it dreams.
With one, two nights of another way to live (`VARIANTS`): `recurrent` is a
hybrid on `rule110`; `backbone` a Llama of which the layers next to the
embedding never change, as with public models; `ttt`, `seal` and
`finetune_passage` learn `bulletins`, `grpo`, `opsd` and `privileged_sleep`
`modular_chains`, the others `facts`.
"""

import ml_collections

from experiments.configs import bulletins
from experiments.configs import common
from experiments.configs import facts
from experiments.configs import reasoning
from experiments.configs import rule110
from sleep_jax import config
from sleep_jax.tasks import modular_chains

_FACTS = (
  *('wake_only', 'icl', 'sft', 'replay', 'ewc', 'joint', 'replay_archive'),
  *('distilled_replay', 'experience_replay', 'cartridge', 'rag'),
)
_DREAMING = ('ttt', 'seal', 'finetune_passage')
_SOLVING = ('grpo', 'opsd', 'privileged_sleep')
VARIANTS = ('', 'recurrent', 'backbone', *_FACTS, *_DREAMING, *_SOLVING)
_ARMS = {
  'wake_only': common.WAKE_ONLY,
  'replay_archive': dict(
    facts.LEARNERS['replay'],
    learner='replay',
    learner_config=dict(archive=8, archive_base=4),
  ),
  'cartridge': dict(learner_config=dict(tokens=8)),
  'rag': dict(learner_config=dict(top=1)),
  'grpo': dict(learner_config=dict(group=2, kl=0.1)),
  'opsd': dict(learner_config=dict(teacher='average')),
  'distilled_replay': dict(
    wake=dict(rehearsed=2),
    sleep=dict(dreams=16, archive=8, archive_base=4, teacher_top_k=8),
  ),
}
_SEEDING = dict(
  dreams=32, steps=6, batch=4, rollout_every=3, prefixes=4, max_kl_share=9.0
)


def get_config(learner: str = '') -> ml_collections.ConfigDict:
  """Settings; any may be changed by flag."""
  if learner in ('', *_DREAMING):
    c, arm = _bulletins(), learner or 'sleep'
  elif learner == 'recurrent':
    c, arm = _recurrent(), 'recurrent_training'
  elif learner == 'backbone':
    c, arm = _backbone(), 'sleep'
  elif learner in _SOLVING:
    c, arm = _chains(), learner
  else:
    c, arm = _facts(), learner
  c.name = f'small_life_{learner}' if learner else 'small_life'
  c.seeds = (1,)
  c.workers = 1
  c.reference = arm
  arms = facts.LEARNERS | _ARMS
  c.arms = {arm: {} if arm == 'sleep' else arms.get(arm, {})}
  return c


def _facts() -> ml_collections.ConfigDict:
  c = facts.get_config()
  c.task.update(episodes=2, rows=16, probes=1)
  return c


def _chains() -> ml_collections.ConfigDict:
  """Fresh weights solve nothing; a reference and a teacher make updates."""
  c = reasoning.get_config()
  c.base = ''
  c.task.update(episodes=2, problems=4, reads=1, depths=(1, 1))
  c.task.update(old=(1, 1), out_of_range=(1, 1), eval_problems=2, samples=2)
  c.task.update(contexts=1, context_problems=2)
  c.dreaming.update(dreams=4, keep=2, rehearsed=2)
  c.model.update(dim=16, layers=1, unroll=1)
  length = modular_chains.ChainsConfig(depths=(1, 1)).length
  c.model.levels[0].update(chunk=length, sleep_every=2)
  c.wake.batch = 2
  c.sleep.update(dream_length=length, continuation=6, **_SEEDING)
  c.finetune.update(batch=4)
  return c


def _recurrent() -> ml_collections.ConfigDict:
  c = rule110.get_config()
  c.task.update(width=4, episodes=2, eval_rows=32)
  c.model.update(dim=16)
  c.model.recurrent.update(heads=1, key=8, value=8)
  c.recurrence.passes = 2
  c.training.update(steps=20, batch=16)
  return c


def _backbone() -> ml_collections.ConfigDict:
  """Fresh weights: a base on disk would have to be there before the life."""
  c = _facts()
  clock = dict(chunk=64, sleep_every=2, learning_rate=1e-3)
  levels = (clock, dict(slots=2, rank=4), {})
  c.base = ''
  c.model = ml_collections.ConfigDict(
    dict(
      vocab=c.model.vocab,
      dim=32,
      layers=4,
      heads=4,
      kv_heads=2,
      max_len=128,
      levels=tuple(
        common.settings(config.LevelConfig, hidden=64, **x) for x in levels
      ),
      partition=(1, 1, 2),
      partition_from='output',
    )
  )
  c.sleep.update(**_SEEDING)
  return c


def _bulletins() -> ml_collections.ConfigDict:
  c = bulletins.get_config()
  c.model.levels[0].sleep_every = 2
  c.task.update(episodes=2, train=2, reads=8, test=1, joint=50, attempts=1)
  c.sleep.update(continuation=6, alpha=0.9, lam=0.25, **_SEEDING)
  c.trial.update(epochs=2, joint_epochs=2)
  c.dreaming.update(dreams=4, keep=2, epochs=2, retention_margin=9.0)
  c.dreaming.update(retention_rows=8)
  return c
