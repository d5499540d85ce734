"""Knowledge incorporation: bulletins, SQuAD by SEAL's protocol, grades."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import base_bulletins
from experiments.configs import bulletins as bulletins_config
from experiments.configs import squad as squad_config
from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import contexts
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import squad as squad_data
from sleep_jax.harness import build as build_lib
from sleep_jax.models import transformer
from sleep_jax.tasks import bulletins
from sleep_jax.tasks import grading
from sleep_jax.tasks import squad
from sleep_jax.weights import add_levels
from tests import students

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='SLEEP_JAX_DATA is not set'
)
SMALL = dict(episodes=2, train=3, reads=2, test=2, joint=5, attempts=2)
PASSAGE = squad_data.SquadPassage(
  'Normans', ' They came. ', (('Who?', 'The Normans'),)
)


@pytest.fixture(name='task', scope='module')
def _task():
  return tasks.build('bulletins', SMALL, seed=1)


def statements(task, context):
  lines = [task.world.statement(context.source, r) for r in range(4)]
  return [token for line in lines for token in line]


def names(group):
  return {c.source.name for c in group}


def contexts_and_requests(task):
  """Contexts of each episode, and the requests of the last evaluation."""
  requests = []
  last_evaluation(task, requests=requests)
  episodes = [task.experience(e).contexts for e in range(task.episodes)]
  return episodes, requests


def last_evaluation(task, known=(), answer=None, requests=None):
  """Of a student that knows some people, and gives `answer` after study."""

  def study(batch):
    if requests is not None:
      requests.extend(batch)
    return [[(answer or _right)(r)] * r.attempts for r in batch]

  student = students.FakeStudent(lambda p, a: tuple(p[2:4]) in known, study)
  result = task.evaluate(student, task.episodes - 1)
  assert all(a[-1] == task.format.stop for a in student.answers)
  return result


def _right(request):
  return [a[:-1] for c in request.contexts for a in c.answers]


def test_a_bulletin_has_its_answers_and_the_row_ends_with_stop(task):
  context = task.experience(0).contexts[0]
  prompt = task.tokenizer.decode(context.prompt)
  for question, (value, stop) in zip(context.questions, context.answers):
    assert task.tokenizer.decode([value]) in prompt
    assert question[0] == task.tokenizer.bos and stop == task.format.stop
  rows = task.format.from_context(context)
  assert rows.tokens.shape == (1, 16)
  ids = rows.tokens[0][rows.weight[0] > 0].tolist()
  assert ids == [*context.prompt[:-1], task.format.stop]


def test_a_dream_is_a_row_per_line_and_the_record_last(task):
  context = task.experience(0).contexts[1]
  world = task.world
  note = world.record(context.source, 2)
  general = world.general(context.source, 0)
  dream = [*statements(task, context), *note, *general]
  edit = task.format.parse(context, dream)
  texts = [row[row != task.tokenizer.pad].tolist()[1:-1] for row in edit.tokens]
  assert sum(texts[:-1], []) == dream and len(texts) == 7
  assert texts[-1] == world.record(context.source)
  np.testing.assert_array_equal(edit.weight > 0, edit.tokens > 0)


def test_garbage_is_rejected_and_a_line_cut_off_is_left_out(task):
  context = task.experience(0).contexts[0]
  encode, form = task.tokenizer.encode, task.format
  assert form.parse(context, []) == contexts.Rejected('empty')
  for dream in ('. . .', 'ba da lives-in home3', 'ba lives-in da home3 .'):
    assert form.parse(context, encode(dream)) == contexts.Rejected('unreadable')
  cut = [*statements(task, context)[:5], *encode('ba da eats')]
  assert len(form.parse(context, cut).tokens) == 2


def test_only_the_value_alone_is_right(task):
  context = task.experience(0).contexts[0]
  (a, b, c, d) = (answer[0] for answer in context.answers)
  stop = task.format.stop
  answers = [[a], [c], [], [d, stop]]
  np.testing.assert_array_equal(
    task.format.grade(context, answers), [1.0, 0.0, 0.0, 0.0]
  )
  assert b != c


def test_open_book_puts_the_record_first(task):
  context = task.experience(0).contexts[0]
  prompt = task.format.open_book(context, context.questions[2])
  assert prompt == [*context.prompt[:-1], *context.questions[2][1:]]


def test_episodes_test_and_base_are_disjoint(task):
  episodes, requests = contexts_and_requests(task)
  base = {b.name for b in task.world.base_people}
  groups = [*map(names, episodes), names(requests[-1].contexts), base]
  assert [len(g) for g in groups] == [3, 3, 5, 64]
  assert len(set().union(*groups)) == 3 + 3 + 5 + 64


def test_the_evaluation_studies_one_by_one_and_together(task):
  _, requests = contexts_and_requests(task)
  assert [len(r.contexts) for r in requests] == [1, 1, 5]
  assert [r.attempts for r in requests] == [2, 2, 1]
  assert requests[-1].contexts[:2] == (
    *requests[0].contexts,
    *requests[1].contexts,
  )


def test_each_metric_is_of_its_own_contexts(task):
  base = {b.name for b in task.world.base_people}
  first = names(task.experience(0).contexts)

  def answer(request):  # All right after n = 1, every second one after n = 5.
    answers = _right(request)
    if len(request.contexts) > 1:
      answers[1::2] = [[]] * len(answers[1::2])
    return answers

  result = last_evaluation(task, base | first, answer)
  assert result.by_episode == [1.0, 0.0]
  assert result.metrics == dict(
    closed_book=0.0, base_accuracy=1.0, n1=1.0, n5=0.5
  )


def test_only_the_last_evaluation_studies(task):
  result = task.evaluate(students.FakeStudent(), 0)
  assert set(result.metrics) == {'closed_book', 'base_accuracy'}


def test_a_life_is_seeded(task):
  same, other = (tasks.build('bulletins', SMALL, seed=s) for s in (1, 2))
  stream = task.experience(1)
  np.testing.assert_array_equal(stream.tokens, same.experience(1).tokens)
  assert stream.contexts == same.experience(1).contexts
  assert stream.contexts != other.experience(1).contexts
  assert same.world.base_people == other.world.base_people
  _, counts = np.unique(stream.tokens, axis=0, return_counts=True)
  assert counts.tolist() == [2, 2, 2]


def test_the_dreams_of_the_base_are_well_formed(task):
  rng = np.random.default_rng(0)
  kinds = set()
  for _ in range(50):
    person = task.world.new_entity(rng)
    lines = task.world.implications(rng, person)
    assert all(map(task.world.is_line, lines))
    assert sum(map(len, lines)) <= task.format.max_dream
    kinds |= {len(line) for line in lines}
  assert kinds == {4, 5, 7}  # General, statement, note.


def test_the_base_has_no_questions_about_new_entities_alone():
  cfg = bulletins.BulletinsConfig(base_entities=8)
  world = bulletins.World(cfg)
  rows = bulletins.pretraining_rows(world, np.random.default_rng(0), 200, 32)
  assert (rows[:, 0] == world.tokenizer.bos).all()
  question = world.tokenizer.encode('question')[0]
  base = {b.name for b in world.base_people}
  first = [tuple(r[2:4]) for r in rows.tolist() if r[1] == question]
  assert len(first) > 20 and set(first) <= base


def test_too_many_people_are_refused():
  with pytest.raises(config.ConfigError, match='names are left'):
    tasks.build('bulletins', dict(joint=5000), 0)
  with pytest.raises(config.ConfigError, match='task.joint=3'):
    tasks.build('bulletins', dict(test=4, joint=3), 0)
  with pytest.raises(config.ConfigError, match='task.length=14'):
    tasks.build('bulletins', dict(length=14), 0)


# What SQuAD's own evaluation script makes of these.
@pytest.mark.parametrize(
  'answer, golds, exact, f1',
  [
    ('The Denver Broncos!', ['Denver Broncos'], 1.0, 1.0),
    ('denver  broncos', ['Panthers', 'Denver Broncos'], 1.0, 1.0),
    ('Broncos', ['Denver Broncos'], 0.0, 2 / 3),
    ('Denver Denver', ['Denver Broncos'], 0.0, 0.5),
    ('', ['Denver'], 0.0, 0.0),
    ('the', ['a'], 1.0, 1.0),
    ('February 7, 2016', ['7 February'], 0.0, 0.8),
    ("Levi's Stadium", ['Levis Stadium'], 1.0, 1.0),
    ('theme', ['me'], 0.0, 0.0),
  ],
)
def test_squads_grades(answer, golds, exact, f1):
  assert grading.exact_match(answer, golds) == exact
  assert grading.f1(answer, golds) == pytest.approx(f1)


@pytest.mark.parametrize(
  'grader, answer, right',
  [
    ('exact', 'the Normans.', True),
    ('exact', 'It was the Normans.', False),
    ('contains', 'It was the Normans.', True),
    ('contains', 'Normanski', False),
    ('f1', 'Normans, maybe', True),
    ('f1', 'a tribe of Normans from Norway', False),
  ],
)
def test_graders(grader, answer, right):
  assert grading.GRADERS[grader]('Who?', 'The Normans', answer) is right


def test_another_grader(monkeypatch):
  monkeypatch.setitem(
    grading.GRADERS, 'lenient', lambda question, gold, answer: True
  )
  form = squad_format(grader='lenient')
  context = form.context(PASSAGE)
  answers = [Letters().encode('no idea')]
  assert form.grade(context, answers).tolist() == [1.0]
  assert form.grade(context, [[]]).tolist() == [0.0]
  with pytest.raises(config.ConfigError, match='task.grader'):
    squad.SquadConfig(grader='gpt')


class Letters:
  """A tokenizer of letters."""

  vocab, pad, bos, separator, stop = 300, 0, 1, 2, 2

  def encode(self, text):
    return [ord(c) + 3 for c in text]

  def decode(self, tokens):
    return ''.join(chr(i - 3) for i in tokens)


def squad_format(**settings):
  return squad.SquadFormat(
    squad.SquadConfig(**dict(length=40) | settings), Letters()
  )


def test_the_prompts_are_seals():
  assert squad.dream_prompt(PASSAGE) == (
    "Let's read the following passage and produce a list of implications "
    'derived directly or indirectly from the content.\n\n'
    'Passage:\nNormans\n They came. \n\nImplications:\n'
  )
  assert 'produce a very long list' in squad.dream_prompt(
    PASSAGE, 'implications-very-long'
  )
  assert squad.dream_prompt(PASSAGE, 'rewrite') == (
    "Let's read the following passage and rewrite it in a few different ways, "
    'each one separated by a newline.\n\n'
    'Passage:\nNormans\n They came. \n\nRewritten passages:\n'
  )
  assert squad.question_prompt(PASSAGE, 'Who?') == (
    "Let's answer a question directly and concisely.\n"
    'Question: Topic: Normans\nWho?\nAnswer:\n'
  )


@pytest.mark.parametrize(
  'dream, split, parts',
  [
    ('1. a\n\n 2. b \n', True, ['1. a', '2. b']),
    ('Here you are:\n1. a\n2. b', True, ['1. a', '2. b']),
    ('a\n---\nb\nc', True, ['a', 'b', 'c']),
    ('a\n---\nb\nc', False, ['a', 'b\nc']),
    (' \n ', True, []),
  ],
)
def test_a_dream_is_split_as_seal_does(dream, split, parts):
  assert squad.segments(dream, split) == parts


def test_a_row_is_title_and_line_and_the_passage_is_last():
  form = squad_format()
  context = form.context(PASSAGE)
  edit = form.parse(context, Letters().encode('1. One.\n2. Two.'))
  assert edit.tokens.shape == (3, 40)
  texts = [
    Letters().decode(row[weight > 0].tolist()[1:-1])
    for row, weight in zip(edit.tokens, edit.weight)
  ]
  assert texts == [
    'Normans\n1. One.',
    'Normans\n2. Two.',
    'Normans\nThey came.',
  ]
  np.testing.assert_array_equal(
    form.from_context(context).tokens, edit.tokens[-1:]
  )


def test_a_row_too_long_is_cut_and_no_words_are_no_dream():
  form = squad_format(length=10)
  context = form.context(PASSAGE)
  rows = form.from_context(context)
  assert rows.tokens.shape == (1, 10) and rows.weight.all()
  assert form.parse(context, []) == contexts.Rejected('empty')
  blank = Letters().encode(' \n')
  assert form.parse(context, blank) == contexts.Rejected('unreadable')


def test_squad_settings_are_checked():
  for wrong in (
    dict(prompt='self-qa'),
    dict(episodes=3),
    dict(train=51),
    dict(joint=201),
    dict(test=9, joint=8),
  ):
    with pytest.raises(config.ConfigError, match=f'task.{min(wrong)}'):
      squad.SquadConfig(**wrong)


@needs_data
def test_the_passages_are_seals():
  passages = squad_data.test_passages()
  assert len(passages) == 200
  assert sum(len(p.questions) for p in passages) == 974
  assert len({p.title for p in passages}) == 47
  assert passages[0].title == 'Genghis Khan'
  trained = [squad_data.train_passages(e) for e in range(2)]
  texts = [{p.text for p in group} for group in (*trained, passages)]
  assert [len(t) for t in texts] == [50, 50, 200]
  assert len(set().union(*texts)) == 300


@needs_data
def test_squad_runs_as_a_task():
  task = tasks.build(
    'knowledge_incorporation',
    dict(
      tokenizer='stories260k/tok512.bin',
      train=2,
      reads=4,
      test=1,
      joint=2,
      length=64,
      max_dream=32,
    ),
    seed=0,
  )
  stream = task.experience(1)
  assert stream.tokens.shape == (8, 64) and len(stream.contexts) == 2

  def study(requests):
    return [
      [
        [
          task.tokenizer.encode(f'It is {a}.')
          for c in r.contexts
          for _, a in c.source.questions
        ]
      ]
      * r.attempts
      for r in requests
    ]

  metrics = task.evaluate(students.FakeStudent(study=study), 1).metrics
  assert metrics['n1'] == metrics['n2'] == 1.0
  assert metrics['n1_exact'] == 0.0 < metrics['n2_f1'] < 1.0


def test_a_word_that_ends_documents():
  words = tokenizers.WordTokenizer(['.', 'a', '<end>'], '.', '<end>')
  assert words.stop == words.encode('<end>')[0]
  assert tokenizers.WordTokenizer(['.', 'a'], '.').stop == -1


@pytest.mark.parametrize('arm', ['sleep', 'sleep_4_levels'])
def test_every_arm_adopts_the_base_of_bulletins(arm):
  c = json.loads(bulletins_config.get_config().to_json())
  c = build_lib.arm_config(c, arm)
  model = config.ModelConfig.from_mapping(c['model'])
  plain = config.ModelConfig.from_mapping(base_bulletins.model().to_dict())
  assert plain.vocab == bulletins.build_tokenizer().vocab
  born = jax.eval_shape(lambda: transformer.init(plain, jax.random.key(0)))
  params = jax.eval_shape(
    lambda p: add_levels.add_levels(plain, p, model, jax.random.key(0)), born
  )
  wanted = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
  assert jax.tree.structure(params) == jax.tree.structure(wanted)


def test_the_papers_squad_lowers():
  c = squad_config.get_config('paper').to_dict()
  model = build_lib.model_config(c, absent=True)
  params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
  rows = jax.ShapeDtypeStruct((c['trial']['batch'], 2048), jnp.int32)
  out = jax.jit(transformer.forward, static_argnums=0).lower(
    model, params, rows
  )
  assert out.out_info.logits.shape == (1, 2048, model.vocab)
  assert (c['lora']['rank'], c['lora']['alpha']) == (32, 64.0)
  assert (c['task']['test'], c['task']['length']) == (200, 2048)
