"""Associative recurrent memory: against a plain loop over segments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.inference import sampling
from sleep_jax.inference import streaming
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.models.mixers import armt
from tests import conftest

SETTINGS = armt.ARMTConfig(segment=5, memory=2, width=4, nu=3)


def build(
  settings: armt.ARMTConfig = SETTINGS, **changes
) -> model_lib.Model:
  """A model whose memory speaks: W_v is not 0."""
  cfg = conftest.tiny(mixers=('armt',), recurrent=settings, **changes)
  params = conftest.weights(cfg)
  keys = iter(jax.random.split(jax.random.key(7), 100))

  def noise(path, w):
    names = [key.key for key in path]
    scale = 0.3 if 'recurrence' in names else 0.0
    scale = 1.0 if 'memory_tokens' in names else scale
    return w + scale * jax.random.normal(next(keys), w.shape)

  params = jax.tree_util.tree_map_with_path(noise, params)
  return model_lib.Model(cfg, params, memory_init.init_memory(cfg))


def norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def phi(x):
  """One vector, entry by entry."""
  x = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
  y = [x[i] * x[i - j] for j in (1, 2, 3) for i in range(len(x))]
  return np.array(y) / np.linalg.norm(y)


def turned(x, position):
  """Rotary embedding of one head."""
  half = len(x) // 2
  angle = position * 10_000.0 ** (-np.arange(half) / half)
  a, b = x[:half], x[half:]
  return np.concatenate(
    [
      a * np.cos(angle) - b * np.sin(angle),
      b * np.cos(angle) + a * np.sin(angle),
    ]
  )


def attention(p, x):
  """Causal attention of one segment, token by token and head by head."""
  q, k, v = (np.einsum('td,dhe->the', x, p[n]['kernel']) for n in 'qkv')
  out = []
  for t in range(len(x)):
    y = np.zeros_like(q[t])
    for head in range(q.shape[1]):
      group = head * k.shape[1] // q.shape[1]
      at_t = turned(q[t, head], t)
      scores = np.array(
        [at_t @ turned(k[i, group], i) for i in range(t + 1)]
      ) / np.sqrt(len(at_t))
      weight = np.exp(scores - scores.max())
      y[head] = weight / weight.sum() @ v[: t + 1, group]
    out.append(np.einsum('he,hed->d', y, p['o']['kernel']))
  return np.array(out)


def level(p, x):
  gate = x @ p['gate']
  return gate / (1 + np.exp(-gate)) * (x @ p['up']) @ p['down']


def write(p, memory, tokens):
  """A and z after the memory tokens of one segment."""
  a, z = memory
  more_a, more_z = np.zeros_like(a), np.zeros_like(z)
  for m in tokens:
    k, v = phi(m @ p['to_key']['kernel']), m @ p['to_value']['kernel']
    rate = m @ p['rate']['kernel'] + p['rate']['bias']
    old = k @ a / (k @ z + 1e-5)
    more_a += np.outer(k, v - old) / (1 + np.exp(-rate))
    more_z += np.clip(1 - k @ z / (k @ k), 0, 1) * k
  return a + more_a, z + more_z


def by_the_loop(model: model_lib.Model, tokens: np.ndarray):
  """Hidden states of one row, and the memories of all layers."""
  cfg, r = model.cfg, model.cfg.recurrent
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), model.params)
  memories = [(np.zeros((r.features, cfg.dim)), np.zeros(r.features))] * (
    cfg.layers
  )
  hidden = []
  for first in range(0, len(tokens), r.segment):
    x = p['embed']['embedding'][tokens[first : first + r.segment]]
    x = np.concatenate([x, p['blocks']['memory_tokens']])
    for i in range(cfg.layers):
      of_layer = p['blocks'][f'block_{i}']
      mixer, (a, z) = of_layer['recurrence'], memories[i]
      if first:
        q = [phi(h @ mixer['ask']['kernel']) for h in x]
        x = x + np.array([y @ a / (y @ z + 1e-5) for y in q])
      x = x + attention(
        mixer, norm(x, of_layer['recurrence_norm']['scale'])
      )
      for j in range(1, len(cfg.levels) + 1):
        scale = of_layer[f'level_{j}_norm']['scale']
        x = x + level(of_layer[f'level_{j}'], norm(x, scale))
      memories[i] = write(mixer, (a, z), x[-r.memory :])
    hidden.append(norm(x[: -r.memory], p['norm']['scale']))
  return np.concatenate(hidden), memories


@pytest.mark.parametrize('length', [4, 13])
def test_segments_equal_the_plain_loop(length):
  """Of one segment, or three of which the last is cut."""
  model = build()
  tokens = jax.random.randint(jax.random.key(1), (2, length), 0, 32)
  with jax.default_matmul_precision('highest'):
    out = jax.jit(lambda: model.forward(tokens))()
  for row in range(2):
    hidden, memories = by_the_loop(model, np.asarray(tokens[row]))
    np.testing.assert_allclose(out.hidden[row], hidden, rtol=1e-4, atol=1e-5)
    for s, (a, z) in zip(out.states, memories, strict=True):
      assert np.abs(a).max() > 1e-2
      np.testing.assert_allclose(s[row, 0, :, :-1], a, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(s[row, 0, :, -1], z, rtol=1e-4, atol=1e-5)
