"""Dreams that are kept beyond their night."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.harness import life_folder
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import rehearsal
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.objectives import divergences
from sleep_jax.runtime import checkpoint
from tests import seeding_test
from tests.seeding_test import _cfg  # noqa: F401  (a fixture)
from tests.seeding_test import _life  # noqa: F401  (a fixture)

CONFIG = dataclasses.replace(
  seeding_test.CONFIG,
  dreams=64,
  steps=8,
  rollout_every=4,
  teacher_top_k=8,
  archive=20,
  max_kl_share=2.0,
)
# Of `seeding_test.TOKENIZER`: BOS is 1, and 2 ends a segment.
TWO_SEGMENTS = np.array([1, 5, 6, 2, 7, 8, 2, *[9] * 9])


def dreams_of(night, rows, length=4, top_k=2):
  empty = archive_lib.empty(length, top_k)
  grown = jax.tree.map(
    lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), empty
  )
  ids = 100 * night + jnp.arange(rows)
  return grown.replace(
    tokens=jnp.tile(ids[:, None], (1, length)),
    night=jnp.full((rows,), night, jnp.int32),
  )


def test_every_night_keeps_as_many_rows():
  archive, rng = archive_lib.empty(4, 2), np.random.default_rng(0)
  counts = []
  for night in range(4):
    archive = archive_lib.extend(archive, dreams_of(night, 30), 10, rng)
    np.testing.assert_array_equal(archive.tokens[:, 0] // 100, archive.night)
    assert len(np.unique(archive.tokens[:, 0])) == len(archive)
    counts.append(np.bincount(archive.night).tolist())
  assert counts == [[10], [5, 5], [4, 3, 3], [3, 3, 2, 2]]


def test_a_night_with_few_dreams_keeps_them_all():
  rng = np.random.default_rng(0)
  archive = archive_lib.extend(
    archive_lib.empty(4, 2), dreams_of(0, 3), 10, rng
  )
  archive = archive_lib.extend(archive, dreams_of(1, 30), 10, rng)
  assert np.bincount(archive.night).tolist() == [3, 5]


def test_what_the_base_dreamt_may_all_stay():
  rng = np.random.default_rng(0)
  archive = dreams_of(archive_lib.BASE_NIGHT, 4)
  for night in range(3):
    archive = archive_lib.extend(
      archive, dreams_of(night, 30), 10, rng, keep_base=True
    )
  assert np.bincount(archive.night + 1).tolist() == [4, 2, 2, 2]


def test_an_archive_outlives_the_vocabulary_it_was_labelled_in(life):
  """Numbers in a night's head become tokens, and numbers of another head."""
  tokens = np.array([[1, 5, 7, 2]])
  teacher = divergences.TopK(
    jnp.array([[[0, 2], [1, 3], [3, 0], [2, 1]]]), jnp.zeros((1, 4, 3))
  )
  labels = teacher_labels.LabeledBatch(
    jnp.asarray(tokens), jnp.arange(4)[None], jnp.ones((1, 4)), teacher,
    jnp.ones((1, 4)), jnp.ones((1, 4)),
  )  # fmt: skip
  kept = teacher_labels.as_archive(labels, np.array([1, 2, 5, 7]), night=3)
  assert kept.night.tolist() == [3]
  assert kept.teacher.tokens.tolist() == [[[1, 5], [2, 7], [7, 1], [5, 2]]]
  teachers = replay_lib.Teachers(life.model, None)
  again = teacher_labels.from_archive(
    CONFIG, kept, teachers, np.array([1, 2, 4, 5, 7])
  )
  assert again.teacher.tokens.tolist() == [[[0, 3], [1, 4], [4, 0], [3, 1]]]
  assert not again.gate.any() and again.gate_weight.all()
  np.testing.assert_array_equal(again.positions, labels.positions)


def two_nights(life, cfg=CONFIG):
  lives = []
  for _ in range(2):
    day = life.memory.deltas()
    life, report = seeding_test.consolidate(life, cfg)
    assert report.transferred
    life = life_lib.end_night(life)
    lives.append(life)
    life = life.with_memory(life.memory.with_deltas(day))
  return lives


@pytest.mark.slow
@pytest.mark.parametrize(
  'dream_vocab, least_fresh, share', [(True, 0.0, 1 / 3), (False, 0.8, 0.2)]
)
def test_what_was_predicted_once_is_what_later_nights_learn(
  life, monkeypatch, dream_vocab, least_fresh, share
):
  """Night 2 trains on night 1's rows, with night 1's predictions."""
  taught, prepare = [], rehearsal.prepare

  def record(*args):
    taught.append(prepare(*args))
    return taught[-1]

  monkeypatch.setattr(rehearsal, 'prepare', record)
  changes = dict(dream_vocab=dream_vocab, least_fresh=least_fresh)
  cfg = dataclasses.replace(CONFIG, splice=False, **changes)
  first, second = two_nights(life, cfg)
  assert np.bincount(first.archive.night).tolist() == [20]
  assert np.bincount(second.archive.night).tolist() == [10, 10]
  assert [d.archived_share for d in taught] == [0.0, pytest.approx(share)]
  size = len(taught[1].replay.tokens)
  archived = taught[1].labels.rows(np.arange(size, size + 20))
  np.testing.assert_array_equal(archived.tokens, first.archive.tokens)
  for name in ('tokens', 'logprobs'):
    np.testing.assert_array_equal(
      getattr(archived.teacher, name), getattr(first.archive.teacher, name)
    )
  rows = taught[1].sample_rows(np.random.default_rng(0), 3000)
  assert (rows >= size).mean() == pytest.approx(share, abs=0.035)
  assert set(rows[rows >= size]) == set(range(size, size + 20))


@pytest.mark.slow
def test_only_what_the_day_taught_is_kept(life, monkeypatch):
  """Of rows that are half the previous model's, an earlier night has those."""
  prepared, prepare = [], rehearsal.prepare

  def record(*args):
    prepared.append(prepare(*args))
    return prepared[-1]

  monkeypatch.setattr(rehearsal, 'prepare', record)
  cfg = dataclasses.replace(CONFIG, archive=1000, splice=False)
  after, _ = seeding_test.consolidate(life, cfg)
  source = prepared[0].replay.source
  kept = prepared[0].replay.tokens[source.mean(axis=1) > 0.5]
  assert len(kept) == cfg.dreams // 2
  np.testing.assert_array_equal(after.archive.tokens, kept)


def test_only_segments_that_the_day_taught_are_kept(life, monkeypatch):
  """Of two segments in each dream, the one that asks for a new expert."""
  label_all = teacher_labels.label_all

  def label(cfg, teachers, replay):
    labels = label_all(cfg, teachers, replay)
    rows = np.tile(TWO_SEGMENTS, (len(replay.tokens), 1))
    asks = np.zeros(rows.shape, np.float32)
    asks[:, 4:6] = 1.0  # The prediction of the second segment's last tokens.
    return labels.replace(
      tokens=jnp.asarray(rows), gate=asks, gate_weight=jnp.ones(rows.shape)
    )

  monkeypatch.setattr(teacher_labels, 'label_all', label)
  cfg = dataclasses.replace(CONFIG, splice=False, archive_only_new=True)
  after, _ = seeding_test.consolidate(life, cfg)
  kept = np.asarray(after.archive.tokens)
  assert len(kept) == 20
  second = TWO_SEGMENTS[4:7]
  want = [1, *np.tile(second, 9)][: kept.shape[1]]
  np.testing.assert_array_equal(kept, np.tile(want, (20, 1)))


def test_what_the_current_model_contradicts_has_no_weight(life):
  """Of the archive, and of what the previous model says."""
  tokens = jnp.array([[1, 5, 7, 9]])
  logits = life.model.forward(tokens).logits
  told = jax.nn.softmax(logits).max(-1)
  sure = float(jnp.sort(told[0])[1:3].mean())  # Of two tokens of the four.
  cfg = dataclasses.replace(CONFIG, contradicted=sure, teacher_top_k=2)
  teachers = replay_lib.Teachers(life.model, None)
  agrees = divergences.top_k(logits, 2)
  other = divergences.top_k(-logits, 2)
  for teacher, want in ((agrees, [1.0] * 4), (other, 1.0 - (told[0] > sure))):
    kept = archive_lib.Archive(
      tokens, jnp.ones((1, 4)), teacher, jnp.zeros(1, jnp.int32)
    )
    labels = teacher_labels.from_archive(cfg, kept, teachers, None)
    np.testing.assert_array_equal(labels.weight[0], want)
  # What the previous model says too, the day has not told: it was forgotten.
  same = replay_lib.Teachers(life.model, life.memory)
  labels = teacher_labels.from_archive(cfg, kept, same, None)
  np.testing.assert_array_equal(labels.weight[0], [1.0] * 4)
  # By `label`, where the previous model is the teacher and has another token.
  teachers = replay_lib.Teachers(life.model, life.previous_memory())
  args = tokens, jnp.arange(4)[None], jnp.ones((1, 4)), jnp.zeros((1, 4))
  labels, _ = teacher_labels.label(cfg, teachers, *args)
  before = teachers.previous.forward(tokens).logits.argmax(-1)
  differs = (before != logits.argmax(-1)) & (told > sure)
  assert differs[0, :3].any()
  np.testing.assert_array_equal(labels.weight[0, :3], 1.0 - differs[0, :3])


@pytest.mark.slow
def test_a_contradiction_stays_in_the_archive(life):
  """The next day rehearses what is left."""
  first, second = two_nights(
    life, dataclasses.replace(CONFIG, contradicted=0.0)
  )
  rows = {row.tobytes(): w for row, w in zip(*_rows(first.archive))}
  lost = 0
  for row, weight in zip(*_rows(second.archive)):
    if row.tobytes() in rows:
      before = rows[row.tobytes()]
      assert ((weight == before) | (weight == 0)).all()
      lost += (weight != before).sum()
  assert lost > 0


def _rows(archive):
  return np.asarray(archive.tokens), np.asarray(archive.weight)


@pytest.mark.slow
def test_seeding_is_compiled_once_while_the_archive_grows(life):
  """Nights of as many dreams have one shape, whatever was kept before."""
  cfg, sizes, compiled = (
    dataclasses.replace(CONFIG, archive=60, dreams=16),
    [],
    [],
  )
  for _ in range(3):
    day = life.memory.deltas()
    life, _ = seeding_test.consolidate(life, cfg)
    life = life_lib.end_night(life)
    life = life.with_memory(life.memory.with_deltas(day))
    sizes.append(len(life.archive))
    compiled.append(seeding.seed_steps._cache_size())
  assert sizes[0] < sizes[1] < sizes[2]
  assert compiled[1] == compiled[2]


def test_a_night_that_failed_keeps_no_dreams(life):
  failing = dataclasses.replace(CONFIG, learning_rate=0.0, max_kl_share=0.5)
  after, report = seeding_test.consolidate(life, failing)
  assert not report.transferred and after.archive is None


def test_an_archive_of_other_dreams_is_refused(life):
  life, _ = two_nights(life)
  other = dataclasses.replace(CONFIG, teacher_top_k=4)
  with pytest.raises(config.ConfigError, match='teacher_top_k=4'):
    seeding_test.consolidate(life, other)


@pytest.mark.parametrize(
  'bad, message',
  [
    (dict(teacher_top_k=0), 'sleep.archive=20 .* sleep.teacher_top_k'),
    (dict(archive_base=21), 'sleep.archive_base=21 rows do not fit'),
    (dict(archive_keeps_base=True), 'leaves none for the base'),
    (
      dict(archive_only_new=True, teachers='current'),
      'tells by two teachers what is new',
    ),
    (dict(distinct=True, splice=False), 'set sleep.splice=True'),
    (dict(temperature=0.0), 'sleep.day_dreams=1'),
  ],
)
def test_settings_of_dreams_that_mean_nothing_are_refused(bad, message):
  with pytest.raises(config.ConfigError, match=message):
    dataclasses.replace(CONFIG, **bad)


def test_a_checkpoint_holds_an_archive_that_has_grown(life, tmp_path):
  empty = archive_lib.empty(CONFIG.dream_length, CONFIG.teacher_top_k)
  template = life.replace(archive=empty)
  life, _ = two_nights(life)
  checkpoints = checkpoint.Checkpoints(tmp_path, 'digest')
  checkpoints.save(checkpoint.Snapshot(0, 'sleep', life, {}))
  checkpoints.close()
  found = checkpoint.Checkpoints(tmp_path, 'digest').newest(template)
  assert not seeding_test.paths_that_differ(found.life, life)


def test_a_saved_life_has_its_archive(life, tmp_path):
  life, _ = two_nights(life)
  life_folder.save(tmp_path / 'slept', life, {})
  loaded, _ = life_folder.load(tmp_path / 'slept')
  assert not seeding_test.paths_that_differ(loaded.archive, life.archive)
