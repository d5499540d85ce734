"""What must always hold of a night."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib
from tests import conftest

HOW = consolidation_config.SeedingConfig(
  dreams=64,
  dream_length=16,
  steps=40,
  batch=16,
  learning_rate=0.02,
  prefixes=4,
  group=4,
  rollout_groups=2,
  continuation=6,
  rollout_every=20,
  max_kl_share=0.99,
)
TOKENIZER = tokenizers.WordTokenizer(
  ['.', *(f'w{i}' for i in range(29))], separator='.'
)
FIRST = schedule.Transfer(0, 1)


@pytest.fixture(name='cfg')
def _cfg():
  """The shared config, but its fast level learns fast."""
  fast = dataclasses.replace(
    conftest.tiny().levels[0], optimizer='adam', learning_rate=0.02
  )
  return conftest.tiny(levels=(fast, *conftest.tiny().levels[1:]))


@pytest.fixture(name='life')
def _life(cfg, params):
  """A life that has read one day of a pattern."""
  life = life_lib.init_life(cfg, params, jax.random.PRNGKey(0))
  row = jax.random.randint(jax.random.key(4), (1, 16), 3, cfg.vocab)
  row = row.at[0, 0].set(1).at[0, 5].set(2).at[0, 11].set(2)
  rows = jnp.tile(row, (60, 1))
  memory, clock, _ = wake.wake(
    cfg,
    wake.WakeConfig(batch=2),
    params,
    life.memory,
    life.clock.tokens,
    rows,
    jnp.ones(rows.shape),
    defer_due_update=True,
  )
  return life.replace(memory=memory, clock=life.clock.replace(tokens=clock))


def night(cfg, life, how=HOW, transfer=FIRST):
  return transfer_lib.transfer(
    cfg,
    how,
    life,
    transfer,
    TOKENIZER,
    jax.random.PRNGKey(1),
    costs_lib.CostTracker(cfg, 16),
  )


def paths_that_differ(a, b):
  flat_a = jax.tree_util.tree_leaves_with_path(a)
  flat_b = jax.tree.leaves(b)
  return {
    jax.tree_util.keystr(p)
    for (p, x), y in zip(flat_a, flat_b, strict=True)
    if not np.array_equal(x, y)
  }


@pytest.mark.parametrize('teachers', ['awake', 'current+previous'])
def test_kl_is_positive_at_first_and_falls(cfg, life, teachers):
  how = dataclasses.replace(HOW, teachers=teachers)
  _, report = night(cfg, life, how)
  assert report.kl_first > 0.05
  assert report.kl_last < 0.7 * report.kl_first
  assert report.transferred


def test_a_lumped_teacher_of_all_tokens_is_the_whole_teacher(cfg, life):
  whole = dataclasses.replace(HOW, steps=6, rollout_every=3)
  lumped = dataclasses.replace(
    whole, teacher_top_k=cfg.vocab - 1, tokens_in_flight=50
  )
  curves = [night(cfg, life, how)[1].curves for how in (whole, lumped)]
  for name in ('kl', 'on_policy', 'imitation', 'router'):
    np.testing.assert_allclose(
      curves[0][name], curves[1][name], rtol=2e-3, atol=1e-4, err_msg=name
    )


def test_a_few_tokens_of_the_teacher_suffice_to_learn(cfg, life):
  how = dataclasses.replace(HOW, teacher_top_k=8, tokens_in_flight=64)
  _, report = night(cfg, life, how)
  assert 0.05 < report.kl_first and report.kl_last < 0.7 * report.kl_first


def test_seeding_touches_the_new_slot_alone(cfg, life):
  ledger = costs_lib.CostTracker(cfg, 16)
  student = transfer_lib.compute(cfg, HOW, life.memory, 0)
  bank = student.levels[1].bank.unlock(0, jnp.int32(0), jax.random.key(2))
  student = student.with_level(1, bank=bank)
  selves = replay_lib.Teachers(life.memory, life.previous_memory())
  frozen = jax.tree.map(np.array, (life, student))
  lesson = seeding.SeedingJob(
    cfg, HOW, life.params, selves, TOKENIZER, 0, 1, 0, ledger
  )
  seeded, _ = seeding.seed(lesson, student, jax.random.key(3))
  assert not paths_that_differ(frozen, (life, student))
  assert paths_that_differ(seeded, student) == {
    f'.levels[1].bank.experts.{n}' for n in ('a', 'b', 'router', 'bias')
  } | {'.levels[1].bank.status'}
  for x, y in zip(
    jax.tree.leaves(seeded.levels[1].bank.experts),
    jax.tree.leaves(student.levels[1].bank.experts),
  ):
    np.testing.assert_array_equal(x[:, 1:], y[:, 1:])
  assert seeded.levels[1].bank.status.tolist() == [memory_lib.ACTIVE, 0, 0]


def test_the_update_commits_and_resets_the_sender(cfg, life):
  # Level 2 sends its own expert up: its slots must come out free.
  life, _ = night(cfg, life)
  life = life_lib.end_night(life)
  after, report = night(cfg, life, transfer=schedule.Transfer(1, 2))
  assert report.transferred
  assert after.memory.levels[1].bank.status.tolist() == [0, 0, 0]
  assert not np.asarray(after.memory.levels[1].bank.experts.b).any()
  assert after.memory.levels[2].bank.status.tolist()[0] == memory_lib.ACTIVE


def test_restart_and_carry_differ_by_the_old_weights(cfg, life):
  carry = dataclasses.replace(HOW, sender_reset='carry')
  fast = life.memory.levels[0].fast
  assert int(fast.chunks) == 1  # The update that the night holds pending.
  for how in (HOW, carry):
    new = transfer_lib.compute(cfg, how, life.memory, 0).levels[0].fast
    assert int(new.chunks) == 0
    start = jax.tree.map(
      jnp.zeros_like if how is HOW else jnp.asarray, fast.delta
    )
    assert paths_that_differ(new.delta, start)  # It was computed.
  nothing = fast.replace(chunks=jnp.int32(0))
  memory = life.memory.with_level(0, fast=nothing)
  restarted = transfer_lib.compute(cfg, HOW, memory, 0).levels[0].fast
  carried = transfer_lib.compute(cfg, carry, memory, 0).levels[0].fast
  assert not any(np.asarray(d).any() for d in restarted.delta.values())
  assert not paths_that_differ(carried.delta, fast.delta)


def test_a_sleep_that_cannot_transfer_keeps_the_old_life(cfg, life, caplog):
  how = dataclasses.replace(HOW, learning_rate=0.0, max_kl_share=0.8)
  after, report = night(cfg, life, how)
  assert not report.transferred
  assert not paths_that_differ(after, life)
  assert 'could not transfer' in caplog.text


def test_a_random_expert_stays_as_it_was_born(cfg, life):
  how = dataclasses.replace(HOW, train_expert=False)
  after, report = night(cfg, life, how)
  bank = after.memory.levels[1].bank
  assert report.transferred and bank.status[0] == memory_lib.ACTIVE
  assert not np.asarray(bank.experts.b[:, 0]).any()


def test_a_failed_sleep_does_not_cost_a_recycled_slot(cfg, life):
  how = dataclasses.replace(
    HOW, learning_rate=0.0, max_kl_share=0.5, slot_policy='recycle'
  )
  after, report = night(cfg, full(cfg, life), how)
  assert not report.transferred
  assert not paths_that_differ(after, full(cfg, life))


def full(cfg, life):
  banks = conftest.lived(cfg).levels[1].bank
  full_bank = banks.replace(
    status=jnp.full((3,), memory_lib.ACTIVE), created_night=jnp.array([1, 0, 2])
  )
  return life.replace(memory=life.memory.with_level(1, bank=full_bank))


def test_a_full_bank_is_an_error_by_default(cfg, life):
  with pytest.raises(config.ConfigError, match='all 3 slots of level 2'):
    night(cfg, full(cfg, life))


def test_recycle_gives_up_the_oldest(cfg, life, caplog):
  how = dataclasses.replace(HOW, slot_policy='recycle')
  after, report = night(cfg, full(cfg, life), how)
  assert report.slot == 1 and 'slot 1 is recycled' in caplog.text
  old, new = (x.memory.levels[1].bank for x in (full(cfg, life), after))
  for slot in (0, 2):
    assert not paths_that_differ(old.expert(slot), new.expert(slot))


def test_merge_teaches_the_heir_first(cfg, life):
  how = dataclasses.replace(HOW, slot_policy='merge')
  after, report = night(cfg, full(cfg, life), how)
  old, new = (x.memory.levels[1].bank for x in (full(cfg, life), after))
  assert report.slot == 1
  assert paths_that_differ(old.expert(0), new.expert(0))  # The heir.
  assert not paths_that_differ(old.expert(2), new.expert(2))


def test_one_slot_can_be_recycled_and_not_merged(cfg, life):
  levels = (
    cfg.levels[0],
    dataclasses.replace(cfg.levels[1], slots=1),
    *cfg.levels[2:],
  )
  cfg = dataclasses.replace(cfg, levels=levels)
  bank = life.memory.levels[1].bank
  alone = jax.tree.map(lambda x: x[:, :1], bank.experts)
  bank = bank.replace(
    experts=alone,
    status=jnp.array([memory_lib.ACTIVE]),
    created_night=jnp.array([0]),
  )
  life = life.replace(memory=life.memory.with_level(1, bank=bank))
  _, report = night(cfg, life, dataclasses.replace(HOW, slot_policy='recycle'))
  assert report.slot == 0
  with pytest.raises(config.ConfigError, match='needs two slots'):
    night(cfg, life, dataclasses.replace(HOW, slot_policy='merge'))


def test_without_expansion_one_expert_serves_every_night(cfg, life):
  how = dataclasses.replace(HOW, expand=False)
  once, _ = night(cfg, life, how)
  again = once.replace(memory=once.memory.with_deltas(life.memory.deltas()))
  twice, report = night(cfg, again, how)
  assert report.slot == 0
  assert twice.memory.levels[1].bank.status.tolist() == [2, 0, 0]


def test_a_night_repeats_itself_to_the_bit(cfg, life):
  a, b = night(cfg, life)[0], night(cfg, life)[0]
  assert not paths_that_differ(a, b)


def test_seed_steps_compile_once(cfg, life):
  seeding.seed_steps.clear_cache()
  for _ in range(2):
    life, _ = night(cfg, life)
    life = life_lib.end_night(life)
  assert seeding.seed_steps._cache_size() == 1


def test_splicing_keeps_whole_segments_and_tells_their_owner():
  awake = [np.array([10, 11, 2]), np.array([12, 2])]
  old = [np.array([20, 21, 22, 2])]
  tokens, owner = replay_lib.splice(
    awake, old, 50, 16, 0.5, 1, np.random.default_rng(0)
  )
  assert (tokens[:, 0] == 1).all() and set(np.unique(tokens)) <= {
    1,
    2,
    10,
    11,
    12,
    20,
    21,
    22,
  }
  inside = owner[(tokens >= 11) & (tokens != 12) & (tokens < 20)]
  assert (inside == 1).all()
  assert (owner[tokens >= 21] == 0).all()
  starts = owner[(tokens == 10) | (tokens == 20)]
  assert (starts == 0.5).all()
  assert 0.4 < (tokens == 20).sum() / np.isin(tokens, (10, 12, 20)).sum() < 0.6


def test_segments_are_cut_at_separators():
  got = replay_lib.segments(
    np.array([[1, 5, 2, 6, 7, 2, 9], [1, 3, 3, 3, 3, 3, 3]]),
    np.array([7, 7]),
    separator=2,
  )
  assert [g.tolist() for g in got] == [[5, 2], [6, 7, 2]]


def test_the_mixture_teacher_is_a_mixture():
  a, b = jnp.array([0.0, 1.0, 2.0]), jnp.array([3.0, 0.0, 0.0])
  got = jnp.exp(teacher_labels.mixture(jnp.float32(0.25), a, b))
  want = 0.25 * jax.nn.softmax(a) + 0.75 * jax.nn.softmax(b)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(
    jnp.exp(teacher_labels.mixture(jnp.float32(1.0), a, b)),
    jax.nn.softmax(a),
    rtol=1e-5,
  )


def test_a_cut_splits_a_dream_in_what_was_and_what_followed():
  tokens = jnp.arange(1, 11)[None].repeat(20, 0)
  prefix, at, rest, left = imitation.split_prefix(
    tokens, jnp.full((20,), 10), 4, jax.random.key(0)
  )
  assert len(set(at.tolist())) > 3
  for p, n, r, m in zip(prefix, at, rest, left):
    assert p[6 - n :].tolist() == list(range(1, n + 1))
    assert r.tolist() == list(range(n + 1, n + 5)) and m == 4


def test_the_old_self_is_the_life_before_this_day(cfg, params, life):
  born = life_lib.init_life(cfg, params, jax.random.PRNGKey(0))
  assert not paths_that_differ(
    life.previous_memory().deltas(), born.memory.deltas()
  )
  rested = life_lib.end_night(life)
  assert not paths_that_differ(
    rested.previous_memory().deltas(), life.memory.deltas()
  )
  assert int(rested.clock.nights) == 1
