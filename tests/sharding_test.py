"""The sharding rules: errors, and equal results on one and eight devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import lora
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding
from sleep_jax.runtime import tree_paths
from tests import conftest

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}
ROWS = 16


@pytest.fixture(name='memory')
def _memory(cfg):
  return conftest.random_memory(cfg)


@pytest.fixture(name='rows')
def _rows(cfg):
  return jax.random.randint(jax.random.key(3), (ROWS, 16), 0, cfg.vocab)


def put(mesh, tree):
  return jax.device_put(tree, sharding.shardings(mesh, tree))


def put_rows(mesh, tree, axis='batch'):
  return jax.device_put(tree, sharding.rows(mesh, tree, axis))


def assert_close(got, want):
  got, want = tree_paths.leaf_paths(got), tree_paths.leaf_paths(want)
  assert got.keys() == want.keys() and got
  for path, leaf in want.items():
    np.testing.assert_allclose(
      got[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path
    )


def test_a_hybrid_is_sharded_layer_by_layer():
  """Its layers are not stacked, and recurrent mixers are on every device."""
  recurrent = config.RecurrentConfig(heads=2, key=8, value=8, chunk=4)
  cfg = conftest.tiny(mixers=('attention', 'gdn'), recurrent=recurrent)
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  shardings = sharding.shardings(sharding.mesh(MESH), params)
  specs = {k: x.spec for k, x in tree_paths.leaf_paths(shardings).items()}
  for name, want in {
    'block_0.attention.q.kernel': (('fsdp',), ('tensor',), None),
    'block_0.attention.o.kernel': (('tensor',), None, ('fsdp',)),
    'block_0.level_1.gate': (('fsdp',), ('tensor',)),
    'block_1.level_3.down': (('tensor',), ('fsdp',)),
    'block_1.recurrence.q.kernel': (),
    'block_1.recurrence.o.kernel': (),
  }.items():
    assert specs[f'blocks.{name}'] == jax.P(*want), name


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, MESH], ids=['fsdp', 'mixed'])
def test_wake_on_eight_devices_equals_one(sizes, cfg, params, rows):
  # A small rate: large steps would amplify the rounding errors.
  level = dataclasses.replace(cfg.levels[0], learning_rate=0.05)
  cfg = conftest.replace(cfg, levels=(level, *cfg.levels[1:]))

  def wake_day(place, place_rows):
    memory = memory_init.init_memory(cfg)
    return wake.read_day(
      wake.WakeConfig(batch=8),
      model_lib.Model(cfg, place(params), place(memory)),
      jnp.int32(0),
      place_rows(rows),
      place_rows(jnp.ones(rows.shape)),
      defer_due_update=True,
    )

  mesh = sharding.mesh(sizes)
  want = wake_day(lambda x: x, lambda x: x)
  got = wake_day(lambda x: put(mesh, x), lambda x: put_rows(mesh, x))
  assert_close(got, want)
  change = want[0].levels[0].fast.delta['down']
  assert np.abs(change).max() > 1e-3  # The fast weights have changed.
  devices = got[0].levels[0].fast.delta['down'].sharding.device_set
  assert len(devices) == 8


@pytest.mark.slow
def test_a_day_of_single_rows_is_split_by_the_model(cfg, rows):
  level = dataclasses.replace(cfg.levels[0], learning_rate=0.05)
  cfg = conftest.replace(cfg, levels=(level, *cfg.levels[1:]))

  def wake_day():
    model = model_lib.Model(
      cfg,
      sharding.shard_params(conftest.weights(cfg)),
      sharding.shard_params(memory_init.init_memory(cfg)),
    )
    tokens = jnp.asarray(np.asarray(rows[:2]))
    return wake.read_day(
      wake.WakeConfig(batch=1),
      model,
      jnp.int32(0),
      tokens,
      jnp.ones(tokens.shape),
      defer_due_update=True,
    )

  want = wake_day()
  with sharding.use_mesh({'fsdp': 4, 'tensor': 2}):
    sharding.check_rows({'wake.batch': 1})
    got = jax.block_until_ready(wake_day())
  assert_close(got, want)
  down = got[0].levels[0].fast.delta['down']
  assert np.abs(down).max() > 1e-3
  assert down.sharding.shard_shape(down.shape)[1:] == (8, 4)  # Of (16, 16).


def test_a_rollout_on_eight_devices_equals_one(cfg, params, memory):
  def rollout(place, place_rows):
    prompts = jnp.full((ROWS, 1), 1)
    return sampling.generate(
      model_lib.Model(cfg, place(params), place(memory)),
      place_rows(prompts),
      place_rows(jnp.ones((ROWS,), jnp.int32)),
      jax.random.key(4),
      sampling.SamplerConfig(max_new=12),
    )

  mesh = sharding.mesh(MESH)
  want = rollout(lambda x: x, lambda x: x)
  got = rollout(lambda x: put(mesh, x), lambda x: put_rows(mesh, x))
  np.testing.assert_array_equal(got.tokens, want.tokens)
  assert_close(got.logprobs, want.logprobs)


@pytest.mark.slow
def test_seeding_on_eight_devices_equals_one(cfg, params, memory, rows):
  seeding_cfg = consolidation_config.SeedingConfig(steps=4, batch=8)

  def seed(place, place_rows):
    ones = jnp.ones(rows.shape)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    teacher = transformer.forward(cfg, params, rows).logits
    labels = teacher_labels.LabeledBatch(
      rows, positions, ones, teacher, ones, ones
    )
    expert = jax.tree.map(jnp.copy, memory.levels[1].bank.expert(0))
    order = jnp.arange(4 * 8).reshape(4, 8) % ROWS
    opt_state = seeding.optimizer(seeding_cfg).init(expert)
    return seeding.seed_steps(
      seeding_cfg,
      (place(expert), place(opt_state)),
      model_lib.Model(cfg, place(params), place(memory)),
      job_lib.SlotId(1, jnp.int32(0)),
      (place_rows(labels), None),
      (order, jnp.zeros((4, 0), jnp.int32)),
    )

  mesh = sharding.mesh(MESH)
  want = seed(lambda x: x, lambda x: x)
  got = seed(lambda x: put(mesh, x), lambda x: put_rows(mesh, x))
  assert_close(got[1], want[1])
  assert_close(got[0][0], want[0][0])


@pytest.mark.slow
def test_trials_on_eight_devices_equal_one(cfg, params, memory, rows):
  def run_trials(place, place_rows):
    keys = jax.random.split(jax.random.key(5), 8)
    lora_cfg = lora.LoraConfig(rank=2, alpha=4.0)
    adapters = jax.vmap(
      lambda key: lora.init_adapter(cfg, lora_cfg, params, key)
    )(keys)
    tokens = jnp.broadcast_to(rows[:4], (8, 4, 16))
    order = jnp.arange(8 * 3 * 2).reshape(8, 3, 2) % 4
    return trials.train_instances(
      model_lib.Model(cfg, place(params), place(memory)),
      place_rows(adapters),
      (place_rows(tokens), place_rows(jnp.ones(tokens.shape))),
      (place_rows(order), place_rows(jnp.full((8, 3), 1e-3))),
    )[0]

  mesh = sharding.mesh(MESH)
  want = run_trials(lambda x: x, lambda x: x)
  got = run_trials(
    lambda x: put(mesh, x), lambda x: put_rows(mesh, x, 'instances')
  )
  assert_close(got, want)


def test_every_large_leaf_is_split(cfg, params, memory):
  """Leaves that match no rule would be replicated."""
  mesh = sharding.mesh({'fsdp': 4, 'tensor': 2})
  for tree in (params, memory):
    leaf_shardings = tree_paths.leaf_paths(sharding.shardings(mesh, tree))
    for path, leaf in tree_paths.leaf_paths(tree).items():
      leaf_sharding = leaf_shardings[path]
      replicated = leaf_sharding.is_fully_replicated
      assert replicated == (leaf.size < 96), path
      if not replicated:
        assert np.prod(leaf_sharding.shard_shape(leaf.shape)) < leaf.size


def test_a_backbone_of_every_kind_has_named_axes():
  """Biases, query norms and an untied head, which the tiny model lacks."""
  cfg = conftest.tiny(qkv_bias=True, qk_norm=True, tie_embeddings=False)
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  mesh = sharding.mesh({'fsdp': 4, 'tensor': 2})
  found = tree_paths.leaf_paths(sharding.shardings(mesh, params))
  assert found['head.kernel'].spec == jax.P('fsdp', 'tensor')
  assert found['blocks.attention.q.bias'].spec[1] == 'tensor'
  assert found['blocks.attention.q_norm.scale'].is_fully_replicated


@pytest.mark.parametrize(
  'path, axes',
  [
    ('model.params.embed.embedding', ('vocab', 'embed')),
    ('model.params.head.kernel', ('embed', 'vocab')),
    (
      'model.params.blocks.attention.q.kernel',
      ('layers', 'embed', 'heads', None),
    ),
    ('model.params.blocks.level_1.down', ('layers', 'mlp', 'embed')),
    ('model.params.blocks.level_1_norm.scale', ()),
    (
      'model.memory.levels.1.bank.experts.b',
      ('layers', 'slots', None, 'embed'),
    ),
    ('model.memory.levels.1.bank.status', ()),
    ('model.memory.levels.0.fast.delta.up', ('layers', 'embed', 'mlp')),
    ('fast_at_wake.0.0.down', ('layers', 'mlp', 'embed')),
    ('fast_at_wake.0.1.1.mu.gate', ('layers', 'embed', 'mlp')),
    ('model.adapter.pairs.attention.v.b', ('layers', None, None)),
    ('optimizer.mu.a', ('layers', 'embed', None)),
  ],
)
def test_the_axes_of_a_leaf_of_a_life(path, axes):
  assert sharding.axes_of(path) == axes


def test_a_collision_is_refused(params):
  mesh = sharding.mesh({'fsdp': 8})
  rules = {**sharding.RULES, 'mlp': ('fsdp',)}
  words = r"both 'mlp' and 'embed' lie on mesh axis 'fsdp'"
  with pytest.raises(config.ConfigError, match=words):
    sharding.shardings(mesh, params, rules=rules)


def test_an_indivisible_size_is_refused_with_both_numbers(params):
  mesh = sharding.mesh({'tensor': 8})
  words = "'heads' has size 2, which 8 devices (tensor) do not divide"
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    sharding.shardings(mesh, params)


def test_an_indivisible_batch_is_refused():
  mesh = sharding.mesh({'data': 2, 'fsdp': 4})
  words = "'batch' has size 12, which 8 devices (data x fsdp) do not divide"
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    sharding.rows(mesh, jnp.zeros((12, 3)))


@pytest.mark.parametrize(
  'sizes, words',
  [
    ({'fsdp': 3}, 'a mesh of fsdp=3 needs 3 devices, but there are 8'),
    ({'model': 8}, "mesh axis 'model' is unknown"),
  ],
)
def test_an_invalid_mesh_is_refused(sizes, words):
  with pytest.raises(config.ConfigError, match=words):
    sharding.mesh(sizes)
