"""Rollouts against slow and obvious references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sleep_jax import config
from sleep_jax.data import padding
from sleep_jax.inference import decoding
from sleep_jax.inference import sampling
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from tests import conftest


def slow_greedy(cfg, params, memory, prompt, new):
  """A forward pass per token; the zeros that follow are not seen."""
  row = list(prompt)
  forward = jax.jit(transformer.forward, static_argnums=0)
  for _ in range(new):
    padded = jnp.array([row + [0] * (16 - len(row))])
    logits = forward(cfg, params, padded, memory).logits
    row.append(int(logits[0, len(row) - 1].argmax()))
  return row[len(prompt) :]


def test_greedy_equals_a_forward_pass_per_token(cfg, params):
  memory = conftest.random_memory(cfg)
  prompts = [[1, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1]]
  tokens, lengths = padding.left_pad(prompts, 0)
  got = sampling.generate(
    cfg,
    params,
    memory,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=6, temperature=0.0),
  )
  for row, prompt in zip(got.tokens, prompts, strict=True):
    assert row.tolist() == slow_greedy(cfg, params, memory, prompt, 6)


def test_a_row_ends_at_its_stop_token(cfg, params):
  prompts = [[1, 5], [1, 9], [1, 30]]
  tokens, lengths = padding.left_pad(prompts, 0)
  free = sampling.generate(
    cfg,
    params,
    None,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=8, temperature=0.0),
  )
  stop = int(free.tokens[0, 2])
  got = sampling.generate(
    cfg,
    params,
    None,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=8, temperature=0.0, stop=stop, pad=31),
  )
  for row, length, whole in zip(got.tokens, got.lengths, free.tokens):
    hits = np.flatnonzero(np.asarray(whole) == stop)
    want = hits[0] + 1 if len(hits) else 8
    assert length == want
    np.testing.assert_array_equal(row[:want], whole[:want])
    assert (np.asarray(row[want:]) == 31).all()


@pytest.mark.parametrize(
  'how',
  [
    sampling.SamplerConfig(max_new=1, temperature=0.7),
    sampling.SamplerConfig(max_new=1, top_k=5),
    sampling.SamplerConfig(max_new=1, top_p=0.6),
    sampling.SamplerConfig(max_new=1, min_p=0.4),
  ],
)
def test_samples_follow_the_filtered_softmax(cfg, params, how):
  rows = 4000
  tokens = jnp.tile(jnp.array([[1, 7, 3]]), (rows, 1))
  got = sampling.generate(
    cfg, params, None, tokens, jnp.full((rows,), 3), jax.random.key(3), how
  )
  logits = np.asarray(transformer.forward(cfg, params, tokens[:1]).logits)[
    0, -1
  ]
  p = np.exp(logits.astype(float) / how.temperature)
  p /= p.sum()
  order = np.argsort(-p)
  if how.top_k:
    p[order[how.top_k :]] = 0
  if how.top_p < 1:
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= how.top_p]] = 0
  p[p < how.min_p * p.max()] = 0
  p /= p.sum()
  counts = np.bincount(np.asarray(got.tokens)[:, 0], minlength=cfg.vocab)
  assert counts[p == 0].sum() == 0
  kept = p > 0
  assert stats.chisquare(counts[kept], rows * p[kept]).pvalue > 1e-3
  np.testing.assert_allclose(
    np.exp(got.logprobs[:, 0]), p[np.asarray(got.tokens)[:, 0]], rtol=1e-4
  )


@pytest.mark.parametrize('random_expert', [0.0, 0.9])
def test_a_memory_per_row_equals_row_by_row(cfg, params, random_expert):
  lives = [conftest.random_memory(cfg, seed) for seed in (1, 2, 3)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *lives)
  prompts, lengths = padding.left_pad([[1, 5, 7], [1], [1, 2, 3, 4]], 0)
  how = sampling.SamplerConfig(max_new=5, random_expert=random_expert)
  keys = jax.random.split(jax.random.key(0), 3)
  got = sampling.generate_per_row(
    cfg, params, batch, prompts, lengths, keys, how
  )
  for i, life in enumerate(lives):
    alone = sampling.generate(
      cfg, params, life, prompts[i : i + 1], lengths[i : i + 1], keys[i], how
    )
    np.testing.assert_array_equal(got.tokens[i], alone.tokens[0])
    np.testing.assert_allclose(
      got.logprobs[i], alone.logprobs[0], rtol=1e-4, atol=1e-5
    )


def prefill(cfg, params, views, tokens):
  model = decoding.unstack_layers(cfg, params, views)
  cache = decoding.init_decode_cache(cfg, *tokens.shape)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return decoding.decode(cfg, model, tokens, positions, cache)[0]


@pytest.mark.parametrize('unroll', [1, 2])
def test_the_unrolled_decoder_equals_the_scanned(cfg, params, tokens, unroll):
  memory = conftest.random_memory(cfg)
  cfg = conftest.replace(cfg, unroll=unroll)
  np.testing.assert_allclose(
    prefill(cfg, params, cms.per_layer_memory(memory), tokens),
    transformer.forward(cfg, params, tokens, memory).logits[:, -1],
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_unrolled_decoder_knows_partitions(tokens):
  levels = tuple(
    dataclasses.replace(x, hidden=16) for x in conftest.tiny().levels
  )
  cfg = conftest.tiny(layers=4, partition=(1, 2, 1), levels=levels)
  params, memory = conftest.weights(cfg), conftest.random_memory(cfg)
  np.testing.assert_allclose(
    prefill(cfg, params, cms.per_layer_memory(memory), tokens),
    transformer.forward(cfg, params, tokens, memory).logits[:, -1],
    rtol=1e-4,
    atol=1e-5,
  )


def test_a_random_expert_is_one_active_slot_per_router_and_row(cfg):
  rows, weight = 400, 0.7
  views = cms.with_random_experts(
    cms.per_layer_memory(conftest.random_memory(cfg)),
    rows,
    weight,
    jax.random.key(0),
  )
  assert views[0].min_gate is None  # The first level has no bank.
  for view in views[1:]:
    extra = np.asarray(view.min_gate)
    assert extra.shape == (cfg.layers, rows, 3)
    np.testing.assert_array_equal((extra > 0).sum(-1), 1)
    np.testing.assert_allclose(extra.sum(-1), weight)
    assert (extra[..., 2] == 0).all()  # Locked.
    counts = (extra[..., :2] > 0).sum((0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_random_expert_is_a_gate_of_at_least_its_weight(cfg, params, tokens):
  """Its effect is that of a router which picks that slot with that gate."""
  memory, weight, slot = conftest.random_memory(cfg), 0.7, 1
  level = memory.levels[2]
  silent = level.bank.experts.replace(
    router=jnp.zeros_like(level.bank.experts.router),
    bias=jnp.full_like(level.bank.experts.bias, -9.0),
  )
  open_ = silent.replace(
    bias=silent.bias.at[:, slot].set(np.log(weight / (1 - weight)))
  )

  def seen(experts):
    bank = level.bank.replace(experts=experts)
    return cms.per_layer_memory(memory.with_level(2, bank=bank))

  extra = jnp.zeros((cfg.layers, len(tokens), 3)).at[:, :, slot].set(weight)
  views = seen(silent)
  forced = (*views[:2], views[2].replace(min_gate=extra))
  got = prefill(cfg, params, forced, tokens)
  np.testing.assert_allclose(
    got, prefill(cfg, params, seen(open_), tokens), rtol=1e-4, atol=1e-5
  )
  assert not np.allclose(got, prefill(cfg, params, views, tokens))


def test_a_random_expert_changes_samples_only_and_by_the_seed(cfg, params):
  memory = conftest.random_memory(cfg)
  prompts, lengths = padding.left_pad([[1, 5, 7]] * 8, 0)

  def said(random_expert, memory=memory, seed=0):
    how = sampling.SamplerConfig(max_new=8, random_expert=random_expert)
    key = jax.random.key(seed)
    return np.asarray(
      sampling.generate(cfg, params, memory, prompts, lengths, key, how).tokens
    )

  np.testing.assert_array_equal(said(1.0), said(1.0))
  assert (said(1.0) != said(0.0)).any() and (
    said(1.0) != said(1.0, seed=1)
  ).any()
  none = memory_lib.init_memory(cfg)  # No expert that could be picked.
  np.testing.assert_array_equal(said(1.0, none), said(0.0, none))


def test_complete_pads_and_cuts(cfg, params):
  prompts = [[1, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1]]
  how = sampling.SamplerConfig(max_new=6, temperature=0.0)
  key = jax.random.key(0)
  free = sampling.complete(cfg, params, None, prompts, key, how)
  for row, prompt in zip(free, prompts, strict=True):
    assert row == slow_greedy(cfg, params, None, prompt, 6)
  stop = free[0][1]
  how = dataclasses.replace(how, stop=stop)
  for row, whole in zip(
    sampling.complete(cfg, params, None, prompts, key, how), free
  ):
    assert row == whole[: whole.index(stop) + 1 if stop in whole else 6]


def test_complete_uses_the_cache_to_its_last_column(cfg, params):
  cfg = conftest.replace(cfg, max_len=9)
  how = sampling.SamplerConfig(max_new=4, temperature=0.0)
  prompt = [1, 5, 7, 2, 3]
  got = sampling.complete(cfg, params, None, [prompt], jax.random.key(0), how)
  assert got == [slow_greedy(cfg, params, None, prompt, 4)]


def test_a_prompt_longer_than_the_cache_is_refused(cfg, params):
  cfg = conftest.replace(cfg, max_len=16)
  how = sampling.SamplerConfig(max_new=4)
  key = jax.random.key(0)
  message = '13 tokens and max_new=4 need a cache of 17, but model.max_len=16'
  with pytest.raises(config.ConfigError, match=message):
    sampling.complete(cfg, params, None, [[1] * 13], key, how)
  with pytest.raises(config.ConfigError, match=message):
    prompts, lengths = padding.left_pad([[1] * 13], 0, multiple=1)
    sampling.generate(cfg, params, None, prompts, lengths, key, how)
  with pytest.raises(config.ConfigError, match='empty'):
    sampling.complete(cfg, params, None, [[1], []], key, how)


@pytest.mark.parametrize(
  'bad',
  [
    dict(max_new=0),
    dict(max_new=1, temperature=-1.0),
    dict(max_new=1, top_p=0.0),
    dict(max_new=1, random_expert=2.0),
  ],
)
def test_a_sampler_that_cannot_work_is_refused(bad):
  name, value = list(bad.items())[-1]
  with pytest.raises(config.ConfigError, match=f'{name}={value}'):
    sampling.SamplerConfig(**bad)
