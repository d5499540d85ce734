"""Mixers that carry a memory from chunk to chunk: what all of them must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from sleep_jax.models.mixers import hope
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans
from sleep_jax.models.mixers import titans_attention
from sleep_jax.models.mixers import titans_mac
from tests import conftest

TITANS = titans.TitansConfig(heads=2, width=4, chunk=4, max_rate=0.5)
HOPE = hope.HopeConfig(heads=2, width=4, chunk=4)
WINDOW = sliding_window.SlidingWindowConfig(window=4, sinks=2, persistent=1)
BOTH = titans_attention.TitansAttentionConfig(
  heads=2, width=4, chunk=4, max_rate=0.5, window=4, sinks=1, persistent=1
)
SETTINGS = {
  'titans': TITANS,
  'hope': HOPE,
  'sliding_window': WINDOW,
  'titans_mag': BOTH,
  'titans_mal': BOTH,
  'titans_mac': titans_mac.TitansMACConfig(
    heads=2, width=4, chunk=4, max_rate=0.5, persistent=1
  ),
}


@pytest.fixture(name='cfg', params=SETTINGS)
def _cfg(request) -> config.ModelConfig:
  mixers = request.param, 'attention'
  return conftest.tiny(
    mixers=mixers, recurrent=SETTINGS[request.param], layers=2
  )


@pytest.mark.parametrize(
  'sizes',
  [
    (3, 1, 12),
    pytest.param((5, 7, 4), marks=pytest.mark.slow),
    pytest.param((16,), marks=pytest.mark.slow),
    pytest.param((1,) * 16, marks=pytest.mark.slow),
  ],
)
def test_a_stream_may_come_in_any_pieces(cfg, tokens, sizes):
  """Chunks are of 4: pieces end in the middle of one, and are shorter."""
  params, memory = conftest.weights(cfg), memory_init.init_memory(cfg)
  step = jax.jit(
    lambda tokens, cache: transformer.forward(
      cfg, params, tokens, memory, cache=cache
    )
  )
  full = transformer.forward(cfg, params, tokens, memory)
  assert any(np.abs(s).max() > 1e-3 for s in full.states)
  cache, parts, at = cache_lib.init_cache(cfg, 4, 16, memory), [], 0
  for size in sizes:
    out = step(tokens[:, at : at + size], cache)
    parts.append(out.logits)
    cache, at = out.cache, at + size
  np.testing.assert_allclose(
    full.logits, np.concatenate(parts, 1), rtol=1e-4, atol=1e-5
  )
  for got, want in zip(out.states, full.states, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_row_knows_nothing_of_the_others(cfg, tokens):
  """The state is per row: rows in another order are the same rows."""
  params, order = conftest.weights(cfg), jnp.array([2, 0, 3, 1])
  ours = transformer.forward(cfg, params, tokens)
  other = transformer.forward(cfg, params, tokens[order])
  np.testing.assert_allclose(
    ours.logits[order], other.logits, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    ours.states[0][order], other.states[0], rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  'mixer, changes',
  [
    pytest.param('titans', dict(depth=1), marks=pytest.mark.slow),
    pytest.param('titans', dict(depth=2), marks=pytest.mark.slow),
    ('titans', dict(depth=4)),
    pytest.param('hope', dict(negative=False), marks=pytest.mark.slow),
    ('hope', dict(negative=True)),
  ],
)
def test_long_and_repeated_text_stays_finite(mixer, changes):
  """Deep memories diverged for others on long rows."""
  if mixer == 'titans':  # What the config has by default.
    changes = changes | dict(max_rate=0.5)
  settings = dataclasses.replace(SETTINGS[mixer], chunk=32, **changes)
  cfg = conftest.tiny(mixers=(mixer,), layers=1, recurrent=settings)
  rows = jnp.tile(jnp.array([[3, 7, 7, 1]]), (1, 500))

  @jax.jit
  def slope(params):
    return jax.grad(
      lambda p: (transformer.forward(cfg, p, rows).hidden ** 2).mean()
    )(params)

  grads = slope(conftest.weights(cfg))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  layer = grads['blocks']['block_0']['recurrence']
  memories = [g for name, g in layer.items() if name.startswith('memory')]
  assert memories and all(np.abs(g).max() > 0 for g in memories)
