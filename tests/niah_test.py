"""`niah`: RULER's samples, read and asked."""

import re

import numpy as np
import pytest

from experiments.configs import babilong as babilong_config
from experiments.configs import niah as niah_config
from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import contexts
from sleep_jax.tasks import long_text
from sleep_jax.tasks import niah
from tests import students

pytest.importorskip('wonderwords')

SMALL = dict(
  tokenizer='sleep_jax/assets/text.model', context=700, samples=4, length=64
)
NEEDLE = re.compile(
  r'One of the special magic (number|uuid)s for ([\w-]+) is: ([\w-]+)\.'
)
UUID = r'[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}'


def build(**changes) -> niah.Niah:
  task = tasks.build('niah', SMALL | changes, 0)
  assert isinstance(task, niah.Niah)
  return task


def samples(task):
  return [c.source for c in task.samples]


def key_of(sample) -> str:
  return re.fullmatch(r'What is .* for (\S+) mentioned .*', sample.question)[1]


@pytest.mark.parametrize(
  'kind, words, key, value',
  [
    ('multikey_1', 'number', r'[a-z]+-.+', r'[1-9]\d{6}'),
    ('multikey_2', 'number', r'[a-z]+-.+', r'[1-9]\d{6}'),
    ('multikey_3', 'uuid', UUID, UUID),
  ],
)
def test_the_asked_needle_stands_once_in_its_text(kind, words, key, value):
  task = build(kind=kind, context=1200)
  for sample in samples(task):
    found = NEEDLE.findall(sample.text)
    assert {kind for kind, *_ in found} == {words}
    pairs = {k: v for _, k, v in found}
    assert len(pairs) == len(found)
    assert pairs[key_of(sample)] == sample.answer
    assert all(re.fullmatch(key, k) for k in pairs)
    assert all(re.fullmatch(value, v) for v in pairs.values())
    if kind == 'multikey_1':  # Three distractors among noise.
      assert len(found) == 4 and 'The grass is green.' in sample.text
    else:
      assert len(found) == sample.text.count('\n') + 1 > 4
  assert len({s.answer for s in samples(task)}) == 4


def test_needles_are_where_their_depths_say():
  """Of an essay of 1,000 sentences, at 0 to 100% in steps of a fortieth."""
  essay = [f'w{i}.' for i in range(1000)]
  places = []
  for i in range(40):
    sample = niah.make_sample('multikey_1', 1000, essay, str(i))
    lines = long_text.sentences(sample.text)
    found = [j for j, line in enumerate(lines) if line.startswith('One of')]
    places += [j - number for number, j in enumerate(found)]
  depths = {int(1000 * round(x) / 100) for x in np.linspace(0, 100, 40)}
  assert set(places) <= depths and len(set(places)) > 30


def test_a_longer_text_has_the_same_needles():
  short, long = (
    niah.make_sample('multikey_1', size, ['Yes.'], 'a') for size in (9, 90)
  )
  assert (short.question, short.answer) == (long.question, long.answer)
  assert sorted(NEEDLE.findall(short.text)) == sorted(NEEDLE.findall(long.text))
  assert len(long.text) > len(short.text)


def test_a_sample_is_as_long_as_fits():
  task = build()
  lengths = [len(c.prompt) for c in task.samples]
  assert max(lengths[:1]) + 128 <= 700 < max(lengths[:1]) + 128 + 20


def test_the_question_is_rulers_with_the_answers_prefix():
  task = build()
  (context, *_) = task.samples
  text = task.tokenizer.decode(context.questions[0][1:])
  key = key_of(context.source)
  assert text == (
    f'What is the special magic number for {key} mentioned in the provided '
    f'text? The special magic number for {key} mentioned in the provided text '
    'is'
  )
  whole = task.tokenizer.decode(
    task.format.open_book(context, context.questions[0])[1:]
  )
  assert whole.startswith('A special magic number is hidden within')
  assert whole.endswith(text)
  assert ' '.join(context.source.text.split()) in whole


def test_rows_are_the_whole_text_as_often_as_it_is_read():
  task = build(reads=3)
  (context, *_) = task.samples
  rows = task.format.from_context(context)
  once = len(rows.tokens) // 3
  np.testing.assert_array_equal(rows.tokens[:once], rows.tokens[once:][:once])
  ids = rows.tokens[:once, 1:][rows.weight[:once, 1:] > 0]
  assert ids.tolist() == task.tokenizer.encode(context.source.text)
  assert (rows.tokens[:, 0] == task.tokenizer.bos).all()


def test_scores_are_the_share_of_values_that_occur():
  task = build()
  asked = []

  def study(requests: list[contexts.StudyRequest]):
    asked.extend(r.contexts[0].name for r in requests)
    return [
      [[task.tokenizer.encode(f'it is {r.contexts[0].source.answer}!' * right)]]
      for r, right in zip(requests, (1, 0, 1, 1))
    ]

  result = task.evaluate(students.FakeStudent(study=study), 0)
  assert result.metrics == {'accuracy': 0.75, 'unread': 0.0}
  assert len(asked) == 4


def test_what_is_read_before_is_none_of_the_samples():
  task = build()
  text = task.tokenizer.decode(
    [int(t) for t in task.experience(0).tokens[:, 1:].ravel()]
  )
  assert not any(s.answer in text for s in samples(task))


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(kind='multikey_4'), 'task.kind'),
    (dict(context=100), 'task.context=100'),
    (dict(context=200), 'task.context=200'),
    (dict(haystack='nowhere.txt'), 'task.haystack=nowhere.txt'),
  ],
)
def test_what_cannot_be_is_refused(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    build(**changes)


def test_the_largest_size():
  assert [
    niah.largest(lambda n, m=m: n <= m) for m in (0, 1, 2, 7, 8, 100)
  ] == [*(0, 1, 2, 7, 8, 100)]


@pytest.mark.parametrize('recipe', [niah_config, babilong_config])
def test_a_text_is_studied_by_reading_and_a_night(recipe):
  """And not by dreams about it, which is how SEAL studies."""
  c = recipe.get_config()
  assert c.dreaming.study_night and not c.dreaming.enabled
  fast = c.model.levels[0]
  updates = c.dreaming.study_rows * c.task.length // c.wake.batch // fast.chunk
  assert updates >= fast.sleep_every  # So that the night is due.
  assert c.dreaming.study_rows % c.wake.batch == 0
  assert c.model.levels[1].slots >= c.task.episodes + 1
