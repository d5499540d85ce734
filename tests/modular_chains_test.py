"""`modular_chains`: problems against an interpreter, grades, what base sees."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import base_chains
from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import student as student_lib
from sleep_jax.learners import base
from sleep_jax.learners import frozen
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.tasks import modular_chains
from sleep_jax.tasks import solving
from sleep_jax.weights import load
from tests import small_life
from tests import students

SMALL = dict(
  episodes=2, problems=12, eval_problems=6, samples=4, contexts=2,
  context_problems=3,
)  # fmt: skip


def task(**changes) -> modular_chains.ModularChains:
  return tasks.build('modular_chains', SMALL | changes, seed=1)


def interpret(text: str) -> tuple[int, set[str]]:
  """The value of a problem's question, and the variables that it needs."""
  *statements, question = text.replace(':', '').split(';')
  statements = (s.split() for s in statements)
  meaning = {name: ' '.join(rest) for name, *rest in statements}
  needed = set()

  def value(name: str) -> int:
    name = name.upper()
    needed.add(name)
    term = meaning[name]
    if term[0].islower():
      term = f'{value(term[0])}{term[1:]}'
    return eval(term) % 23  # pylint: disable=eval-used

  return value(question.split()[1]), needed


def test_solutions_are_what_an_interpreter_finds():
  t = task()
  problems, words = t.problems(0), t.tokenizer
  for prompt, solution, answer in zip(
    problems.prompts, problems.solutions, problems.answers, strict=True
  ):
    value, needed = interpret(words.decode(prompt[1:]))
    assert value == answer and len(needed) in (6, 7)
    names, first, *lines, end = words.decode(solution).split(' ; ')
    assert end == f'! {value} .'
    last = int(first.split()[1])
    steps = [first.split()[0]]
    for line in lines:  # Every value is computed from the one before it.
      name, term, equals, result = line.split()
      assert term[0].upper() == steps[-1] and equals == '='
      last = eval(f'{last}{term[1:]}') % 23  # pylint: disable=eval-used
      assert last == int(result)
      steps.append(name)
    assert last == value and set(steps) == needed
    assert names.split() == steps[::-1]


def test_depths_are_those_of_the_config():
  t = task(depths=(2, 2), out_of_range=(9, 9), distractors=3)
  for suffix, depth in (('', 2), ('_out', 9)):
    for prompt in t.evaluated[suffix].prompts:
      text = t.tokenizer.decode(prompt[1:])
      assert text.count(';') == depth + 1 + 3
      assert len(interpret(text)[1]) == depth + 1


def test_no_problem_of_an_episode_is_evaluated():
  """Even where there are so few that each would be drawn again."""
  t = task(depths=(1, 1), distractors=0, problems=64)
  asked = {tuple(p) for p in t.evaluated[''].prompts}
  told = [tuple(p) for i in range(2) for p in t.problems(i).prompts]
  assert not asked & set(told) and len(asked) == 6
  again = task(depths=(1, 1), distractors=0, problems=64)
  assert again.problems(1).prompts == t.problems(1).prompts
  assert t.problems(0).prompts != t.problems(1).prompts


def test_a_privileged_prompt_shows_the_solution():
  t = task()
  problems = t.problems(0)
  given, own = (t.tokenizer.encode(x) for x in ('given', 'own'))
  for i, prompt in enumerate(problems.privileged):
    assert prompt == [*problems.prompts[i][:-1], *given, *problems.solutions[i],
                      *own]  # fmt: skip


def test_rows_are_problems_with_solutions_as_targets():
  t = task(reads=3)
  day = t.experience(0)
  assert day.tokens.shape == (36, t.cfg.length)
  assert day.problems is not None
  rows = [x[x > 0].tolist() for x in day.tokens]
  pairs = list(zip(day.problems.prompts, day.problems.solutions, strict=True))
  assert sorted(rows) == sorted(3 * [p + s for p, s in pairs])
  for tokens, weight in zip(day.tokens, day.weight, strict=True):
    text = t.tokenizer.decode(tokens[weight > 0].tolist())
    assert text.startswith(
      t.tokenizer.decode(tokens.tolist()).split(': ')[1][:9]
    )
    assert text.endswith('.')


@pytest.mark.parametrize(
  'text, right, truncated, unreadable',
  [
    ('A 7 ; ! 7 .', True, False, False),
    ('! 3 ; ! 7 .', True, False, False),  # The last one counts.
    ('! 7 ; ! 3 .', False, False, False),
    ('! 7', True, True, False),
    ('A 7 ;', False, True, True),
    ('! .', False, False, True),
    ('.', False, False, True),
    ('! 7 ; !', True, True, False),  # Nothing follows the last mark.
    ('! 7 ; ! A .', False, False, True),
  ],
)
def test_grades(text, right, truncated, unreadable):
  t = task()
  problems = t.problems(0)
  problems.answers[4] = 7
  grades = problems.grade(np.array([4]), [t.tokenizer.encode(text)])
  assert grades.right.tolist() == [right]
  assert grades.truncated.tolist() == [truncated]
  assert grades.unreadable.tolist() == [unreadable]


def test_scores_are_avg_and_pass_at_k():
  """A student that is right in one of four samples of every second problem."""
  t = task()
  solutions = {
    tuple(p): s
    for x in t.evaluated.values()
    for p, s in zip(x.prompts, x.solutions, strict=True)
  }
  calls = {}

  def complete(prompt):
    number = list(solutions).index(tuple(prompt))
    calls[number] = calls.get(number, -1) + 1
    right = number % 2 == 0 and calls[number] == 2
    return solutions[tuple(prompt)] if right else t.tokenizer.encode('A 7 ;')

  student = students.FakeStudent(complete=complete, logprob=-2.0)
  metrics = t.evaluate(student, 0).metrics
  for suffix in ('', '_out', '_old'):
    assert metrics[f'accuracy{suffix}'] == 1 / 8
    assert metrics[f'pass{suffix}'] == 1 / 2
    assert metrics[f'truncated{suffix}'] == 7 / 8
  assert metrics['entropy'] == pytest.approx(2 / 3)  # Nats a token.
  assert set(t.columns) <= set(metrics)


@pytest.mark.parametrize('deep_share, most', [(0.0, 5), (0.5, 7)])
def test_the_base_solves_shallow_problems_and_copies_all(deep_share, most):
  changes = dict(rows=16, eval_problems=2, deep_share=deep_share)
  t = tasks.build('modular_chains_base', changes, 0)
  tokens, weight = next(t.experience(0).blocks(16))
  words, kinds, needed = t.tokenizer, [], []
  for row, targets in zip(tokens, weight, strict=True):
    text = words.decode(row[row > 0].tolist())
    target = words.decode(row[targets == 1].tolist())
    kinds.append('given' in text)
    if kinds[-1]:
      before, own = text.split(' own ')
      assert target == own == before.split('given ')[1]
      assert not (targets[targets > 0] != 1).any()
      continue
    for document in text.split('<bos> ')[1:]:
      problem, solution = document.split(' : ')
      needed.append(len(interpret(problem)[1]))
      assert solution.strip() in target
  assert sum(kinds) == 8 and max(needed) == most


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(depths=(0, 3)), r'task.depths=\(0, 3\)'),
    (dict(old=(3, 2)), r'task.old=\(3, 2\)'),
    (dict(out_of_range=(7, 30)), 'need 33 variables, and there are 26'),
  ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
  with pytest.raises(config.ConfigError, match=message):
    task(**changes)


def test_the_teacher_of_the_shipped_base_is_ahead_of_its_student():
  """By 20 points at least; without that opsd would have nothing to teach."""
  cfg = config.ModelConfig.from_mapping(base_chains.model().to_dict())
  weights = load.load('sleep_jax/assets/base_chains.npz', cfg)
  t = tasks.build('modular_chains', dict(eval_problems=32), seed=9)
  setup = base.Setup(
    model=model_lib.Model(cfg, jax.tree.map(jnp.asarray, weights)),
    tokenizer=t.tokenizer,
    costs=costs_lib.CostTracker(cfg, t.row_length),
  )
  learner = frozen.Frozen(frozen.FrozenConfig(), setup)
  student = student_lib.Student(learner, learner.init(jax.random.key(0)))
  problems = t.evaluated['']
  asked = [
    solving.score(student, problems, 2, 0, prompts)['accuracy']
    for prompts in (problems.prompts, problems.privileged)
  ]
  assert asked[1] > asked[0] + 0.2, asked


def test_a_dream_is_a_problem_with_its_solution():
  t = task()
  form, (context, other) = t.format, t.experience(0).contexts
  problems = t.problems(0)
  assert context.questions == problems.prompts[:3]
  assert other.questions == problems.prompts[3:6]
  # It begins by a definition; the rest of the problem itself is such a dream.
  (rows,) = form.from_context(other).tokens[:1]
  begun = len(other.prompt)
  assert rows[:begun].tolist() == other.prompt
  assert t.tokenizer.decode(other.prompt).endswith(';')
  row = problems.prompts[3] + problems.solutions[3]
  update = form.parse(other, row[begun:-1])
  np.testing.assert_array_equal(update.tokens, [rows])
  # Its targets are the solution, to the stop token.
  (targets,) = update.tokens[update.weight > 0][None]
  assert targets.tolist() == problems.solutions[3]

  def reason(text: str) -> str:
    return form.parse(other, t.tokenizer.encode(text)).reason

  assert reason('') == 'empty'
  assert reason('? D D A ; ! 3') == 'unreadable'  # Where does it begin?
  assert reason('? D : D A ;') == 'unreadable'  # It has no answer,
  assert reason('? D : ! 3 ? D : ! 3') == 'unreadable'  # or two.
  assert reason('? D : ' + 'A ' * 90 + '! 3') == 'too long'


def test_a_dream_is_worth_what_is_solved_after_it():
  t = task()
  (context, _), encode = t.experience(0).contexts, t.tokenizer.encode
  right = [encode(f'! {answer}') for answer in t.problems(0).answers[:3]]
  assert t.format.grade(context, right).tolist() == [1, 1, 1]
  right[1] = encode('A B ;')
  assert t.format.grade(context, right).tolist() == [1, 0, 1]


def test_more_contexts_than_problems_are_refused():
  with pytest.raises(config.ConfigError, match='contexts=5 of context_problem'):
    task(contexts=5)


def test_problems_are_solved_as_an_interpreter_does():
  for row in task().problems(0).prompts:
    text = task().tokenizer.decode(row[1:-1])
    assert modular_chains.solve(text) == interpret(text)[0]


@pytest.mark.parametrize(
  'text',
  [
    *('A 7 ;', 'A 7 ; ? B', 'B a+5 ; ? B', 'B b+5 ; ? B', 'A 7 ? A'),
    *('A 7 ; A 8 ; ? A', 'A = ; ? A', 'A 7 ; B A ; ? B'),
    'A b+1 ; B a+1 ; ? A',
  ],
)  # fmt: skip
def test_what_is_no_problem_has_no_answer(text):
  assert modular_chains.solve(text) is None


def test_an_audit_knows_right_solutions_wrong_ones_and_none():
  t, student = task(), students.FakeStudent()
  words = (
    *('A 7 ; ? A : ! 7', 'A 7 ; ? A : ! 8', 'B 7 ; ? A : ! 7'),
    *('A 7 ; ? A', 'A 7 ; ? A : A 7'),
  )
  documents = [[t.tokenizer.bos, *t.tokenizer.encode(x)] for x in words]
  shares = t.audit(student, 0, documents)
  assert np.isnan(shares.pop('believed'))
  assert shares == {
    'true': 0.2, 'false': 0.2, 'unread': 0.2, 'unreadable': 0.4, 'outdated': 0,
  }  # fmt: skip


def test_a_night_of_a_sleeper_dreams_of_problems():
  c = small_life.get_config('privileged_sleep')
  c = build_lib.arm_config(json.loads(c.to_json()), 'privileged_sleep')
  t, learner, _ = build_lib.build(c, 1)
  life, _ = learner.wake(learner.init(jax.random.key(0)), t.experience(0))
  assert life.contexts == t.experience(0).contexts
  _, metrics = learner.sleep(life)
  # Fresh weights make up nothing that can be read.
  assert (
    metrics['dreaming/dreams'] == 4 == metrics['dreaming/rejected_unreadable']
  )
