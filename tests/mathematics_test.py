"""`mathematics`: GSM8K and files of JSON lines, prompts, refusals."""

import hashlib
import json

import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import tokenizers
from sleep_jax.tasks import mathematics
from tests import students

_WORDS = [
  '.', *'abcdefghijklmnopqrstuvwxyz0123456789\\{}:$#?!,', '\n', 'Question',
  'Answer',
]  # fmt: skip


class Letters(tokenizers.WordTokenizer):
  """A character a token: enough for any text of these tests."""

  def encode(self, text: str) -> list[int]:
    return [3 + ord(x) % 120 for x in text]

  def decode(self, tokens) -> str:
    return ''.join(chr(32 + (t + 85) % 120) for t in tokens)


@pytest.fixture(name='files')
def _files(tmp_path, monkeypatch):
  """A file to train on and one to test on, and how settings name them."""
  monkeypatch.setattr(
    tokenizers, 'load', lambda *_: Letters(_WORDS, separator='.', stop='.')
  )
  train = [
    dict(problem=f'{i} + 1', answer=str(i + 1), solution=f'one more than {i}')
    for i in range(6)
  ]
  # As AIME 2024, AIME 2025 and HMMT have them.
  test = [
    dict(id=60, problem='p', solution='s', answer='204', year='2024'),
    dict(problem_idx=1, problem='q', answer=70, problem_type=['Number Theory']),
    dict(problem_idx=2, problem='r', answer=r'\frac{1}{2}'),
  ]
  paths = {}
  for name, records in (('train', train), ('test', test)):
    paths[name] = tmp_path / f'{name}.jsonl'
    lines = '\n'.join(json.dumps(r) for r in records)
    paths[name].write_text(lines + '\n')
  return {k: str(v) for k, v in paths.items()}


def build(files, **changes):
  settings = dict(
    episodes=2, problems=2, length=512, max_new=96, eval_problems=3, samples=2
  )
  return tasks.build('mathematics', files | settings | changes, seed=1)


def test_an_episode_brings_new_problems_with_boxed_answers(files):
  pytest.importorskip('math_verify')
  t = build(files, reads=3)
  days = [t.experience(i) for i in range(2)]
  asked = [tuple(p) for day in days for p in day.problems.prompts]
  assert len(set(asked)) == 4
  for day in days:
    assert day.tokens.shape == (6, 512)
    problems = day.problems
    for i, solution in enumerate(problems.solutions):
      text = t.tokenizer.decode(solution[:-1])
      assert text.endswith(f'\\boxed{{{problems.answers[i]}}}')
      assert solution[-1] == t.tokenizer.stop
      shown = t.tokenizer.decode(problems.privileged[i])
      assert f'one more than {int(problems.answers[i]) - 1}' in shown
      assert 'one more' not in t.tokenizer.decode(problems.prompts[i])


def test_scores_are_of_the_last_box(files):
  pytest.importorskip('math_verify')
  t = build(files)
  said = iter(
    [r'\boxed{204}', r'\boxed{7} or 70', '70', r'\boxed{70}']
    + [r'\boxed{0.5}', r'\boxed{1} no: \boxed{\frac{2}{4}}']
  )
  student = students.FakeStudent(
    complete=lambda _: [*t.tokenizer.encode(next(said)), t.tokenizer.stop],
    logprob=-1.0,
  )
  metrics = t.evaluate(student, 0).metrics
  assert metrics['accuracy'] == pytest.approx(4 / 6)
  assert metrics['pass'] == 1.0
  assert metrics['accuracy_se'] == pytest.approx(1 / 6)
  assert metrics['unreadable'] == pytest.approx(1 / 6)
  assert set(t.columns) <= set(metrics)


def test_gsm8k_as_it_is_published(monkeypatch):
  """Notes for a calculator are no part of a solution."""
  problem = mathematics._of_gsm8k(
    dict(question='q', answer='He has 48/2=<<48/2=24>>24.\n#### 1,024')
  )
  assert problem == mathematics._Problem('q', '1,024', 'He has 48/2=24.')


def test_problems_whose_solutions_do_not_fit_are_left_out(files, caplog):
  pytest.importorskip('math_verify')
  with pytest.raises(config.ConfigError, match='has 0 problems whose solu'):
    build(files, max_new=8)
  with pytest.raises(config.ConfigError, match='2 episodes of 4 need 8'):
    build(files, problems=4)
  assert 'were left out' in caplog.text


@pytest.mark.parametrize(
  'line, words',
  [
    ('{"problem": "p"}', 'answer is null; it must be text'),
    ('{"answer": "7"}', 'problem is null'),
    ('{"problem": " ", "answer": "7"}', 'problem is " "'),
    ('{"problem": "p", "answer": [7]}', r'answer is \[7\]'),
    ('{"problem": "p", "answer": "7", "solution": 3}', 'solution must be'),
    ('[1]', 'line 1'),
    ('{', 'line 1'),
    ('', 'has no problems'),
  ],
)
def test_bad_lines_are_named(files, tmp_path, line, words):
  path = tmp_path / 'bad.jsonl'
  path.write_text(line)
  with pytest.raises(config.ConfigError, match=words) as error:
    build(files, test=str(path))
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_another_file_than_was_meant_is_refused(files):
  pytest.importorskip('math_verify')
  text = open(files['test'], encoding='utf-8').read()
  digest = hashlib.sha256(text.encode()).hexdigest()
  build(files, test_sha256=digest)
  with pytest.raises(config.ConfigError, match='has SHA-256'):
    build(files, test_sha256='0' * 64)


def test_unknown_splits_are_refused(files):
  with pytest.raises(config.ConfigError, match='gsm8k/'):
    build(files, test='gsm8k/dev')
