"""`babilong_windows`: sequences stage by stage, and what is asked of them."""

import json
import os
import pathlib

import numpy as np
import pytest

from experiments.configs import babilong as recipe
from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import datasets
from sleep_jax.data import experience as experience_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.runtime import checkpoint
from sleep_jax.tasks import babilong_windows
from tests import babilong_test
from tests import students

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='needs SLEEP_JAX_DATA'
)


def build(folder: pathlib.Path, **changes) -> babilong_windows.BabilongWindows:
  (folder / 'book.txt').write_text(babilong_test.BOOK)
  settings = dict(
    window=32, segments=(4, 6, 9), episodes=6, eval_rows=5, lengths=(0, 600)
  )
  task = tasks.build(
    'babilong_windows', settings | dict(books=str(folder)) | changes, 0
  )
  assert isinstance(task, babilong_windows.BabilongWindows)
  return task


def texts(task, batch) -> list[tuple[str, str]]:
  """Of each row its context, and its question with the answer."""
  decode, rows = task.tokenizer.decode, []
  for i in range(len(batch.inputs)):
    context = batch.context[i][batch.token_mask[i]]
    size = int(batch.input_mask[i].sum())
    asked = [*batch.inputs[i, :size], batch.targets[i, size - 1]]
    rows.append((decode(context.tolist()), decode([int(x) for x in asked])))
  return rows


@needs_data
def test_a_sequence_is_a_story_in_a_book(tmp_path):
  """And its targets are the answer and its end, and nothing else."""
  task, stories = build(tmp_path), datasets.load('babi/qa1', 'train')
  facts = {fact for story in stories for fact in story['facts']}
  batches = task.experience(5).batches(4, 2)
  for _ in range(6):
    batch = next(batches)
    for i, (text, asked) in enumerate(texts(task, batch)):
      question, _, answer = asked.partition('?')
      there = {fact for fact in facts if fact in text}
      assert any(
        there == set(story['facts'])
        for story in stories
        if story['question'] == question.strip() + '?'
        and story['answer'] == answer.strip()
      )
      targets = batch.targets[i][batch.weight[i] > 0].tolist()
      assert targets[-1] == task.tokenizer.stop
      assert task.tokenizer.decode(targets[:-1]).strip() == answer.strip()
      assert (batch.weight[i][~batch.input_mask[i]] == 0).all()


@needs_data
def test_stages_grow_and_lengths_are_drawn_for_several_batches(tmp_path):
  task = build(tmp_path)
  shapes = []
  for episode in range(6):
    batches = task.experience(episode).batches(1, 3)
    drawn = [next(batches) for _ in range(90)]
    windows = [b.context.shape[1] for b in drawn]
    real = [b.token_mask.sum((1, 2)).max() for b in drawn]
    for i in range(0, 90, 3):
      assert len(set(windows[i : i + 3])) == 1
    shapes.append(set(windows))
    most = task.cfg.segments[episode // 2]
    assert max(windows) == most and max(real) == most * 32
    # From one window up: shorter ones are behind empty windows.
    assert min(real) < most * 32 / 2
    assert not drawn[int(np.argmin(real))].token_mask[:, 0].any()
  assert shapes == [{4}, {4}, {4, 6}, {4, 6}, {4, 6, 9}, {4, 6, 9}]
  fixed = build(tmp_path, vary_segments=False).experience(4).batches(2)
  assert all(next(fixed).token_mask.all() for _ in range(3))


def test_one_draw_is_no_choice():
  """A stream of one draw is what it was before there could be several."""
  one = experience_lib.WindowStream(
    lambda rng, n: rng.integers(9, size=n), (3,)
  )
  rng, batches = np.random.default_rng((3,)), one.batches(4, 2)
  for _ in range(5):
    np.testing.assert_array_equal(next(batches), rng.integers(9, size=4))


def reader(right: bool) -> tuple[students.FakeStudent, list[tuple[int, ...]]]:
  """A student that knows every answer, or none, and the shapes it was given."""
  shapes = []

  def predict(batch, passes):
    assert passes is None
    shapes.append(batch.context.shape)
    return experience_lib.WindowPredictions(
      argmax=batch.targets + (0 if right else batch.weight > 0),
      nll=np.full(batch.targets.shape, 0.5),
      passes=np.ones(len(batch.targets)),
      loss=0.5,
    )

  return students.FakeStudent(predict=predict), shapes


@needs_data
@pytest.mark.parametrize('right', [True, False])
def test_accuracy_is_that_of_whole_answers_at_each_length(tmp_path, right):
  task, (student, shapes) = build(tmp_path), reader(right)
  first, last = (task.evaluate(student, i).metrics for i in (0, 5))
  assert first == {'accuracy': right, 'loss': 0.5}
  assert last == first | {'accuracy@0k': right, 'accuracy@600': right}
  assert shapes[:2] == [(5, 9, 32)] * 2
  assert shapes[3] == (5, 19, 32)
  assert set(task.chance_level()) <= set(last)


@needs_data
@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(kind='qa3'), 'task.kind'),
    (dict(segments=()), 'task.segments'),
    (dict(segments=(4, 2, 8)), 'task.segments'),
    (dict(episodes=7), 'task.episodes=7'),
    (dict(window=2), 'task.window=2'),
  ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, words):
  with pytest.raises(config.ConfigError, match=words):
    build(tmp_path, **changes)


def small(folder: pathlib.Path):
  """The recipe at a size that trains in seconds."""
  (folder / 'book.txt').write_text(babilong_test.BOOK)
  c = recipe.get_config('train')
  c.task.update(
    books=str(folder), window=16, segments=(6, 8), episodes=2, eval_rows=4
  )
  c.task.lengths = (200,)
  c.model.update(dim=16, layers=2, levels=(dict(hidden=16),))
  c.training.update(steps=4, batch=2)
  c = json.loads(c.to_json())
  c['arms']['armt']['model']['recurrent'] |= dict(segment=16, memory=2, width=4)
  return c


@needs_data
@pytest.mark.slow
def test_an_interrupted_curriculum_goes_on_to_the_same_end(
  tmp_path, monkeypatch
):
  c = small(tmp_path)
  whole = live_lib.live(c, 'armt', 1, tmp_path / 'whole', 0)
  assert {'accuracy', 'accuracy@200'} <= set(whole['final'])
  assert whole['tokens'] >= 4 * 2 * 6 * 16
  save = checkpoint.Checkpoints.save

  def dies(self, snapshot):
    if snapshot.night == 1:
      raise KeyboardInterrupt
    save(self, snapshot)

  with monkeypatch.context() as m:
    m.setattr(checkpoint.Checkpoints, 'save', dies)
    with pytest.raises(KeyboardInterrupt):
      live_lib.live(c, 'armt', 1, tmp_path / 'cut', 0)
  again = live_lib.live(c, 'armt', 1, tmp_path / 'cut', 0)
  for key in ('final', 'steps', 'tokens', 'flops'):
    assert again[key] == whole[key]
