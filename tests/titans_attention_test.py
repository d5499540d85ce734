"""Titans with attention: MAC token by token, MAG and MAL of their parts."""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config
from sleep_jax.models import positions
from sleep_jax.models.kernels import attention
from sleep_jax.models.mixers import base
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans
from sleep_jax.models.mixers import titans_attention
from sleep_jax.models.mixers import titans_mac
from tests import conftest
from tests import titans_test

MAC = titans_mac.TitansMACConfig(
  heads=1, width=4, chunk=3, max_rate=0.5, persistent=2
)
BOTH = titans_attention.TitansAttentionConfig(
  heads=2, width=4, chunk=4, max_rate=0.5, window=3, sinks=1, persistent=2
)


def apply(cfg: config.ModelConfig, x):
  """The layer with drawn weights, what it says of `x`, and its parameters."""
  module = base.find(cfg.mixers[0]).module(cfg, None)
  place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  inputs = base.MixerInputs(
    rope=(jnp.zeros(0), jnp.zeros(0)),  # They rotate by themselves.
    mask=attention.mask(positions.PositionMask(place, place)),
    cache_index=None,
    token_mask=jnp.ones(x.shape[:2], bool),
  )
  params = module.init(jax.random.key(0), x, inputs, None)
  params = jax.tree.map(
    lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), params
  )
  return module.apply(params, x, inputs, None)[0], params['params'], inputs


def unit(x):
  return x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def norm(x, scale):
  return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def mac_by_the_equations(cfg, p, x):
  """One row with one head of memory, token by token."""
  r, e, rotate = cfg.recurrent, cfg.resolved_head_dim, sliding_window.Rotation
  memory = began = tuple(p[f'memory_{i}'][0] for i in (1, 2))
  momentum = tuple(map(jnp.zeros_like, memory))

  def answer(memory, q):
    return jax.nn.silu(q @ memory[0]) @ memory[1]

  def turned(y, place):
    return rotate(cfg)(y[None, None], jnp.full((1, 1), place))[0, 0]

  out, keys, values = [], [], []
  for i, token in enumerate(x):
    if i % r.chunk == 0:
      began, keys, values = memory, [], []
    ask = unit(jax.nn.silu(token @ p['ask']['kernel']))
    for y in (answer(began, ask) @ p['recalled'], token):
      k, v = jnp.split((y @ p['kv']).reshape(cfg.num_kv_heads, -1), 2, axis=-1)
      keys.append(turned(k, i % r.chunk))
      values.append(v)
    q = (token @ p['q']['kernel']).reshape(cfg.heads, e)
    heads = []
    for head in range(cfg.heads):
      group = head * cfg.num_kv_heads // cfg.heads
      scores = [turned(q, i % r.chunk)[head] @ k[group] for k in keys]
      scores += [q[head] @ k[group] for k in p['persistent_k']]
      weights = jax.nn.softmax(jnp.stack(scores) / np.sqrt(e))
      seen = [*values, *p['persistent_v']]
      heads.append(weights @ jnp.stack([v[group] for v in seen]))
    y = jnp.concatenate(heads) @ p['o']
    q, k, v = jnp.split(jax.nn.silu(y @ p['to_memory']), 3)
    gates = jax.nn.sigmoid(y @ p['gates'] + p['gates_bias'])
    tokens = titans.Tokens(
      *(unit(q), unit(k), v, r.max_rate * gates[0]),
      *(jnp.log(gates[1]), jnp.log(gates[2]), jnp.ones(())),
    )
    one = jax.tree.map(lambda t: t[None], tokens)
    step = titans_test.one_chunk(r, (memory, momentum, began), one)
    memory, momentum, said = step
    said = said[0] @ p['said']
    out.append(
      norm(y, p['norms'][0]) * jax.nn.sigmoid(norm(said, p['norms'][1]))
    )
  return jnp.stack(out)


def test_memory_as_context_is_its_equations():
  cfg = conftest.tiny(mixers=('titans_mac',), recurrent=MAC)
  x = jax.random.normal(jax.random.key(2), (2, 8, cfg.dim))
  with jax.default_matmul_precision('highest'):
    out, params, _ = apply(cfg, x)
    want = mac_by_the_equations(cfg, params, x[1])
  np.testing.assert_allclose(out[1], want, rtol=1e-4, atol=1e-5)


def test_memory_gates_attention_or_comes_before_it():
  for name in ('titans_mag', 'titans_mal'):
    cfg = conftest.tiny(mixers=(name,), recurrent=BOTH)
    x = jax.random.normal(jax.random.key(2), (2, 8, cfg.dim))
    out, p, inputs = apply(cfg, x)
    held, _ = titans.TitansLayer(cfg).apply(
      {'params': p['memory']}, x, inputs, None
    )
    held = norm(held, p['memory_norm']['scale'])
    layer = sliding_window.SlidingWindowLayer(cfg, BOTH.attention())
    seen, _ = layer.apply(
      {'params': p['attention']},
      x if name == 'titans_mag' else held,
      inputs,
      None,
    )
    if name == 'titans_mag':
      seen = norm(seen, p['attention_norm']['scale']) * jax.nn.sigmoid(held)
    np.testing.assert_allclose(out, seen, rtol=1e-4, atol=1e-5)
