"""A base that nothing trains: one copy of it, and none in a checkpoint."""

import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.learners import frozen
from sleep_jax.runtime import sharding
from sleep_jax.weights import npz
from tests import run_test
from tests import small_life


def built(learner: str, dreams_to: str = 'lora'):
  """Task and learner of a short life with consolidation and dreams."""
  c = small_life.get_config()
  c.sleep.update(alpha=1.0, lam=0.0, steps=2)
  c.dreaming.target = dreams_to
  c.task.episodes = 1
  c = json.loads(c.to_json())
  c['arms'] = {learner: {}}
  task, learner, _ = build_lib.build(build_lib.arm_config(c, learner), seed=1)
  return task, learner


def copies_of(params) -> int:
  """How many arrays there are of the shape of the largest leaf."""
  gc.collect()
  largest = max(jax.tree.leaves(params), key=lambda x: x.size)
  pointers = {
    x.unsafe_buffer_pointer()
    for x in jax.live_arrays()
    if x.shape == largest.shape and not x.is_deleted()
  }
  return len(pointers)


@pytest.mark.slow
def test_a_day_and_a_night_hold_the_base_once():
  task, learner = built('sleep')
  base = learner.setup.model.params
  before = copies_of(base)  # Of this and earlier tests; the base is one.
  leaves = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(base)}

  def check(life):
    own = {
      x.unsafe_buffer_pointer() for x in jax.tree.leaves(life.model.params)
    }
    assert own == leaves
    assert copies_of(base) == before

  life = learner.init(jax.random.PRNGKey(0))
  check(life)
  life, _ = learner.wake(life, task.experience(0))
  check(life)
  life, metrics = learner.sleep(life)
  check(life)
  assert metrics['transfers'] and metrics['dreaming/dreams']


@pytest.mark.parametrize(
  'learner, target, trains',
  [
    ('sleep', 'lora', False),
    ('sleep', 'fold', True),
    ('seal', 'slot', False),
    ('seal', 'fold', True),
    ('ttt', 'fold', False),
    ('icl', 'lora', False),
    ('frozen', 'lora', False),
    ('sft', 'lora', True),
    ('ewc', 'lora', True),
  ],
)
def test_which_learners_change_the_backbone(learner, target, trains):
  assert built(learner, target)[1].trains_backbone == trains


def _life(workdir, c, arm, **changes):
  c = c | changes
  return live_lib.live(c, arm, 1, workdir, 0)


def _with_base(tmp_path, arms):
  """A short life on a base that lies in a file of its own."""
  c = run_test.small_config(arms)
  c['sleep'].update(alpha=1.0, lam=0.0)
  cfg, params = npz.read(pathlib.Path(c['base']))
  npz.save(tmp_path / 'base.npz', params, cfg)
  return c | {'base': str(tmp_path / 'base.npz')}, cfg, params


@pytest.mark.parametrize('arm', ['wake_only', 'sft'])
def test_a_life_goes_on_with_its_own_base_alone(tmp_path, arm):
  c, cfg, params = _with_base(tmp_path, [arm])
  whole = _life(tmp_path / 'whole', c, arm)
  _life(tmp_path / 'cut', c, arm)
  # As if it had been killed after the first day.
  (tmp_path / 'cut' / 'summary.json').unlink()
  resumed = _life(tmp_path / 'cut', c, arm)
  assert resumed['final'] == whole['final']
  meta = (tmp_path / 'cut/checkpoints/3/meta/metadata').read_text()
  names = json.loads(meta)['packed']
  assert any(name.startswith("['model']['memory']") for name in names)
  held = [name.startswith("['model']['params']") for name in names]
  assert any(held) == (arm == 'sft')
  (tmp_path / 'cut' / 'summary.json').unlink()
  params['embed']['embedding'] = params['embed']['embedding'] + 0.5
  npz.save(tmp_path / 'base.npz', params, cfg)
  if arm == 'sft':  # It holds all of its weights.
    assert _life(tmp_path / 'cut', c, arm)['final'].keys() == (
      whole['final'].keys()
    )
    return
  with pytest.raises(config.ConfigError, match='bring back the weights'):
    _life(tmp_path / 'cut', c, arm)


class Liar(frozen.Frozen):
  """Says that it trains nothing, and does."""

  name = 'liar'

  def wake(self, life, experience):
    params = jax.tree.map(lambda x: 1.001 * x, life.model.params)
    return life.replace(model=life.model.replace(params=params)), {}


def test_a_learner_that_changes_the_base_must_say_so(tmp_path):
  c = run_test.small_config(['sleep'])
  c['arms'] = {'liar': {'learner': f'{__name__}:Liar'}}
  with pytest.raises(config.ConfigError, match='learner liar says that it'):
    live_lib.live(c, 'liar', 1, tmp_path, 0)
  assert not list(tmp_path.glob('checkpoints/[0-9]'))


def test_a_mesh_holds_the_base_once():
  with sharding.use_mesh({'fsdp': 4, 'tensor': 2}):
    tree = {'blocks': {'level_1': {'gate': jnp.ones((2, 8, 16))}}}
    placed = sharding.shard_params(tree)
    again = sharding.shard_params(placed)
    assert jax.tree.leaves(placed)[0] is jax.tree.leaves(again)[0]
    traced = jax.jit(lambda x: sharding.shard_params(jax.tree.map(jnp.sin, x)))
    assert jax.tree.leaves(traced(placed))[0].sharding == (
      jax.tree.leaves(placed)[0].sharding
    )
