"""Every learner behind the one protocol, on two days of facts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.data import tokenizers
from sleep_jax.harness import student as student_lib
from sleep_jax.inference import sampling
from sleep_jax.inference import scoring
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import ewc
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.training import fisher as fisher_lib
from tests import conftest

TASK = tasks.build(
  'facts', dict(episodes=2, entities=1, rows=16, length=16, context=1), 0
)


SECTIONS = dict(
  wake=dict(batch=4),
  sleep=dict(
    dreams=16,
    dream_length=16,
    steps=4,
    batch=4,
    prefixes=4,
    group=2,
    rollout_groups=2,
    continuation=4,
    rollout_every=2,
    max_kl_share=9.0,
  ),
  finetune=dict(batch=4, fisher_rows=4),
)
# Arms that are settings of the learner `sleep`.
ARMS = {'wake_only': dict(consolidate=False)}


def setup(**changes) -> learner_lib.Setup:
  cfg = conftest.tiny(
    vocab=168,
    max_len=32,
    levels=(
      config.LevelConfig(16, chunk=16, sleep_every=4, learning_rate=0.01),
      config.LevelConfig(16, slots=2, rank=4, top_k=2),
    ),
  )
  settings = dict(
    model=conftest.build_model(cfg),
    tokenizer=TASK.tokenizer,
    costs=costs_lib.CostTracker(cfg, 16),
    episodes=2,
  )
  return learner_lib.Setup(**(settings | changes))


def build(arm: str, s: learner_lib.Setup, **changes) -> learner_lib.Learner:
  """The learner of an arm; `changes` are settings of its sections."""
  changes = {name: SECTIONS[name] | values for name, values in changes.items()}
  sections = SECTIONS | changes
  if arm in ARMS:
    sections['sleep'] = sections['sleep'] | ARMS[arm]
    arm = 'sleep'
  return learners.build(arm, sections, s)


@pytest.mark.parametrize(
  'name', ['icl', 'sft', 'ewc', 'wake_only', 'sleep', 'joint']
)
def test_every_learner_lives_two_days(name):
  s = setup()
  base = jax.tree.map(np.array, s.model)
  learner = build(name, s)
  life = learner.init(jax.random.PRNGKey(0))
  for episode in range(2):
    life, wake_metrics = learner.wake(life, TASK.experience(episode))
    life, sleep_metrics = learner.sleep(life)
    metrics = wake_metrics | sleep_metrics
    assert all(np.isfinite(v) for v in metrics.values())
  assert int(life.clock.nights) == 2 and int(life.clock.tokens) > 0
  result = TASK.evaluate(student_lib.Student(learner, life), 1)
  assert len(result.by_episode) == 2
  totals = s.costs.totals()
  assert totals['eval']['flops'] > 0
  assert (totals['update']['tokens'] > 0) == (name == 'sleep')
  # No life changes the base model, which other lives begin with.
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(s.model), strict=True):
    np.testing.assert_array_equal(a, b)


def test_sleep_uses_a_slot_each_night_and_wake_only_none():
  for name, want in (('sleep', [2, 2]), ('wake_only', [0])):
    learner = build(name, setup())
    life = learner.init(jax.random.PRNGKey(0))
    for episode in range(2):
      life, _ = learner.wake(life, TASK.experience(episode))
      life, _ = learner.sleep(life)
    assert life.memory.levels[1].bank.status.tolist() == want


def test_archived_dreams_are_rehearsed_while_awake():
  s = setup()
  sleep = dict(archive=8, teacher_top_k=8)
  learner = build('sleep', s, wake=dict(rehearsed=4), sleep=sleep)
  life = learner.init(jax.random.PRNGKey(0))
  size = TASK.experience(0).tokens.size
  learner.wake(life, TASK.experience(0))
  assert s.costs.totals()['wake']['tokens'] == size  # Of an empty archive.
  kept = jax.tree.map(
    lambda x: jnp.zeros((8, *x.shape[1:]), x.dtype), life.archive
  )
  learner.wake(life.replace(archive=kept), TASK.experience(1))
  # Four dreams to a batch of four rows.
  assert s.costs.totals()['wake']['tokens'] == 3 * size
  with pytest.raises(config.ConfigError, match='wake.rehearsed=4 dreams an up'):
    build('sleep', setup(), wake=dict(rehearsed=4))


def test_dreams_of_the_base_are_rehearsed_on_the_first_day():
  """They are the base's own, labelled by it, and count as a night's."""
  s = setup()
  sleep = dict(archive=8, archive_base=4, teacher_top_k=8)
  learner = build('sleep', s, wake=dict(rehearsed=4), sleep=sleep)
  life = learner.init(jax.random.PRNGKey(0))
  life, _ = learner.wake(life, TASK.experience(0))
  assert life.archive.night.tolist() == [-1] * 4
  assert (
    s.costs.totals()['wake']['tokens'] == 2 * TASK.experience(0).tokens.size
  )
  assert s.costs.totals()['rollout']['tokens'] == life.archive.tokens.size
  logits = s.model.forward(life.archive.tokens).logits
  inside = np.asarray(life.archive.weight) > 0
  np.testing.assert_array_equal(
    life.archive.likeliest()[inside], logits.argmax(-1)[inside]
  )
  life, _ = learner.sleep(life)
  assert np.bincount(life.archive.night + 1).tolist() == [4, 4]
  again, _ = learner.wake(life, TASK.experience(1))
  np.testing.assert_array_equal(again.archive.tokens, life.archive.tokens)


def test_an_unknown_learner_lists_the_known():
  with pytest.raises(
    config.ConfigError,
    match='cartridge, distilled_replay, ewc, experience_replay, finetune_passa',
  ):
    build('hope', setup())


@dataclasses.dataclass(frozen=True)
class CountingConfig:
  """Settings of `Counting`: a field of its own, and a common section."""

  step: int = 1
  wake: wake_lib.WakeConfig = wake_lib.WakeConfig()


class Counting(learner_lib.Learner):
  """A learner from outside the package, which counts its days."""

  name = 'counting'
  Config = CountingConfig

  def init(self, rng):
    return super().init(rng).replace(learner_state=jnp.zeros((), jnp.int32))

  def wake(self, life, experience):
    del experience
    count = life.learner_state + self.cfg.step
    return life.replace(learner_state=count), {}


class WithoutConfig(learner_lib.Learner):
  """A learner whose class does not say what its settings are."""

  name = 'without_config'


def test_a_learner_from_outside_is_found_by_module_and_class():
  name = f'{__name__}:Counting'
  learner = learners.build(name, SECTIONS, setup())
  assert type(learner).__name__ == 'Counting'
  assert learner.cfg.step == 1
  sections = SECTIONS | {'learner_config': {'step': 3}}
  learner = learners.build(name, sections, setup())
  assert learner.cfg.step == 3
  assert learner.cfg.wake == wake_lib.WakeConfig(batch=4)
  life = learner.init(jax.random.PRNGKey(0))
  for episode in range(2):
    life, _ = learner.wake(life, TASK.experience(episode))
    life, _ = learner.sleep(life)
  assert int(life.learner_state) == 6 and int(life.clock.nights) == 2


@pytest.mark.parametrize(
  'name,sections,message',
  [
    (
      f'{__name__}:Counting',
      {'learner_config': {'stride': 1}},
      "learner_config: unknown setting 'stride'; known are step",
    ),
    (
      f'{__name__}:Counting',
      {'wake': {'lanes': 1}},
      "wake: unknown setting 'lanes'",
    ),
    (f'{__name__}:WithoutConfig', {}, 'has no Config'),
    (f'{__name__}:Absent', {}, 'Absent.* cannot be imported'),
    ('tests.absent:Counting', {}, 'absent.* cannot be imported'),
  ],
)
def test_a_learner_that_cannot_be_built_is_refused(name, sections, message):
  with pytest.raises(config.ConfigError, match=message):
    learners.build(name, sections, setup())


class FactFormat:
  """Contexts whose source is rows of facts; dreams are not read."""

  max_dream, max_answer, stop = 8, 3, -1

  def from_context(self, context):
    tokens = context.source
    return contexts.TrainingRows(tokens, np.ones(tokens.shape, np.float32))

  def parse(self, context, dream):
    return contexts.Rejected('unreadable')

  def grade(self, context, answers):
    return np.array([a == b for a, b in zip(answers, context.answers)], float)

  def open_book(self, context, question):
    return [*context.prompt, *question]


class RecordingFinetune(finetune.Finetune):
  """sft that writes down what it reads, and when it sleeps."""

  name = 'recording_finetune'

  def __init__(self, cfg, setup):
    super().__init__(cfg, setup)
    self.calls = []

  def wake(self, life, experience):
    self.calls.append(experience)
    return super().wake(life, experience)

  def sleep(self, life):
    self.calls.append('sleep')
    return super().sleep(life)


def study_requests() -> list[contexts.StudyRequest]:
  """One of one context asked twice, and one of two contexts."""
  rows = [TASK.experience(episode).tokens[:8] for episode in range(2)]
  one, two = (
    contexts.Context(
      name=f'context {i}',
      prompt=[],
      questions=[tokens[0, :n].tolist() for n in (3, 7)],
      answers=[],
      source=tokens,
    )
    for i, tokens in enumerate(rows)
  )
  return [contexts.StudyRequest((one,), 2), contexts.StudyRequest((one, two))]


@pytest.mark.slow
def test_study_is_by_default_that_a_copy_wakes_on_the_contexts_and_sleeps():
  s = setup(format=FactFormat())
  sections = SECTIONS | {'finetune': dict(batch=4, learning_rate=0.05)}
  learner = learners.build(f'{__name__}:RecordingFinetune', sections, s)
  life = learner.init(jax.random.PRNGKey(0))
  life, _ = learner.wake(life, TASK.experience(0))
  life, _ = learner.sleep(life)
  before = jax.tree.map(np.array, life)
  learner.calls.clear()
  requests = study_requests()
  answers = learner.study(life, requests)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(life), strict=True):
    np.testing.assert_array_equal(a, b)
  # Each copy reads its rows as a stream without contexts, and then sleeps.
  assert [call for call in learner.calls if call == 'sleep'] == ['sleep'] * 2
  read = learner.calls[::2]
  for experience, request in zip(read, requests, strict=True):
    want = np.concatenate([c.source for c in request.contexts])
    np.testing.assert_array_equal(experience.tokens, want)
    assert (experience.weight == 1).all() and not experience.contexts
  assert [[len(a) for a in attempts] for attempts in answers] == [[2, 2], [4]]
  assert answers[0][0] == answers[0][1]
  # The same by hand: a copy that reads, sleeps, and answers greedily.
  sampler = sampling.SamplerConfig(max_new=3, temperature=0.0)
  for request, attempts in zip(requests, answers, strict=True):
    copy = jax.tree.map(jnp.copy, life)
    tokens = np.concatenate([c.source for c in request.contexts])
    experience = experience_lib.Experience(
      tokens, np.ones(tokens.shape, np.float32)
    )
    copy, _ = learner.sleep(learner.wake(copy, experience)[0])
    want = sampling.complete(
      copy.model, request.questions, jax.random.key(0), sampler
    )
    assert attempts == [want] * request.attempts
    unstudied = sampling.complete(
      life.model, request.questions, jax.random.key(0), sampler
    )
    assert want != unstudied


def test_study_needs_a_task_with_contexts():
  learner = build('sft', setup())
  life = learner.init(jax.random.PRNGKey(0))
  with pytest.raises(config.ConfigError, match='learner sft needs a task with'):
    learner.study(life, study_requests())


def test_scores_equal_greedy_decoding_and_the_chain_rule():
  s = setup()
  model = s.model.with_memory(conftest.random_memory(s.model.cfg))
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 168, n).tolist() for n in (3, 7, 4, 12)]
  tokens, lengths = padding.left_pad(prompts, 0)
  greedy = sampling.generate(
    model,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=3, temperature=0.0),
  ).tokens.tolist()
  wrong = [[*a[:-1], (a[-1] + 1) % 168] for a in greedy]
  scores = scoring.score(model, prompts, greedy, pad=0, costs=s.costs)
  assert scores.exact.all() and (scores.token_accuracy == 1.0).all()
  missed = scoring.score(model, prompts, wrong, pad=0, costs=s.costs)
  assert not missed.exact.any()
  np.testing.assert_allclose(missed.token_accuracy, 2 / 3, rtol=1e-6)
  for prompt, answer, logprob in zip(prompts, greedy, scores.answer_logprob):
    logits = model.forward(jnp.array([prompt + answer])).logits[0]
    logp = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
    want = sum(float(logp[i, t]) for i, t in enumerate(answer))
    assert logprob == pytest.approx(want, abs=1e-4)


def test_completions_are_greedy_and_cost_tokens():
  s = setup()
  learner = build('sft', s)
  life = learner.init(jax.random.PRNGKey(0))
  life, _ = learner.wake(life, TASK.experience(0))
  student = student_lib.Student(learner, life)
  prompts = [[1, 5], [1, 7, 9, 11]]
  completions = student.complete(prompts, 3)
  assert s.costs.totals()['eval']['tokens'] == 6 + sum(map(len, completions))
  assert student.respond(prompts, completions).exact.all()
  assert learner.complete(learner.init(life.rng), prompts, 3) != completions


def test_the_ewc_penalty_is_weighted_by_the_fisher():
  params = {'a': jnp.array([1.0, 1.0])}
  state = {
    'anchor': {'a': jnp.array([0.0, 0.0])},
    'fisher': {'a': jnp.array([3.0, 0.0])},
    'lambda': jnp.float32(2.0),
  }
  assert float(ewc.ewc_penalty(params, state)) == 3.0
  grad = jax.grad(ewc.ewc_penalty)(params, state)
  np.testing.assert_allclose(grad['a'], [6.0, 0.0])


def test_a_strong_ewc_moves_less_than_sft():
  def distance(name, **changes):
    s = setup()
    learner = build(name, s, finetune=changes)
    life = learner.init(jax.random.PRNGKey(0))
    life, _ = learner.wake(life, TASK.experience(0))
    return sum(
      float(((a - b) ** 2).sum())
      for a, b in zip(
        jax.tree.leaves(life.model.params), jax.tree.leaves(s.model.params)
      )
    )

  assert distance('ewc', ewc_lambda=1e5) < 0.5 * distance('sft')


LORA = dict(target='lora', learning_rate=0.05)


@pytest.mark.parametrize(
  'name', ['sft', pytest.param('ewc', marks=pytest.mark.slow), 'joint']
)
def test_an_adapter_learns_beside_a_backbone_that_stays(name):
  s = setup(format=FactFormat())
  base = jax.tree.map(np.array, s.model.params)
  learner = build(name, s, finetune=LORA | dict(passes=3))
  life = learner.init(jax.random.PRNGKey(0))
  first = jax.tree.map(np.array, life.model.adapter)
  losses = []
  for episode in range(2):
    life, metrics = learner.wake(life, TASK.experience(episode))
    life, _ = learner.sleep(life)
    losses.append((metrics['loss'], metrics['loss_last']))
  learner.study(life, study_requests())
  assert all(last < mean for mean, last in losses)
  # Not a copy, and so neither donated: the very buffers of the base.
  for a, b in zip(
    jax.tree.leaves(life.model.params), jax.tree.leaves(s.model.params)
  ):
    assert a is b
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(life.model.params)):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(life.model.adapter)):
    assert (np.asarray(b) != a).any()
  # What answers is the backbone and the adapter together.
  prompts, answers = [[1, 5, 9]], [[11, 3]]
  bare = life.replace(model=life.model.replace(adapter=None))
  with_adapter = learner.respond(life, prompts, answers).answer_logprob
  assert with_adapter != learner.respond(bare, prompts, answers).answer_logprob


def test_a_strong_ewc_moves_an_adapter_less_than_sft():
  def distance(name, **changes):
    learner = build(name, setup(), finetune=LORA | changes)
    first = learner.init(jax.random.PRNGKey(0))
    start = jax.tree.map(np.array, first.model.adapter)
    life, _ = learner.wake(first, TASK.experience(0))
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(life.model.adapter))
    return sum(float(((a - b) ** 2).sum()) for a, b in pairs)

  assert distance('ewc', ewc_lambda=1e5) < 0.5 * distance('sft')


def test_the_first_of_several_passes_reads_the_day_in_its_order():
  def live(**changes):
    learner = build('sft', setup(), finetune=changes)
    life = learner.init(jax.random.PRNGKey(0))
    life, metrics = learner.wake(life, TASK.experience(0))
    return learner, life, metrics['loss']

  learner, life, loss = live()
  _, two, loss_of_two = live(passes=2)
  _, again, _ = live(passes=2)
  life, second = learner.wake(life, TASK.experience(0))
  # The same rows: of another order, so not the same steps.
  assert loss_of_two == pytest.approx((loss + second['loss']) / 2, rel=0.05)
  assert two.clock.tokens == life.clock.tokens
  leaves = [jax.tree.leaves(x.model.params) for x in (two, again, life)]
  assert all((a == b).all() for a, b in zip(leaves[0], leaves[1]))
  assert any((a != b).any() for a, b in zip(leaves[0], leaves[2]))


@pytest.mark.parametrize(
  'changes,message',
  [
    (dict(target='half'), "finetune.target='half'"),
    (dict(passes=0), 'finetune.passes=0'),
  ],
)
def test_settings_of_fine_tuning_that_cannot_be_are_refused(changes, message):
  with pytest.raises(config.ConfigError, match=message):
    build('sft', setup(), finetune=changes)


def test_the_fisher_is_the_mean_of_squared_row_gradients():
  model = setup().model
  x = TASK.experience(0)
  tokens, weight = jnp.array(x.tokens[:3]), jnp.array(x.weight[:3])
  fisher = fisher_lib.diagonal_fisher(model, tokens, weight)

  def row_loss(params, i):
    logits = model.replace(params=params).forward(tokens[i : i + 1]).logits
    logp = jax.nn.log_softmax(logits[0, :-1])
    picked = jnp.take_along_axis(logp, tokens[i, 1:, None], axis=1)
    return -picked.mean()

  rows = [jax.grad(row_loss)(model.params, i) for i in range(3)]
  want = jax.tree.map(lambda *g: sum(x * x for x in g) / 3, *rows)
  for a, b in zip(jax.tree.leaves(fisher), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8)


def test_joint_keeps_all_rows_it_has_read():
  learner = build('joint', setup())
  life = learner.init(jax.random.PRNGKey(0))
  for episode in range(2):
    life, _ = learner.wake(life, TASK.experience(episode))
  assert life.learner_state['tokens'].shape == (32, 16)


def test_the_base_must_fit_the_tokenizer():
  with pytest.raises(config.ConfigError, match='167 pieces but model.vocab=9'):
    tokenizers.check_fits(TASK.tokenizer, 9)
  with pytest.raises(config.ConfigError, match='167 pieces but model.vocab=32'):
    setup(model=conftest.build_model(conftest.tiny()))


def test_setups_are_values():
  s = setup()
  assert dataclasses.replace(s, seed=2).seed == 2
  with pytest.raises(dataclasses.FrozenInstanceError):
    s.seed = 2
