"""What must always hold of the forward pass."""

import dataclasses

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.inference import decoding
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import flops
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory_init
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import transformer
from sleep_jax.models.mixers import base as mixers_base
from tests import conftest


def logits(cfg, params, tokens, memory=None, **kw):
  return transformer.forward(cfg, params, tokens, memory, **kw).logits


def test_fresh_memory_gives_the_base_logits_bit_for_bit(cfg, params, tokens):
  memory = memory_init.init_memory(cfg)
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
  memory = memory_init.init_memory(cfg)
  np.testing.assert_array_equal(
    logits(cfg, params, tokens), logits(cfg, params, tokens, memory)
  )
  if k == 1:  # A Transformer: it has no memory that could change.
    assert not jax.tree.leaves(memory)


@pytest.mark.parametrize('level', [1, 2])
def test_unlocking_a_slot_changes_no_bit(cfg, params, tokens, level):
  memory = conftest.random_memory(cfg)
  bank = memory.levels[level].bank.unlock(2, jnp.int32(3), jax.random.key(9))
  unlocked = memory.with_level(level, bank=bank)
  np.testing.assert_array_equal(
    logits(cfg, params, tokens, memory),
    logits(cfg, params, tokens, unlocked),
  )


def test_a_lived_memory_does_change_the_logits(cfg, params, tokens):
  memory = conftest.random_memory(cfg)
  assert not np.allclose(
    logits(cfg, params, tokens), logits(cfg, params, tokens, memory)
  )


def test_pruning_a_bank_takes_its_experts_away(cfg, params, tokens):
  memory = conftest.random_memory(cfg)
  none = memory
  for i in (1, 2):
    none = none.with_level(i, bank=memory.levels[i].bank.prune())
  fast_only = memory_init.init_memory(cfg).with_deltas(memory.deltas())
  np.testing.assert_array_equal(
    logits(cfg, params, tokens, none), logits(cfg, params, tokens, fast_only)
  )


@pytest.mark.parametrize(
  'change',
  [
    dict(unroll=2),
    dict(remat=True),
    dict(remat=True, remat_saves='products'),
  ],
)
def test_scan_unroll_and_remat_agree(cfg, params, tokens, change):
  memory = conftest.random_memory(cfg)

  def loss(cfg):
    def f(params):
      return (logits(cfg, params, tokens, memory) ** 2).mean()

    return jax.value_and_grad(f)(params)

  chex.assert_trees_all_close(
    loss(cfg), loss(conftest.replace(cfg, **change)), rtol=1e-5, atol=1e-6
  )


@pytest.mark.slow
def test_jit_agrees_with_no_jit(cfg, params, tokens):
  memory = conftest.random_memory(cfg)
  with jax.disable_jit():
    plain = logits(cfg, params, tokens, memory)
  np.testing.assert_allclose(
    plain, logits(cfg, params, tokens, memory), rtol=1e-5, atol=1e-5
  )


def test_a_token_does_not_see_the_future(cfg, params, tokens):
  memory = conftest.random_memory(cfg)
  changed = tokens.at[:, 9].add(1) % cfg.vocab
  a = logits(cfg, params, tokens, memory)
  b = logits(cfg, params, changed, memory)
  np.testing.assert_array_equal(a[:, :9], b[:, :9])
  assert not np.allclose(a[:, 9:], b[:, 9:])


def test_cached_decode_equals_the_full_forward(cfg, params, tokens):
  memory = conftest.random_memory(cfg)
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
  memory = conftest.random_memory(cfg)
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
  lives = [conftest.random_memory(cfg, seed) for seed in (1, 2, 3)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *lives)
  together = jax.vmap(lambda m: logits(cfg, params, tokens, m))(batch)
  for got, life in zip(together, lives, strict=True):
    np.testing.assert_allclose(
      got, logits(cfg, params, tokens, life), rtol=1e-5, atol=1e-5
    )


def test_one_device_equals_eight(cfg, params):
  assert jax.device_count() == 8
  tokens = jax.random.randint(jax.random.key(2), (8, 16), 0, cfg.vocab)
  memory = conftest.random_memory(cfg)
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
  memory = conftest.random_memory(cfg)
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
    config.ModelConfig.from_mapping(
      dict(vocab=8, levels=[dict(hidden=4, chunks=1)])
    )


@dataclasses.dataclass(frozen=True)
class EmaConfig:
  """Settings of `Ema`."""

  init_decay: float = 0.5


class EmaState(at.Pytree):
  """The average so far."""

  s: jax.Array  # [B, 1, 1, D]


class EmaLayer(nn.Module):
  """An exponential moving average of the tokens, one decay per channel."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(self, x, inputs, state, adapter=None):
    dim = x.shape[-1]
    init = nn.initializers.constant(self.cfg.recurrent.init_decay)
    decay = nn.sigmoid(self.param('decay', init, (dim,)))
    mean = jnp.zeros(x[:, 0].shape) if state is None else state.s[:, 0, 0]
    means = []
    for i in range(x.shape[1]):
      new = decay * mean + (1 - decay) * x[:, i]
      mean = jnp.where(inputs.token_mask[:, i, None], new, mean)
      means.append(mean)
    y = nn.Dense(dim, name='o')(jnp.stack(means, axis=1))
    return y, EmaState(mean[:, None, None])


class Ema(mixers_base.Mixer):
  """A mixer from outside the package."""

  name = 'ema'
  Config = EmaConfig
  recurrent = True

  @classmethod
  def module(cls, cfg, name):
    return EmaLayer(cfg, name=name)

  @classmethod
  def init_state(cls, cfg, rows, capacity):
    return EmaState(jnp.zeros((rows, 1, 1, cfg.dim)))

  @classmethod
  def flops(cls, cfg, context):
    return 2.0 * (2 * cfg.dim + cfg.dim**2)


EMA = f'{__name__}:Ema'


@pytest.fixture(name='hybrid')
def _hybrid():
  cfg = config.ModelConfig.from_mapping(
    dict(
      vocab=32,
      dim=16,
      layers=4,
      heads=4,
      levels=[dict(hidden=16, chunk=4), dict(hidden=16, slots=3, rank=4)],
      mixers=[EMA, 'attention'],
      recurrent=dict(init_decay=0.25),
    )
  )
  return cfg, conftest.weights(cfg), conftest.random_memory(cfg)


@pytest.mark.slow
def test_a_mixer_from_outside_is_one_class(hybrid, tokens):
  cfg, params, memory = hybrid
  assert cfg.recurrent == EmaConfig(init_decay=0.25)
  assert cfg.recurrent_layers == (0, 2) and cfg.attention_layers == (1, 3)
  assert params['blocks']['block_0']['recurrence']['decay'][0] == 0.25
  assert [s.shape for s in memory.states] == [(1, 1, 16)] * 2
  plain = conftest.replace(
    cfg, mixers=('attention',), recurrent=config.RecurrentConfig()
  )
  per_layer = flops.forward_flops(plain, 9.0) - flops.forward_flops(cfg, 9.0)
  attention = 2.0 * (4 * 16 * 16 + 2 * 16 * 9)
  assert per_layer == 2 * (attention - Ema.flops(cfg, 9.0))
  # The states of the memory count: without them the logits differ.
  none = memory.replace(states=())
  assert not np.allclose(
    logits(cfg, params, tokens, memory), logits(cfg, params, tokens, none)
  )


@pytest.mark.parametrize('sizes', [(16,), (5, 7, 4), (1,) * 16])
def test_its_chunks_equal_one_token_at_a_time(hybrid, tokens, sizes):
  cfg, params, memory = hybrid
  step = jax.jit(
    lambda tokens, cache: transformer.forward(
      cfg, params, tokens, memory, cache=cache
    )
  )
  full = transformer.forward(cfg, params, tokens, memory)
  cache, parts, at = cache_lib.init_cache(cfg, 4, 16, memory), [], 0
  for size in sizes:
    out = step(tokens[:, at : at + size], cache)
    parts.append(out.logits)
    cache, at = out.cache, at + size
  np.testing.assert_allclose(
    full.logits, np.concatenate(parts, 1), rtol=1e-5, atol=1e-5
  )
  for got, want in zip(out.states, full.states, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_its_decode_loop_equals_the_full_forward(hybrid, tokens):
  cfg, params, memory = hybrid
  model = decoding.unstack_layers(cfg, params, cms.per_layer_memory(memory))
  cache = decoding.init_decode_cache(cfg, 4, 16, memory)
  positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
  got = []
  for columns in (slice(0, 14), slice(14, 15), slice(15, 16)):
    out, cache = decoding.decode(
      cfg, model, tokens[:, columns], positions[:, columns], cache
    )
    got.append(out)
  want = logits(cfg, params, tokens, memory)[:, 13:]
  np.testing.assert_allclose(jnp.stack(got, axis=1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'mixer', ['attention', 'gdn', 'jet', 'titans', 'hope', EMA]
)
def test_gradients_of_a_token_by_later_tokens_are_zero(mixer):
  cfg = conftest.tiny(mixers=(mixer,))
  (mixer_cls, _) = mixers_base.of_layers(cfg)
  x = jax.random.normal(jax.random.key(0), (2, 6, 16))
  positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
  inputs = mixers_base.MixerInputs(
    rope=layers_lib.rope_cos_sin(positions, 4, cfg.rope_theta),
    mask=positions_lib.causal_mask(positions, positions),
    cache_index=None,
    token_mask=jnp.ones((2, 6), bool),
  )
  layer = mixer_cls.module(cfg, None)
  params = layer.init(jax.random.key(1), x, inputs, None)
  slope = jax.jit(
    jax.jacrev(lambda x: layer.apply(params, x, inputs, None)[0].sum((0, 2)))
  )(x)  # [T, B, T, D]
  size = np.abs(slope).sum((1, 3))
  np.testing.assert_array_equal(np.triu(size, 1), 0)
  assert (np.diagonal(size) > 0).all()


def test_settings_of_two_mixers_do_not_mix():
  with pytest.raises(config.ConfigError, match='EmaConfig, RecurrentConfig'):
    conftest.tiny(mixers=(EMA, 'gdn'))
  with pytest.raises(config.ConfigError, match='must be of class EmaConfig'):
    conftest.tiny(mixers=(EMA,), recurrent=config.RecurrentConfig(heads=2))


def test_positions_of_left_padded_rows():
  np.testing.assert_array_equal(
    positions_lib.left_padded_positions(jnp.array([3, 0, 4]), 4),
    [[-1, 0, 1, 2], [-1, -1, -1, -1], [0, 1, 2, 3]],
  )
