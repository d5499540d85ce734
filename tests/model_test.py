"""What must always hold of the forward pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import flops
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import transformer
from tests import conftest


def logits(cfg, params, tokens, memory=None, **kw):
  return transformer.forward(cfg, params, tokens, memory, **kw).logits


def test_fresh_memory_gives_the_base_logits_bit_for_bit(cfg, params, tokens):
  memory = memory_lib.init_memory(cfg)
  base = logits(cfg, params, tokens)
  np.testing.assert_array_equal(base, logits(cfg, params, tokens, memory))


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_one_code_path_serves_one_to_four_levels(tokens, k):
  clocks = [
    config.LevelConfig(16, chunk=4 * 2**i, sleep_every=2, slots=2, rank=4)
    for i in range(k - 1)
  ]
  slowest = config.LevelConfig(16, slots=2 * (k > 1), rank=4)
  cfg = conftest.tiny(levels=(*clocks, slowest))
  params = transformer.init(cfg, jax.random.key(0))
  levels = [n for n in params['blocks'] if n.startswith('level_')]
  assert len(levels) == 2 * k  # Each level has its weights and its norm.
  memory = memory_lib.init_memory(cfg)
  np.testing.assert_array_equal(
    logits(cfg, params, tokens), logits(cfg, params, tokens, memory)
  )
  if k == 1:  # A Transformer: it has no memory that could change.
    assert not jax.tree.leaves(memory)


@pytest.mark.parametrize('level', [1, 2])
def test_unlocking_a_slot_changes_no_bit(cfg, params, tokens, level):
  memory = conftest.lived(cfg)
  bank = memory.levels[level].bank.unlock(2, jnp.int32(3), jax.random.key(9))
  unlocked = memory.with_level(level, bank=bank)
  np.testing.assert_array_equal(
    logits(cfg, params, tokens, memory),
    logits(cfg, params, tokens, unlocked),
  )


def test_a_lived_memory_does_change_the_logits(cfg, params, tokens):
  memory = conftest.lived(cfg)
  assert not np.allclose(
    logits(cfg, params, tokens), logits(cfg, params, tokens, memory)
  )


def test_pruning_a_bank_takes_its_experts_away(cfg, params, tokens):
  memory = conftest.lived(cfg)
  none = memory
  for i in (1, 2):
    none = none.with_level(i, bank=memory.levels[i].bank.prune())
  fast_only = memory_lib.init_memory(cfg).with_deltas(memory.deltas())
  np.testing.assert_array_equal(
    logits(cfg, params, tokens, none), logits(cfg, params, tokens, fast_only)
  )


@pytest.mark.parametrize('change', [dict(unroll=2), dict(remat=True)])
def test_scan_unroll_and_remat_agree(cfg, params, tokens, change):
  memory = conftest.lived(cfg)

  def loss(cfg):
    def f(params):
      return (logits(cfg, params, tokens, memory) ** 2).mean()

    return jax.value_and_grad(f)(params)

  chex.assert_trees_all_close(
    loss(cfg), loss(conftest.replace(cfg, **change)), rtol=1e-5, atol=1e-6
  )


def test_jit_agrees_with_no_jit(cfg, params, tokens):
  memory = conftest.lived(cfg)
  with jax.disable_jit():
    plain = logits(cfg, params, tokens, memory)
  np.testing.assert_allclose(
    plain, logits(cfg, params, tokens, memory), rtol=1e-5, atol=1e-5
  )


def test_a_token_does_not_see_the_future(cfg, params, tokens):
  memory = conftest.lived(cfg)
  changed = tokens.at[:, 9].add(1) % cfg.vocab
  a = logits(cfg, params, tokens, memory)
  b = logits(cfg, params, changed, memory)
  np.testing.assert_array_equal(a[:, :9], b[:, :9])
  assert not np.allclose(a[:, 9:], b[:, 9:])


def test_cached_decode_equals_the_full_forward(cfg, params, tokens):
  memory = conftest.lived(cfg)
  full = logits(cfg, params, tokens, memory)
  cache = cache_lib.init_cache(cfg, 4, 16)
  parts, at = [], 0
  for size in (5, 1, 1, 6, 3):
    out = transformer.forward(
      cfg, params, tokens[:, at : at + size], memory, cache=cache
    )
    parts.append(out.logits)
    cache, at = out.cache, at + size
  np.testing.assert_allclose(
    full, np.concatenate(parts, 1), rtol=1e-5, atol=1e-5
  )


def test_left_padding_does_not_matter(cfg, params, tokens):
  memory = conftest.lived(cfg)
  padded = jnp.pad(tokens, ((0, 0), (3, 0)))
  positions = jnp.broadcast_to(jnp.arange(19) - 3, padded.shape)
  positions = jnp.where(positions < 0, positions_lib.PAD_POSITION, positions)
  np.testing.assert_allclose(
    logits(cfg, params, tokens, memory),
    logits(cfg, params, padded, memory, positions=positions)[:, 3:],
    rtol=1e-5,
    atol=1e-5,
  )


def test_a_batch_of_lives_equals_each_alone(cfg, params, tokens):
  lives = [conftest.lived(cfg, seed) for seed in (1, 2, 3)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *lives)
  together = jax.vmap(lambda m: logits(cfg, params, tokens, m))(batch)
  for got, life in zip(together, lives, strict=True):
    np.testing.assert_allclose(
      got, logits(cfg, params, tokens, life), rtol=1e-5, atol=1e-5
    )


def test_one_device_equals_eight(cfg, params):
  assert jax.device_count() == 8
  tokens = jax.random.randint(jax.random.key(2), (8, 16), 0, cfg.vocab)
  memory = conftest.lived(cfg)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.NamedSharding(mesh, jax.P('data'))

  def loss(params, memory, tokens):
    return (logits(cfg, params, tokens, memory) ** 2).mean()

  grad = jax.jit(jax.value_and_grad(loss))
  chex.assert_trees_all_close(
    grad(params, memory, tokens),
    grad(params, memory, jax.device_put(tokens, rows)),
    rtol=1e-5,
    atol=1e-6,
  )


def test_top_k_limits_the_active_experts(params, tokens):
  cfg = conftest.tiny()
  levels = cfg.levels[:1] + tuple(
    config.LevelConfig(l.hidden, l.chunk, slots=3, rank=4, top_k=1)
    for l in cfg.levels[1:]
  )
  one = conftest.replace(cfg, levels=levels)
  memory = conftest.lived(cfg)
  assert not np.allclose(
    logits(cfg, params, tokens, memory), logits(one, params, tokens, memory)
  )


def test_flops_match_a_hand_count():
  cfg = config.ModelConfig(
    vocab=10, dim=4, layers=3, heads=2, levels=(config.LevelConfig(8),)
  )
  attention = 4 * 4 * 4 + 2 * 4 * 7  # q, k, v, o; scores and values over 7.
  per_layer = attention + 3 * 4 * 8
  want = 2 * (3 * per_layer + 4 * 10)
  assert flops.forward_flops(cfg, context=7) == want


@pytest.mark.parametrize(
  'levels, words',
  [
    ((), 'levels is empty'),
    (
      (config.LevelConfig(8, chunk=4), config.LevelConfig(8, chunk=6)),
      'not a multiple',
    ),
    ((config.LevelConfig(8, chunk=4, sleep_every=1),), 'slowest'),
    (
      (
        config.LevelConfig(8, chunk=4, sleep_every=1),
        config.LevelConfig(8),
      ),
      'give it both',
    ),
    (
      (
        config.LevelConfig(8, sleep_every=1),
        config.LevelConfig(8, slots=1, rank=1),
      ),
      'nothing to send',
    ),
  ],
)
def test_impossible_levels_are_refused(levels, words):
  with pytest.raises(config.ConfigError, match=words):
    conftest.tiny(levels=levels)


def test_an_unknown_setting_is_named():
  with pytest.raises(config.ConfigError, match="levels\\[0\\].*'chunks'"):
    config.ModelConfig.from_mapping(dict(vocab=8, levels=[dict(hidden=4, chunks=1)]))
