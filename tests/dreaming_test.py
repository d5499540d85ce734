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
from sleep_jax.lifecycle import life as life_lib
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
from sleep_jax.models import model as model_lib
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

  def open_book(self, context, question):
    return [*context.prompt, *question[1:]]

  def grade(self, context, answers):
    return np.array(
      [a[:1] == b for a, b in zip(answers, context.answers, strict=True)], float
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
DREAMING = dreaming_config.DreamingConfig(
  dreams=32,
  keep=24,
  keep_random=8,
  importance='random',
  rounds=4,
  epochs=30,
  learning_rate=0.02,
  retention_margin=float('inf'),
)


def init_model(cfg=CFG):
  # The output matrix is the embedding: at its initial scale no adapter could
  # give one token most of the probability.
  params = transformer.init(cfg, jax.random.key(0))
  params |= {'embed': jax.tree.map(lambda x: 9.0 * x, params['embed'])}
  return model_lib.Model(cfg, params)


@pytest.fixture(name='model', scope='module')
def _model():
  return init_model()


def dreamer_of(cfg=DREAMING, trial=TRIAL, form=None):
  return dreamer_lib.Dreamer(
    cfg,
    LORA,
    trial,
    consolidation_config.SeedingConfig(),
    form or Bandit(),
    TOKENIZER,
    costs_lib.CostTracker(CFG, LENGTH),
  )


def life_of(model, num_contexts=8):
  life = life_lib.init_life(model, jax.random.key(3))
  return life.replace(contexts=contexts_of(num_contexts))


def with_active_expert(life, scale=3.0):
  """A life whose first slot is active but never chosen by its router."""
  bank = life.memory.levels[1].bank.unlock(0, 0, jax.random.key(5))
  expert = bank.expert(0)
  expert = expert.replace(
    b=scale * jax.random.normal(jax.random.key(6), expert.b.shape),
    bias=jnp.full_like(expert.bias, -30.0),
  )
  bank = bank.with_expert(0, expert).set_status(0, memory_lib.ACTIVE)
  return life.with_memory(life.memory.with_level(1, bank=bank))


# Step 1.


def test_dreams_are_parsed_or_rejected_with_a_reason(model):
  dreamer, life = dreamer_of(), life_of(model)
  dreams = propose_lib.propose(
    dreamer, life.model, life.contexts, 12, jax.random.key(0)
  )
  assert [len(x) for x in dreams] == [12] * 8
  for dream in (d for dreams_of_context in dreams for d in dreams_of_context):
    parses = len(dream.tokens) == 1 and dream.tokens[0] in VALUES
    assert dream.usable == parses
    if not parses:
      reason = 'unreadable' if dream.tokens else 'empty'
      assert dream.update.reason == reason


def test_random_expert_changes_dreams_and_not_the_life(model):
  life = with_active_expert(life_of(model))
  before = jax.tree.map(np.array, life.model)

  def sample(weight):
    cfg = dataclasses.replace(DREAMING, random_expert=weight)
    dreams = propose_lib.propose(
      dreamer_of(cfg), life.model, life.contexts, 12, jax.random.key(0)
    )
    return [d.tokens for of_context in dreams for d in of_context]

  assert sample(0.0) == sample(0.0)
  assert sample(1.0) != sample(0.0)
  jax.tree.map(np.testing.assert_array_equal, before, life.model)
  memory = cms.per_layer_memory(life.memory)
  assert all(level.min_gate is None for level in memory)


# Step 2.


def test_importance_is_highest_for_the_right_dream(model):
  """The dream with tau's answer has tau's gradient, the wrong ones do not."""
  dreamer, life = dreamer_of(), life_of(model, 4)
  position = 5
  dreams = []
  for context in life.contexts:
    right = context.answers[0][0]
    wrong = [v for v in VALUES if v != right]
    values = [*wrong[:position], right, *wrong[position:]]
    dreams.append(
      [
        propose_lib.Dream(context, [v], dreamer.format.parse(context, [v]))
        for v in values
      ]
    )
  rules = ('grad_cosine', 'greats')
  omega = importance.importance_scores(
    dreamer, life.model, dreams, jax.random.key(0), rules
  )
  for rule in rules:
    for scores in omega[rule]:
      assert np.argmax(scores) == position, rule


def test_batched_gradients_equal_single_gradients(model):
  life = life_of(model)
  updates = [dreamer_of().format.from_context(c) for c in life.contexts]
  tokens, weight = trials.stack_rows(updates, 8, TOKENIZER.pad)
  adapter = lora.init_adapter(CFG, LORA, model.params, jax.random.key(1))
  model = life.model.replace(adapter=adapter)
  grads, loss = importance.gradients(model, tokens, weight)
  for i in range(8):
    alone = importance.gradients(model, tokens[i : i + 1], weight[i : i + 1])
    np.testing.assert_allclose(grads[i], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(loss[i], alone[1][0], rtol=1e-5)
  assert np.abs(grads).sum() > 0


def test_gradients_of_a_large_vocabulary_fit():
  cfg = dataclasses.replace(CFG, vocab=49_152, max_len=256)

  def shapes():
    model = init_model(cfg)
    adapter = lora.init_adapter(cfg, LORA, model.params, jax.random.key(1))
    return model.replace(adapter=adapter)

  shape = 30, 8, 256
  lowered = importance.gradients.lower(
    jax.eval_shape(shapes),
    jax.ShapeDtypeStruct(shape, jnp.int32),
    jax.ShapeDtypeStruct(shape, jnp.float32),
  )
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 16e9  # 32 sets at a time take 25.


def test_importance_rules_have_their_formulas():
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
  # 0 and 2 are parallel; after one of them, half a step, 1 gains as much.
  assert omega('greats').argmin() == 3
  with pytest.raises(config.ConfigError, match='dreaming.importance'):
    omega('size')


def test_greats_subtracts_the_gain_of_earlier_choices():
  unit = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
  aim = np.array([0.8, 0.6])
  order = np.argsort(-importance.greats(unit, aim, keep=2))
  # 2 gains 0.96, then 0 gains 0.8 - 0.3, and 1 the same less the gain of 0.
  assert order[0] == 2
  one_step = np.argsort(-importance.greats(unit[:, ::-1], aim, keep=1))
  assert one_step[0] == 2


def test_select_returns_k_and_b_usable_others():
  omega = np.array([0.1, 0.9, -np.inf, 0.5, 0.7, 0.3])
  usable = np.array([True, True, False, True, True, False])
  for seed in range(5):
    index = importance.select(omega, usable, 2, 1, np.random.default_rng(seed))
    assert index[:2].tolist() == [1, 4] and index[2] in (0, 3)
  index = importance.select(omega, usable, 9, 9, np.random.default_rng(0))
  assert sorted(index) == [0, 1, 3, 4]


# Steps 3 and 4.


def test_batched_trials_equal_single_trials(model):
  life = life_of(model)
  before = jax.tree.map(np.array, life.model)
  updates = [Bandit().from_context(c) for c in life.contexts]
  updates[3] = dataclasses.replace(updates[3], epochs=7, learning_rate=0.01)
  adapters = jax.vmap(lambda k: lora.init_adapter(CFG, LORA, model.params, k))(
    jax.random.split(jax.random.key(0), 8)
  )
  rows = trials.stack_rows(updates, 8, TOKENIZER.pad)
  steps = trials.schedules(TRIAL, updates, 8, np.random.default_rng(0))
  inputs = jax.tree.map(jnp.asarray, (adapters, rows, steps))
  together, finite = trials.train_instances(life.model, *inputs)
  assert finite.all()
  for i in range(8):
    single = jax.tree.map(lambda x, i=i: x[i : i + 1], inputs)
    alone, _ = trials.train_instances(life.model, *single)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
      np.testing.assert_allclose(a[i], b[0], rtol=2e-2, atol=2e-4)
  jax.tree.map(np.testing.assert_array_equal, before, life.model)


def test_columns_without_a_target_are_left_out():
  tokens = np.arange(2 * 64, dtype=np.int32).reshape(2, 64)
  weight = np.zeros((2, 64), np.float32)
  weight[1, 3:18] = 1.0
  update = contexts.TrainingRows(tokens, weight)
  short = contexts.TrainingRows(tokens[:1, :8], np.ones((1, 8), np.float32))
  rows, weights = trials.stack_rows([update, short], 3, -1)
  assert rows.shape == weights.shape == (3, 2, 32)
  np.testing.assert_array_equal(rows[0], tokens[:, :32])
  np.testing.assert_array_equal(weights[0], weight[:, :32])
  np.testing.assert_array_equal(rows[1, 0, :8], tokens[0, :8])
  assert (rows[1, 0, 8:] == -1).all() and (rows[2] == -1).all()


def test_rows_of_an_update_are_packed_side_by_side(model):
  tokens = np.arange(1, 25, dtype=np.int32).reshape(4, 6)
  weight = np.tile(np.float32([1, 1, 1, 1, 0, 0]), (4, 1))
  update = contexts.TrainingRows(tokens, weight, epochs=3, learning_rate=0.1)
  dreamer = dreamer_of()
  assert trials.packed(dreamer, update) is update
  trial = dataclasses.replace(dreamer.trial, window=8, batch=1)
  dreamer = dataclasses.replace(dreamer, trial=trial)
  packed = trials.packed(dreamer, update)
  np.testing.assert_array_equal(packed.tokens, tokens[:, :4].reshape(2, 8))
  # No row is told to predict the beginning of the next.
  np.testing.assert_array_equal(packed.weight, [[0, 1, 1, 1] * 2] * 2)
  assert (packed.epochs, packed.learning_rate) == (3, 0.1)
  assert trials.num_steps(trial, packed) == 6
  # What is run is what is packed.
  questions, key = [[]], jax.random.key(0)
  trials.run(dreamer, life_of(model).model, [update], questions, key)
  assert dreamer.costs.totals()['trials']['steps'] == 6
  with pytest.raises(config.ConfigError, match='trial.window=1'):
    dreaming_config.TrialConfig(window=1)


def test_an_untuned_instance_answers_like_the_model(model):
  life, dreamer = life_of(model), dreamer_of()
  questions = [c.questions for c in life.contexts]
  completions, finite = trials.run(
    dreamer, life.model, [None] * 8, questions, jax.random.key(0)
  )
  assert finite.all()
  for answers, prompts in zip(completions, questions, strict=True):
    logits = life.model.forward(jnp.array(prompts)).logits[0, -1]
    first = int(jnp.argmax(logits))
    assert answers[0][:1] == ([] if first == STOP else [first])


def test_reward_is_strict_and_per_dream(model):
  life, dreamer = life_of(model, 3), dreamer_of()
  selected = []
  for context in life.contexts:
    right = context.answers[0][0]
    for value in (right, next(v for v in VALUES if v != right)):
      update = dreamer.format.parse(context, [value])
      selected.append((propose_lib.Dream(context, [value], update), 0.0))
  results = reward_lib.run_trials(
    dreamer, life.model, selected, jax.random.key(0)
  )
  assert [x.reward for x in results] == [True, False] * 3
  equal = dataclasses.replace(results[0], baseline_score=results[0].score)
  assert not equal.reward


def test_a_diverged_instance_is_a_rejection_with_a_reason(model):
  life, dreamer = life_of(model, 2), dreamer_of()
  selected = []
  for context, rate in zip(life.contexts, (0.05, float('inf'))):
    right = context.answers[0][0]
    update = dreamer.format.parse(context, [right])
    update = dataclasses.replace(update, learning_rate=rate)
    selected.append((propose_lib.Dream(context, [right], update), 0.0))
  results = reward_lib.run_trials(
    dreamer, life.model, selected, jax.random.key(0)
  )
  assert [x.reward for x in results] == [True, False]
  assert results[1].rejected == 'diverged'


def test_an_update_with_too_many_steps_is_rejected(model):
  life = life_of(model)
  dreamer = dreamer_of(trial=dataclasses.replace(TRIAL, max_steps=10))
  dreams = propose_lib.propose(
    dreamer, life.model, life.contexts, 12, jax.random.key(0)
  )
  reasons = {d.update.reason for of_context in dreams for d in of_context}
  assert 'too long' in reasons


# Step 5.


@pytest.mark.parametrize(
  'learn_from, target',
  [
    pytest.param('best', 'slot', marks=pytest.mark.slow),
    pytest.param('all', 'fold', marks=pytest.mark.slow),
    ('all', 'lora'),
    pytest.param('best', 'lora', marks=pytest.mark.slow),
    pytest.param('best', 'fold', marks=pytest.mark.slow),
    pytest.param('all', 'slot', marks=pytest.mark.slow),
  ],
)
def test_rest_em_raises_the_reward_rate_of_a_bandit(model, target, learn_from):
  """The right value of each of eight names is dreamed far more often after."""
  cfg = dataclasses.replace(DREAMING, target=target, learn_from=learn_from)
  dreamer, life = dreamer_of(cfg), life_of(model)

  def right_rate(life):
    dreams = propose_lib.propose(
      dreamer, life.model, contexts_of(8), 32, jax.random.key(99)
    )
    right = [d.tokens == d.context.answers[0] for x in dreams for d in x]
    return np.mean(right)

  rate_before = right_rate(life)
  after, report = dreaming_night.night(dreamer, life, jax.random.key(1))
  assert rate_before < 0.15
  assert right_rate(after) > 0.35
  assert report.rewarded > 0 and not report.rolled_back
  params, adapter = after.model.params, after.model.adapter
  is_at_target = {
    'lora': adapter is not None,
    'fold': params is not life.model.params and adapter is None,
    'slot': int(after.memory.levels[1].bank.status[0]) == memory_lib.ACTIVE,
  }
  assert is_at_target[target]
  if target != 'fold':
    jax.tree.map(np.testing.assert_array_equal, params, model.params)


def test_active_slots_are_unchanged_by_dreaming(model):
  life = with_active_expert(life_of(model))
  cfg = dataclasses.replace(DREAMING, target='slot')
  after, _ = dreaming_night.night(dreamer_of(cfg), life, jax.random.key(1))
  old, new = (x.memory.levels[1].bank for x in (life, after))
  jax.tree.map(np.testing.assert_array_equal, old.expert(0), new.expert(0))
  assert np.abs(new.expert(1).b).sum() > 0


def test_no_free_slot_is_refused(model):
  life = life_of(model)
  life = life.with_memory(life.memory.with_all_slots(model.cfg))
  bank = life.memory.levels[1].bank
  for slot in range(len(bank.status)):
    bank = bank.unlock(slot, 0, jax.random.key(0))
  life = life.with_memory(life.memory.with_level(1, bank=bank))
  cfg = dataclasses.replace(DREAMING, target='slot')
  with pytest.raises(config.ConfigError, match='no level has a free slot'):
    dreaming_night.night(dreamer_of(cfg), life, jax.random.key(1))


def test_without_rewards_the_life_is_unchanged_with_a_warning(model, caplog):
  class GradesZero(Bandit):
    def grade(self, context, answers):
      return np.zeros(len(answers))

  life = life_of(model)
  with caplog.at_level(std_logging.WARNING):
    after, report = dreaming_night.night(
      dreamer_of(form=GradesZero()), life, jax.random.key(1)
    )
  assert after is life and report.rewarded == 0
  assert 'none of' in caplog.text


def test_a_night_above_the_retention_margin_is_rolled_back(model, caplog):
  cfg = dataclasses.replace(DREAMING, retention_margin=-1e9)
  life = life_of(model)
  with caplog.at_level(std_logging.WARNING):
    after, report = dreaming_night.night(
      dreamer_of(cfg), life, jax.random.key(1)
    )
  assert after is life and report.rolled_back
  assert 'rolled back' in caplog.text
  assert report.metrics()['rolled_back'] == 1.0


def test_what_is_rehearsed_is_kept(model):
  life, lost = life_of(model), []
  for rehearsed in (0, 8):
    cfg = dataclasses.replace(DREAMING, rounds=2, rehearsed=rehearsed)
    _, report = dreaming_night.night(dreamer_of(cfg), life, jax.random.key(1))
    assert report.rewarded > 0
    lost.append(report.retention)
  assert lost[1] < 0.5 * lost[0]


def test_what_is_learnt_from():
  a, b = contexts_of(2)

  def result(context, score, baseline_score=0.2):
    dream = propose_lib.Dream(
      context, [int(100 * score)], contexts.Rejected('x')
    )
    return reward_lib.TrialResult(dream, 0.0, score, baseline_score)

  results = [result(a, 0.5), result(a, 0.9), result(b, 0.2), result(b, 0.1)]
  best = reward_lib.select_rewarded(DREAMING, results)
  assert [d.tokens for d in best] == [[90]]
  learn_from_all = dataclasses.replace(DREAMING, learn_from='all')
  rewarded = reward_lib.select_rewarded(learn_from_all, results)
  assert [d.tokens for d in rewarded] == [[50], [90]]
  # Whatever its reward, but not what broke its instance.
  tried = dataclasses.replace(DREAMING, learn_from='tried')
  results[1] = dataclasses.replace(results[1], rejected='diverged')
  dreams = reward_lib.select_rewarded(tried, results)
  assert [d.tokens for d in dreams] == [[50], [20], [10]]


def test_fold_cannot_restart():
  with pytest.raises(config.ConfigError, match='dreaming.restart'):
    dreaming_config.DreamingConfig(target='fold', restart=True)
  with pytest.raises(config.ConfigError, match='more than dreams=3'):
    dreaming_config.DreamingConfig(dreams=3, keep=3, keep_random=1)


# The learners.


def sections():
  """The config sections of the learners."""
  seeding = consolidation_config.SeedingConfig(
    dreams=32, dream_length=LENGTH, steps=4, batch=4, rollout_every=4,
    prefixes=2, group=2, rollout_groups=1, continuation=2, max_kl_share=9.0,
  )  # fmt: skip
  dreaming = dataclasses.replace(
    DREAMING, rounds=1, study_rows=4, study_night=True
  )
  return {
    'wake': {'batch': 2},
    'sleep': dataclasses.asdict(seeding),
    'lora': dataclasses.asdict(LORA),
    'trial': dataclasses.asdict(TRIAL),
    'dreaming': dataclasses.asdict(dreaming),
  }


def setup_of(model):
  return learner_lib.Setup(
    model=model,
    tokenizer=TOKENIZER,
    costs=costs_lib.CostTracker(CFG, LENGTH),
    format=Bandit(),
  )


def build(name, model):
  return learners.build(name, sections(), setup_of(model))


def experience_of(contexts_of_day):
  """Four rows, one context after another."""
  rows = contexts.concat([Bandit().from_context(c) for c in contexts_of_day])
  index = np.resize(np.arange(len(contexts_of_day)), 4)
  return experience_lib.Experience(
    rows.tokens[index], rows.weight[index], contexts_of_day
  )


def after_wake(learner):
  """A new life after one day about four contexts."""
  life = learner.init(jax.random.key(0))
  return learner.wake(life, experience_of(contexts_of(4)))[0]


@pytest.mark.parametrize(
  'name',
  [
    'frozen',
    pytest.param('finetune_passage', marks=pytest.mark.slow),
    pytest.param('seal', marks=pytest.mark.slow),
    pytest.param('ttt', marks=pytest.mark.slow),
    'sleep',
  ],
)
def test_every_learner_lives_a_day_and_studies(model, name):
  learner = build(name, model)
  life, metrics = learner.sleep(after_wake(learner))
  assert int(life.clock.nights) == 1 and life.contexts == ()
  assert ('dreaming/reward_rate' in metrics) == (name in ('seal', 'sleep'))
  before = jax.tree.map(np.array, life.model)
  answers = learner.study(
    life,
    [
      contexts.StudyRequest(contexts_of(1), attempts=2),
      contexts.StudyRequest(contexts_of(8)),
    ],
  )
  assert [[len(x) for x in attempts] for attempts in answers] == [[1, 1], [8]]
  jax.tree.map(np.testing.assert_array_equal, before, life.model)
  if name == 'finetune_passage':  # `from_context` of this format has v0.
    assert all(answer[:1] == [VALUES[0]] for answer in answers[1][0])


def test_seal_may_read_the_day_before_it_dreams(model):
  """Its adapter trains on the day's rows, and the night goes on from there."""
  own = sections() | dict(learner_config=dict(reads_day=True))
  own['finetune'] = dict(batch=2, learning_rate=0.01, passes=8)
  seal, reader = (
    learners.build('seal', x, setup_of(model)) for x in (sections(), own)
  )
  lives = after_wake(seal), after_wake(reader)
  before, after = (
    [float(jnp.abs(x).max()) for x in jax.tree.leaves(life.model.adapter)]
    for life in (reader.init(jax.random.key(0)), lives[1])
  )
  assert before != after
  jax.tree.map(
    np.testing.assert_array_equal, lives[1].model.params, model.params
  )
  assert lives[1].contexts == lives[0].contexts
  rows = experience_of(contexts_of(4))
  assert reader.setup.costs.totals()['wake']['tokens'] == 8 * rows.tokens.size
  assert seal.setup.costs.totals()['wake']['tokens'] == 0
  life, metrics = reader.sleep(lives[1])
  assert 'dreaming/reward_rate' in metrics and int(life.clock.nights) == 1

  def steps(life) -> int:
    leaves = jax.tree.leaves(life.opt_state)
    return max(int(x) for x in leaves if x.dtype == jnp.int32)

  first = steps(life)
  again, _ = reader.wake(life, rows)  # The optimizer goes on.
  assert steps(again) == 2 * first
  own['dreaming'] = own['dreaming'] | dict(target='slot')
  with pytest.raises(config.ConfigError, match='dreaming.target=lora, not slo'):
    learners.build('seal', own, setup_of(model))


def test_sleep_consolidates_before_it_dreams(model, monkeypatch):
  order = []
  transfer, night = transfer_lib.transfer, dreaming_night.night
  monkeypatch.setattr(
    transfer_lib,
    'transfer',
    lambda *a: order.append('consolidate') or transfer(*a),
  )
  monkeypatch.setattr(
    dreaming_night, 'night', lambda *a: order.append('dream') or night(*a)
  )
  learner = build('sleep', model)
  learner.sleep(after_wake(learner))
  assert order == ['consolidate', 'dream']


def test_a_night_killed_in_a_trial_repeats_its_dreams(model, monkeypatch):
  learner = build('sleep', model)
  life = after_wake(learner)
  calls, run = [], trials.run

  def interrupt_first(dreamer, model, updates, questions, rng):
    calls.append([None if u is None else u.tokens.tolist() for u in updates])
    if len(calls) == 1:
      raise KeyboardInterrupt
    return run(dreamer, model, updates, questions, rng)

  monkeypatch.setattr(trials, 'run', interrupt_first)
  with pytest.raises(KeyboardInterrupt):
    learner.sleep(life)
  first, _ = learner.sleep(life)
  assert calls[0] == calls[1]
  second, _ = learner.sleep(life)
  jax.tree.map(
    np.testing.assert_array_equal, first.model.adapter, second.model.adapter
  )


def test_a_learner_that_studies_needs_a_format(model):
  setup = dataclasses.replace(setup_of(model), format=None)
  with pytest.raises(config.ConfigError, match='seal needs a task with contex'):
    learners.build('seal', sections(), setup)


def test_numpy_rng_depends_on_the_key():
  a, b = (order_lib.numpy_rng(jax.random.key(i)).random() for i in (0, 1))
  assert a != b
