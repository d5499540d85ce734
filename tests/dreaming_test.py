"""Dreaming: selection, isolated trials, rewards, ReST^EM, and its faults."""

import dataclasses
import logging as std_logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import learners
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import importance
from sleep_jax.lifecycle.dreaming import night as dreaming_night
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import reward as reward_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import cms
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer

WORDS = [*'abcdefgh', *(f'v{i}' for i in range(8)), '?', '.']
TOKENIZER = tokenizers.WordTokenizer(WORDS, separator='.')
ASK, STOP = TOKENIZER.encode('? .')
NAMES, VALUES = (
  TOKENIZER.encode('a b c d e f g h'),
  TOKENIZER.encode(' '.join(WORDS[8:16])),
)
LENGTH = 4


class Bandit:
  """A dream is one word: the value that the name's question is answered with.

  One arm of eight is right for each name. Names are no values: a dream of one
  cannot be read.
  """

  max_dream, max_answer, stop = 1, 2, STOP

  def parse(self, context, dream):
    if len(dream) != 1 or dream[0] not in VALUES:
      return contexts.Rejected('unreadable')
    row = [*context.questions[0], dream[0]]
    return contexts.TrainingRows(
      np.array([row], np.int32), np.array([[0, 0, 0, 1]], np.float32)
    )

  def from_context(self, context):
    row = [*context.questions[0], VALUES[0]]
    return contexts.TrainingRows(
      np.array([row], np.int32), np.array([[0, 0, 0, 1]], np.float32)
    )

  def grade(self, context, said):
    return np.array(
      [s[:1] == a for s, a in zip(said, context.answers, strict=True)], float
    )


def contexts_of(count):
  """Names and their right values."""
  return tuple(
    contexts.Context(
      name=WORDS[i],
      prompt=[TOKENIZER.bos, NAMES[i]],
      questions=[[TOKENIZER.bos, NAMES[i], ASK]],
      answers=[[VALUES[(3 * i + 1) % 8]]],
    )
    for i in range(count)
  )


CFG = config.ModelConfig(
  vocab=TOKENIZER.vocab,
  dim=32,
  layers=1,
  heads=2,
  levels=(
    config.LevelConfig(32, chunk=LENGTH, sleep_every=2),
    config.LevelConfig(32, slots=3, rank=4, top_k=3),
  ),
)
LORA = lora.LoraConfig(rank=4, alpha=8.0, targets=('q', 'v', 'up', 'down'))
TRIAL = dreaming_config.TrialConfig(epochs=20, learning_rate=0.05)
HOW = dreaming_config.DreamingConfig(
  dreams=32,
  keep=24,
  keep_random=8,
  importance='random',
  rounds=4,
  epochs=30,
  learning_rate=0.02,
  retention_margin=float('inf'),
)


@pytest.fixture(scope='module')
def params():
  # The output matrix is the embedding: as small as it is born, no adapter could
  # make the model sure of anything.
  born = transformer.init(CFG, jax.random.key(0))
  return born | {'embed': jax.tree.map(lambda x: 9.0 * x, born['embed'])}


def dreamer_of(how=HOW, trial=TRIAL, format=None):
  return dreamer_lib.Dreamer(
    CFG,
    how,
    LORA,
    trial,
    consolidation_config.SeedingConfig(),
    reader or Bandit(),
    TOKENIZER,
    costs_lib.CostTracker(CFG, LENGTH),
  )


def life_of(params, about=8):
  life = life_lib.init_life(CFG, params, jax.random.key(3))
  return life.replace(contexts=contexts_of(about))


def with_active_expert(life, scale=3.0):
  """A life whose first slot is in force but never chosen by its router."""
  bank = life.memory.levels[1].bank.unlock(0, 0, jax.random.key(5))
  expert = bank.expert(0)
  expert = expert.replace(
    b=scale * jax.random.normal(jax.random.key(6), expert.b.shape),
    bias=jnp.full_like(expert.bias, -30.0),
  )
  bank = bank.with_expert(0, expert).set_status(0, memory_lib.ACTIVE)
  return life.replace(memory=life.memory.with_level(1, bank=bank))


# Step 1.


def test_dreams_are_read_and_rejected_by_reason(params):
  dreamer = dreamer_of()
  life = life_of(params)
  found = propose_lib.propose(
    dreamer, life, life.contexts, 12, jax.random.key(0)
  )
  assert [len(x) for x in found] == [12] * 8
  for dream in (d for of_one in found for d in of_one):
    right = len(dream.tokens) == 1 and dream.tokens[0] in VALUES
    assert dream.usable == right
    if not right:
      wanted = 'unreadable' if dream.tokens else 'empty'
      assert dream.edit.reason == wanted


def test_a_random_expert_changes_dreams_and_nothing_else(params):
  life = with_active_expert(life_of(params))
  before = jax.tree.map(np.array, (life.params, life.memory))

  def dreamt(weight):
    how = dataclasses.replace(HOW, random_expert=weight)
    found = propose_lib.propose(
      dreamer_of(how), life, life.contexts, 12, jax.random.key(0)
    )
    return [d.tokens for of_one in found for d in of_one]

  assert dreamt(0.0) == dreamt(0.0)
  assert dreamt(1.0) != dreamt(0.0)
  jax.tree.map(
    np.testing.assert_array_equal, before, (life.params, life.memory)
  )
  views = cms.per_layer_memory(life.memory)
  assert all(view.extra is None for view in views)


# Step 2.


def test_top_k_finds_a_planted_useful_dream(params):
  """Among noise, the dream that tells tau's answer has tau's gradient."""
  dreamer, life = dreamer_of(), life_of(params, 4)
  planted = 5
  dreamt = []
  for context in life.contexts:
    right = context.answers[0][0]
    wrong = [v for v in VALUES if v != right]
    said = [*wrong[:planted], right, *wrong[planted:]]
    dreamt.append(
      [
        propose_lib.Dream(context, [v], dreamer.format.parse(context, [v]))
        for v in said
      ]
    )
  rules = ('grad_cosine', 'greats')
  omega = importance.importance_scores(
    dreamer, life, dreamt, jax.random.key(0), rules
  )
  for rule in rules:
    for scored in omega[rule]:
      assert np.argmax(scored) == planted, rule


def test_gradients_are_those_of_each_alone(params):
  life = life_of(params)
  edits = [dreamer_of().format.from_context(c) for c in life.contexts]
  tokens, weight = trials.stack_rows(edits, 8, TOKENIZER.pad)
  adapter = lora.init_adapter(CFG, LORA, params, jax.random.key(1))
  grads, loss = importance.gradients(
    CFG, params, life.memory, adapter, tokens, weight
  )
  for i in range(8):
    alone = importance.gradients(
      CFG, params, life.memory, adapter, tokens[i : i + 1], weight[i : i + 1]
    )
    np.testing.assert_allclose(grads[i], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(loss[i], alone[1][0], rtol=1e-5)
  assert np.abs(grads).sum() > 0


def test_the_rules_score_what_they_say():
  grads = np.array([[2.0, 0.0], [0.0, 1.0], [0.1, 0.0], [-1.0, 0.0]])
  aim, losses = np.array([1.0, 0.5]), np.array([0.3, 0.1, 0.7, 0.2])
  rng = np.random.default_rng(0)

  def omega(rule):
    return importance.score_gradients(rule, grads, losses, aim, 2, rng)

  np.testing.assert_allclose(omega('grad_norm'), [2.0, 1.0, 0.1, 1.0])
  cosine = omega('grad_cosine')
  np.testing.assert_allclose(cosine[[0, 2]], 2 / 5**0.5)
  np.testing.assert_allclose(cosine[3], -2 / 5**0.5)
  np.testing.assert_array_equal(omega('loss'), losses)
  # 0 and 2 say the same; after one of them, half the step, 1 gains as much.
  assert omega('greats').argmin() == 3
  with pytest.raises(config.ConfigError, match='dreaming.importance'):
    omega('size')


def test_greats_prefers_what_is_not_yet_gained():
  unit = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
  aim = np.array([0.8, 0.6])
  order = np.argsort(-importance.greats(unit, aim, keep=2))
  # 2 gains 0.96, then 0 gains 0.8 - 0.3 and 1 the same less what 0 took.
  assert order[0] == 2
  one_step = np.argsort(-importance.greats(unit[:, ::-1], aim, keep=1))
  assert one_step[0] == 2


def test_select_keeps_k_and_b_usable_others():
  omega = np.array([0.1, 0.9, -np.inf, 0.5, 0.7, 0.3])
  usable = np.array([True, True, False, True, True, False])
  for seed in range(5):
    got = importance.select(omega, usable, 2, 1, np.random.default_rng(seed))
    assert got[:2].tolist() == [1, 4] and got[2] in (0, 3)
  got = importance.select(omega, usable, 9, 9, np.random.default_rng(0))
  assert sorted(got) == [0, 1, 3, 4]


# Steps 3 and 4.


def test_a_batch_of_trials_is_each_alone(params):
  life = life_of(params)
  before = jax.tree.map(np.array, (life.params, life.memory))
  edits = [Bandit().from_context(c) for c in life.contexts]
  edits[3] = dataclasses.replace(edits[3], epochs=7, learning_rate=0.01)
  adapters = jax.vmap(lambda k: lora.init_adapter(CFG, LORA, params, k))(
    jax.random.split(jax.random.key(0), 8)
  )
  rows = trials.stack_rows(edits, 8, TOKENIZER.pad)
  plan = trials.schedules(TRIAL, edits, 8, np.random.default_rng(0))
  together, finite = trials.train_instances(
    CFG, params, life.memory, adapters, *map(jnp.asarray, (*rows, *plan))
  )
  assert finite.all()
  for i in range(8):
    own = jax.tree.map(lambda x, i=i: x[i : i + 1], (adapters, *rows, *plan))
    alone, _ = trials.train_instances(CFG, params, life.memory, *own)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
      np.testing.assert_allclose(a[i], b[0], rtol=2e-2, atol=2e-4)
  jax.tree.map(
    np.testing.assert_array_equal, before, (life.params, life.memory)
  )


def test_an_untuned_instance_answers_as_the_life_does(params):
  life, dreamer = life_of(params), dreamer_of()
  questions = [c.questions for c in life.contexts]
  said, finite = trials.run(
    dreamer.lab(life), [None] * 8, questions, jax.random.key(0)
  )
  assert finite.all()
  for own, asked in zip(said, questions, strict=True):
    logits = transformer.forward(
      CFG, params, jnp.array(asked), life.memory
    ).logits[0, -1]
    first = int(jnp.argmax(logits))
    assert own[0][:1] == ([] if first == STOP else [first])


def test_reward_is_strict_and_each_dream_gets_its_own(params):
  life, dreamer = life_of(params, 3), dreamer_of()
  chosen = []
  for context in life.contexts:
    right = context.answers[0][0]
    for value in (right, next(v for v in VALUES if v != right)):
      edit = dreamer.format.parse(context, [value])
      chosen.append((propose_lib.Dream(context, [value], edit), 0.0))
  tried = reward_lib.run_trials(dreamer, life, chosen, jax.random.key(0))
  assert [x.reward for x in tried] == [True, False] * 3
  same = dataclasses.replace(tried[0], untuned=tried[0].mark)
  assert not same.reward


def test_a_diverging_instance_is_a_counted_rejection(params):
  life, dreamer = life_of(params, 2), dreamer_of()
  chosen = []
  for context, rate in zip(life.contexts, (0.05, float('inf'))):
    right = context.answers[0][0]
    edit = dreamer.format.parse(context, [right])
    edit = dataclasses.replace(edit, learning_rate=rate)
    chosen.append((propose_lib.Dream(context, [right], edit), 0.0))
  tried = reward_lib.run_trials(dreamer, life, chosen, jax.random.key(0))
  assert [x.reward for x in tried] == [True, False]
  assert tried[1].rejected == 'diverged'


def test_an_edit_that_asks_for_too_much_is_rejected(params):
  life = life_of(params)
  dreamer = dreamer_of(trial=dataclasses.replace(TRIAL, max_steps=10))
  found = propose_lib.propose(
    dreamer, life, life.contexts, 12, jax.random.key(0)
  )
  reasons = {d.edit.reason for of_one in found for d in of_one}
  assert 'too long' in reasons


# Step 5.


@pytest.mark.parametrize('target', ('lora', 'fold', 'slot'))
@pytest.mark.parametrize('learn_from', ('best', 'all'))
def test_rest_em_raises_the_reward_rate_of_a_bandit(params, target, learn_from):
  """The right arm of each of eight names comes to be dreamt far more often."""
  how = dataclasses.replace(HOW, target=target, learn_from=learn_from)
  dreamer, life = dreamer_of(how), life_of(params)

  def rate(life):
    found = propose_lib.propose(
      dreamer, life, contexts_of(8), 32, jax.random.key(99)
    )
    right = [d.tokens == d.context.answers[0] for x in found for d in x]
    return np.mean(right)

  before = rate(life)
  after, report, _ = dreaming_night.night(dreamer, life, jax.random.key(1))
  assert before < 0.15
  assert rate(after) > 0.35
  assert report.rewarded > 0 and not report.rolled_back
  where = {
    'lora': after.adapter is not None,
    'fold': after.params is not life.params and after.adapter is None,
    'slot': int(after.memory.levels[1].bank.status[0]) == memory_lib.ACTIVE,
  }
  assert where[target]
  if target != 'fold':
    jax.tree.map(np.testing.assert_array_equal, after.params, params)


def test_frozen_slots_stay_as_they_are(params):
  life = with_active_expert(life_of(params))
  how = dataclasses.replace(HOW, target='slot')
  after, _, _ = dreaming_night.night(dreamer_of(how), life, jax.random.key(1))
  old, new = (x.memory.levels[1].bank for x in (life, after))
  jax.tree.map(np.testing.assert_array_equal, old.expert(0), new.expert(0))
  assert np.abs(new.expert(1).b).sum() > 0


def test_no_free_slot_is_refused(params):
  life = life_of(params)
  bank = life.memory.levels[1].bank
  for slot in range(3):
    bank = bank.unlock(slot, 0, jax.random.key(0))
  life = life.replace(memory=life.memory.with_level(1, bank=bank))
  how = dataclasses.replace(HOW, target='slot')
  with pytest.raises(config.ConfigError, match='no level has a free slot'):
    dreaming_night.night(dreamer_of(how), life, jax.random.key(1))


def test_without_rewards_the_dreamer_stays_and_says_so(params, caplog):
  class Stern(Bandit):
    def grade(self, context, said):
      return np.zeros(len(said))

  life = life_of(params)
  with caplog.at_level(std_logging.WARNING):
    after, report, _ = dreaming_night.night(
      dreamer_of(format=Stern()), life, jax.random.key(1)
    )
  assert after is life and report.rewarded == 0
  assert 'none of' in caplog.text


def test_a_night_that_costs_too_much_is_rolled_back(params, caplog):
  how = dataclasses.replace(HOW, retention_margin=-1e9)
  life = life_of(params)
  with caplog.at_level(std_logging.WARNING):
    after, report, _ = dreaming_night.night(
      dreamer_of(how), life, jax.random.key(1)
    )
  assert after is life and report.rolled_back
  assert 'rolled back' in caplog.text
  assert report.metrics()['rolled_back'] == 1.0


def test_best_keeps_one_dream_of_each_context_and_all_keeps_all():
  a, b = contexts_of(2)

  def tried(context, mark, untuned=0.2):
    dream = propose_lib.Dream(
      context, [int(100 * mark)], contexts.Rejected('x')
    )
    return reward_lib.TrialResult(dream, 0.0, mark, untuned)

  found = [tried(a, 0.5), tried(a, 0.9), tried(b, 0.2), tried(b, 0.1)]
  best = reward_lib.select_rewarded(HOW, found)
  assert [d.tokens for d in best] == [[90]]
  every = dataclasses.replace(HOW, learn_from='all')
  found_all = reward_lib.select_rewarded(every, found)
  assert [d.tokens for d in found_all] == [[50], [90]]


def test_fold_cannot_restart():
  with pytest.raises(config.ConfigError, match='dreaming.restart'):
    dreaming_config.DreamingConfig(target='fold', restart=True)
  with pytest.raises(config.ConfigError, match='more than dreams=3'):
    dreaming_config.DreamingConfig(dreams=3, keep=3, keep_random=1)


# The learners.


def setup_of(params, **changes):
  how = dataclasses.replace(HOW, rounds=1, **changes)
  seeding = consolidation_config.SeedingConfig(
      dreams=32, dream_length=LENGTH, steps=4, batch=4, rollout_every=4,
      prefixes=2, group=2, rollout_groups=1, continuation=2, max_kl_share=9.0,
    )  # fmt: skip
  return learner_lib.Setup(
    model=CFG,
    params=params,
    tokenizer=TOKENIZER,
    wake=wake_lib.WakeConfig(batch=2),
    sleep=seeding,
    finetune=finetune.FinetuneConfig(),
    costs=costs_lib.CostTracker(CFG, LENGTH),
    format=Bandit(),
    lora=LORA,
    trial=TRIAL,
    dreaming=dataclasses.replace(how, study_rows=4, study_night=True),
  )


def day(about):
  rows = contexts.concat([Bandit().from_context(c) for c in about])
  rows = np.resize(np.arange(len(about)), 4)
  plain = contexts.concat([Bandit().from_context(c) for c in about])
  return experience_lib.Experience(
    plain.tokens[rows], plain.weight[rows], about
  )


@pytest.mark.parametrize(
  'name', ('frozen', 'finetune_passage', 'ttt', 'seal', 'sleep')
)
def test_every_learner_lives_a_day_and_studies(params, name):
  built = learners.build(name, setup_of(params))
  life = built.init(jax.random.key(0))
  life, _ = built.wake(life, day(contexts_of(4)))
  life, metrics = built.sleep(life)
  assert int(life.clock.nights) == 1 and life.contexts == ()
  assert ('dreaming/reward_rate' in metrics) == (name in ('seal', 'sleep'))
  before = jax.tree.map(np.array, (life.params, life.memory))
  said = built.study(
    life,
    [
      contexts.StudyRequest(contexts_of(1), attempts=2),
      contexts.StudyRequest(contexts_of(8)),
    ],
  )
  assert [[len(own) for own in attempts] for attempts in said] == [[1, 1], [8]]
  jax.tree.map(
    np.testing.assert_array_equal, before, (life.params, life.memory)
  )
  if name == 'finetune_passage':  # `plain` of this reader tells v0.
    assert all(answer[:1] == [VALUES[0]] for answer in said[1][0])


def test_sleep_consolidates_before_it_dreams(params, monkeypatch):
  order = []
  transfer, night = transfer_lib.transfer, dreaming_night.night
  monkeypatch.setattr(
    transfer_lib,
    'consolidate',
    lambda *a: order.append('consolidate') or transfer(*a),
  )
  monkeypatch.setattr(
    dreaming_night, 'night', lambda *a: order.append('dream') or night(*a)
  )
  built = learners.build('sleep', setup_of(params))
  life, _ = built.wake(built.init(jax.random.key(0)), day(contexts_of(4)))
  life, _ = built.sleep(life)
  assert order == ['consolidate', 'dream']


def test_a_night_killed_in_a_trial_dreams_the_same_again(params, monkeypatch):
  built = learners.build('sleep', setup_of(params))
  life, _ = built.wake(built.init(jax.random.key(0)), day(contexts_of(4)))
  seen, real = [], trials.run

  def killed(lab, edits, questions, rng):
    seen.append([None if e is None else e.tokens.tolist() for e in edits])
    if len(seen) == 1:
      raise KeyboardInterrupt
    return real(lab, edits, questions, rng)

  monkeypatch.setattr(trials, 'run', killed)
  with pytest.raises(KeyboardInterrupt):
    built.sleep(life)
  after, _ = built.sleep(life)
  assert seen[0] == seen[1]
  again, _ = built.sleep(life)
  jax.tree.map(np.testing.assert_array_equal, after.adapter, again.adapter)


def test_a_learner_that_studies_needs_a_reader(params):
  setup = dataclasses.replace(setup_of(params), format=None)
  with pytest.raises(config.ConfigError, match="learner='seal' is unknown"):
    learners.build('seal', setup)


def test_host_randomness_is_part_of_the_key():
  a, b = (order_lib.numpy_rng(jax.random.key(i)).random() for i in (0, 1))
  assert a != b
