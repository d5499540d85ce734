"""What a night rehearses: D, labelled by its teachers, and archived dreams."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import splicing
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding

_HEAD_MULTIPLE = 1024
_ARCHIVE_BLOCK = 64  # An archive that grows is padded to so many rows.
_ARCHIVE_KEY = 7  # Beside the keys that sampling splits off.
_SPLICE_KEY = 8
_PROBE_ROWS = 64  # Most dreams on which KL is measured, and none is trained.


def archive_of(
  cfg: consolidation_config.SeedingConfig, life: life_lib.Life
) -> archive_lib.Archive | None:
  """The life's archive, perhaps a new one; None where none is kept.

  Raises:
    ConfigError: if its rows are not of today's settings.
  """
  if not cfg.archive:
    return None
  archive = archive_lib.empty(cfg.dream_length, cfg.teacher_top_k)
  if life.archive is None:
    return archive
  *_, length, top_k = life.archive.teacher.tokens.shape
  if (length, top_k) != (cfg.dream_length, cfg.teacher_top_k):
    raise config.ConfigError(
      f'sleep.dream_length={cfg.dream_length} and sleep.teacher_top_k='
      f'{cfg.teacher_top_k}, but the archived dreams have {length} tokens and '
      f'{top_k} predictions each; set these, or sleep.archive=0.'
    )
  return life.archive


def of_base(
  cfg: consolidation_config.SeedingConfig,
  base: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  costs: costs_lib.CostTracker,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...],
) -> archive_lib.Archive:
  """The archive before the first day: `cfg.archive_base` dreams of the base.

  From then on they count as those of a night, number -1. `day` are the frames
  of what is about to be read: an instruct model knows most in its chat format.
  """
  with costs.phase('rollout') as cost:
    drawn = generation.sample_as_it_is(
      cfg, base, tokenizer, cfg.archive_base, rng, day
    )
    cost.add_forward(drawn.tokens.size)
  with costs.phase('teacher') as cost:
    teachers = replay_lib.Teachers(base, previous_memory=None)
    labels = teacher_labels.label_all(
      cfg, teachers, replay_lib.of_one_teacher(cfg, drawn)
    )
    archive = teacher_labels.as_archive(labels, None, archive_lib.BASE_NIGHT)
    cost.add_forward(drawn.tokens.size)
  return sharding.replicate(jax.block_until_ready(archive))


class Rehearsal(NamedTuple):
  """What a job rehearses.

  replay: D.
  labels: of D, and after it of the archive, padded.
  probe: labelled dreams that are not in D.
  num_archived: rows of the archive.
  archived_share: of what is rehearsed.
  archive: as the night leaves it, if dreams are archived.
  """

  replay: replay_lib.Replay
  labels: teacher_labels.LabeledBatch
  probe: teacher_labels.LabeledBatch
  num_archived: int
  archived_share: float
  archive: archive_lib.Archive | None

  def sample_rows(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Row numbers of `labels`, `[*shape]`."""
    rows = self.replay.sample_rows(rng, *shape)
    if not self.archived_share:
      return rows
    size = len(self.replay.tokens)
    archived = rng.integers(size, size + self.num_archived, shape)
    return np.where(rng.random(shape) < self.archived_share, archived, rows)


def prepare(
  job: job_lib.SeedingJob, rng: at.Key, probe_rng: at.Key
) -> Rehearsal:
  """The job's data, sampled and labelled.

  Today, the previous model and every archived night have equal shares, as long
  as D has `cfg.least_fresh`.
  """
  archive = job.archive if job.archive else None  # None if it has no rows.
  nights, num_archived, archived_share = job.nights, 0, 0.0
  if archive is not None:
    nights, num_archived = 0, len(archive)
    archived_nights = len(np.unique(archive.night))
    archived_share = archived_nights / (archived_nights + 2)
    archived_share = min(archived_share, 1.0 - job.cfg.least_fresh)
  replay, probe = _sample(job, nights, rng, probe_rng)
  teachers, vocabulary = _over_vocabulary(job, archive, replay, probe)
  kept = None
  with job.costs.phase('teacher') as cost:
    # Every device has all rows, and takes its own rows of a batch.
    labels, probe_labels = (
      sharding.replicate(teacher_labels.label_all(job.cfg, teachers, rows))
      for rows in (replay, probe)
    )
    jax.block_until_ready(labels)
    times = 1 if job.teachers.previous is None else 2
    size = replay.tokens.size + probe.tokens.size
    cost.add_forward(size, times=times)
    if archive is not None:
      padded = archive.padded(_padded_rows(num_archived, job.cfg.archive))
      kept = teacher_labels.from_archive(job.cfg, padded, teachers, vocabulary)
      if job.cfg.contradicted < 1.0:
        cost.add_forward(kept.tokens.size, times=times)
      elif kept.prefix is not None:
        cost.add_forward(kept.tokens.size)
      archive = archive.replace(weight=kept.weight[:num_archived])
  dreamt = replay, labels
  order = order_lib.numpy_rng(jax.random.fold_in(rng, _SPLICE_KEY))
  spliced = functools.partial(splice, job.cfg, job.tokenizer, teachers, order)
  replay, labels = spliced(replay, labels)
  _, probe_labels = spliced(probe, probe_labels)
  if job.cfg.splice and archive is not None and kept is not None:
    pool = archive.segments(job.tokenizer)
    kept = _splice_archived(teachers, order, kept, pool)
  if kept is not None:
    labels = teacher_labels.concatenate(labels, sharding.replicate(kept))
  if job.archive is not None:
    draw = order_lib.numpy_rng(jax.random.fold_in(probe_rng, _ARCHIVE_KEY))
    archive = archive_lib.extend(
      job.archive if archive is None else archive,
      _new_rows(job, *dreamt, vocabulary, draw),
      job.cfg.archive,
      draw,
      keep_base=job.cfg.archive_keeps_base,
    )
    archive = sharding.replicate(archive)
  return Rehearsal(
    replay,
    labels,
    sharding.shard_batch(probe_labels, 'batch'),
    num_archived,
    archived_share,
    archive,
  )


def splice(
  cfg: consolidation_config.SeedingConfig,
  tokenizer: tokenizers.Tokenizer,
  teachers: replay_lib.Teachers,
  rng: np.random.Generator,
  replay: replay_lib.Replay,
  labels: teacher_labels.LabeledBatch,
) -> tuple[replay_lib.Replay, teacher_labels.LabeledBatch]:
  """As many rows, of segments of both teachers by their fractions.

  Rows are as they were where one of the teachers has no whole segment, or where
  `cfg` does not splice.
  """
  if not cfg.splice:
    return replay, labels
  of_rows = splicing.spans(replay.tokens, replay.lengths, tokenizer)
  pools, shares = [of_rows], [1.0]
  if replay.row_prob is not None:
    current = _of_current(replay)
    share = float(replay.row_prob[current].sum())
    is_current = np.isin(of_rows[:, 0], current)
    pools, shares = (
      [of_rows[~is_current], of_rows[is_current]],
      [1 - share, share],
    )
  if cfg.distinct:
    pools = [splicing.distinct(pool, replay.tokens) for pool in pools]
  if not all(map(len, pools)):
    return replay, labels
  rows, length = replay.tokens.shape
  where = splicing.interleave(pools, shares, (rows, length), length, rng)
  labels = teacher_labels.spliced(teachers, labels, where)
  tokens, weight, source = (
    x.reshape(-1)[where] for x in (replay.tokens, replay.weight, replay.source)
  )
  lengths = np.full(rows, length)
  replay = replay_lib.Replay(tokens, lengths, weight, source, None)
  return replay, sharding.replicate(labels)


def _over_vocabulary(
  job: job_lib.SeedingJob,
  archive: archive_lib.Archive | None,
  *dreams: replay_lib.Replay,
) -> tuple[replay_lib.Teachers, np.ndarray | None]:
  """The teachers, and the tokens that they are distilled over; None = all."""
  if not job.cfg.dream_vocab:
    return job.teachers, None
  used = [replay.tokens for replay in dreams]
  if archive is not None:
    used.append(np.asarray(archive.teacher.tokens))
  vocabulary = _vocabulary(job.teachers.current, used)
  return job.teachers.replace(vocabulary=jnp.asarray(vocabulary)), vocabulary


def _new_rows(
  job: job_lib.SeedingJob,
  replay: replay_lib.Replay,
  labels: teacher_labels.LabeledBatch,
  vocabulary: np.ndarray | None,
  rng: np.random.Generator,
) -> archive_lib.Archive:
  """What tonight adds to the archive: the current model's dreams."""
  on_host = sharding.fetch(labels.replace(vocabulary=None, prefix=None))
  rows = _of_current(replay)
  on_host = on_host.rows(rows)
  if job.cfg.archive_only_new:
    lengths = replay.lengths[rows]
    on_host = _of_new_segments(job, on_host, lengths, rng)
  of_current = jax.tree.map(jnp.asarray, on_host)
  return teacher_labels.as_archive(of_current, vocabulary, job.nights)


def _of_new_segments(
  job: job_lib.SeedingJob,
  labels: teacher_labels.LabeledBatch,
  lengths: np.ndarray,
  rng: np.random.Generator,
) -> teacher_labels.LabeledBatch:
  """As many rows, of the segments with a token that asks for a new expert.

  No rows if there are none.
  """
  tokens = np.asarray(labels.tokens)
  segments = splicing.spans(tokens, lengths, job.tokenizer)
  asks = np.asarray(labels.gate * labels.gate_weight) > 0
  new = [asks[row, max(a - 1, 0) : b - 1].any() for row, a, b in segments]
  segments = segments[np.array(new, bool)]
  if not len(segments):
    return labels.rows(np.zeros(0, int))
  rows, length = labels.tokens.shape
  where = splicing.interleave([segments], [1.0], (rows, length), length, rng)
  return teacher_labels.spliced(job.teachers, labels, where)


def _splice_archived(
  teachers: replay_lib.Teachers,
  rng: np.random.Generator,
  kept: teacher_labels.LabeledBatch,
  pool: splicing.Spans,
) -> teacher_labels.LabeledBatch:
  """As many rows, of the archive's segments."""
  if not len(pool):
    return kept
  rows, length = kept.tokens.shape
  where = splicing.interleave([pool], [1.0], (rows, length), length, rng)
  return teacher_labels.spliced(teachers, kept, where)


def _padded_rows(rows: int, at_most: int) -> int:
  """A number from `rows` up, of few, so that few shapes are compiled.

  A power of two blocks, or blocks for `at_most`, which a full archive has.
  """
  blocks, most = (-(-n // _ARCHIVE_BLOCK) for n in (rows, at_most))
  return _ARCHIVE_BLOCK * min(1 << (blocks - 1).bit_length(), max(blocks, most))


def _sample(
  job: job_lib.SeedingJob, nights: int, rng: at.Key, probe_rng: at.Key
) -> tuple[replay_lib.Replay, replay_lib.Replay]:
  """D, and the dreams on which KL is measured."""
  # No more than D has: a small D's shapes are then compiled once.
  num_probes = min(job.cfg.dreams, _PROBE_ROWS)
  probe_cfg = dataclasses.replace(job.cfg, dreams=num_probes)
  with job.costs.phase('rollout') as cost:
    replay, probe = (
      replay_lib.sample_replay(
        cfg, job.teachers, job.tokenizer, nights, key, job.frames
      )
      for cfg, key in ((job.cfg, rng), (probe_cfg, probe_rng))
    )
    size = replay.tokens.size + probe.tokens.size
    cost.add_forward(size, times=job.cfg.oversample)
    if job.cfg.oversample > 1:  # The current model's half, by both teachers.
      cost.add_forward(size // 2, times=2 * job.cfg.oversample)
  is_current = replay.source.mean(axis=1) > 0.5
  for kind, rows in (('current', is_current), ('previous', ~is_current)):
    observation.documents(
      f'by the {kind} model', replay.tokens[rows], replay.lengths[rows]
    )
  return replay, probe


def _of_current(replay: replay_lib.Replay) -> np.ndarray:
  """The rows that are mostly the current model's.

  What the previous one knows was archived on an earlier night, when it was
  better known.
  """
  share = np.average(replay.source, axis=1, weights=replay.weight)
  return np.flatnonzero(share > 0.5)


def _vocabulary(model: model_lib.Model, used: list[np.ndarray]) -> np.ndarray:
  """The tokens that occur, in order, and a few more.

  A multiple of `_HEAD_MULTIPLE`, so that few shapes are compiled.
  """
  occurs = np.zeros(model.cfg.vocab, bool)
  for tokens in used:
    occurs[tokens] = True
  size = -(-occurs.sum() // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
  size = min(size, len(occurs))
  occurs[np.flatnonzero(~occurs)[: size - occurs.sum()]] = True
  return np.flatnonzero(occurs)
