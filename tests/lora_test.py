"""Low-rank adapters: beside the backbone, folded into it, and untouched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.models import lora
from sleep_jax.models import memory_init
from sleep_jax.models import transformer

ALL = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
CFG = config.ModelConfig(
  vocab=31,
  dim=16,
  layers=2,
  heads=4,
  kv_heads=2,
  levels=(config.LevelConfig(24, chunk=4), config.LevelConfig(20)),
)
SPLIT = dataclasses.replace(
  CFG,
  levels=(config.LevelConfig(24, chunk=4), config.LevelConfig(24)),
  partition=(1, 1),
)
TOKENS = jnp.array(np.random.default_rng(0).integers(0, 31, (3, 9)))


def drawn(cfg, targets=ALL):
  """Backbone, and an adapter whose B is not zero."""
  params = transformer.init(cfg, jax.random.key(0))
  how = lora.LoraConfig(rank=3, alpha=6.0, targets=targets)
  adapter = lora.init_adapter(cfg, how, params, jax.random.key(1))
  keys = iter(jax.random.split(jax.random.key(2), 99))
  noisy = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapter
  )
  return params, adapter, noisy


def test_a_fresh_adapter_changes_nothing():
  params, fresh, _ = drawn(CFG)
  plain = transformer.forward(CFG, params, TOKENS).logits
  with_it = transformer.forward(CFG, params, TOKENS, adapter=fresh).logits
  np.testing.assert_array_equal(plain, with_it)


@pytest.mark.parametrize('cfg', (CFG, SPLIT), ids=('stack', 'partition'))
@pytest.mark.parametrize('target', ALL)
def test_beside_equals_folded(cfg, target):
  params, _, noisy = drawn(cfg, (target,))
  memory = memory_init.init_memory(cfg)
  beside = transformer.forward(cfg, params, TOKENS, memory, adapter=noisy)
  folded = transformer.forward(cfg, lora.merge(params, noisy), TOKENS, memory)
  plain = transformer.forward(cfg, params, TOKENS, memory)
  np.testing.assert_allclose(beside.logits, folded.logits, atol=2e-5)
  assert np.abs(beside.logits - plain.logits).max() > 1e-3


def test_rank_and_scale_are_as_configured():
  _, adapter, _ = drawn(CFG, ('q', 'down'))
  assert adapter.scale == 2.0
  assert set(adapter.pairs) == {'attention', 'level_1', 'level_2'}
  pair = adapter.pairs['level_2']['down']
  assert pair.a.shape == (2, 20, 3) and pair.b.shape == (2, 3, 16)


def test_an_unknown_target_is_refused():
  with pytest.raises(config.ConfigError, match="'w1' is unknown"):
    lora.LoraConfig(targets=('w1',))
