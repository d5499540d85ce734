"""What must always hold of a night of consolidation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import splicing
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import night as night_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import losses
from tests import conftest

CONFIG = consolidation_config.SeedingConfig(
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
FASTEST = schedule.Transfer(0, 1)


@pytest.fixture(name='cfg')
def _cfg():
  """The shared config, but its fast level learns fast."""
  fast = dataclasses.replace(
    conftest.tiny().levels[0], optimizer='adam', learning_rate=0.02
  )
  return conftest.tiny(levels=(fast, *conftest.tiny().levels[1:]))


@pytest.fixture(name='life')
def _life(cfg, params):
  """A life that has read one day of a pattern, with all of its slots."""
  life = life_lib.init_life(model_lib.Model(cfg, params), jax.random.PRNGKey(0))
  life = life.with_memory(life.memory.with_all_slots(cfg))
  row = jax.random.randint(jax.random.key(4), (1, 16), 3, cfg.vocab)
  row = row.at[0, 0].set(1).at[0, 5].set(2).at[0, 11].set(2)
  rows = jnp.tile(row, (60, 1))
  memory, clock, _ = wake.read_day(
    wake.WakeConfig(batch=2),
    life.model,
    life.clock.tokens,
    rows,
    jnp.ones(rows.shape),
    defer_due_update=True,
  )
  clock = life.clock.replace(tokens=clock)
  return life.with_memory(memory).replace(clock=clock)


def consolidate(life, seeding_cfg=CONFIG, pair=FASTEST):
  return transfer_lib.transfer(
    seeding_cfg,
    life,
    pair,
    life.previous_memory(),
    TOKENIZER,
    costs_lib.CostTracker(life.model.cfg, 16),
    jax.random.PRNGKey(1),
  )


def paths_that_differ(a, b):
  flat_a = jax.tree_util.tree_leaves_with_path(a)
  flat_b = jax.tree.leaves(b)
  return {
    jax.tree_util.keystr(p)
    for (p, x), y in zip(flat_a, flat_b, strict=True)
    if not np.array_equal(x, y)
  }


@pytest.mark.parametrize(
  'teachers',
  [pytest.param('current', marks=pytest.mark.slow), 'current+previous'],
)
def test_kl_is_positive_at_first_and_falls(life, teachers):
  _, report = consolidate(life, dataclasses.replace(CONFIG, teachers=teachers))
  assert report.kl_first > 0.05
  assert report.kl_last < 0.7 * report.kl_first
  assert report.transferred


@pytest.mark.slow
def test_top_k_of_all_tokens_is_the_whole_teacher(cfg, life):
  whole = dataclasses.replace(CONFIG, steps=6, rollout_every=3)
  top_k = dataclasses.replace(
    whole, teacher_top_k=cfg.vocab - 1, tokens_in_flight=50
  )
  curves = [consolidate(life, x)[1].curves for x in (whole, top_k)]
  for name in ('kl', 'on_policy', 'imitation', 'router'):
    np.testing.assert_allclose(
      curves[0][name], curves[1][name], rtol=2e-3, atol=1e-4, err_msg=name
    )


@pytest.mark.slow
def test_the_dreams_vocabulary_serves_rollouts_too(life):
  """With all of a small vocabulary in the dreams nothing is left out."""
  whole = dataclasses.replace(CONFIG, steps=4, rollout_every=2)
  own = dataclasses.replace(whole, dream_vocab=True)
  curves = [consolidate(life, x)[1].curves for x in (whole, own)]
  for name in ('kl', 'on_policy', 'imitation'):
    np.testing.assert_allclose(
      curves[0][name], curves[1][name], rtol=1e-3, atol=1e-5, err_msg=name
    )


@pytest.mark.slow
def test_top_k_of_a_few_tokens_suffices_to_learn(life):
  top_k = dataclasses.replace(CONFIG, teacher_top_k=8, tokens_in_flight=64)
  _, report = consolidate(life, top_k)
  assert 0.05 < report.kl_first and report.kl_last < 0.7 * report.kl_first


def test_seeding_touches_the_new_slot_alone(cfg, life):
  student = transfer_lib.compute(CONFIG, life.model, 0)
  bank = student.memory.levels[1].bank
  bank = bank.unlock(0, jnp.int32(0), jax.random.key(2))
  student = student.with_memory(student.memory.with_level(1, bank=bank))
  teachers = replay_lib.Teachers(life.model, life.previous_memory())
  before = jax.tree.map(np.array, (life, student))
  job = job_lib.SeedingJob(
    CONFIG,
    teachers,
    target=job_lib.SlotId(1, 0),
    nights=0,
    tokenizer=TOKENIZER,
    costs=costs_lib.CostTracker(cfg, 16),
  )
  seeded = seeding.seed(job, student, jax.random.key(3)).student
  assert not paths_that_differ(before, (life, student))
  assert paths_that_differ(seeded, student) == {
    f'.memory.levels[1].bank.experts.{n}' for n in ('a', 'b', 'router', 'bias')
  } | {'.memory.levels[1].bank.status'}
  seeded_bank = seeded.memory.levels[1].bank
  for x, y in zip(
    jax.tree.leaves(seeded_bank.experts), jax.tree.leaves(bank.experts)
  ):
    np.testing.assert_array_equal(x[:, 1:], y[:, 1:])
  assert seeded_bank.status.tolist() == [memory_lib.ACTIVE, 0, 0]


def test_earlier_experts_may_go_on_training(life):
  """With it a second night changes the first expert too, and no locked one."""
  first, _ = consolidate(life)
  first = life_lib.end_night(first)
  again = dataclasses.replace(
    CONFIG, retrain_experts=True, sender_reset='carry', max_kl_share=9.0
  )
  changed = {}
  for cfg in (dataclasses.replace(again, retrain_experts=False), again):
    after, report = consolidate(first, cfg)
    assert report.transferred
    old, new = (x.memory.levels[1].bank for x in (first, after))
    assert new.status.tolist() == [memory_lib.ACTIVE, memory_lib.ACTIVE, 0]
    differ = [
      bool((np.asarray(old.experts.b) != new.experts.b)[:, slot].any())
      for slot in range(3)
    ]
    changed[cfg.retrain_experts] = differ
  assert changed == {False: [False, True, False], True: [True, True, False]}


def test_the_update_commits_and_resets_the_sender(life):
  # Level 2 sends its own expert on: its slots must be locked again.
  life, _ = consolidate(life)
  life = life_lib.end_night(life)
  after, report = consolidate(life, pair=schedule.Transfer(1, 2))
  assert report.transferred
  assert after.memory.levels[1].bank.status.tolist() == [0, 0, 0]
  assert not np.asarray(after.memory.levels[1].bank.experts.b).any()
  assert after.memory.levels[2].bank.status.tolist()[0] == memory_lib.ACTIVE


def test_restart_and_carry_differ_by_the_previous_weights(life):
  carry = dataclasses.replace(CONFIG, sender_reset='carry')
  fast = life.memory.levels[0].fast
  assert int(fast.chunks) == 1  # The update that waits for the night.
  for seeding_cfg in (CONFIG, carry):
    new = transfer_lib.compute(seeding_cfg, life.model, 0).memory.levels[0].fast
    assert int(new.chunks) == 0
    start = jax.tree.map(
      jnp.zeros_like if seeding_cfg is CONFIG else jnp.asarray, fast.delta
    )
    assert paths_that_differ(new.delta, start)  # It was computed.
  no_chunks = fast.replace(chunks=jnp.int32(0))
  model = life.model.with_memory(life.memory.with_level(0, fast=no_chunks))
  restarted = transfer_lib.compute(CONFIG, model, 0).memory.levels[0].fast
  carried = transfer_lib.compute(carry, model, 0).memory.levels[0].fast
  assert not any(np.asarray(d).any() for d in restarted.delta.values())
  assert not paths_that_differ(carried.delta, fast.delta)


def test_a_failed_transfer_leaves_the_life_as_it_was(life, caplog):
  failing = dataclasses.replace(CONFIG, learning_rate=0.0, max_kl_share=0.8)
  after, report = consolidate(life, failing)
  assert not report.transferred
  assert not paths_that_differ(after, life)
  assert 'could not be transferred' in caplog.text


def test_an_untrained_expert_keeps_its_initial_weights(life):
  untrained = dataclasses.replace(CONFIG, train_expert=False)
  after, report = consolidate(life, untrained)
  bank = after.memory.levels[1].bank
  assert report.transferred and bank.status[0] == memory_lib.ACTIVE
  assert not np.asarray(bank.experts.b[:, 0]).any()


@pytest.mark.slow
def test_a_failed_transfer_does_not_free_a_recycled_slot(life):
  failing = dataclasses.replace(
    CONFIG, learning_rate=0.0, max_kl_share=0.5, slot_policy='recycle'
  )
  after, report = consolidate(with_full_bank(life), failing)
  assert not report.transferred
  assert not paths_that_differ(after, with_full_bank(life))


def first_slots(bank, slots):
  """A bank of these slots alone."""
  return memory_lib.Bank(
    experts=jax.tree.map(lambda x: x[:, :slots], bank.experts),
    status=bank.status[:slots],
    created_night=bank.created_night[:slots],
  )


def test_a_bank_grows_with_its_experts(cfg, life):
  """What is in use, and at most as much again: 1, 2, then all 3 slots."""
  whole = life
  one = first_slots(life.memory.bank(1), 1)
  grown = life.with_memory(life.memory.with_level(1, bank=one))
  weak = dataclasses.replace(CONFIG, steps=3, max_kl_share=9.0)
  for night, slots in enumerate((1, 2, 3)):
    (whole, _), (grown, report) = (consolidate(x, weak) for x in (whole, grown))
    assert report.transferred and report.slot == night
    bank = grown.memory.bank(1)
    assert len(bank.status) == slots and bank.num_used() == night + 1
    # Empty slots change nothing but the order of sums.
    chex.assert_trees_all_close(
      bank, first_slots(whole.memory.bank(1), slots), atol=1e-4
    )
    day = life.memory.deltas()
    whole, grown = (
      life_lib.end_night(x.with_memory(x.memory.with_deltas(day)))
      for x in (whole, grown)
    )
  with pytest.raises(config.ConfigError, match='all 3 slots of level 2'):
    consolidate(grown, weak)


def with_full_bank(life):
  """The life whose level 2 has an expert in each of its three slots."""
  bank = conftest.random_memory(life.model.cfg).levels[1].bank
  full_bank = bank.replace(
    status=jnp.full((3,), memory_lib.ACTIVE), created_night=jnp.array([1, 0, 2])
  )
  return life.with_memory(life.memory.with_level(1, bank=full_bank))


def test_a_full_bank_is_an_error_by_default(life):
  with pytest.raises(config.ConfigError, match='all 3 slots of level 2'):
    consolidate(with_full_bank(life))


@pytest.mark.slow
def test_recycle_drops_the_oldest_expert(life, caplog):
  recycle = dataclasses.replace(CONFIG, slot_policy='recycle')
  after, report = consolidate(with_full_bank(life), recycle)
  assert report.slot == 1 and 'slot 1 is recycled' in caplog.text
  old, new = (x.memory.levels[1].bank for x in (with_full_bank(life), after))
  for slot in (0, 2):
    assert not paths_that_differ(old.expert(slot), new.expert(slot))


@pytest.mark.slow
def test_merge_distils_the_oldest_expert_into_the_next_oldest(life):
  merge = dataclasses.replace(CONFIG, slot_policy='merge')
  after, report = consolidate(with_full_bank(life), merge)
  old, new = (x.memory.levels[1].bank for x in (with_full_bank(life), after))
  assert report.slot == 1
  assert paths_that_differ(old.expert(0), new.expert(0))  # The next oldest.
  assert not paths_that_differ(old.expert(2), new.expert(2))


def folding(life):
  """The life with a full level 2, whose base may take in what it knows."""
  model = with_full_bank(life).model
  levels = list(model.cfg.levels)
  levels[1] = dataclasses.replace(levels[1], folds=True)
  cfg = dataclasses.replace(model.cfg, levels=tuple(levels))
  change = memory_init.init_change(cfg, 1)
  return life.replace(model=model.replace(cfg=cfg).with_level(1, folded=change))


@pytest.mark.slow
def test_fold_distils_all_experts_into_the_base_and_frees_their_slots(life):
  fold = dataclasses.replace(CONFIG, slot_policy='fold', optimizer='muon')
  life = folding(life)
  after, report = consolidate(life, fold)
  old, new = (x.memory.levels[1] for x in (life, after))
  assert report.slot == 0 and new.bank.status.tolist() == [2, 0, 0]
  assert not np.asarray(new.bank.experts.b[:, 1:]).any()
  metrics = report.metrics()
  assert metrics['1to2/freeing_kl_last'] < metrics['1to2/freeing_kl_first']
  # It is there: without it the model is another one.
  changed = paths_that_differ(old.folded, new.folded)
  assert len(changed) == 3
  tokens = jnp.arange(3, 15)[None]
  without = after.model.with_level(1, folded=old.folded)
  assert (
    after.model.forward(tokens).logits != without.forward(tokens).logits
  ).any()


def test_a_level_folds_only_if_its_base_may_change(life):
  fold = dataclasses.replace(CONFIG, slot_policy='fold')
  with pytest.raises(config.ConfigError, match='folds=True'):
    consolidate(with_full_bank(life), fold)
  with pytest.raises(config.ConfigError, match='slots=0'):
    conftest.tiny(levels=(config.LevelConfig(16, folds=True),))


@pytest.mark.slow
def test_a_single_slot_can_be_recycled_and_not_merged(cfg, life):
  levels = (
    cfg.levels[0],
    dataclasses.replace(cfg.levels[1], slots=1),
    *cfg.levels[2:],
  )
  bank = life.memory.levels[1].bank
  bank = bank.replace(
    experts=jax.tree.map(lambda x: x[:, :1], bank.experts),
    status=jnp.array([memory_lib.ACTIVE]),
    created_night=jnp.array([0]),
  )
  life = life.with_memory(life.memory.with_level(1, bank=bank))
  model = life.model.replace(cfg=dataclasses.replace(cfg, levels=levels))
  life = life.replace(model=model)
  recycle = dataclasses.replace(CONFIG, slot_policy='recycle')
  _, report = consolidate(life, recycle)
  assert report.slot == 0
  with pytest.raises(config.ConfigError, match='needs two slots'):
    consolidate(life, dataclasses.replace(CONFIG, slot_policy='merge'))


def test_without_expansion_all_nights_train_the_same_expert(life):
  no_expansion = dataclasses.replace(CONFIG, expand=False)
  first, _ = consolidate(life, no_expansion)
  second_day = first.with_memory(first.memory.with_deltas(life.memory.deltas()))
  second, report = consolidate(second_day, no_expansion)
  assert report.slot == 0
  assert second.memory.levels[1].bank.status.tolist() == [2, 0, 0]


def test_a_transfer_is_deterministic_to_the_bit(life):
  a, b = consolidate(life)[0], consolidate(life)[0]
  assert not paths_that_differ(a, b)


def test_seed_steps_compile_once(life):
  seeding.seed_steps.clear_cache()
  for _ in range(2):
    life, _ = consolidate(life)
    life = life_lib.end_night(life)
  assert seeding.seed_steps._cache_size() == 1


@pytest.mark.slow
def test_of_many_drafts_those_are_dreamt_that_the_day_taught(life):
  cfg = dataclasses.replace(
    CONFIG, oversample=4, dreams=16, temperature=1.0, previous_fraction=(0, 0)
  )
  teachers = replay_lib.Teachers(life.model, life.previous_memory())
  args = TOKENIZER, 16, jax.random.key(2), ()
  drafts = generation.oversample(cfg, teachers.current, *args)
  gain = -np.subtract(
    *(
      replay_lib._ending_logprobs(x, drafts)
      for x in (teachers.previous, teachers.current)
    )
  )
  new = {row.tobytes() for row in drafts.tokens[gain > 1.0]}
  assert 0 < len(new) < len(drafts.tokens)
  models = teachers.current, teachers.previous
  got = replay_lib.sample_new(cfg, models, *args)
  assert len(got.tokens) == 16
  assert {row.tobytes() for row in got.tokens} <= new
  # What decides is the mean of the log-probabilities of the last turn.
  logits = life.model.forward(jnp.asarray(drafts.tokens)).logits
  logp = losses.token_logprobs(logits, jnp.asarray(drafts.tokens))
  first, end = drafts.last_turns[3], drafts.lengths[3]
  np.testing.assert_allclose(
    replay_lib._ending_logprobs(life.model, drafts)[3],
    logp[3, first - 1 : end - 1].mean(),
    rtol=1e-4,
  )


def test_questions_weigh_less_in_what_is_learnt(life):
  """Of a document's tokens, those before its last turn."""
  drawn = generation.Documents(
    np.array([[1, 5, 6, 7, 2, 0]]),
    *(np.array([5]), np.array([1]), np.array([3]), np.zeros(1)),
  )
  cfg = dataclasses.replace(CONFIG, question_weight=0.25)
  weight = replay_lib._weight(cfg, drawn)
  assert weight.tolist() == [[0.25, 0.25, 0.25, 1.0, 1.0, 0.0]]
  replay = replay_lib.Replay(
    drawn.tokens, drawn.lengths, weight, np.ones((1, 6), np.float32), None
  )
  teachers = replay_lib.Teachers(life.model, None)
  labels = teacher_labels.label_all(cfg, teachers, replay)
  assert labels.weight.tolist() == [[0.25, 0.25, 1.0, 1.0, 0.0, 0.0]]


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


def test_a_row_is_split_into_a_prefix_and_what_followed():
  tokens = jnp.arange(1, 11)[None].repeat(20, 0)
  prefixes, lengths, references, remaining = imitation.split_prefix(
    tokens, jnp.full((20,), 10), 4, jax.random.key(0)
  )
  assert len(set(lengths.tolist())) > 3
  for prefix, n, reference, m in zip(prefixes, lengths, references, remaining):
    assert prefix[6 - n :].tolist() == list(range(1, n + 1))
    assert reference.tolist() == list(range(n + 1, n + 5)) and m == 4


def test_the_previous_memory_is_that_of_the_last_morning(life):
  initial = life_lib.init_life(life.model, jax.random.PRNGKey(0))
  assert not paths_that_differ(
    life.previous_memory().deltas(), initial.memory.deltas()
  )
  next_day = life_lib.end_night(life)
  assert not paths_that_differ(
    next_day.previous_memory().deltas(), life.memory.deltas()
  )
  assert int(next_day.clock.nights) == 1


def test_all_transfers_of_a_night_have_one_previous_model(life, monkeypatch):
  """After the first one a bank knows today; the previous model must not."""
  morning, taught, seed = life.previous_memory(), [], seeding.seed

  def record(job, *args):
    taught.append(job.teachers)
    return seed(job, *args)

  monkeypatch.setattr(seeding, 'seed', record)
  cfg = dataclasses.replace(CONFIG, steps=4, max_kl_share=2.0)
  due = [schedule.Transfer(1, 2), schedule.Transfer(0, 1)]
  tracker = costs_lib.CostTracker(life.model.cfg, 16)
  night_lib.night(cfg, life, due, TOKENIZER, tracker)
  assert len(taught) == 2
  for teachers in taught:
    assert not paths_that_differ(teachers.previous_memory, morning)
  assert paths_that_differ(taught[1].current.memory, taught[0].current.memory)


def _segments(tokens):
  """The whole segments of full rows."""
  lengths = np.full(len(tokens), tokens.shape[1])
  spans = splicing.spans(tokens, lengths, TOKENIZER)
  return [tokens[row, start:end] for row, start, end in spans]


def test_kl_is_measured_on_dreams_that_are_not_trained_on(life, monkeypatch):
  drawn, measured = [], []
  sample, measure = replay_lib.sample_replay, seeding._probe_kl

  def record(*args):
    drawn.append(sample(*args))
    return drawn[-1]

  def record_probe(job, expert, student, probe):
    measured.append(np.asarray(probe.tokens))
    return measure(job, expert, student, probe)

  monkeypatch.setattr(replay_lib, 'sample_replay', record)
  monkeypatch.setattr(seeding, '_probe_kl', record_probe)
  consolidate(life, dataclasses.replace(CONFIG, steps=2))
  trained, probe = (replay.tokens for replay in drawn)
  segments = {x.tobytes() for x in _segments(probe)}
  for tokens in measured:
    assert {x.tobytes() for x in _segments(tokens)} <= segments
  known = {row.tobytes() for row in trained}
  # A model that has read one pattern all day writes a few rows twice.
  assert np.mean([row.tobytes() in known for row in probe]) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
  'temperature, top_k',
  [
    (2.0, 8),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in ((1.0, 0), (1.0, 8), (0.5, 0), (0.5, 8), (2.0, 0))
    ),
  ],
)
def test_the_policy_of_a_fresh_rollout_is_that_which_drew_it(
  life, temperature, top_k
):
  """The first ratio of PPO is 1 at any temperature, whatever is emphasised."""
  cfg = dataclasses.replace(
    CONFIG,
    temperature=temperature,
    disagreement_weight=(3.0, 3.0),
    teacher_top_k=top_k,
    tokens_in_flight=64,
  )
  teachers = replay_lib.Teachers(life.model, life.previous_memory())
  rows = jax.random.randint(jax.random.key(5), (4, 16), 3, 32)
  continuations = imitation.sample_continuations(
    cfg, TOKENIZER, life.model, rows, jnp.full((4,), 16), jax.random.key(6)
  )
  rollouts, _ = imitation.score_rollouts(
    cfg, TOKENIZER.separator, teachers, continuations
  )
  student = life.model
  bank = student.bank(1).unlock(0, 0, jax.random.key(7))
  student = student.with_level(1, bank=bank)
  # With all ratios 1, the loss is the mean of the advantages.
  advantage = jnp.arange(16, dtype=jnp.float32)
  drawn = rollouts.labels.weight.any(axis=1)
  _, metrics = seeding.objective(
    bank.expert(0),
    cfg,
    job_lib.SlotId(1, 0),
    student,
    rollouts.labels,
    rollouts.replace(advantage=advantage),
  )
  np.testing.assert_allclose(
    metrics.imitation, -(advantage * drawn).mean(), rtol=1e-3
  )
