"""Levels on a plain backbone, in both readings."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import flops
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.weights import add_levels
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import load as load_lib
from sleep_jax.weights import npz
from tests import conftest

HIDDEN = 16
FAST = config.LevelConfig(
  HIDDEN, chunk=4, sleep_every=2, optimizer='adam', learning_rate=0.02
)
SLOW = config.LevelConfig(
  HIDDEN, chunk=8, slots=3, rank=4, top_k=2, optimizer='sgd', learning_rate=0.1
)
PLAIN = conftest.tiny(
  layers=3,
  levels=(config.LevelConfig(HIDDEN),),
  qkv_bias=True,
  qk_norm=True,
  rope_scaling=config.RopeScaling(8.0, 1.0, 4.0, 16),
)
FAST_OF_STACK = dataclasses.replace(FAST, hidden=8)
STACK = dataclasses.replace(PLAIN, levels=(FAST_OF_STACK, SLOW))
PARTITION = dataclasses.replace(PLAIN, levels=(FAST, SLOW), partition=(1, 2))
# The expert level beneath the fast one, which is next to the output.
TOP = dataclasses.replace(PARTITION, partition_from='output')
READINGS = {'stack': STACK, 'partition': PARTITION, 'top': TOP}


@pytest.fixture(name='plain', scope='module')
def _plain():
  return conftest.weights(PLAIN)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens, memory=None):
  return transformer.forward(cfg, params, tokens, memory)


def logits(cfg, params, tokens, memory=None):
  return forward(cfg, params, tokens, memory).logits


def adopted(cfg, plain):
  return add_levels.add_levels(PLAIN, plain, cfg, jax.random.key(0))


@pytest.mark.parametrize('reading', READINGS)
def test_levels_change_no_bit_until_the_first_update(plain, tokens, reading):
  cfg = READINGS[reading]
  params = adopted(cfg, plain)
  want = logits(PLAIN, plain, tokens)
  memory = memory_init.init_memory(cfg)
  np.testing.assert_array_equal(logits(cfg, params, tokens), want)
  np.testing.assert_array_equal(logits(cfg, params, tokens, memory), want)
  bank = memory.levels[1].bank.unlock(0, jnp.int32(0), jax.random.key(1))
  unlocked = memory.with_level(1, bank=bank)
  np.testing.assert_array_equal(logits(cfg, params, tokens, unlocked), want)
  updated, _, _ = wake.read_day(
    wake.WakeConfig(batch=2),
    model_lib.Model(cfg, params, memory),
    jnp.int32(0),
    tokens[:2, :4],
    jnp.ones((2, 4)),
    defer_due_update=False,
  )
  assert not np.allclose(logits(cfg, params, tokens, updated), want)


def test_a_base_of_several_levels_gains_slower_ones(plain, tokens):
  params = adopted(STACK, plain)
  slower = config.LevelConfig(8, slots=2, rank=2, top_k=2)
  cfg = dataclasses.replace(STACK, levels=(FAST_OF_STACK, SLOW, slower))
  grown = add_levels.add_levels(STACK, params, cfg, jax.random.key(1))
  want = logits(STACK, params, tokens)
  memory = memory_init.init_memory(cfg)
  np.testing.assert_array_equal(logits(cfg, grown, tokens, memory), want)
  # Its experts see what the others do, so they may learn.
  bank = conftest.random_memory(cfg).levels[2].bank
  changed = memory.with_level(2, bank=bank)
  assert not np.allclose(logits(cfg, grown, tokens, changed), want)


def as_one_level(memory: memory_lib.Memory):
  """A partitioned memory written out over all layers of one level.

  Layers that a level does not have get zero changes and locked experts.
  """
  first, second = memory.levels
  cfg = dataclasses.replace(PLAIN, levels=(SLOW,))
  whole = memory_init.init_memory(cfg).levels[0]
  delta = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), first.fast.delta, second.fast.delta
  )
  experts = jax.tree.map(
    lambda all_, own: all_.at[1:].set(own),
    whole.bank.experts,
    second.bank.experts,
  )
  bank = second.bank.replace(experts=experts)
  level = whole.replace(fast=whole.fast.replace(delta=delta), bank=bank)
  return cfg, memory_lib.Memory((level,))


def test_a_partition_is_a_whole_level_with_silent_layers(plain, tokens):
  memory = conftest.random_memory(PARTITION)
  got = forward(PARTITION, plain, tokens, memory)
  cfg, whole = as_one_level(memory)
  want = forward(cfg, plain, tokens, whole)
  np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
  assert got.routes[0] is None and got.routes[1].shape == (2, 4, 16, 3)
  np.testing.assert_allclose(
    got.routes[1], want.routes[0][1:], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  'change',
  [
    dict(unroll=3),
    dict(remat=True),
    dict(remat=True, remat_saves='products'),
  ],
)
def test_scan_unroll_and_remat_agree(plain, tokens, change):
  memory = conftest.random_memory(PARTITION)

  def slope(cfg):
    def f(deltas):
      seen = memory.with_deltas(deltas)
      return (transformer.forward(cfg, plain, tokens, seen).logits ** 2).mean()

    return jax.jit(jax.value_and_grad(f))(memory.deltas())

  chex.assert_trees_all_close(
    slope(PARTITION),
    slope(conftest.replace(PARTITION, **change)),
    rtol=1e-5,
    atol=1e-6,
  )


def test_cached_decode_equals_the_full_forward(plain, tokens):
  memory = conftest.random_memory(PARTITION)
  step = jax.jit(
    lambda tokens, cache: transformer.forward(
      PARTITION, plain, tokens, memory, cache=cache
    )
  )
  cache, parts, at = cache_lib.init_cache(PARTITION, 4, 16), [], 0
  for size in (6, 1, 1, 6, 1, 1):
    out = step(tokens[:, at : at + size], cache)
    parts.append(out.logits)
    cache, at = out.cache, at + size
  np.testing.assert_allclose(
    logits(PARTITION, plain, tokens, memory),
    np.concatenate(parts, 1),
    rtol=1e-5,
    atol=1e-5,
  )


def test_a_partition_from_the_output_is_the_same_layers_in_reverse(
  plain, tokens
):
  assert [list(TOP.layers_of(i)) for i in (0, 1)] == [[2], [0, 1]]
  flipped = dataclasses.replace(TOP, partition=(2, 1), partition_from='input')
  memory = conftest.random_memory(TOP)
  swapped = memory_lib.Memory(memory.levels[::-1])
  flipped = dataclasses.replace(
    flipped,
    levels=(
      dataclasses.replace(SLOW, chunk=4),
      dataclasses.replace(FAST, sleep_every=0),
    ),
  )
  np.testing.assert_array_equal(
    logits(TOP, plain, tokens, memory), logits(flipped, plain, tokens, swapped)
  )


def test_the_gradient_of_a_top_level_stops_where_it_begins():
  """Layers below get none, and the accounts say so."""
  frozen = config.LevelConfig(HIDDEN)
  top = dataclasses.replace(
    TOP, levels=(dataclasses.replace(FAST, sleep_every=0), frozen)
  )
  bottom = dataclasses.replace(top, partition_from='input')
  saved = flops.wake_flops(bottom, 7.0) - flops.wake_flops(top, 7.0)
  below = flops.forward_flops(PLAIN, 7.0) - flops.forward_flops(PLAIN, 7.0, 2)
  assert saved == below > 0


def test_a_frozen_prefix_is_computed_once_and_changes_nothing(plain, tokens):
  levels = (
    FAST,
    dataclasses.replace(SLOW, chunk=0),
    config.LevelConfig(HIDDEN),
  )
  cfg = dataclasses.replace(TOP, levels=levels, partition=(1, 1, 1))
  assert (cfg.frozen_layers, TOP.frozen_layers, PLAIN.frozen_layers) == (
    1,
    0,
    0,
  )
  model = model_lib.Model(cfg, plain, conftest.random_memory(cfg))
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  fresh = model.with_memory(memory_init.init_memory(cfg))
  prefix = fresh.frozen_prefix(tokens, positions)
  np.testing.assert_allclose(
    model.forward(prefix, positions=positions).logits,
    model.forward(tokens).logits,
    rtol=1e-5,
    atol=1e-5,
  )
  assert model.with_memory(None).frozen_prefix(tokens, positions) is None


def test_each_level_holds_its_own_layers_only():
  fast, slow = memory_init.init_memory(PARTITION).levels
  for level, depth in ((fast, 1), (slow, 2)):
    assert {len(x) for x in level.fast.delta.values()} == {depth}
  assert slow.bank.experts.a.shape == (2, 3, 16, 4)
  assert fast.bank is None


def test_a_partition_costs_what_its_layers_cost():
  """One level of all layers costs what the same layers cost in two levels."""
  clock = config.LevelConfig(HIDDEN, chunk=4, slots=2, rank=4)
  one = dataclasses.replace(PLAIN, levels=(clock,))
  two = dataclasses.replace(PLAIN, levels=(clock, clock), partition=(2, 1))
  for formula in (flops.forward_flops, flops.wake_flops, flops.train_flops):
    assert formula(two, 7.0) == formula(one, 7.0)
  frozen = dataclasses.replace(clock, chunk=0)
  less = dataclasses.replace(two, levels=(clock, frozen))
  saved = flops.wake_flops(two, 7.0) - flops.wake_flops(less, 7.0)
  assert saved == 2 * 1 * 3 * 16 * HIDDEN


NIGHT = consolidation_config.SeedingConfig(
  dreams=64,
  dream_length=16,
  steps=80,
  batch=16,
  learning_rate=0.02,
  rollout_every=40,
  alpha=1.0,
  lam=0.0,
  max_kl_share=0.99,
)


@pytest.mark.slow
@pytest.mark.parametrize('reading', ['top', 'stack', 'partition'])
def test_a_converted_life_wakes_and_sleeps(plain, reading):
  """Level 1 learns a day by heart; asleep, one expert of level 2 takes it."""
  cfg = READINGS[reading]
  frozen = dataclasses.replace(cfg.levels[1], chunk=0)
  daily = dataclasses.replace(cfg.levels[0], sleep_every=240)
  cfg = dataclasses.replace(cfg, levels=(daily, frozen))
  model = model_lib.Model(cfg, adopted(cfg, plain))
  life = life_lib.init_life(model, jax.random.PRNGKey(0))
  life = life.with_memory(life.memory.with_all_slots(cfg))
  row = jax.random.randint(jax.random.key(4), (1, 16), 3, cfg.vocab)
  row = row.at[0, 0].set(1).at[0, 5].set(2).at[0, 11].set(2)
  rows = jnp.tile(row, (120, 1))
  memory, clock, loss = wake.read_day(
    wake.WakeConfig(batch=2),
    life.model,
    life.clock.tokens,
    rows,
    jnp.ones(rows.shape),
    defer_due_update=True,
  )
  assert loss[-4:].mean() < 0.1 * loss[:4].mean()
  life = life.with_memory(memory)
  life = life.replace(clock=life.clock.replace(tokens=clock))
  words = ['.', *(f'w{i}' for i in range(29))]
  after, report = transfer_lib.transfer(
    NIGHT,
    life,
    schedule.Transfer(0, 1),
    life.previous_memory(),
    tokenizers.WordTokenizer(words, separator='.'),
    costs_lib.CostTracker(cfg, 16),
    jax.random.PRNGKey(1),
  )
  assert report.kl_first > 0.05
  assert report.kl_last < 0.7 * report.kl_first and report.transferred
  old, new = (x.memory.levels[1].bank for x in (life, after))
  assert new.status.tolist() == [memory_lib.ACTIVE, 0, 0]
  for x, y in zip(jax.tree.leaves(old.experts), jax.tree.leaves(new.experts)):
    np.testing.assert_array_equal(x[:, 1:], y[:, 1:])
  chex.assert_trees_all_equal(after.model.params, life.model.params)

  def nats(memory):
    logp = jax.nn.log_softmax(
      logits(cfg, life.model.params, row, memory)[:, :-1]
    )
    return -jnp.take_along_axis(logp, row[:, 1:, None], -1).mean()

  # The sender has begun anew; what it knew is recalled nevertheless.
  empty = life.memory.with_level(0, fast=after.memory.levels[0].fast)
  assert nats(after.memory) < 0.5 * nats(empty)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(rope_theta=1.0), 'trained with rope_theta=10000.0'),
    (dict(qkv_bias=False), 'trained with qkv_bias=True'),
    (dict(rope_scaling=None), 'trained with rope_scaling='),
    (
      dict(levels=(SLOW, dataclasses.replace(SLOW, hidden=8))),
      r'\[16\].*\[16, 8\]',
    ),
  ],
)
def test_a_base_that_does_not_fit_is_refused(plain, changes, words):
  cfg = dataclasses.replace(PLAIN, **changes)
  with pytest.raises(config.ConfigError, match=words):
    add_levels.add_levels(PLAIN, plain, cfg, jax.random.key(0))


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(partition=(1, 1)), '3 .model.layers. in all'),
    (dict(partition=(0, 3)), 'at least one layer'),
    (dict(partition=(3,)), 'each of the 2 levels'),
    (dict(levels=STACK.levels), r'they have \[8, 16\]'),
  ],
)
def test_an_impossible_partition_is_refused(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    dataclasses.replace(PARTITION, **changes)


@pytest.mark.parametrize('reading', READINGS)
@pytest.mark.parametrize('name', ['base.npz', 'base'])
def test_a_plain_base_on_disk_gains_levels(plain, tmp_path, name, reading):
  path = tmp_path / name
  if path.suffix:
    npz.save(path, plain, PLAIN)
  else:
    folder_lib.save(path, PLAIN, plain)
  got = load_lib.load(str(path), READINGS[reading])
  chex.assert_trees_all_equal(got, adopted(READINGS[reading], plain))


def test_a_config_survives_being_written_as_json():
  as_read = config.ModelConfig.from_mapping(
    jax.tree.map(lambda x: x, dataclasses.asdict(PARTITION))
    | {'partition': list(PARTITION.partition)}
  )
  assert as_read == PARTITION
