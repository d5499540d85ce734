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


def build(settings: armt.ARMTConfig = SETTINGS, **changes) -> model_lib.Model:
  """A model of one level, whose memory speaks: W_v is not 0."""
  changes = dict(levels=(config.LevelConfig(16),)) | changes
  cfg = conftest.tiny(mixers=('armt',), recurrent=settings, **changes)
  params = conftest.weights(cfg)
  keys = iter(jax.random.split(jax.random.key(7), 100))

  def noise(path, w):
    names = [key.key for key in path]
    scale = 0.1 if 'recurrence' in names else 0.0
    scale = 1.0 if 'memory_tokens' in names else scale
    return w + scale * jax.random.normal(next(keys), w.shape)

  params = jax.tree_util.tree_map_with_path(noise, params)
  return model_lib.Model(cfg, params, memory_init.init_memory(cfg))


@jax.jit
def forward(model: model_lib.Model, tokens, **settings) -> transformer.Output:
  with jax.default_matmul_precision('highest'):
    return model.forward(tokens, **settings)


def assert_close(a, b):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


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
      x = x + attention(mixer, norm(x, of_layer['recurrence_norm']['scale']))
      for j in range(1, len(cfg.levels) + 1):
        scale = of_layer[f'level_{j}_norm']['scale']
        x = x + level(of_layer[f'level_{j}'], norm(x, scale))
      memories[i] = write(mixer, (a, z), x[-r.memory :])
    hidden.append(norm(x[: -r.memory], p['norm']['scale']))
  return np.concatenate(hidden), memories


def test_segments_equal_the_plain_loop(tokens):
  """Three segments and one token, through two layers of two levels."""
  levels = config.LevelConfig(16), config.LevelConfig(16)
  model = build(levels=levels)
  out = forward(model, tokens[:2])
  for row in range(2):
    hidden, memories = by_the_loop(model, np.asarray(tokens[row]))
    np.testing.assert_allclose(out.hidden[row], hidden, rtol=1e-4, atol=1e-5)
    for s, (a, z) in zip(out.states, memories, strict=True):
      assert np.abs(a).max() > 1e-2
      np.testing.assert_allclose(s[row, 0, :, :-1], a, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(s[row, 0, :, -1], z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'sizes',
  [(3, 1, 12), pytest.param((1,) * 16, marks=pytest.mark.slow)],
)
def test_a_stream_may_come_in_any_pieces(tokens, sizes):
  """Segments are of 5: pieces end in the middle, and are longer."""
  model = build()
  cache = cache_lib.init_cache(model.cfg, 4, 16, model.memory)
  whole, parts, got, at = forward(model, tokens, cache=cache), [], cache, 0
  for size in sizes:
    out = forward(model, tokens[:, at : at + size], cache=got)
    parts.append(out.logits)
    got, at = out.cache, at + size
  assert_close(whole.logits, np.concatenate(parts, 1))
  assert_close(got.layers, whole.cache.layers)
  # The states alone are what the next window begins with.
  stream = streaming.Stream(got.layers, jnp.full(4, 16))
  memory = streaming.model_after(model, stream).memory
  assert memory is not None
  assert_close(memory.states, whole.states)


def test_padding_changes_nothing(tokens):
  """Rows padded in front, and in the middle, say the same."""
  model = build()
  place = jnp.arange(16)[None] + jnp.zeros_like(tokens)
  plain, gap = forward(model, tokens), jnp.full((len(tokens), 2), -1)
  padded = jnp.concatenate([gap, place[:, :4], gap, place[:, 4:]], axis=1)
  filled = jnp.concatenate([gap, tokens[:, :4], gap, tokens[:, 4:]], axis=1)
  out = forward(model, jnp.maximum(filled, 0), positions=padded)
  assert_close(out.logits[:, padded[0] >= 0], plain.logits)
  assert_close(out.states, plain.states)
  # And a window of padding alone keeps the state to the bit.
  assert model.memory is not None
  model = model.with_memory(model.memory.replace(states=plain.states))
  same = forward(model, tokens, positions=jnp.full_like(tokens, -1)).states
  for a, b in zip(same, plain.states, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_row_knows_nothing_of_the_others(tokens):
  model, order = build(), jnp.array([2, 0, 3, 1])
  ours, other = forward(model, tokens), forward(model, tokens[order])
  assert_close(ours.logits[order], other.logits)
  assert_close(tuple(s[order] for s in ours.states), other.states)


def test_the_last_segment_teaches_the_first():
  """Gradients flow through segments, and nothing flows back in time."""
  model = build(vocab=16, layers=1)
  tokens = jnp.arange(16)[None]  # Each has a row of the embedding.

  @jax.jit
  def slope(embedding):
    params = model.params | {'embed': {'embedding': embedding}}
    hidden = model.replace(params=params).forward(tokens).hidden[0, 10]
    return hidden @ jnp.arange(len(hidden))

  by_token = jax.grad(slope)(model.params['embed']['embedding'])
  largest = np.abs(by_token).max(1)
  assert (largest[:11] > 1e-4).all()  # Two segments, and the third's first.
  assert (largest[11:] == 0).all()


def test_one_segment_is_plain_attention(tokens):
  """As the mixer `attention` has it; memory tokens stand behind it."""
  model = build()
  cfg = dataclasses.replace(
    model.cfg, mixers=('attention',), recurrent=config.RecurrentConfig()
  )
  blocks = {}
  for i in range(cfg.layers):
    block = dict(model.params['blocks'][f'block_{i}'])
    mixer = block.pop('recurrence')
    block['attention'] = {k: mixer[k] for k in 'qkvo'}
    block['attention_norm'] = block.pop('recurrence_norm')
    blocks[f'block_{i}'] = block
  plain = model_lib.Model(cfg, model.params | {'blocks': blocks})
  tokens = tokens[:, :5]
  assert_close(forward(plain, tokens).logits, forward(model, tokens).logits)


def test_a_fresh_memory_says_nothing(tokens):
  """W_v begins at 0: tokens see their segment alone."""
  model = build(layers=1)
  model = model.replace(params=conftest.weights(model.cfg))
  whole = forward(model, tokens[:, :10]).logits
  assert_close(whole[:, 5:], forward(model, tokens[:, 5:10]).logits)


@pytest.mark.slow
def test_greedy_samples_are_the_argmax_of_the_forward_pass():
  model = build()
  prompts = [[3, 1, 4, 1, 5, 9, 2], [2, 7]]
  sampler = sampling.SamplerConfig(max_new=6, temperature=0.0)
  completions = sampling.complete(model, prompts, jax.random.key(0), sampler)
  for prompt, completion in zip(prompts, completions, strict=True):
    logits = model.forward(jnp.array([prompt + completion])).logits[0]
    greedy = logits[len(prompt) - 1 : -1].argmax(-1)
    assert greedy.tolist() == completion


def test_all_layers_have_segments_or_none():
  with pytest.raises(config.ConfigError, match='must be that of every layer'):
    conftest.tiny(mixers=('armt', 'attention'))
  with pytest.raises(config.ConfigError, match='segment'):
    config.from_mapping(armt.ARMTConfig, dict(segment=0), 'model.recurrent')
