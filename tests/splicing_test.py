"""Segments, and rows that interleave them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import splicing
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import rehearsal
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences

SENTENCES = tokenizers.WordTokenizer(
  ['.', *(f'w{i}' for i in range(29))], separator='.'
)
DOT = SENTENCES.separator


# Nothing but the end of a document separates.
DOCUMENTS = tokenizers.WordTokenizer(['.', 'w'], separator='.', stop='.')


def test_segments_are_cut_at_separators():
  tokens = np.array([[1, 5, 2, 6, 7, 2, 9], [1, 3, 3, 3, 3, 3, 3]])
  assert DOT == 2
  got = splicing.spans(tokens, np.array([7, 7]), SENTENCES)
  assert got.tolist() == [[0, 1, 3], [0, 3, 6]]
  assert splicing.spans(tokens, np.array([4, 7]), SENTENCES).tolist() == [
    [0, 1, 3]
  ]


def test_documents_keep_their_beginning_and_an_end_that_was_cut():
  """Where only the end of a document separates, none is dropped."""
  tokens = np.array([[1, 5, 2, 0], [8, 9, 3, 4]])
  got = splicing.spans(tokens, np.array([3, 4]), DOCUMENTS)
  assert got.tolist() == [[0, 0, 3], [1, 0, 4]]
  where = splicing.interleave(
    [got[:1], got[1:]], [0.5, 0.5], (50, 8), 4, np.random.default_rng(0)
  )
  spliced, _, there = splicing.take(tokens, (), where)
  assert set(np.asarray(spliced[:, 0]).tolist()) == {1, 8}
  # Nothing predicts how a document begins, nor what follows a row.
  begins = np.isin(spliced, (1, 8))
  assert not there[:, :-1][begins[:, 1:]].any() and not there[:, -1].any()
  assert there[:, :-1][~begins[:, 1:]].all()


def test_equal_segments_count_once():
  tokens = np.array([[1, 10, 2, 11, 2, 10, 2, 10, 11, 2]])
  spans = splicing.spans(tokens, np.array([10]), SENTENCES)
  kept = splicing.distinct(spans, tokens)
  assert sorted(tokens[0, a:b].tolist() for _, a, b in kept) == [
    [10, 2],
    [10, 11, 2],
    [11, 2],
  ]


def test_rows_have_whole_segments_by_their_shares():
  tokens = np.array([[1, 10, 11, 2, 12, 2], [1, 20, 21, 22, 2, 0]])
  spans = splicing.spans(tokens, np.array([6, 5]), SENTENCES)
  where = splicing.interleave(
    [spans[:2], spans[2:]], [0.75, 0.25], (200, 16), 6, np.random.default_rng(0)
  )
  rows = np.asarray(splicing.take(tokens, (), where)[0])
  assert rows.shape == (200, 16) and (rows[:, 0] == 1).all()
  follows = {10: 11, 11: 2, 12: 2, 20: 21, 21: 22, 22: 2}
  for first, second in zip(rows[:, 1:-1].flat, rows[:, 2:].flat, strict=True):
    assert first == 2 or follows[first] == second
  assert 0.2 < (rows == 20).sum() / np.isin(rows, (10, 12, 20)).sum() < 0.3


def test_a_prediction_goes_where_its_token_goes():
  rng = np.random.default_rng(1)
  tokens = rng.integers(3, 30, (6, 12))
  tokens[:, 0] = 1
  tokens[:, 4::4] = DOT
  about_next = np.roll(tokens, -1, axis=1)
  spans = splicing.spans(tokens, np.full(6, 12), SENTENCES)
  where = splicing.interleave([spans], [1.0], (20, 9), 12, rng)
  got, predicted, there = splicing.take(tokens, about_next, where)
  np.testing.assert_array_equal(predicted[:, :-1], got[:, 1:])
  assert there[:, :-1].all() and not there[:, -1].any()


def archive_of(tokens, weight):
  next_token = jnp.asarray(np.roll(tokens, -1, axis=1))[..., None]
  logprobs = jnp.broadcast_to(
    jnp.log(jnp.array([0.9, 0.1])), (*tokens.shape, 2)
  )
  return archive_lib.Archive(
    jnp.asarray(tokens), jnp.asarray(weight),
    divergences.TopK(next_token, logprobs), jnp.zeros(len(tokens), jnp.int32),
  )  # fmt: skip


def test_a_day_rehearses_segments_of_all_dreams():
  tokens = np.array([[1, 10, 11, 2, 12, 13, 2, 9], [1, 20, 21, 2, 0, 0, 0, 0]])
  weight = (tokens > 0).astype(np.float32)
  weight[0, 4] = 0.0  # That 13 follows 12 has been contradicted.
  archive = archive_of(tokens, weight)
  cfg = wake.WakeConfig(batch=2, rehearsed=3)
  drawn = wake.draw_rehearsed(cfg, archive, 5, jax.random.key(0), SENTENCES)
  assert drawn.tokens.shape == (5, 3, 8)
  rows = np.asarray(drawn.tokens).reshape(15, 8)
  assert not np.isin(rows, (0, 9)).any()
  in_one = {10, 12, 20}
  assert any(len(in_one & set(row.tolist())) > 1 for row in rows)
  np.testing.assert_array_equal(
    np.asarray(drawn.teacher.tokens).reshape(15, 8)[:, :-1], rows[:, 1:]
  )
  lost = np.asarray(drawn.weight).reshape(15, 8)[:, :-1] == 0
  np.testing.assert_array_equal(lost, rows[:, 1:] == 13)
  # Without a tokenizer the rows are those that were archived.
  whole = wake.draw_rehearsed(cfg, archive, 5, jax.random.key(0))
  known = {row.tobytes() for row in tokens.astype(np.int32)}
  assert {row.tobytes() for row in np.asarray(whole.tokens).reshape(15, 8)} <= (
    known
  )


@pytest.mark.parametrize('top_k', [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_segment_is_labelled_where_it_was_dreamt(cfg, params, top_k):
  """Not among the segments that it is learnt with."""
  seeding = consolidation_config.SeedingConfig(
    dreams=16, dream_length=16, teacher_top_k=top_k, archive=8 if top_k else 0
  )
  model = model_lib.Model(cfg, params)
  life = life_lib.init_life(model, jax.random.key(0))
  teachers = replay_lib.Teachers(life.model, life.memory)
  drawn = []

  def sample(*args, **kwargs):
    drawn.append(replay_lib_sample(*args, **kwargs))
    return drawn[-1]

  replay_lib_sample = replay_lib.sample_replay
  job = job_lib.SeedingJob(
    seeding, teachers, job_lib.SlotId(1, 0), 1, SENTENCES,
    costs_lib.CostTracker(cfg, 16),
    archive=rehearsal.archive_of(seeding, life),
  )  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(replay_lib, 'sample_replay', sample)
    got = rehearsal.prepare(job, jax.random.key(1), jax.random.key(2))
  dreamt = drawn[0].tokens
  logits = np.asarray(life.model.forward(jnp.asarray(dreamt)).logits)
  by_segment = {}
  lengths = np.full(len(dreamt), dreamt.shape[1])
  for row, start, end in splicing.spans(dreamt, lengths, SENTENCES):
    of_it = logits[row, start - 1 : end - 1]
    by_segment.setdefault(dreamt[row, start:end].tobytes(), []).append(of_it)
  tokens, checked = np.asarray(got.labels.tokens), 0
  assert (
    len({row.tobytes() for row in tokens} & {r.tobytes() for r in dreamt}) < 8
  )
  for row, start, end in splicing.spans(tokens, lengths, SENTENCES):
    place = row, slice(start - 1, end - 1)
    labels = jax.tree.map(lambda x, place=place: x[place], got.labels.teacher)
    assert any(
      np.allclose(_logprobs(labels), _logprobs_like(labels, x), atol=1e-4)
      for x in by_segment[tokens[row, start:end].tobytes()]
    )
    checked += 1
  assert checked > 16
  if top_k:  # The archive keeps documents, not rows that were spliced.
    known = {row.tobytes() for row in dreamt}
    assert {row.tobytes() for row in np.asarray(got.archive.tokens)} <= known


def _logprobs(labels):
  if isinstance(labels, divergences.TopK):
    return np.asarray(labels.logprobs)[..., :-1]
  return np.asarray(jax.nn.log_softmax(labels))


def _logprobs_like(labels, logits):
  logprobs = np.asarray(jax.nn.log_softmax(logits))
  if isinstance(labels, divergences.TopK):
    return np.take_along_axis(logprobs, np.asarray(labels.tokens), -1)
  return logprobs


def test_a_teacher_that_ended_no_segment_leaves_rows_as_they_are(cfg, params):
  seeding = consolidation_config.SeedingConfig(dreams=8, dream_length=8)
  tokens = np.full((8, 8), 5, np.int32)
  replay = replay_lib.Replay(
    tokens, np.full(8, 8), np.ones((8, 8), np.float32),
    np.repeat([[0.0], [1.0]], 4, axis=0) * np.ones((8, 8)), np.full(8, 1 / 8),
  )  # fmt: skip
  life = life_lib.init_life(model_lib.Model(cfg, params), jax.random.key(0))
  teachers = replay_lib.Teachers(life.model, life.memory)
  rng = np.random.default_rng(0)
  labels = teacher_labels.label_all(seeding, teachers, replay)
  got = rehearsal.splice(seeding, SENTENCES, teachers, rng, replay, labels)
  assert got[0] is replay and got[1] is labels
