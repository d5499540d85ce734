"""Both kinds of sleep on `facts`: into fast weights, into experts, and both.

A small hybrid, six nights, five seeds. `recurrence` makes two passes over every
window before its keys are evicted, and only its recurrent states change;
`recurrence_once` is the same with one pass, a plain hybrid. `sleep` learns by
gradients while awake and seeds one expert a night; its states start at zero in
every row. `recurrence_seeding` reads as `recurrence` does, and each night seeds
one expert from what its states hold, and resets them. All read 61,440 tokens a
day. The `brief` arms have a day of 512 tokens, in which each fact comes six
times.

The settings of `recurrence_seeding` were chosen on seed 100, two or three short
nights, by recall: teacher temperature 1, 0.7 or 0.5, steps 300 or 900 (600 were
taken, for time), router weight 0.1, 0.3, 1 or 3, with and without imitation.
min_p 0.1 recalled as much as 0, but left the base's own facts out of the
previous model's dreams, and forgot more of them. `sleep` has the settings of
`facts`, with rows half as long.

  python -m experiments.run --config=experiments/configs/both_sleeps.py \
      --workdir=runs/both_sleeps
  python -m experiments.report --workdir=runs/both_sleeps \
      --out=results/both_sleeps
"""

from typing import Any

import ml_collections

from experiments.configs import base_facts_hybrid
from experiments.configs import common
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.tasks import facts

NIGHTS = 6
LENGTH = base_facts_hybrid.LENGTH
ROWS, BATCH = 1920, 16  # As many tokens a day as in `facts`.
BRIEF_ROWS = 16


def sleeping_model(updates: int) -> common.Config:
  """The base; level 1 learns `updates` times a day, level 2 grows experts."""
  model = base_facts_hybrid.model()
  fast, slow = (ml_collections.ConfigDict(level) for level in model.levels)
  fast.update(chunk=LENGTH, sleep_every=updates, learning_rate=3e-3)
  slow.update(slots=NIGHTS, rank=32, top_k=NIGHTS)
  model.levels = (fast, slow)
  model.max_len = 128
  return model


RECURRENCE: dict[str, Any] = dict(
  learner='sleep', wake=dict(reads='windows'), sleep=dict(consolidate=False)
)
RECURRENCE_SEEDING: dict[str, Any] = dict(
  learner='sleep',
  wake=dict(reads='windows'),
  # Answers from states have a higher entropy than those of fast weights.
  sleep=dict(teacher_temperature=0.5, steps=600, router_weight=1.0),
)


def _brief(arm: dict[str, Any]) -> dict[str, Any]:
  """The arm with a short day, and an update after every row."""
  return arm | dict(
    task=dict(rows=BRIEF_ROWS),
    wake=arm.get('wake', {}) | dict(batch=1),
    model=dict(sleeping_model(BRIEF_ROWS)),
  )


def get_config() -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.experiment('both_sleeps')
  c.seeds = (1, 2, 3, 4, 5)
  c.reference = 'recurrence_seeding_brief'
  c.base = 'sleep_jax/assets/base_facts_hybrid.npz'
  c.model = sleeping_model(ROWS // BATCH)
  c.task = common.settings(
    facts.FactsConfig,
    episodes=NIGHTS,
    entities=4,
    rows=ROWS,
    length=LENGTH,
    context=4,  # A prompt stays within a window.
  )
  c.task.name = 'facts'
  c.recurrence = common.settings(recurrence_config.RecurrenceConfig, passes=2)
  c.wake = common.settings(wake_lib.WakeConfig, batch=BATCH)
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    dreams=2048,
    dream_length=LENGTH,
    steps=300,
    batch=32,
    learning_rate=0.02,
  )
  c.finetune = common.settings(finetune.FinetuneConfig)
  c.arms = {
    'frozen': {},
    'recurrence_once': RECURRENCE | dict(recurrence=dict(passes=1)),
    'recurrence': RECURRENCE,
    'sleep': {},
    'recurrence_seeding': RECURRENCE_SEEDING,
    'recurrence_brief': _brief(RECURRENCE),
    'sleep_brief': _brief(dict(learner='sleep')),
    'recurrence_seeding_brief': _brief(RECURRENCE_SEEDING),
  }
  return c
