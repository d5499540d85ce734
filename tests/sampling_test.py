"""Rollouts against slow and obvious references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sleep_jax import sampling
from sleep_jax.models import transformer
from tests import conftest


def slow_greedy(cfg, params, memory, prompt, new):
  row = list(prompt)
  for _ in range(new):
    out = transformer.forward(cfg, params, jnp.array([row]), memory)
    row.append(int(out.logits[0, -1].argmax()))
  return row[len(prompt) :]


def test_greedy_equals_a_forward_pass_per_token(cfg, params):
  memory = conftest.lived(cfg)
  prompts = [[1, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1]]
  tokens, lengths = sampling.left_pad(prompts, 0)
  got = sampling.generate(
    cfg,
    params,
    memory,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.Sampling(max_new=6, temperature=0.0),
  )
  for row, prompt in zip(got.tokens, prompts, strict=True):
    assert row.tolist() == slow_greedy(cfg, params, memory, prompt, 6)


def test_a_row_ends_at_its_stop_token(cfg, params):
  prompts = [[1, 5], [1, 9], [1, 30]]
  tokens, lengths = sampling.left_pad(prompts, 0)
  free = sampling.generate(
    cfg,
    params,
    None,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.Sampling(max_new=8, temperature=0.0),
  )
  stop = int(free.tokens[0, 2])
  got = sampling.generate(
    cfg,
    params,
    None,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.Sampling(max_new=8, temperature=0.0, stop=stop, pad=31),
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
    sampling.Sampling(max_new=1, temperature=0.7),
    sampling.Sampling(max_new=1, top_k=5),
    sampling.Sampling(max_new=1, top_p=0.6),
    sampling.Sampling(max_new=1, min_p=0.4),
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


def test_a_memory_per_row(cfg, params):
  lives = [conftest.lived(cfg, seed) for seed in (1, 2)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *lives)
  prompts, lengths = jnp.array([[1, 5, 7]]), jnp.array([3])
  how = sampling.Sampling(max_new=5, temperature=0.0)
  key = jax.random.key(0)
  got = jax.vmap(
    lambda m: sampling.generate(cfg, params, m, prompts, lengths, key, how)
  )(batch)
  for row, life in zip(got.tokens, lives, strict=True):
    alone = sampling.generate(cfg, params, life, prompts, lengths, key, how)
    np.testing.assert_array_equal(row, alone.tokens)
