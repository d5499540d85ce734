"""`babilong`: facts of bAbI in a book, and BABILong's score."""

import os
import pathlib

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import datasets
from sleep_jax.tasks import babilong

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='needs SLEEP_JAX_DATA'
)
BOOK = ' '.join(
  f'Sentence number {i} of this book says nothing at all about anybody.'
  for i in range(400)
)


def build(folder: pathlib.Path, **changes) -> babilong.Babilong:
  (folder / 'book.txt').write_text(BOOK)
  settings = dict(
    tokenizer='sleep_jax/assets/text.model',
    context=600,
    samples=3,
    length=64,
    books=str(folder),
  )
  task = tasks.build('babilong', settings | changes, 0)
  assert isinstance(task, babilong.Babilong)
  return task


@pytest.mark.parametrize(
  'answer, question, kind, right',
  [
    ('garden', 'Where is Mary?', 'qa1', True),
    ('The most recent location of Mary is GARDEN. No.', 'W?', 'qa1', True),
    ('garden or kitchen', 'Where is Mary?', 'qa1', False),
    ('kitchen. garden', 'Where is Mary?', 'qa1', False),
    ('', 'Where is Mary?', 'qa1', False),
    # What the question names is no answer.
    ('before the kitchen: garden', 'Before the kitchen?', 'qa3', True),
    (
      'Fred gave the apple to Bill',
      'What did Fred give to Bill?',
      'qa5',
      False,
    ),
  ],
)
def test_the_target_is_the_only_label_of_the_first_sentence(
  answer, question, kind, right
):
  assert babilong.is_right('garden', answer, question, kind) == right
  apple = babilong.is_right('apple', answer, question, 'qa5')
  assert apple == ('apple' in answer)


def test_facts_keep_their_order_and_may_share_a_place():
  facts, book = [f'f{i}' for i in range(6)], [f's{i}' for i in range(4)]
  shared, ends = 0, set()
  for seed in range(200):
    words = babilong.hide(facts, book, np.random.default_rng(seed))
    assert [w for w in words if w[0] == 'f'] == facts
    assert [w for w in words if w[0] == 's'] == book
    shared += any(a[0] == b[0] == 'f' for a, b in zip(words, words[1:]))
    ends |= {words[0][0] + words[-1][0]}
  assert shared == 200  # Six facts in five places.
  assert ends == {'ff', 'fs', 'sf', 'ss'}


@needs_data
@pytest.mark.parametrize('kind', ['qa1', 'qa3', 'qa5'])
def test_a_sample_is_a_story_in_as_many_tokens(tmp_path, kind):
  task = build(tmp_path, kind=kind, context=900)
  stories = datasets.load(f'babi/{kind}', 'test')
  known = {(r['question'], r['answer'], tuple(r['facts'])) for r in stories}
  for context in task.samples:
    sample = context.source
    size = len(task.tokenizer.encode(f' {sample.text}'))
    assert 0.9 * 900 < size <= 910
    assert any(
      (question, answer) == (sample.question, sample.answer)
      and all(fact in sample.text for fact in facts)
      for question, answer, facts in known
    )
    assert sample.text.count('Sentence number') > 10
    assert task.is_right(sample, f'{sample.answer}.')
  assert len({c.source.text for c in task.samples}) == 3


@needs_data
def test_without_room_a_sample_is_its_facts(tmp_path):
  task = build(tmp_path, context=20)
  for context in task.samples:
    assert 'Sentence' not in context.source.text


@needs_data
@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(kind='qa6'), 'task.kind'),
    (dict(split='valid'), 'task.split'),
    (dict(kind='qa3', split='train'), 'task.split=train'),
    (dict(samples=10**6), 'task.samples=1000000'),
    (dict(books='nowhere'), 'task.books=nowhere'),
  ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, words):
  with pytest.raises(config.ConfigError, match=words):
    build(tmp_path, **changes)
