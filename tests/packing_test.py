"""Short documents in long rows, and long rows in small batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import packing
from sleep_jax.data import tokenizers
from sleep_jax.inference import budget
from sleep_jax.inference import sampling
from sleep_jax.inference import scoring
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from tests import conftest

BOS, PAD = 1, 0


def documents(sizes, length=12, seed=0) -> experience_lib.Experience:
  """Rows of one document each; some tokens within are no targets."""
  rng = np.random.default_rng(seed)
  tokens = np.full((len(sizes), length), PAD, np.int32)
  weight = np.zeros(tokens.shape, np.float32)
  for row, row_weight, size in zip(tokens, weight, sizes):
    row[:size] = rng.integers(2, 30, size)
    row[:1] = BOS
    row_weight[:size] = rng.integers(0, 2, size)
    row_weight[size - 1 : size] = 1.0
  return experience_lib.Experience(tokens, weight, contexts=())


@pytest.mark.parametrize('length', [12, 16, 40])
def test_every_document_is_whole_in_order_and_once(length):
  sizes = [5, 12, 3, 0, 7, 7, 1, 12, 12, 4]
  stream = documents(sizes)
  assert list(packing.lengths(stream.weight)) == sizes
  packed = packing.repack(stream, length, PAD)
  assert packed.tokens.shape[1] == length
  parts = [row[:size] for row, size in zip(stream.tokens, sizes) if size]
  text = ' '.join(map(str, packed.tokens.reshape(-1)))
  at = 0
  for part in parts:  # Each of them is within one row.
    found = text.index(' '.join(map(str, part)), at)
    first = text[:found].count(' ')
    assert first // length == (first + len(part) - 1) // length
    at = found + 1
  # A target is what it was, but for the beginnings of documents.
  want = sum(w[1:].sum() for w in stream.weight)
  assert packed.weight.sum() == want
  assert packed.tokens.size < stream.tokens.size or length == 12
  assert not packed.weight[packed.tokens == BOS].any()


def test_a_document_longer_than_a_row_is_cut_and_nothing_is_lost():
  stream = documents([12, 11, 2])
  packed = packing.repack(stream, 5, PAD)
  inside = np.concatenate([t[:n] for t, n in zip(stream.tokens, [12, 11, 2])])
  kept = packed.tokens.reshape(-1)
  assert np.array_equal(kept[kept != PAD], inside)
  with pytest.raises(config.ConfigError, match='wake.window'):
    packing.repack(stream, 1, PAD)


def test_rows_that_a_clock_does_not_fit_name_the_way_out():
  cfg = conftest.tiny()
  assert schedule.base_chunk(cfg, 64) == 4
  with pytest.raises(config.ConfigError, match=r'wake\.window'):
    schedule.base_chunk(cfg, 30)


def rows(cfg, width, columns=16) -> int:
  return budget.rows_per_pass(cfg, width=width, columns=columns, most=64)


def test_long_rows_and_large_vocabularies_make_small_batches():
  cfg = conftest.tiny(vocab=128_256, dim=64, heads=32, kv_heads=8)
  assert (rows(cfg, 128), rows(cfg, 8192)) == (64, 1)
  assert rows(cfg, 1024, columns=1024) == 8  # For their logits.
  sizes = [rows(cfg, width) for width in (64, 1024, 2048, 4096, 65_536)]
  assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
  rollout = functools.partial(budget.rows_per_rollout, cfg, most=64)
  assert rollout(prompt=65_000, new=536) == 1
  # From BOS there are no scores of a prompt, but the keys of all new tokens.
  assert rollout(prompt=1, new=1023) == 64 > rollout(prompt=1, new=10**6)
  # The tests' and the toys' batches are what they were.
  assert rows(conftest.tiny(), 1024, columns=1024) == 64
  with sharding.use_mesh({'fsdp': 8}):
    assert rows(cfg, 8192) == 8


def test_dreams_that_do_not_fit_a_device_are_sampled_in_parts(monkeypatch):
  """Of what a device's cache has room for; none is left out, or alike."""
  parts = []

  def generate(model, prompts, lengths, rng, sampler):
    del model, lengths
    parts.append(len(prompts))
    tokens = jax.random.randint(rng, (len(prompts), sampler.max_new), 2, 30)
    lengths = jnp.full(len(prompts), sampler.max_new)
    return sampling.Completions(tokens, jnp.zeros(tokens.shape), lengths)

  cfg, seeding = conftest.tiny(), consolidation_config.SeedingConfig()
  monkeypatch.setattr(sampling, 'generate', generate)
  row = cfg.layers * 2 * cfg.num_kv_heads * cfg.resolved_head_dim * 4
  row *= seeding.dream_length
  monkeypatch.setattr(budget, '_CACHE_BYTES', 3 * row)
  model, tokenizer = (
    model_lib.Model(cfg, {}),
    tokenizers.IntegerTokenizer(32, 1),
  )
  dreams = generation.sample(seeding, model, tokenizer, 12, jax.random.key(0))
  assert parts == [3, 3, 3, 3]
  assert len({row.tobytes() for row in dreams.tokens}) == 12


def test_scores_do_not_depend_on_the_batches(monkeypatch):
  cfg = conftest.tiny()
  model = conftest.build_model(cfg)
  rng = np.random.default_rng(0)
  prompts = [
    [BOS, *rng.integers(2, 30, n).tolist()] for n in rng.integers(0, 40, 21)
  ]
  answers = [rng.integers(2, 30, n).tolist() for n in rng.integers(1, 6, 21)]

  def scores():
    costs = costs_lib.CostTracker(cfg, 16)
    return scoring.score(model, prompts, answers, pad=PAD, costs=costs)

  want, shapes = scores(), []
  run = scoring.score_batch
  monkeypatch.setattr(
    scoring,
    'score_batch',
    lambda model, tokens, *rest: (
      shapes.append(tokens.shape) or run(model, tokens, *rest)
    ),
  )
  monkeypatch.setattr(budget, '_SCORES', 2 * cfg.heads * 48**2)
  got = scores()
  assert {s[0] for s in shapes} > {2} and max(s[1] for s in shapes) == 48
  for field in dataclasses.fields(want):
    a, b = getattr(got, field.name), getattr(want, field.name)
    assert np.allclose(a, b, atol=1e-5), field.name


def test_one_row_is_on_every_device_and_others_are_split():
  with sharding.use_mesh({'fsdp': 4, 'tensor': 2}):
    sharding.check_rows({'wake.batch': 1, 'sleep.batch': 8})
    with pytest.raises(config.ConfigError, match='wake.batch.* has size 2'):
      sharding.check_rows({'wake.batch': 2})
