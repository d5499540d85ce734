"""grpo and opsd: own solutions, privileged teachers, groups."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import learners
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import problems as problems_lib
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.learners import base
from sleep_jax.learners import on_policy
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences
from sleep_jax.runtime import finite
from sleep_jax.training import loss as loss_lib
from tests import conftest

_STOP = 2
_CFG = conftest.tiny(
  vocab=16, max_len=32, layers=1, levels=(config.LevelConfig(16),)
)


def setup(**changes) -> base.Setup:
  settings = dict(
    model=conftest.build_model(_CFG),
    tokenizer=tokenizers.WordTokenizer(
      ['.', *'abcdefghijk'], separator='.', stop='.'
    ),
    costs=costs_lib.CostTracker(_CFG, 16),
    episodes=1,
  )
  return base.Setup(**(settings | changes))


def day(**changes) -> experience_lib.Experience:
  """Problems of unequal length, whose answer is the first token but one."""
  prompts = [[1, 5], [1, 6, 7, 8], [1, 9, 9], [1, 4, 4, 4, 4]]
  solutions = [[5, _STOP], [6, _STOP], [9, _STOP], [4, _STOP]]
  settings = dict(
    prompts=prompts,
    privileged=[
      [*p, 11 + i % 2, *s, 12] * (1 + i % 2)
      for i, (p, s) in enumerate(zip(prompts, solutions, strict=True))
    ],
    solutions=solutions,
    answers=[5, 6, 9, 4],
    read=lambda tokens: tokens[0] if tokens[0] != _STOP else None,
    max_new=4,
    stop=_STOP,
  )
  problems = problems_lib.Problems(**(settings | changes))
  rows = np.zeros((4, 16), np.int32)
  return experience_lib.Experience(
    rows, np.ones(rows.shape, np.float32), problems=problems
  )


def build(name: str, s: base.Setup | None = None, **changes) -> base.Learner:
  finetune = dict(batch=8, learning_rate=1e-2)
  finetune |= changes.pop('finetune', {})
  sections = dict(finetune=finetune, learner_config=changes)
  return learners.build(name, sections, s or setup())


def live(learner: base.Learner, experience=None):
  life = learner.init(jax.random.PRNGKey(0))
  return learner.wake(life, experience or day())


def other_model() -> model_lib.Model:
  """One that predicts otherwise than `setup`'s."""
  model = conftest.build_model(_CFG)
  keys = iter(jax.random.split(jax.random.key(3), 99))
  params = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), model.params
  )
  return model.replace(params=params)


def rollouts(seed: int = 0):
  """Random completions of all problems, and their prompts."""
  rng = np.random.default_rng(seed)
  problems = day().problems
  completions = sampling.Completions(
    jnp.asarray(rng.integers(3, 16, (4, 4)), jnp.int32),
    jnp.zeros((4, 4)),
    jnp.asarray([4, 2, 1, 3]),
  )
  mask = (np.arange(4) < np.array([4, 2, 1, 3])[:, None]).astype(np.float32)
  prompts = on_policy.as_prompts(problems.prompts, 0, width=5)
  return on_policy.Rollouts(prompts, completions, jnp.asarray(mask))


def alone(model, prompt: list[int], completion: list[int]) -> np.ndarray:
  """Log-probabilities `[M, V]` after an unpadded prompt."""
  logits = model.forward(jnp.asarray([prompt + completion])).logits[0]
  return np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 : -1]), float)


def test_padding_does_not_shift_what_a_prompt_predicts():
  model, drawn = setup().model, rollouts()
  got = on_policy.logprobs(model, drawn, 1.0)
  for i, prompt in enumerate(day().problems.prompts):
    tokens = drawn.completions.tokens[i].tolist()
    want = alone(model, prompt, tokens)[np.arange(4), tokens]
    np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)


def test_student_and_teacher_are_padded_by_their_own_lengths():
  """The loss is what two models without padding give, row by row."""
  s, drawn, problems = setup(), rollouts(), day().problems
  learner, other, seen = build('opsd', s), other_model(), {}

  def update(life, batches, shared, size):
    del size
    seen['batch'] = jax.tree.map(lambda x: x[0], batches), shared
    return life, {}

  learner._update = update
  life = learner.init(jax.random.PRNGKey(0))
  grades = problems.grade(np.arange(4), [[5, 2]] * 4)
  learner.learn(life, drawn, on_policy.Step(problems, np.arange(4), grades))
  want, count = dict.fromkeys(('forward_kl', 'reverse_kl', 'sampled'), 0.0), 0
  for i, n in enumerate(drawn.completions.lengths.tolist()):
    tokens = drawn.completions.tokens[i].tolist()
    t = alone(s.model, problems.privileged[i], tokens)[:n]
    q = alone(other, problems.prompts[i], tokens)[:n]
    pick = np.arange(n), tokens[:n]
    want['forward_kl'] += (np.exp(t) * (t - q)).sum()
    want['reverse_kl'] += (np.exp(q) * (q - t)).sum()
    want['sampled'] += ((q[pick] - t[pick]) * q[pick]).sum()
    count += n
  for divergence, total in want.items():
    loss = jax.jit(build('opsd', s, divergence=divergence).loss)
    got = loss(other, *seen['batch'])[0]
    np.testing.assert_allclose(got, total / count, rtol=1e-4)


def test_the_clip_bounds_each_token_of_the_vocabulary():
  rng = np.random.default_rng(0)
  teacher, student = 2 * rng.normal(size=(2, 3, 7))
  p, q = (
    np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (teacher, student)
  )
  measure = divergences.divergence('forward_kl', 0.5, clip=0.05)
  np.testing.assert_allclose(
    measure(teacher, student),
    np.minimum(p * np.log(p / q), 0.05).sum(1),
    rtol=1e-4,
  )
  learner = build('opsd', clip=0.05)
  np.testing.assert_array_equal(
    learner.cfg.measure()(teacher, student), measure(teacher, student)
  )


def test_rewarded_answers_become_likely():
  learner = build('grpo', finetune=dict(passes=20), group=8)
  life = learner.init(jax.random.PRNGKey(0))
  problems = day().problems
  answers = [[a] for a in problems.answers]
  before = learner.respond(life, problems.prompts, answers).answer_logprob
  life, _ = learner.wake(life, day())
  after = learner.respond(life, problems.prompts, answers).answer_logprob
  assert after.mean() > before.mean() + 1.0


def test_equal_rewards_change_nothing_and_are_counted():
  learner = build('grpo', group=4)
  life, metrics = live(learner, day(read=lambda tokens: None))
  assert metrics['equal_groups'] == metrics['skipped'] == 1.0
  assert metrics['unreadable'] == 1.0 and 'loss' not in metrics
  for a, b in zip(
    jax.tree.leaves(life.model.params),
    jax.tree.leaves(learner.setup.model.params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert int(life.opt_state[1][0].count) == 0


def masks(**changes) -> np.ndarray:
  """Which tokens of `rollouts` count: groups of two, of which one is equal."""
  learner, seen = build('grpo', group=2, finetune=dict(batch=4), **changes), []

  def update(life, batches, shared, size):
    del shared, size
    seen.append(np.asarray(batches.rollouts.mask))
    return life, {}

  learner._update = update
  grades = problems_lib.Grades(
    right=np.array([True, False, True, True]),
    truncated=np.array([False, True, False, False]),
    unreadable=np.zeros(4, bool),
  )
  step = on_policy.Step(day().problems, np.arange(4), grades)
  life = learner.init(jax.random.PRNGKey(0))
  _, metrics = learner.learn(life, rollouts(), step)
  assert metrics == {'equal_groups': 0.5, 'skipped': 0.0}
  return seen[0].sum(axis=2)


def test_dropped_groups_and_cut_off_rows_are_not_in_the_mean():
  assert masks(iterations=2).tolist() == [[4, 2, 1, 3]] * 2
  assert masks(drop_equal=True).tolist() == [[4, 2, 0, 0]]
  assert masks(mask_truncated=True).tolist() == [[4, 0, 1, 3]]


def test_a_reference_is_the_base():
  """With it, groups of equal rewards are no reason to skip a step."""
  learner = build('grpo', kl=1.0, finetune=dict(learning_rate=0.0))
  _, metrics = live(learner, day(read=lambda tokens: None))
  assert metrics['equal_groups'] == 1.0 and metrics['skipped'] == 0.0
  assert metrics['kl'] == pytest.approx(0.0, abs=1e-6)
  moving = build('grpo', kl=1.0, iterations=2, finetune=dict(passes=4))
  _, metrics = live(moving)
  assert metrics['kl'] > 1e-4
  totals = moving.setup.costs.totals()
  assert totals['rollout']['tokens'] > 0 and totals['teacher']['flops'] > 0
  assert totals['update']['steps'] == 2 * 4 * 4  # Of eight rows, eight a group.


def test_opsd_moves_towards_what_the_teacher_predicts():
  learner = build('opsd', finetune=dict(passes=15, learning_rate=3e-3))
  life, metrics = live(learner)
  _, last = learner.wake(life, day())
  assert last['loss'] < 0.7 * metrics['loss']


def test_the_teacher_of_the_morning_and_the_average():
  s = setup()
  base_leaves = jax.tree.map(np.array, s.model.params)

  def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)

  morning = build('opsd', s, teacher='morning')
  first = morning.init(jax.random.PRNGKey(0))
  life, _ = morning.wake(first, day())
  assert equal(life.learner_state['teacher'], base_leaves)
  evening = jax.tree.map(np.array, life.model.params)
  life, _ = morning.wake(life, day())
  assert equal(life.learner_state['teacher'], evening)
  # One step: the average has gone a quarter of the way.
  average = build('opsd', s, teacher='average', teacher_rate=0.25)
  life, _ = live(average)
  for a, b, c in zip(
    jax.tree.leaves(base_leaves),
    jax.tree.leaves(life.learner_state['teacher']),
    jax.tree.leaves(life.model.params),
    strict=True,
  ):
    np.testing.assert_allclose(b, 0.75 * a + 0.25 * np.asarray(c), atol=1e-6)
  assert equal(s.model.params, base_leaves)


@pytest.mark.parametrize('name', ['grpo', 'opsd'])
def test_an_adapter_learns_beside_a_backbone_that_stays(name):
  learner = build(name, finetune=dict(target='lora', passes=2))
  first = jax.tree.map(
    np.array, learner.init(jax.random.PRNGKey(0)).model.adapter
  )
  life, _ = live(learner)
  for a, b in zip(
    jax.tree.leaves(life.model.params),
    jax.tree.leaves(learner.setup.model.params),
    strict=True,
  ):
    assert a is b
  pairs = zip(
    jax.tree.leaves(first), jax.tree.leaves(life.model.adapter), strict=True
  )
  assert any((a != np.asarray(b)).any() for a, b in pairs)


@pytest.mark.parametrize('name', ['grpo', 'opsd'])
def test_what_is_no_number_ends_the_day(name):
  s = setup()
  params = jax.tree.map(lambda x: x * np.nan, s.model.params)
  s = dataclasses.replace(s, model=s.model.replace(params=params))
  with pytest.raises(finite.NotFinite, match='wake, step 0'):
    # Half of all completions are right, whatever is sampled.
    flips = iter(range(10**6))
    live(build(name, s), day(read=lambda tokens: 5 * (next(flips) % 2)))


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('grpo', dict(group=3), 'finetune.batch=8 .* learner_config.group=3'),
    ('grpo', dict(group=1), 'group=1: a completion is compared'),
    ('grpo', dict(loss='ppo'), "loss='ppo' is unknown; choose .* dapo"),
    ('grpo', dict(scale='batch'), "learner_config.scale='batch'"),
    ('opsd', dict(teacher='old'), "learner_config.teacher='old'"),
    ('opsd', dict(divergence='tv'), "learner_config.divergence='tv'"),
    ('opsd', dict(divergence='jsd', beta=0.0), 'learner_config.beta=0.0'),
  ],
)
def test_settings_that_cannot_be_are_refused(name, changes, message):
  with pytest.raises(config.ConfigError, match=message):
    build(name, **changes)


def test_a_day_without_problems_or_of_too_long_ones_is_refused():
  rows = np.zeros((4, 16), np.int32)
  plain = experience_lib.Experience(rows, np.ones(rows.shape, np.float32))
  with pytest.raises(config.ConfigError, match='grpo needs a task with prob'):
    live(build('grpo'), plain)
  long = day(privileged=[[1] * 29] * 4)
  live(build('grpo', finetune=dict(learning_rate=0.0)), long)
  with pytest.raises(config.ConfigError, match='prompt of 29 tokens and a com'):
    live(build('opsd'), long)


def sleeper(**changes) -> base.Learner:
  """One that sleeps: fast weights of all kinds, and two slots."""
  fast = config.LevelConfig(
    16, chunk=16, sleep_every=2, fast_weights='backbone', optimizer='adam'
  )
  slow = config.LevelConfig(16, slots=2, rank=2, top_k=2)
  cfg = dataclasses.replace(_CFG, levels=(fast, slow))
  s = setup(
    model=conftest.build_model(cfg), costs=costs_lib.CostTracker(cfg, 16)
  )
  sections = dict(
    wake=dict(batch=2),
    finetune=dict(batch=8, learning_rate=1e-2) | changes.pop('finetune', {}),
    sleep=dict(
      dreams=8, dream_length=16, steps=2, batch=4, alpha=1.0, lam=0.0,
      max_kl_share=99.0, splice=False,
    ),
    learner_config=changes,
  )  # fmt: skip
  return learners.build(
    'privileged_sleep', sections, dataclasses.replace(s, episodes=2)
  )


def test_a_sleeper_solves_as_opsd_does_with_its_fast_weights():
  learner = sleeper(prompt_weight=0.0)
  life, metrics = live(learner)
  plain = build('opsd', learner.setup, teacher='base')
  want, plain_metrics = live(plain)
  assert metrics['loss'] == pytest.approx(plain_metrics['loss'], rel=1e-5)
  chex.assert_trees_all_close(
    life.model.weights(), want.model.params, atol=1e-6
  )
  chex.assert_trees_all_equal(life.model.params, learner.setup.model.params)
  assert int(life.clock.tokens) == 2 * 16  # Two batches of rows of 16.


def test_a_sleeper_reads_the_problems_too():
  """So that it is less surprised by them."""
  losses = {}
  for weight in (0.0, 1.0):
    learner = sleeper(prompt_weight=weight, finetune=dict(passes=20))
    life, metrics = live(learner)
    tokens = jnp.asarray([day().problems.prompts[3]])
    logprobs = loss_lib.token_logprobs(life.model, tokens)
    losses[weight] = -float(logprobs.mean())
    assert ('reading' in metrics) == bool(weight)
  assert losses[1.0] < losses[0.0] - 1.0


def test_a_sleepers_second_day_solves_with_the_experts_of_its_first_night():
  learner = sleeper(teacher='morning')
  life, _ = live(learner)
  life, metrics = learner.sleep(life)
  assert metrics['1to2/transferred'] == 1
  bank = life.memory.bank(1)
  assert bank.num_used() == 1
  bank = bank.replace(experts=bank.experts.replace(b=5.0 + bank.experts.b))
  other = life.with_memory(life.memory.with_level(1, bank=bank))
  (same, day_metrics), (_, other_metrics) = (
    learner.wake(x, day()) for x in (life, other)
  )
  assert day_metrics['entropy'] != other_metrics['entropy']
  chex.assert_trees_all_equal(same.memory.bank(1), life.memory.bank(1))


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(teacher='average'), 'learner_config.teacher=average'),
    (dict(group=3), 'learner_config.group=3'),
  ],
)
def test_a_sleeper_refuses(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    sleeper(**changes)


def test_groups_of_equal_rewards_give_way_to_others():
  """A reader who finds the answer of every second problem in half of cases."""
  learner = build('grpo', group=2, resample=3)
  life = learner.init(jax.random.PRNGKey(0))
  right = iter([1, 1, 0, 0, 1, 0, 1, 1] + 8 * [0, 1])
  problems = day(read=lambda _: 5 if next(right) else -1).problems
  problems = dataclasses.replace(problems, answers=[5] * 4)
  index = np.repeat(np.arange(4), 2)
  key = jax.random.key(1)
  first = learner._solve(life, problems, index, key)
  assert first[1].grades.right.tolist() == [1, 1, 0, 0, 1, 0, 1, 1]
  rollouts, step, wasted = learner.refill(life, *first, key)
  assert wasted > 0
  assert step.grades.right.tolist() == [0, 1, 0, 1, 1, 0, 0, 1]
  same = (rollouts.completions.tokens == first[0].completions.tokens).all(1)
  assert same[4:6].all() and not same.all()
  # The prompts that go with the new completions are those of their problems.
  for row, problem in enumerate(step.index):
    prompt = problems.prompts[problem]
    assert rollouts.prompts.tokens[row, -len(prompt) :].tolist() == prompt
  assert step.index[4:6].tolist() == index[4:6].tolist()


def test_without_resampling_a_step_stays_as_it_is():
  learner = build('grpo', group=2)
  life = learner.init(jax.random.PRNGKey(0))
  first = learner._solve(
    life, day().problems, np.repeat(np.arange(4), 2), jax.random.key(1)
  )
  assert learner.refill(life, *first, jax.random.key(1)) == (*first, 0)
