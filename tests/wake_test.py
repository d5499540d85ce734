"""Eq. 2: causal, chunk-parallel, on its clocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from tests import conftest

WAKE = wake.WakeConfig(batch=2)


def read(cfg, params, tokens, *, how=WAKE, defer_due_update=False, weight=None):
  memory = memory_lib.init_memory(cfg)
  weight = jnp.ones(tokens.shape) if weight is None else weight
  return wake.wake(
    cfg,
    how,
    params,
    memory,
    jnp.int32(0),
    tokens,
    weight,
    defer_due_update=hold,
  )


def one_level(**changes) -> config.ModelConfig:
  level = dict(hidden=16, chunk=4, optimizer='sgd', learning_rate=0.5, clip=1e9)
  return conftest.tiny(levels=(config.LevelConfig(**(level | changes)),))


def test_no_loss_sees_an_update_that_its_own_target_caused(cfg, params, tokens):
  """Changing a token changes no loss of a chunk that ends before it."""
  _, _, before = read(cfg, params, tokens)
  # Token 9 of the first group is a target of chunk 2 (targets 9..12).
  _, _, after = read(cfg, params, tokens.at[:2, 9].add(1) % cfg.vocab)
  np.testing.assert_array_equal(before[:2], after[:2])
  assert (np.asarray(before[2:]) != np.asarray(after[2:])).all()


def test_first_chunk_is_scored_by_the_untouched_base(cfg, params, tokens):
  _, _, got = read(cfg, params, tokens)
  logits = transformer.forward(cfg, params, tokens[:2]).logits
  logp = losses.token_logprobs(logits, tokens[:2])
  np.testing.assert_allclose(got[0], -logp[:, :4].mean(), rtol=1e-5)


def test_an_update_is_equation_2_and_equals_token_by_token(tokens):
  """One SGD update, its gradient summed by hand over single-token losses."""
  cfg = one_level(chunk=6)
  params = conftest.weights(cfg)
  rows = tokens[:2, :6]
  memory, _, _ = read(cfg, params, rows)
  fresh = memory_lib.init_memory(cfg)

  def token_loss(deltas, at):
    seen = fresh.with_deltas(deltas)
    prefix = transformer.forward(cfg, params, rows[:, : at + 1], seen)
    logp = jax.nn.log_softmax(prefix.logits[:, -1])
    target = rows[:, at + 1, None]
    return -jnp.take_along_axis(logp, target, axis=1).sum()

  slope = jax.jit(jax.grad(token_loss), static_argnums=1)
  grads = [slope(fresh.deltas(), at) for at in range(5)]
  mean = jax.tree.map(lambda *g: sum(g) / (2 * 5), *grads)
  for key, delta in memory.levels[0].fast.delta.items():
    np.testing.assert_allclose(delta, -0.5 * mean[0][key], rtol=1e-3, atol=1e-6)


def test_levels_update_on_their_own_clocks(cfg, params, tokens):
  def moved(n_tokens):
    memory, _, _ = read(cfg, params, tokens[:2, :n_tokens])
    return [
      l.fast is not None
      and any(bool(jnp.any(d)) for d in jax.tree.leaves(l.fast.delta))
      for l in memory.levels
    ]

  assert moved(4) == [True, False, False]
  assert moved(8) == [True, True, False]


def test_a_frozen_level_has_no_fast_part(cfg):
  assert memory_lib.init_memory(cfg).levels[2].fast is None


def test_learning_helps():
  cfg = one_level(optimizer='adam', learning_rate=0.02)
  params = conftest.weights(cfg)
  row = jax.random.randint(jax.random.key(4), (1, 16), 0, cfg.vocab)
  _, _, loss = read(cfg, params, jnp.tile(row, (40, 1)))
  assert float(loss[-4:].mean()) < 0.7 * float(loss[:4].mean())


def test_hold_leaves_the_update_before_sleep_pending(cfg, params, tokens):
  # Level 1 sleeps every 2 * 4 tokens: after 8, its update is held back.
  held, _, _ = read(cfg, params, tokens[:2, :8], defer_due_update=True)
  free, _, _ = read(cfg, params, tokens[:2, :8], defer_due_update=False)
  fast = held.levels[0].fast
  assert int(fast.chunks) == 1 and int(free.levels[0].fast.chunks) == 0
  applied = wake.apply_update(cfg.levels[0], fast)
  for a, b in zip(
    jax.tree.leaves(applied), jax.tree.leaves(free.levels[0].fast)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_per_row_memory_ends_with_the_row(cfg, params, tokens):
  how = wake.WakeConfig(batch=2, carry_memory=False)
  memory, clock, loss = read(cfg, params, tokens, how=how)
  for a, b in zip(
    jax.tree.leaves(memory), jax.tree.leaves(memory_lib.init_memory(cfg))
  ):
    np.testing.assert_array_equal(a, b)
  assert int(clock) == 32
  # Each row learned alone: the same as a life of one lane that read only it.
  single = wake.WakeConfig(batch=1)
  alone = [read(cfg, params, tokens[i : i + 1], how=single)[2] for i in (0, 1)]
  np.testing.assert_allclose(
    loss[:4], np.mean(alone, axis=0), rtol=1e-4, atol=1e-5
  )


def test_a_batch_of_lives_wakes_as_each_alone(cfg, params, tokens):
  lives = [conftest.lived(cfg, seed) for seed in (1, 2)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *lives)
  ones = jnp.ones(tokens.shape)

  def one_day(memory):
    return wake.wake(
      cfg,
      WAKE,
      params,
      memory,
      jnp.int32(0),
      tokens,
      ones,
      defer_due_update=True,
    )

  together, _, losses_ = jax.vmap(one_day)(batch)
  for i, life in enumerate(lives):
    alone, _, loss = one_day(life)
    np.testing.assert_allclose(losses_[i], loss, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
      np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4)


def test_lanes_and_chunks_that_do_not_divide_are_refused(cfg, params, tokens):
  with pytest.raises(config.ConfigError, match='lanes=2 .* 3 rows'):
    read(cfg, params, tokens[:3])
  with pytest.raises(config.ConfigError, match='rows of 15 .* chunks of 4'):
    read(cfg, params, tokens[:, :15])


def test_transfers_come_due_slowest_first(cfg):
  # Periods: level 1 every 8 tokens, level 2 every 32.
  due = schedule.transfers
  assert due(cfg, 0, 7) == []
  assert due(cfg, 0, 8) == [schedule.Transfer(0, 1)]
  assert due(cfg, 8, 15) == []
  assert due(cfg, 24, 32) == [schedule.Transfer(1, 2), schedule.Transfer(0, 1)]


def test_wake_compiles_once(cfg, params, tokens):
  wake.wake.clear_cache()
  for shift in range(3):
    read(cfg, params, (tokens + shift) % cfg.vocab, defer_due_update=True)
  assert wake.wake._cache_size() == 1
