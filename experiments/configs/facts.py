"""`facts`, 8 nights, 5 seeds: every learner, and sleep taken apart.

Cost: 95 core minutes in all (the seconds in lives.json). The table under
results/facts is written by

  python -m experiments.run --config=experiments/configs/facts.py \
      --workdir=runs/facts
  python -m experiments.report --workdir=runs/facts --out=results/facts

The settings of the baselines were chosen on seed 100, three nights, by mean
recall (and not on the seeds of the table): sft learning rate among 2e-3, 1e-3,
5e-4; ewc lambda among 0.1, 1, 2, 10, 100; wake_only learning rate among 3e-3,
1e-3; icl window among 64 and 128.
"""

import ml_collections

from experiments.configs import base_facts
from experiments.configs import common
from sleep_jax import config
from sleep_jax.tasks import facts

NIGHTS = 8
ROWS, LANES, LENGTH = 960, 8, 64


def sleeping_model(
  slots: int, rank: int = 32, learning_rate: float = 3e-3
) -> ml_collections.ConfigDict:
  """The base with a clock: level 1 is fast, level 2 grows experts."""
  model = base_facts.model()
  fast, slow = model.levels
  fast.update(
    chunk=LENGTH,
    sleep_every=ROWS // LANES,  # Once a day.
    optimizer='adam',
    learning_rate=learning_rate,
  )
  slow.update(slots=slots, rank=rank, top_k=slots)
  model.max_len = 128
  return model


ABLATIONS = {
  'awake_teacher_only': dict(learner='sleep', sleep=dict(teachers='awake')),
  'no_imitation': dict(learner='sleep', sleep=dict(alpha=1.0)),
  'no_expansion': dict(
    learner='sleep',
    sleep=dict(expand=False),
    model=dict(sleeping_model(1, 32 * NIGHTS)),
  ),
  'random_expert': dict(
    learner='sleep', sleep=dict(train_expert=False, steps=10)
  ),
  'no_provenance': dict(learner='sleep', sleep=dict(router_weight=0.0)),
}
LEARNERS = {
  'icl': {},
  'sft': dict(finetune=dict(learning_rate=5e-4)),
  'ewc': {},
  'wake_only': dict(model=dict(sleeping_model(NIGHTS, learning_rate=1e-3))),
  'sleep': {},
  'joint': {},
}


def get_config() -> ml_collections.ConfigDict:
  """Settings; override any with `--config.section.name=value`."""
  c = ml_collections.ConfigDict()
  c.name = 'facts'
  c.seeds = (1, 2, 3, 4, 5)
  c.workers = 2
  c.reference = 'sleep'
  c.base = 'sleep_jax/assets/base_facts.npz'
  c.model = sleeping_model(NIGHTS)
  c.task = common.settings(
    facts.FactsConfig, episodes=NIGHTS, entities=4, rows=ROWS, length=LENGTH
  )
  c.task.name = 'facts'

  c.wake = common.settings(config.WakeConfig, lanes=LANES)
  c.sleep = common.settings(
    config.SeedingConfig,
    dreams=1024,
    dream_length=LENGTH,
    steps=300,
    batch=16,
    learning_rate=0.02,
  )
  c.finetune = common.settings(
    config.FinetuneConfig, batch=LANES, learning_rate=2e-3, ewc_lambda=1.0
  )
  c.arms = LEARNERS | ABLATIONS
  return c
