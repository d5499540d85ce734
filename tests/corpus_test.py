"""The pretraining corpora: streams, held-out loss, and the tokenizer."""

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg
from sleep_jax.tasks import facts
from tests import students

SMALL = dict(episodes=3, rows=10, length=24, eval_rows=6)
VOCAB = {'arc': 39, 'bulletins': 177, 'facts': 167}


@pytest.mark.parametrize('name', sorted(VOCAB))
def test_a_stream_is_lazy_seeded_and_all_tokens_are_targets(name):
  task = tasks.build('corpus', SMALL | dict(corpus=name), seed=1)
  assert task.tokenizer.vocab == VOCAB[name]

  def blocks(episode):
    return list(task.experience(episode).blocks(4))

  tokens, weight = zip(*blocks(0))
  assert [t.shape for t in tokens] == [(4, 24), (4, 24), (2, 24)]
  assert all((w == 1).all() and w.dtype == np.float32 for w in weight)
  assert all((t[:, 0] == task.tokenizer.bos).all() for t in tokens)
  again, other = blocks(0), blocks(1)
  np.testing.assert_array_equal(tokens[0], again[0][0])
  assert (tokens[0] != other[0][0]).any()


def test_the_held_out_loss_is_per_token_over_the_same_rows():
  task = tasks.build('corpus', SMALL, seed=1)
  first, second = (
    students.FakeStudent(logprob=-23 * 1.5),
    students.FakeStudent(),
  )
  result = task.evaluate(first, 0)
  task.evaluate(second, 2)
  assert result.by_episode == []
  assert result.metrics == {'held_out_loss': pytest.approx(1.5)}
  assert len(first.prompts) == 6 and first.answers == second.answers
  assert {len(a) for a in first.answers} == {23}


def test_new_entities_grow_over_three_fifths_of_the_episodes():
  settings = SMALL | dict(corpus='facts_windows', episodes=10, windows=2)
  task = tasks.build('corpus', settings | dict(new_entities=(1, 7)), seed=1)
  known = {
    tuple(f)
    for f in facts.base_facts(
      facts.FactEncoder(task.tokenizer), facts.FactsConfig()
    )[1][:, :2].tolist()
  }

  def most(episode):
    batch = next(task.experience(episode).batches(200))
    assert batch.context.shape == (200, 2, 24)
    counts = []
    for rows, mask in zip(batch.context, batch.token_mask):
      read = rows[mask.any(1)][:, 1:21].reshape(-1, 5)
      counts.append(len({tuple(f) for f in read[:, :2].tolist()} - known))
    return max(counts)

  # A context of two windows has eight whole facts.
  assert [most(e) for e in (0, 1, 2)] == [1, 2, 3]
  assert most(6) == most(9) > 4


def test_the_loss_of_windows_is_the_students():
  task = tasks.build('corpus', SMALL | dict(corpus='facts_windows'), seed=1)
  batches = []

  def predict(batch, passes):
    batches.append(batch)
    shape = batch.targets.shape
    return experience_lib.WindowPredictions(
      np.zeros(shape), np.zeros(shape), np.ones(len(shape)), loss=2.5
    )

  student = students.FakeStudent(predict=predict)
  for episode in (0, 2):
    metrics = task.evaluate(student, episode).metrics
    assert metrics == {'held_out_loss': 2.5}
  np.testing.assert_array_equal(batches[0].context, batches[1].context)
  assert len(batches[0].context) == 6


def test_a_missing_tokenizer_is_trained_on_the_books(tmp_path, monkeypatch):
  def text(word):
    lines = [f'{word} one two three, paragraph {i}.' for i in range(400)]
    return '\n\n'.join(lines).encode()

  books = {
    name: download.RawFile(name, '', 0, '') for name in ('train', 'held_out')
  }
  monkeypatch.setattr(gutenberg, 'BOOKS', books)
  monkeypatch.setattr(
    download, 'read', lambda file, folder: text(f'{file.path}word')
  )
  path = tmp_path / 'new' / 'tok.model'
  settings = dict(
    corpus='text', held_out=('held_out',), tokenizer=str(path), vocab=300
  )
  task = tasks.build('corpus', SMALL | settings, seed=1)
  assert [p.name for p in path.parent.iterdir()] == ['tok.model']
  assert task.tokenizer.vocab == 300
  written = path.read_bytes()
  assert tasks.build('corpus', SMALL | settings, seed=1).tokenizer.vocab == 300
  assert path.read_bytes() == written
  student = students.FakeStudent()
  task.evaluate(student, 0)
  (tokens, _), *_ = task.experience(0).blocks(4)
  decode = tokenizers.load(path).decode
  assert all('trainword' in decode(row) for row in tokens.tolist())
  assert all(decode(a).startswith('held_outword') for a in student.answers)
  assert (tokens[:, 0] == task.tokenizer.bos).all()


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(corpus='fact'), "task.corpus='fact' is unknown.*facts_windows"),
    (dict(rows=0), 'task.rows=0 must be at least 1'),
    (dict(new_entities=(3, 2)), r'task.new_entities=\(3, 2\) must be two'),
    (dict(held_out=('Emma',)), "task.held_out='Emma' is unknown"),
    (dict(corpus='text', held_out=()), 'task.held_out is empty'),
  ],
)
def test_a_corpus_that_cannot_work_is_refused(settings, message):
  with pytest.raises(config.ConfigError, match=message):
    tasks.build('corpus', settings, 0)
