"""`facts`, 8 nights, 5 seeds, all learners: the main table.

Variants: `:main` (default) compares learners, `:ablations` takes sleep apart.
Cost: see results/. Figures there are written by

  python -m experiments.run --config=experiments/configs/facts.py \
      --workdir=runs/facts
  python -m experiments.run --config=experiments/configs/facts.py:ablations \
      --workdir=runs/facts_ablations
"""

import ml_collections

from experiments.configs import base_facts

NIGHTS = 8
ROWS, LANES, LENGTH = 480, 8, 64


def sleeping_model(slots: int, rank: int = 32) -> ml_collections.ConfigDict:
  """The base with a clock: level 1 is fast, level 2 grows experts."""
  model = base_facts.model()
  fast, slow = (dict(level) for level in model.levels)
  fast.update(
    chunk=LENGTH,
    sleep_every=ROWS // LANES,  # Once a day.
    optimizer='adam',
    learning_rate=5e-3,
  )
  slow.update(slots=slots, rank=rank, top_k=slots)
  model.levels = (fast, slow)
  model.max_len = 256
  return model


ABLATIONS = {
  'sleep': {},
  'awake_teacher_only': dict(learner='sleep', sleep=dict(teachers='awake')),
  'no_imitation': dict(learner='sleep', sleep=dict(alpha=1.0)),
  'no_on_policy': dict(learner='sleep', sleep=dict(alpha=1.0, lam=0.0)),
  'no_expansion': dict(
    learner='sleep',
    sleep=dict(expand=False),
    model=dict(sleeping_model(1, 32 * NIGHTS)),
  ),
  'random_expert': dict(learner='sleep', sleep=dict(train_expert=False)),
  'no_provenance': dict(learner='sleep', sleep=dict(router_weight=0.0)),
  'no_splicing': dict(learner='sleep', sleep=dict(splice=False)),
}
MAIN = {
  name: {} for name in ('icl', 'sft', 'ewc', 'wake_only', 'sleep', 'joint')
}


def get_config(variant: str = 'main') -> ml_collections.ConfigDict:
  """Settings; `variant` is main or ablations."""
  c = ml_collections.ConfigDict()
  c.name = f'facts_{variant}'
  c.seeds = (1, 2, 3, 4, 5)
  c.workers = 2
  c.reference = 'sleep'
  c.base = 'sleep_jax/assets/base_facts.npz'
  c.model = sleeping_model(NIGHTS)
  c.task = dict(
    name='facts', episodes=NIGHTS, entities=4, rows=ROWS, length=LENGTH
  )
  c.wake = dict(lanes=LANES)
  c.sleep = dict(
    dreams=1024,
    dream_length=LENGTH,
    steps=400,
    batch=16,
    learning_rate=0.02,
  )
  c.finetune = dict(batch=LANES, learning_rate=2e-3)
  c.arms = {'main': MAIN, 'ablations': ABLATIONS}[variant]
  return c
