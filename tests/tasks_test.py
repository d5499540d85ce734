"""Streams and evaluations: seeded, closed book, and without leaks."""

import collections
import os

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.tasks import facts
from tests import students

SMALL = dict(episodes=3, entities=2, rows=8, length=32, context=3)

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='SLEEP_JAX_DATA is not set'
)


def oracle(task, known):
  """A student that answers the facts in `known`, a set of token tuples."""
  separator = task.tokenizer.separator
  return students.FakeStudent(lambda p, a: (*p[-3:], *a, separator) in known)


def facts_in(experience, length=5):
  rows = experience.tokens[:, 1:]
  whole = rows[:, : rows.shape[1] // length * length]
  return {tuple(f) for f in whole.reshape(-1, length).tolist()}


def test_facts_are_seeded_and_episodes_differ():
  a, b = (tasks.build('facts', SMALL, seed=1) for _ in range(2))
  other = tasks.build('facts', SMALL, seed=2)
  np.testing.assert_array_equal(a.experience(1).tokens, b.experience(1).tokens)
  assert facts_in(a.experience(1)) != facts_in(other.experience(1))
  assert not facts_in(a.experience(0)) & facts_in(a.experience(1))


def test_windows_hold_the_facts_that_their_document_asks_for():
  words = facts.build_tokenizer()
  encoder, cfg = facts.FactEncoder(words), facts.FactsConfig(length=32)
  taken, base = facts.base_facts(encoder, cfg)
  rng = np.random.default_rng(0)
  batch = facts.pretraining_windows(encoder, cfg, rng, 60, 3, 2)
  base, counts = {tuple(f) for f in base.tolist()}, set()
  assert batch.context.shape == batch.token_mask.shape == (60, 3, 32)
  assert not batch.context[~batch.token_mask].any()
  for row in range(60):
    read = batch.token_mask[row].all(1)
    assert (batch.token_mask[row].any(1) == read).all()
    assert not np.diff(read.astype(int)).clip(0).any()  # The first ones.
    counts.add(int(read.sum()))
    stream = batch.context[row, read, 1:31].reshape(-1, 5).tolist()
    document = [words.bos, *batch.targets[row].tolist()]
    assert document[:-1] == batch.inputs[row].tolist()
    new = {tuple(document[i : i + 5]) for i in range(1, 31, 5)} - base
    names = {f[:2] for f in new}
    assert len(names) <= 2
    if read.any():
      assert new <= {tuple(f) for f in stream}
  assert counts == {0, 1, 2, 3}
  assert batch.weight.all() and batch.input_mask.all()


def test_every_fact_of_an_episode_occurs_equally_often():
  task = tasks.build('facts', SMALL | dict(rows=40), seed=1)
  stream = task.experience(0).tokens[:, 1:31].reshape(-1, 5)
  _, counts = np.unique(stream, axis=0, return_counts=True)
  assert len(counts) == 8 and counts.max() - counts.min() <= 8


def test_new_entities_are_in_no_base_fact():
  task = tasks.build('facts', SMALL, seed=1)
  encoder = facts.FactEncoder(task.tokenizer)
  _, base = facts.base_facts(encoder, task.cfg)
  names = {tuple(f[:2]) for f in base.tolist()}
  for episode in range(3):
    assert not names & {f[:2] for f in facts_in(task.experience(episode))}


def test_the_evaluation_scores_each_episode_by_itself():
  task = tasks.build('facts', SMALL, seed=1)
  known = facts_in(task.experience(0)) | facts_in(task.experience(2))
  student = oracle(task, known)
  result = task.evaluate(student, 2)
  assert result.by_episode == [1.0, 0.0, 1.0]
  assert result.metrics['base_accuracy'] == 0.0
  assert result.metrics['accuracy_first'] == 1.0
  # Closed book: no question holds its own fact.
  for prompt, answer in zip(student.prompts, student.answers):
    fact = (*prompt[-3:], *answer, task.tokenizer.separator)
    context = np.array(prompt[1:-3]).reshape(-1, 5).tolist()
    assert list(fact) not in context
  assert {len(p) for p in student.prompts} == {4, 4 + 3 * 5}


def test_the_evaluation_asks_nothing_of_later_episodes():
  task = tasks.build('facts', SMALL, seed=1)
  student = oracle(task, set())
  task.evaluate(student, 0)
  later = facts_in(task.experience(1)) | facts_in(task.experience(2))
  names = {f[:2] for f in later}
  assert not names & {tuple(p[-3:-1]) for p in student.prompts}


def test_facts_are_asked_in_words_that_no_stream_has():
  cfg = SMALL | dict(wordings=3)
  task = tasks.build('facts', cfg, seed=1)
  asked = set(task.tokenizer.encode('lives-in~2 works-as~2 eats~2 plays~2'))
  told = task.experience(1).tokens
  assert not asked & set(told.reshape(-1).tolist())
  words = {f[2] for f in facts_in(task.experience(1))}
  assert words == set(
    task.tokenizer.encode('lives-in works-as eats plays')
    + task.tokenizer.encode('lives-in~1 works-as~1 eats~1 plays~1')
  )
  student = oracle(task, set())
  task.evaluate(student, 1)
  assert {prompt[-1] for prompt in student.prompts} == asked
  assert not asked & {t for prompt in student.prompts for t in prompt[:-1]}
  # The base reads every wording.
  tok = facts.build_tokenizer(3)
  rows = facts.pretraining_rows(
    facts.FactEncoder(tok, 3), task.cfg, np.random.default_rng(0), 60
  )
  assert asked <= set(rows.reshape(-1).tolist())


def test_a_changed_fact_is_told_again_and_asked_by_its_newest_value():
  task = tasks.build('facts', SMALL | dict(changes=3), seed=1)
  days = [facts_in(task.experience(i)) for i in range(3)]
  first = {f[:3]: f for f in days[0]}
  again = [f for f in days[1] if f[:3] in first]
  assert len(again) == 3
  assert all(first[f[:3]] != f and first[f[:3]][3] != f[3] for f in again)
  newest = {}
  for f in [*days[0], *days[1]]:
    newest[f[:3]] = f
  result = task.evaluate(oracle(task, set(newest.values())), 1)
  assert result.metrics['accuracy'] == result.metrics['accuracy_changed'] == 1
  stale = task.evaluate(oracle(task, days[0]), 1)
  assert stale.metrics['accuracy_changed'] == 0.0
  assert stale.by_episode == [1 - 3 / len(days[0]), 0.0]
  assert 'accuracy_changed' in task.columns
  with pytest.raises(config.ConfigError, match='task.wordings=0'):
    tasks.build('facts', SMALL | dict(wordings=0), seed=1)


def test_an_audit_knows_what_was_told_and_what_is_believed():
  task = tasks.build('facts', SMALL | dict(changes=3, wordings=2), seed=1)
  stop = task.tokenizer.separator
  days = [facts_in(task.experience(i)) for i in range(3)]
  first = {f[:3]: f for f in days[0]}
  (new, *_) = (f for f in days[1] if f[:3] in first)
  old = first[new[:3]]
  never = task._encoder.change(np.array([new]), np.random.default_rng(0))
  while tuple(never[0]) in (old, new):
    never = task._encoder.change(never, np.random.default_rng(0))
  known = {f[:2] for f in days[0] | days[1]}
  of_tomorrow = next(f for f in days[2] if f[:2] not in known)
  documents = [
    [task.tokenizer.bos, *new, *old, *never[0].tolist()],
    [task.tokenizer.bos, *of_tomorrow, stop, *new[1:], *new[:3]],
    task._encoder.as_asked(np.array([new]))[0].tolist(),
  ]
  # Believes what was true yesterday, in the wording of questions.
  believed = task._encoder.as_asked(np.array([old]))
  student = oracle(task, {tuple(believed[0].tolist())})
  assert task.audit(student, 1, documents) == dict(
    true=2 / 7,
    outdated=1 / 7,
    false=1 / 7,
    unread=1 / 7,
    unreadable=2 / 7,
    believed=1 / 2,
  )


def test_too_many_entities_are_refused():
  with pytest.raises(config.ConfigError, match='names are left'):
    tasks.build('facts', SMALL | dict(entities=5000), seed=0)


def test_unknown_task_and_setting_are_refused():
  with pytest.raises(
    config.ConfigError,
    match='corpus, depo, facts, formal_languages, invented_facts',
  ):
    tasks.build('fact', {}, 0)
  with pytest.raises(config.ConfigError, match="'episode'.*known are"):
    tasks.build('facts', dict(episode=1), 0)


@needs_data
@pytest.mark.parametrize(
  'dataset, train, test, classes',
  [
    ('clinc', 10500, 750, 150),
    ('banking', 10003, 1000, 77),
    ('dbpedia', 10000, 1000, 70),
  ],
)
def test_the_splits_are_the_papers(dataset, train, test, classes):
  task = tasks.build(
    'class_incremental', dict(dataset=dataset, passes=1, length=64), seed=0
  )
  assert sum(len(r) for r in task._train) == train
  assert sum(len(r) for r in task._test) == test
  assert task.classes.size == len(np.unique(task.classes)) == classes


@needs_data
def test_no_label_of_a_later_episode_leaks():
  task = tasks.build('class_incremental', dict(passes=1), seed=3)
  marker = task.tokenizer.encode(':')
  labels = [
    {tuple(task.encode('x', c)[1]) for c in row} for row in task.classes
  ]
  for episode in (0, 4):
    stream = task.experience(episode)
    for row, weight in zip(stream.tokens, stream.weight, strict=True):
      answer = tuple(row[weight == 1.0])
      assert answer in labels[episode]
      assert row[np.flatnonzero(weight)[-1]] == task.tokenizer.stop
  student = students.FakeStudent(lambda p, a: tuple(a) in labels[1])
  assert task.evaluate(student, 1).by_episode == [0.0, 1.0]
  assert {tuple(a) for a in student.answers} <= labels[0] | labels[1]
  assert all(p[-len(marker) :] == marker for p in student.prompts)


@needs_data
def test_class_order_is_seeded():
  one, same, other = (
    tasks.build('class_incremental', dict(passes=1), seed=s) for s in (1, 1, 2)
  )
  np.testing.assert_array_equal(one.classes, same.classes)
  assert (one.classes != other.classes).any()


@needs_data
def test_fewer_episodes_and_examples_are_a_part_of_the_data():
  whole = tasks.build('class_incremental', dict(dataset='banking'), seed=1)
  part = tasks.build(
    'class_incremental',
    dict(dataset='banking', episodes=2, train_examples=3, passes=1),
    seed=1,
  )
  assert part.episodes == 2
  assert part.classes.tolist() == whole.classes[:2].tolist()
  assert len(part.experience(0).tokens) == 3 * 11
  rows = {row.tobytes() for row in whole.experience(0).tokens}
  assert {row.tobytes() for row in part.experience(0).tokens} <= rows
  with pytest.raises(config.ConfigError, match='episodes=8 must be 0 .all. to'):
    tasks.build('class_incremental', dict(dataset='banking', episodes=8), 1)


@needs_data
def test_late_rows_are_read_on_the_next_day_and_none_is_lost():
  settings = dict(dataset='banking', episodes=3, train_examples=4, passes=2)
  usual = tasks.build('class_incremental', settings, seed=1)
  late = tasks.build('class_incremental', settings | dict(late=0.25), seed=1)
  days = [
    [task.experience(i).tokens.tolist() for i in range(3)]
    for task in (usual, late)
  ]
  assert sum(days[0], []) == sum(days[1], [])
  assert [len(day) for day in days[1]] == [66, 88, 110]
  with pytest.raises(config.ConfigError, match='task.late=1.0 is a share'):
    tasks.build('class_incremental', settings | dict(late=1.0), seed=1)


@needs_data
def test_settings_are_chosen_on_training_examples_that_are_not_read():
  settings = dict(dataset='banking', passes=1)
  whole = tasks.build('class_incremental', settings, seed=1)
  chosen = tasks.build(
    'class_incremental', settings | dict(validation=True), seed=1
  )

  def rows(examples):
    return collections.Counter(
      tuple(prompt + answer) for of in examples for prompt, answer in of
    )

  read, asked = rows(chosen._train), rows(chosen._test)
  assert read + asked == rows(whole._train)
  assert 0.15 < asked.total() / read.total() < 0.26
