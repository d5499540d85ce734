"""Puzzles and lives that read windows, on eight devices as on one."""

import contextlib
import json

import jax
import numpy as np
import pytest

from experiments.configs import depo
from experiments.configs import rule110
from sleep_jax.harness import build as build_lib
from sleep_jax.lifecycle.recurrence import training
from sleep_jax.runtime import sharding
from sleep_jax.runtime import tree_paths
from tests import golden_lives

_MESH = {'data': 4, 'fsdp': 2}


def built(c, arm):
  """Task and learner of an arm, and its new life; on the mesh that is set."""
  task, learner, _ = build_lib.build(build_lib.arm_config(c, arm), seed=1)
  life = learner.init(jax.random.PRNGKey(1))
  return task, learner, sharding.shard_params(life)


def settings(recipe):
  """Small, and its updates too: Adam enlarges what is rounded otherwise."""
  c = recipe.get_config()
  c.task.update(episodes=1)
  c.model.update(dim=16)
  c.model.recurrent.update(heads=1, key=8, value=8)
  c.training.update(steps=2, batch=16)
  c.training.update(muon_learning_rate=1e-4, adam_learning_rate=1e-4)
  if recipe is rule110:
    c.task.update(width=4, eval_rows=32)
  arm = next(a for a in c.arms if a.startswith('passes_2'))
  return json.loads(c.to_json()), arm


@pytest.mark.slow
@pytest.mark.parametrize('recipe', [rule110, depo])
def test_a_puzzle_is_learnt_and_asked_by_rows(recipe, monkeypatch):
  c, arm = settings(recipe)
  evaluate, placed = training.evaluate_batch, []

  def recorded(cfg, model, batch):
    placed.append(getattr(batch.inputs, 'sharding', None))
    return evaluate(cfg, model, batch)

  monkeypatch.setattr(training, 'evaluate_batch', recorded)

  def trained(mesh):
    with mesh:
      task, learner, life = built(c, arm)
      stream = task.experience(0)
      life, metrics = learner.wake(life, stream)
      batch = next(stream.batches(16))
      return metrics, learner.predict(life, batch)

  want, asked = trained(contextlib.nullcontext())
  got, answered = trained(sharding.use_mesh(_MESH))
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(answered.loss, asked.loss, rtol=1e-5)
  parts = placed[-1].spec[0]
  assert parts == ('data', 'fsdp')


@pytest.mark.slow
def test_a_day_of_windows_on_a_mesh_equals_that_of_one_device():
  c = json.loads(golden_lives.get_config('both_sleeps').to_json())

  def read(mesh):
    with mesh:
      task, learner, life = built(c, 'recurrence_brief')
      life, _ = learner.wake(life, task.experience(0))
      life, _ = learner.sleep(life)
      return tree_paths.leaf_paths(life.memory.states), life.model.params

  want, _ = read(contextlib.nullcontext())
  got, params = read(sharding.use_mesh(_MESH))
  assert any(np.abs(x).max() > 1e-2 for x in want.values())
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-5)
  sharded = params['embed']['embedding'].sharding
  assert len(sharded.device_set) == 8 and not sharded.is_fully_replicated
