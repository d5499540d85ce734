"""Sampling against slow and simple references."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sleep_jax import config
from sleep_jax.data import padding
from sleep_jax.inference import completion
from sleep_jax.inference import decoding
from sleep_jax.inference import prefix as prefix_lib
from sleep_jax.inference import sampling
from sleep_jax.inference import scoring
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import cms
from sleep_jax.models import lora
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from tests import conftest


def slow_greedy(model, prompt, num_new):
  """A forward pass per token; causality hides the zeros that pad the row."""
  row = list(prompt)
  forward = jax.jit(model_lib.Model.forward)
  for _ in range(num_new):
    padded = jnp.array([row + [0] * (16 - len(row))])
    logits = forward(model, padded).logits
    row.append(int(logits[0, len(row) - 1].argmax()))
  return row[len(prompt) :]


@pytest.fixture(name='base')
def _base(cfg, params):
  """The model without a memory."""
  return model_lib.Model(cfg, params)


def test_greedy_equals_a_forward_pass_per_token(cfg, base):
  model = base.with_memory(conftest.random_memory(cfg))
  prompts = [[1, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1]]
  tokens, lengths = padding.left_pad(prompts, 0)
  out = sampling.generate(
    model,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=6, temperature=0.0),
  )
  for row, prompt in zip(out.tokens, prompts, strict=True):
    assert row.tolist() == slow_greedy(model, prompt, 6)


def test_a_row_ends_at_its_stop_token(base):
  prompts = [[1, 5], [1, 9], [1, 30]]
  tokens, lengths = padding.left_pad(prompts, 0)
  endless = sampling.generate(
    base,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=8, temperature=0.0),
  )
  stop = int(endless.tokens[0, 2])
  out = sampling.generate(
    base,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=8, temperature=0.0, stop=stop, pad=31),
  )
  for row, length, whole in zip(out.tokens, out.lengths, endless.tokens):
    hits = np.flatnonzero(np.asarray(whole) == stop)
    want = hits[0] + 1 if len(hits) else 8
    assert length == want
    np.testing.assert_array_equal(row[:want], whole[:want])
    assert (np.asarray(row[want:]) == 31).all()


@pytest.mark.parametrize(
  'sampler',
  [
    sampling.SamplerConfig(max_new=1, temperature=0.7),
    sampling.SamplerConfig(max_new=1, top_k=5),
    sampling.SamplerConfig(max_new=1, top_p=0.6),
    sampling.SamplerConfig(max_new=1, min_p=0.4),
  ],
)
def test_samples_follow_the_filtered_softmax(cfg, base, sampler):
  rows = 4000
  tokens = jnp.tile(jnp.array([[1, 7, 3]]), (rows, 1))
  out = sampling.generate(
    base, tokens, jnp.full((rows,), 3), jax.random.key(3), sampler
  )
  logits = np.asarray(base.forward(tokens[:1]).logits)[0, -1]
  p = np.exp(logits.astype(float) / sampler.temperature)
  p /= p.sum()
  order = np.argsort(-p)
  if sampler.top_k:
    p[order[sampler.top_k :]] = 0
  if sampler.top_p < 1:
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampler.top_p]] = 0
  p[p < sampler.min_p * p.max()] = 0
  p /= p.sum()
  counts = np.bincount(np.asarray(out.tokens)[:, 0], minlength=cfg.vocab)
  assert counts[p == 0].sum() == 0
  possible = p > 0
  chi_squared = stats.chisquare(counts[possible], rows * p[possible])
  assert chi_squared.pvalue > 1e-3
  np.testing.assert_allclose(
    np.exp(out.logprobs[:, 0]), p[np.asarray(out.tokens)[:, 0]], rtol=1e-4
  )


@pytest.mark.parametrize('random_expert', [0.0, 0.9])
def test_a_memory_per_row_equals_row_by_row(cfg, base, random_expert):
  memories = [conftest.random_memory(cfg, seed) for seed in (1, 2, 3)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *memories)
  prompts, lengths = padding.left_pad([[1, 5, 7], [1], [1, 2, 3, 4]], 0)
  sampler = sampling.SamplerConfig(max_new=5, random_expert=random_expert)
  keys = jax.random.split(jax.random.key(0), 3)
  out = sampling.generate_per_row(
    base.with_memory(batch), prompts, lengths, keys, sampler
  )
  for i, memory in enumerate(memories):
    alone = sampling.generate(
      base.with_memory(memory),
      prompts[i : i + 1],
      lengths[i : i + 1],
      keys[i],
      sampler,
    )
    np.testing.assert_array_equal(out.tokens[i], alone.tokens[0])
    np.testing.assert_allclose(
      out.logprobs[i], alone.logprobs[0], rtol=1e-4, atol=1e-5
    )


def prefill(cfg, params, layer_memories, tokens):
  """Logits of the last column, by the decoder with a buffer per layer."""
  per_layer = decoding.unstack_layers(cfg, params, layer_memories)
  cache = decoding.init_decode_cache(cfg, *tokens.shape)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return decoding.decode(cfg, per_layer, tokens, positions, cache)[0]


@pytest.mark.parametrize('unroll', [1, 2])
def test_the_per_layer_decoder_equals_the_scanned(cfg, params, tokens, unroll):
  memory = conftest.random_memory(cfg)
  cfg = conftest.replace(cfg, unroll=unroll)
  np.testing.assert_allclose(
    prefill(cfg, params, cms.per_layer_memory(memory), tokens),
    transformer.forward(cfg, params, tokens, memory).logits[:, -1],
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.slow
def test_the_per_layer_decoder_supports_partitions(tokens):
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
  layer_memories = cms.with_random_experts(
    cms.per_layer_memory(conftest.random_memory(cfg)),
    rows,
    weight,
    jax.random.key(0),
  )
  assert layer_memories[0].min_gate is None  # The first level has no bank.
  for level in layer_memories[1:]:
    min_gate = np.asarray(level.min_gate)
    assert min_gate.shape == (cfg.layers, rows, 3)
    np.testing.assert_array_equal((min_gate > 0).sum(-1), 1)
    np.testing.assert_allclose(min_gate.sum(-1), weight)
    assert (min_gate[..., 2] == 0).all()  # Locked.
    counts = (min_gate[..., :2] > 0).sum((0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_random_expert_is_a_gate_of_at_least_its_weight(cfg, params, tokens):
  """Its effect is that of a router which picks that slot with that gate."""
  memory, weight, slot = conftest.random_memory(cfg), 0.7, 1
  level = memory.levels[2]
  closed = level.bank.experts.replace(
    router=jnp.zeros_like(level.bank.experts.router),
    bias=jnp.full_like(level.bank.experts.bias, -9.0),
  )
  opened = closed.replace(
    bias=closed.bias.at[:, slot].set(np.log(weight / (1 - weight)))
  )

  def with_experts(experts):
    bank = level.bank.replace(experts=experts)
    return cms.per_layer_memory(memory.with_level(2, bank=bank))

  min_gate = jnp.zeros((cfg.layers, len(tokens), 3))
  min_gate = min_gate.at[:, :, slot].set(weight)
  without = with_experts(closed)
  forced = (*without[:2], without[2].replace(min_gate=min_gate))
  logits = prefill(cfg, params, forced, tokens)
  np.testing.assert_allclose(
    logits,
    prefill(cfg, params, with_experts(opened), tokens),
    rtol=1e-4,
    atol=1e-5,
  )
  assert not np.allclose(logits, prefill(cfg, params, without, tokens))


def test_a_random_expert_changes_samples_only_and_by_the_seed(cfg, base):
  memory = conftest.random_memory(cfg)
  prompts, lengths = padding.left_pad([[1, 5, 7]] * 8, 0)

  def samples(random_expert, memory=memory, seed=0):
    sampler = sampling.SamplerConfig(max_new=8, random_expert=random_expert)
    model, key = base.with_memory(memory), jax.random.key(seed)
    out = sampling.generate(model, prompts, lengths, key, sampler)
    return np.asarray(out.tokens)

  np.testing.assert_array_equal(samples(1.0), samples(1.0))
  assert (samples(1.0) != samples(0.0)).any()
  assert (samples(1.0) != samples(1.0, seed=1)).any()
  no_experts = memory_init.init_memory(cfg)  # No expert that could be picked.
  np.testing.assert_array_equal(
    samples(1.0, no_experts), samples(0.0, no_experts)
  )


def test_rows_that_ended_are_left_out_of_the_steps(cfg, base, monkeypatch):
  """And change no token of the others."""
  model = base.with_memory(conftest.random_memory(cfg))
  prompts, lengths = padding.left_pad([[1, i % 32] for i in range(128)], 0)
  sampler = sampling.SamplerConfig(
    max_new=24, temperature=0.5, stop=3, pad=31, random_expert=0.5
  )
  decode, sizes = decoding.decode, []

  def samples() -> sampling.Completions:
    sampling.generate.clear_cache()
    sizes.clear()
    key = jax.random.key(0)
    return sampling.generate(model, prompts, lengths, key, sampler)

  def traced(cfg, model, tokens, *args):
    sizes.append(len(tokens))
    return decode(cfg, model, tokens, *args)

  monkeypatch.setattr(decoding, 'decode', traced)
  out = samples()
  assert set(sizes) == {128, 64, 32}
  monkeypatch.setattr(sampling, '_SIZES', 1)
  whole = samples()
  assert set(sizes) == {128}
  alive_in_the_end = (np.asarray(out.lengths) == 24).mean()
  assert 0.1 < alive_in_the_end < 0.5  # The others were left out.
  np.testing.assert_array_equal(out.tokens, whole.tokens)
  np.testing.assert_array_equal(out.lengths, whole.lengths)
  np.testing.assert_allclose(out.logprobs, whole.logprobs, atol=1e-5)


def test_complete_pads_and_cuts(base):
  prompts = [[1, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1]]
  sampler = sampling.SamplerConfig(max_new=6, temperature=0.0)
  key = jax.random.key(0)
  endless = sampling.complete(base, prompts, key, sampler)
  for row, prompt in zip(endless, prompts, strict=True):
    assert row == slow_greedy(base, prompt, 6)
  stop = endless[0][1]
  sampler = dataclasses.replace(sampler, stop=stop)
  for row, whole in zip(
    sampling.complete(base, prompts, key, sampler), endless
  ):
    assert row == whole[: whole.index(stop) + 1 if stop in whole else 6]


def with_max_len(model, max_len):
  return model.replace(cfg=conftest.replace(model.cfg, max_len=max_len))


def test_complete_uses_the_cache_to_its_last_column(base):
  model = with_max_len(base, 9)
  sampler = sampling.SamplerConfig(max_new=4, temperature=0.0)
  prompt = [1, 5, 7, 2, 3]
  completions = sampling.complete(model, [prompt], jax.random.key(0), sampler)
  assert completions == [slow_greedy(model, prompt, 4)]


def test_a_prompt_longer_than_the_cache_is_refused(base):
  model = with_max_len(base, 16)
  sampler = sampling.SamplerConfig(max_new=4)
  key = jax.random.key(0)
  message = '13 tokens and max_new=4 need a cache of 17, but model.max_len=16'
  with pytest.raises(config.ConfigError, match=message):
    sampling.complete(model, [[1] * 13], key, sampler)
  with pytest.raises(config.ConfigError, match=message):
    prompts, lengths = padding.left_pad([[1] * 13], 0, multiple=1)
    sampling.generate(model, prompts, lengths, key, sampler)
  with pytest.raises(config.ConfigError, match='empty'):
    sampling.complete(model, [[1], []], key, sampler)


@pytest.mark.parametrize('token', [32, -1])
def test_a_token_that_the_model_does_not_have_is_refused(base, token):
  """It would be looked up as NaN."""
  words = f'token {token}, but model.vocab=32'
  costs = costs_lib.CostTracker(base.cfg, 16)
  key, sampler = jax.random.key(0), sampling.SamplerConfig(max_new=2)
  for function, args in (
    (sampling.complete, (base, [[1], [2, token]], key, sampler)),
    (completion.complete, (base, [[1], [2, token]], key, sampler, costs)),
  ):
    with pytest.raises(config.ConfigError, match=words):
      function(*args)
  with pytest.raises(config.ConfigError, match=words):
    scoring.score(base, [[1]], [[2, token]], pad=0, costs=costs)


def test_a_model_with_an_adapter_is_refused(cfg, base):
  adapter = lora.init_adapter(
    cfg, lora.LoraConfig(rank=2), base.params, jax.random.key(0)
  )
  adapter = jax.tree.map(lambda x: x + 0.1, adapter)
  model = base.replace(adapter=adapter)
  sampler = sampling.SamplerConfig(max_new=4, temperature=0.0)
  with pytest.raises(config.ConfigError, match='merged'):
    sampling.complete(model, [[1, 5]], jax.random.key(0), sampler)
  assert sampling.complete(
    model.merged(), [[1, 5]], jax.random.key(0), sampler
  ) == [slow_greedy(model, [1, 5], 4)]


@pytest.mark.parametrize(
  'bad',
  [
    dict(max_new=0),
    dict(max_new=1, temperature=-1.0),
    dict(max_new=1, top_p=0.0),
    dict(max_new=1, random_expert=2.0),
  ],
)
def test_invalid_sampler_settings_are_refused(bad):
  name, value = list(bad.items())[-1]
  with pytest.raises(config.ConfigError, match=f'{name}={value}'):
    sampling.SamplerConfig(**bad)


@pytest.mark.parametrize(
  'partition',
  [pytest.param((), marks=pytest.mark.slow), (1, 2, 1)],
  ids=['levels', 'partition'],
)
def test_a_prefix_that_is_read_once_is_as_if_it_stood_in_every_row(
  monkeypatch, partition
):
  """Also in chunks, the first of which is padded."""
  monkeypatch.setattr(prefix_lib, '_CHUNK', 16)
  layers = sum(partition) or 2
  cfg = conftest.tiny(max_len=64, layers=layers, partition=partition)
  model = conftest.build_model(cfg, conftest.random_memory(cfg))
  rng = np.random.default_rng(0)
  text = rng.integers(1, 32, 20).tolist()
  prompts = [rng.integers(1, 32, n).tolist() for n in (3, 1)]
  prefix = prefix_lib.prefill(model, text, pad=0)
  assert int(prefix.length) == 20
  whole = [[*text, *p] for p in prompts]
  greedy = sampling.SamplerConfig(max_new=6, temperature=0.0)
  rng = jax.random.key(0)
  answers = sampling.complete(model, whole, rng, greedy)
  assert sampling.complete(model, prompts, rng, greedy, prefix) == answers
  costs = costs_lib.CostTracker(cfg, 16)
  answers = [[*a[:3], 5] for a in answers]
  score = functools.partial(scoring.score, model, pad=0, costs=costs)
  want, got = score(whole, answers), score(prompts, answers, prefix=prefix)
  np.testing.assert_array_equal(got.exact, want.exact)
  np.testing.assert_allclose(got.token_accuracy, want.token_accuracy)
  np.testing.assert_allclose(got.answer_logprob, want.answer_logprob, rtol=1e-4)
  for too_long in ([], [1] * 65):
    with pytest.raises(config.ConfigError, match='A context of'):
      prefix_lib.prefill(model, too_long, pad=0)


@pytest.mark.slow
def test_many_prompts_after_a_long_prefix_are_split(monkeypatch):
  cfg = conftest.tiny()
  model = conftest.build_model(cfg)
  prefix = prefix_lib.prefill(model, [1] * 64, pad=0)
  size = 2 * cfg.layers * 64 * cfg.num_kv_heads * cfg.resolved_head_dim * 4
  monkeypatch.setattr(prefix_lib, '_BATCH_BYTES', 5 * size)
  assert prefix.batch_size(64) == 4 and prefix.batch_size(2) == 2
  monkeypatch.setattr(prefix_lib, '_BATCH_BYTES', size // 2)
  assert prefix.batch_size(64) == 1
