"""Sliding-window attention with sinks: against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from sleep_jax.models.mixers import sliding_window as sw
from tests import conftest


def model(layers=1, **settings) -> config.ModelConfig:
  return conftest.tiny(
    mixers=('sliding_window',),
    layers=layers,
    heads=4,
    kv_heads=2,
    recurrent=sw.SlidingWindowConfig(**settings),
  )


def by_hand(cfg, q, k, v, persistent):
  """Token by token; each query is rotated for every key that it sees."""
  r, rotate = cfg.recurrent, sw.Rotation(cfg)

  def turned(x, position):
    at = jnp.full((1, 1), position)
    return rotate(x[None, None], at)[0, 0]

  out = []
  for n in range(len(q)):
    seen = [m for m in range(n + 1) if n - m < r.window or m < r.sinks]
    of_heads = []
    for head in range(cfg.heads):
      group, scores, values = head // 2, [], []
      for m in seen:
        near = min(n, r.kept - 1) if m < r.sinks else n
        a, b = turned(q[n], near)[head], turned(k[m], m)[group]
        scores.append(a @ b / np.sqrt(q.shape[-1]))
        values.append(v[m, group])
      for of_weights, value in zip(*persistent, strict=True):
        scores.append(q[n, head] @ of_weights[group] / np.sqrt(q.shape[-1]))
        values.append(value[group])
      p = jax.nn.softmax(jnp.stack(scores))
      of_heads.append(p @ jnp.stack(values))
    out.append(jnp.stack(of_heads))
  return jnp.stack(out)


@pytest.mark.parametrize(
  'settings',
  [
    dict(window=3, sinks=0),
    dict(window=3, sinks=2, persistent=2),
    dict(window=64, sinks=4),
  ],
)
def test_tokens_read_the_window_and_the_sinks(settings):
  cfg = model(**settings)
  r, e, t = cfg.recurrent, cfg.resolved_head_dim, 11
  keys = jax.random.split(jax.random.key(0), 5)
  q = jax.random.normal(keys[0], (1, t, 4, e))
  k, v = (jax.random.normal(x, (1, t, 2, e)) for x in keys[1:3])
  of_weights = [jax.random.normal(x, (r.persistent, 2, e)) for x in keys[3:]]
  persistent = of_weights[0], of_weights[1]
  empty = sw._unpack(sw.init_state(cfg, r, 1))
  new = sw.Tokens(k, v, jnp.ones((1, t)))
  with jax.default_matmul_precision('highest'):
    kept, out = sw.read(
      r, sw.Rotation(cfg), empty, q, new, persistent if r.persistent else None
    )
    want = by_hand(cfg, q[0], k[0], v[0], persistent)
  np.testing.assert_allclose(out[0], want, rtol=1e-4, atol=1e-5)
  ones = [i for i in range(t) if i < r.sinks or i >= t - r.window]
  assert kept.real[0].sum() == len(ones)
  there = kept.real[0] > 0
  np.testing.assert_array_equal(kept.v[0][there], v[0, jnp.array(ones)])


def test_padding_changes_nothing(tokens):
  """Rows padded in front, and in the middle, say the same."""
  cfg = model(layers=2, window=3, sinks=2)
  params, memory = conftest.weights(cfg), memory_init.init_memory(cfg)
  plain = transformer.forward(cfg, params, tokens, memory)
  gap = jnp.full((len(tokens), 2), -1)
  place = jnp.arange(tokens.shape[1])[None] + jnp.zeros_like(tokens)
  padded = jnp.concatenate([gap, place[:, :5], gap, place[:, 5:]], axis=1)
  filled = jnp.concatenate([gap, tokens[:, :5], gap, tokens[:, 5:]], axis=1)
  out = transformer.forward(
    cfg, params, jnp.maximum(filled, 0), memory, positions=padded
  )
  real = padded[0] >= 0
  np.testing.assert_allclose(
    out.logits[:, real], plain.logits, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    out.states[0], plain.states[0], rtol=1e-4, atol=1e-5
  )


def test_what_left_the_window_is_not_seen():
  cfg = model(window=4, sinks=1)
  params = conftest.weights(cfg)

  def last(tokens):
    return transformer.forward(cfg, params, tokens).logits[0, -1]

  rows = jnp.arange(10)[None] % 7
  np.testing.assert_array_equal(last(rows), last(rows.at[0, 5].set(0)))
  assert np.abs(last(rows) - last(rows.at[0, 6].set(0))).max() > 1e-4
  assert np.abs(last(rows) - last(rows.at[0, 0].set(3))).max() > 1e-4


def test_a_long_stream_costs_the_same_memory_for_every_piece():
  """What is kept does not grow, and positions do not either."""
  cfg = model(window=4, sinks=1)
  params, memory = conftest.weights(cfg), memory_init.init_memory(cfg)
  step = jax.jit(
    lambda states: transformer.forward(
      cfg, params, jnp.ones((1, 50), jnp.int32), memory.replace(states=states)
    )
  )
  states, logits = memory.states, []
  for _ in range(4):
    out = step(states)
    states = out.states
    logits.append(out.logits[0, -1])
  assert states[0].shape == (1, 2, 5, 2 * cfg.resolved_head_dim + 1)
  np.testing.assert_allclose(logits[0], logits[-1], rtol=1e-5, atol=1e-6)
  cache = cache_lib.init_cache(cfg, 1, 8, memory)
  assert cache.layers[0].s.shape == states[0].shape


@pytest.mark.parametrize(
  'settings', [dict(window=0), dict(sinks=-1), dict(persistent=-1)]
)
def test_settings_are_checked(settings):
  with pytest.raises(config.ConfigError, match=next(iter(settings))):
    config.ModelConfig.from_mapping(
      dict(
        vocab=8,
        dim=8,
        layers=1,
        heads=2,
        levels=(dict(hidden=8),),
        mixers=('sliding_window',),
        recurrent=settings,
      )
    )
