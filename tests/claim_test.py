"""The claim itself: consolidation moves knowledge, and nothing else does."""

import json

import jax
import numpy as np
import pytest

from experiments.configs import quickstart
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import student as student_lib


def one_night(**sleep) -> tuple[float, float, float]:
  """Accuracy on the day before and after its night, and on the base's facts."""
  c = quickstart.get_config()
  c.task.update(episodes=1)
  # Without rollouts, for time: `seeding_test` has them.
  c.sleep.update(dict(dreams=512, steps=250, alpha=1.0, lam=0.0) | sleep)
  c = json.loads(c.to_json())
  task, learner, _ = build_lib.build(build_lib.arm_config(c, 'sleep'), seed=100)
  life = learner.init(jax.random.PRNGKey(0))
  life, _ = learner.wake(life, task.experience(0))

  def metrics(life):
    return task.evaluate(student_lib.Student(learner, life), 0).metrics

  awake = metrics(life)['accuracy']
  life, _ = learner.sleep(life)
  after = metrics(life)
  fast = jax.tree.leaves(life.memory.levels[0].fast.delta)
  # The sender was reset, so the answers come from the expert.
  assert np.mean([np.abs(d).mean() for d in fast]) < 1e-2
  return awake, after['accuracy'], after['base_accuracy']


@pytest.fixture(name='slept', scope='module')
def _slept():
  return one_night()


def test_consolidation_moves_knowledge(slept):
  awake, after, _ = slept
  assert awake > 0.9
  assert after > 0.75


def test_consolidation_keeps_what_the_base_knew(slept):
  assert slept[2] > 0.95


@pytest.mark.parametrize(
  'control',
  [
    dict(train_expert=False),
    pytest.param(
      dict(learning_rate=0.0, max_kl_share=9.0), marks=pytest.mark.slow
    ),
  ],
)
def test_without_seeding_nothing_is_left_after_the_reset(control):
  # How many steps learn nothing does not matter.
  awake, after, _ = one_night(dreams=64, steps=20, **control)
  assert awake > 0.9
  assert after < 0.3
