"""Eq. 2: causal, chunk-parallel, each level on its clock."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from tests import conftest

CONFIG = wake.WakeConfig(batch=2)


def read(
  cfg,
  params,
  tokens,
  *,
  wake_cfg=CONFIG,
  defer_due_update=False,
  weight=None,
  memory=None,
):
  """`read_day` from token 0, by default with a memory that holds nothing."""
  memory = memory_init.init_memory(cfg) if memory is None else memory
  weight = jnp.ones(tokens.shape) if weight is None else weight
  return wake.read_day(
    wake_cfg,
    model_lib.Model(cfg, params, memory),
    jnp.int32(0),
    tokens,
    weight,
    defer_due_update=defer_due_update,
  )


def one_level(**changes) -> config.ModelConfig:
  level = dict(hidden=16, chunk=4, optimizer='sgd', learning_rate=0.5, clip=1e9)
  return conftest.tiny(levels=(config.LevelConfig(**(level | changes)),))


def test_no_loss_depends_on_an_update_that_its_own_target_caused(
  cfg, params, tokens
):
  """Changing a token changes no loss of a chunk that ends before it."""
  _, _, loss = read(cfg, params, tokens)
  # Token 9 of the first group is a target of chunk 2 (targets 9..12).
  _, _, changed = read(cfg, params, tokens.at[:2, 9].add(1) % cfg.vocab)
  np.testing.assert_array_equal(loss[:2], changed[:2])
  assert (np.asarray(loss[2:]) != np.asarray(changed[2:])).all()


def test_first_chunk_is_scored_by_the_base_model(cfg, params, tokens):
  _, _, loss = read(cfg, params, tokens)
  logits = transformer.forward(cfg, params, tokens[:2]).logits
  logp = losses.token_logprobs(logits, tokens[:2])
  np.testing.assert_allclose(loss[0], -logp[:, :4].mean(), rtol=1e-5)


def test_an_update_is_equation_2_and_equals_token_by_token(tokens):
  """One SGD update, its gradient summed by hand over single-token losses."""
  cfg = one_level(chunk=6)
  params = conftest.weights(cfg)
  rows = tokens[:2, :6]
  memory, _, _ = read(cfg, params, rows)
  initial = memory_init.init_memory(cfg)

  def token_loss(deltas, position):
    changed = initial.with_deltas(deltas)
    out = transformer.forward(cfg, params, rows[:, : position + 1], changed)
    logp = jax.nn.log_softmax(out.logits[:, -1])
    target = rows[:, position + 1, None]
    return -jnp.take_along_axis(logp, target, axis=1).sum()

  grad = jax.jit(jax.grad(token_loss), static_argnums=1)
  grads = [grad(initial.deltas(), position) for position in range(5)]
  mean = jax.tree.map(lambda *g: sum(g) / (2 * 5), *grads)
  for key, delta in memory.levels[0].fast.delta.items():
    np.testing.assert_allclose(delta, -0.5 * mean[0][key], rtol=1e-3, atol=1e-6)


def test_levels_update_on_their_own_clocks(cfg, params, tokens):
  def updated_levels(num_tokens):
    memory, _, _ = read(cfg, params, tokens[:2, :num_tokens])
    return [
      level.fast is not None
      and any(bool(jnp.any(d)) for d in jax.tree.leaves(level.fast.delta))
      for level in memory.levels
    ]

  assert updated_levels(4) == [True, False, False]
  assert updated_levels(8) == [True, True, False]


def test_a_frozen_level_has_no_fast_weights(cfg):
  assert memory_init.init_memory(cfg).levels[2].fast is None


def test_reading_a_repeated_row_lowers_its_loss():
  cfg = one_level(optimizer='adam', learning_rate=0.02)
  params = conftest.weights(cfg)
  row = jax.random.randint(jax.random.key(4), (1, 16), 0, cfg.vocab)
  _, _, loss = read(cfg, params, jnp.tile(row, (40, 1)))
  assert float(loss[-4:].mean()) < 0.7 * float(loss[:4].mean())


def test_a_due_update_can_be_left_pending(cfg, params, tokens):
  # Level 1 is consolidated every 2 * 4 tokens: after 8, its update waits.
  deferred, _, _ = read(cfg, params, tokens[:2, :8], defer_due_update=True)
  updated, _, _ = read(cfg, params, tokens[:2, :8], defer_due_update=False)
  fast = deferred.levels[0].fast
  assert int(fast.chunks) == 1 and int(updated.levels[0].fast.chunks) == 0
  applied = wake.apply_update(cfg.levels[0], fast)
  for a, b in zip(
    jax.tree.leaves(applied), jax.tree.leaves(updated.levels[0].fast)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_per_row_memory_ends_with_the_row(cfg, params, tokens):
  per_row = wake.WakeConfig(batch=2, carry_memory=False)
  memory, clock, loss = read(cfg, params, tokens, wake_cfg=per_row)
  for a, b in zip(
    jax.tree.leaves(memory), jax.tree.leaves(memory_init.init_memory(cfg))
  ):
    np.testing.assert_array_equal(a, b)
  assert int(clock) == 32
  # Each row is learned alone: as by a life with one row a batch that reads it.
  single = wake.WakeConfig(batch=1)
  alone = [
    read(cfg, params, tokens[i : i + 1], wake_cfg=single)[2] for i in (0, 1)
  ]
  np.testing.assert_allclose(
    loss[:4], np.mean(alone, axis=0), rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
def test_a_batch_of_lives_wakes_as_each_alone(cfg, params, tokens):
  memories = [conftest.random_memory(cfg, seed) for seed in (1, 2)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *memories)

  def read_from(memory):
    return read(cfg, params, tokens, memory=memory, defer_due_update=True)

  together, _, loss_of_batch = jax.vmap(read_from)(batch)
  for i, memory in enumerate(memories):
    alone, _, loss = read_from(memory)
    np.testing.assert_allclose(loss_of_batch[i], loss, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
      np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4)


def test_batches_and_chunks_that_do_not_divide_are_refused(cfg, params, tokens):
  with pytest.raises(config.ConfigError, match='wake.batch=2 .* 3 rows'):
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
  wake.read_day.clear_cache()
  for shift in range(3):
    read(cfg, params, (tokens + shift) % cfg.vocab, defer_due_update=True)
  assert wake.read_day._cache_size() == 1


def archive_of(model, rows):
  """An archive of these rows, with the model's own predictions."""
  teacher = divergences.top_k(model.forward(rows).logits, 4)
  return archive_lib.Archive(
    rows, jnp.ones(rows.shape), teacher, jnp.zeros(len(rows), jnp.int32)
  )


def test_what_is_rehearsed_is_not_overwritten_by_the_day(cfg, params, tokens):
  """KL to the archive stays lower, and the day is scored as it was."""
  wake_cfg = dataclasses.replace(CONFIG, rehearsed=8)
  memory = memory_init.init_memory(cfg)
  model = model_lib.Model(cfg, params, memory)
  archive = archive_of(model, tokens[::-1])
  rows = jnp.tile(tokens, (8, 1))
  chunks = rows.size // (2 * schedule.base_chunk(cfg, rows.shape[1]))
  dreams = wake.draw_rehearsed(wake_cfg, archive, chunks, jax.random.PRNGKey(0))
  assert dreams.tokens.shape == (chunks, 8, rows.shape[1])
  assert dreams.teacher.tokens.shape == (chunks, 8, rows.shape[1], 4)
  kls, scores = [], []
  for rehearsed in (None, dreams):
    after, _, loss = wake.read_day(
      wake_cfg, model, jnp.int32(0), rows, jnp.ones(rows.shape), rehearsed,
      defer_due_update=False,
    )  # fmt: skip
    kls.append(float(wake.dreams_loss(after.deltas(), model, archive)))
    scores.append(np.asarray(loss))
  assert abs(float(wake.dreams_loss(memory.deltas(), model, archive))) < 1e-5
  assert 0 < kls[1] < 0.7 * kls[0]
  np.testing.assert_allclose(scores[0][0], scores[1][0], rtol=1e-4)


def test_what_the_day_has_told_otherwise_is_not_rehearsed(cfg, params, tokens):
  """Of a dream those tokens count that it does not say otherwise and new."""
  model = model_lib.Model(cfg, params, memory_init.init_memory(cfg))
  morning = model.with_memory(conftest.random_memory(cfg))
  logits = model.forward(tokens).logits
  archive = archive_of(model, tokens)
  other = archive.replace(teacher=divergences.top_k(-logits, 4))
  sure = jax.nn.softmax(logits).max(-1)
  threshold = float(jnp.median(sure))

  def weight(dreams, threshold, morning=morning):
    groups = jax.tree.map(lambda x: x.reshape(2, 1, 2, *x.shape[1:]), dreams)
    kept = wake.uncontradicted(threshold, morning, model, groups)
    np.testing.assert_array_equal(kept.tokens, groups.tokens)
    return kept.weight.reshape(sure.shape)

  choice = morning.forward(tokens).logits.argmax(-1)
  new = choice != logits.argmax(-1)
  assert 0 < new.mean() < 1
  want = jnp.where((sure > threshold) & new, 0.0, 1.0)
  np.testing.assert_array_equal(weight(other, threshold), want)
  np.testing.assert_array_equal(weight(other, 0.0), ~new)
  assert weight(other, 1.0).all()
  # What it said in the morning already, it has only forgotten.
  assert weight(other, 0.0, morning=model).all()
  # Nothing is lost of what the model would say, too.
  shifted = archive.replace(teacher=divergences.top_k(0.5 * logits, 4))
  assert weight(shifted, 0.0).all()


def losses_of_a_day(model, rows, dreams, **settings):
  """Of every chunk, beside dreams."""
  cfg = dataclasses.replace(CONFIG, **settings)
  chunks = rows.size // (2 * schedule.base_chunk(model.cfg, rows.shape[1]))
  *_, loss = wake.read_day(
    cfg, model, jnp.int32(0), rows, jnp.ones(rows.shape),
    wake.draw_rehearsed(cfg, dreams, chunks, jax.random.PRNGKey(0)),
    defer_due_update=False,
  )  # fmt: skip
  return np.asarray(loss)


@pytest.mark.slow
def test_the_first_half_of_a_day_rehearses_all(cfg, params, tokens):
  """What it only overwrites is told apart from what it says otherwise."""
  model = model_lib.Model(cfg, params, memory_init.init_memory(cfg))
  rows = jnp.tile(tokens, (16, 1))
  dreams = archive_of(model, tokens)
  logits = -model.forward(tokens).logits
  other = dreams.replace(teacher=divergences.top_k(logits, 4))
  losses = [
    losses_of_a_day(model, rows, other, rehearsed=4, contradicted=threshold)
    for threshold in (1.0, 0.0)
  ]
  half = len(losses[0]) // 2
  # The chunk after the judgement is still read by the same weights.
  np.testing.assert_allclose(
    losses[0][: half + 1], losses[1][: half + 1], rtol=1e-5
  )
  assert not np.allclose(losses[0][half + 2 :], losses[1][half + 2 :], 1e-3)


@pytest.mark.slow
def test_a_day_overrules_the_dreams_that_contradict_it(cfg, params, tokens):
  """It is read better where the rehearsal gives way."""
  model = model_lib.Model(cfg, params, memory_init.init_memory(cfg))
  rows = jnp.tile(tokens, (64, 1))
  dreams = archive_of(model, tokens[jnp.tile(jnp.arange(4), 2)])
  other = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))) * 7 % cfg.vocab
  logits = 8 * jax.nn.one_hot(jnp.tile(other, (2, 1)), cfg.vocab)
  dreams = dreams.replace(teacher=divergences.top_k(logits, 4))
  last = [
    losses_of_a_day(model, rows, dreams, rehearsed=2, contradicted=threshold)[
      -8:
    ].mean()
    for threshold in (1.0, 0.1)
  ]
  assert last[1] < 0.9 * last[0]


def test_nothing_is_rehearsed_before_the_first_night(cfg, params, tokens):
  model = model_lib.Model(cfg, params)
  archive = archive_of(model, tokens)
  key, wake_cfg = jax.random.PRNGKey(0), wake.WakeConfig(rehearsed=2)
  assert (
    wake.draw_rehearsed(wake_cfg, archive.rows(np.arange(0)), 3, key) is None
  )
  assert wake.draw_rehearsed(wake_cfg, None, 3, key) is None
  assert wake.draw_rehearsed(CONFIG, archive, 3, key) is None
  with pytest.raises(config.ConfigError, match='wake.rehearsed=2'):
    wake.WakeConfig(rehearsed=2, carry_memory=False)
