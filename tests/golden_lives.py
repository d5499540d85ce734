"""Configs: short lives whose metrics are pinned in `golden/figures.json`."""

import ml_collections

from experiments.configs import arc
from experiments.configs import both_sleeps
from experiments.configs import bulletins
from experiments.configs import class_incremental
from experiments.configs import quickstart
from experiments.configs import rule110
from sleep_jax import config

_SEEDING = dict(
  dreams=64, steps=8, batch=4, rollout_every=4, prefixes=4, max_kl_share=9.0
)


def _bulletins() -> ml_collections.ConfigDict:
  c = bulletins.get_config()
  c.model.levels[0].sleep_every = 2
  c.task.update(episodes=1, train=2, reads=8, test=1, joint=50, attempts=1)
  c.sleep.update(continuation=6, alpha=0.9, lam=0.25, **_SEEDING)
  c.trial.update(epochs=2, joint_epochs=2)
  c.dreaming.update(dreams=4, keep=2, epochs=2, retention_margin=9.0)
  c.dreaming.update(retention_rows=8, study_rows=16)
  arms = ('icl', 'finetune_passage', 'ttt', 'seal', 'sleep', 'no_dreaming')
  c.arms = {name: c.arms[name].to_dict() for name in arms}
  return c


def _arc() -> ml_collections.ConfigDict:
  c = arc.get_config()
  c.task.update(episodes=1, train=2, test=2, attempts=2)
  c.model.levels[0].sleep_every = 2
  c.sleep.update(**_SEEDING)
  c.trial.update(epochs=1)
  c.dreaming.update(dreams=8, keep=3, keep_random=1, epochs=2, rehearsed=0)
  c.dreaming.update(retention_rows=8, retention_margin=9.0)
  c.sleep.previous_fraction = 0.5, 1.0
  c.arms = {'icl': {}, 'seal': {}, 'sleep': {}}
  return c


def _banking() -> ml_collections.ConfigDict:
  """Its figures are of the first episode, see `golden_test`."""
  c = class_incremental.get_config('banking')
  c.task.update(passes=1)
  c.model.levels[0].sleep_every = 20
  c.wake.rehearsed = 0
  c.sleep.update(
    temperature=1.0, question_temperature=0.0, question_weight=1.0, min_p=0.1,
    day_dreams=0.0, oversample=1, archive=0, teacher_top_k=0,
    sender_reset='restart', max_kl_share=0.8,
  )  # fmt: skip
  c.sleep.update(**_SEEDING)
  arms = ('sft', 'ewc', 'wake_only', 'sleep', 'joint')
  c.arms = {name: c.arms[name].to_dict() for name in arms}
  return c


def _rule110() -> ml_collections.ConfigDict:
  c = rule110.get_config()
  c.training.update(steps=40, batch=16)
  c.task.episodes = 2
  c.arms = {
    'passes_1': {},
    'passes_2': dict(recurrence=dict(passes=2)),
    'halting': dict(recurrence=dict(passes=2, halting=True)),
    'sliding': dict(recurrence=dict(eviction='sliding', passes=2)),
    'drawn': dict(
      recurrence=dict(passes=2),
      training=dict(random_passes=(1, 2)),
      task=dict(eval_passes=(1,)),
    ),
  }
  return c


def _both_sleeps() -> ml_collections.ConfigDict:
  c = both_sleeps.get_config()
  c.task.update(episodes=2)
  c.sleep.update(**_SEEDING)
  brief = {'recurrence_brief', 'sleep_brief', 'recurrence_seeding_brief'}
  arms = {name: c.arms[name].to_dict() for name in ('frozen', *sorted(brief))}
  for name in brief:
    # The settings of the night replace the arm's, but for what it is.
    night = arms[name].get('sleep', {})
    keep = {k: v for k, v in night.items() if k == 'consolidate'}
    arms[name]['sleep'] = keep | _SEEDING
  c.arms = arms
  return c


def get_config(name: str) -> ml_collections.ConfigDict:
  """The short life called `name`."""
  makers = dict(
    quickstart=quickstart.get_config,
    bulletins=_bulletins,
    arc=_arc,
    banking=_banking,
    rule110=_rule110,
    both_sleeps=_both_sleeps,
  )
  c = config.lookup(name, makers, 'variant')()
  c.name, c.seeds, c.workers = f'golden_{name}', (1,), 1
  return c
