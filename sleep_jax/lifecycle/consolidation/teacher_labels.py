"""Teacher labels: what the teachers predict at every token of given rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import splicing
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding

_MAX_TEACHER_KL = 4.0  # Nats; a single token must not carry a batch.
LABEL_BATCH = 64  # Rows labelled at a time; bounds the memory of a pass.


class LabeledBatch(at.Pytree):
  """Token rows with their teachers' predictions.

  Column t holds what concerns the prediction of token t+1.
  """

  tokens: at.Int[jax.Array, 'N T']
  positions: at.Int[jax.Array, 'N T']
  weight: at.Float[jax.Array, 'N T']  # Weight of the prediction; 0 = padding.
  # The teacher's logits `[N, T, V]`, or the likeliest of them.
  teacher: jax.Array | divergences.TopK
  # Where the new expert should be on, 1 or 0, and the weight of that target.
  gate: at.Float[jax.Array, 'N T']
  gate_weight: at.Float[jax.Array, 'N T']
  # `Model.frozen_prefix` of the rows, if the model has one.
  prefix: at.Float[jax.Array, 'N T D'] | None = None
  # Of `Teachers`: what the teachers' logits are of. It belongs to no row.
  vocabulary: at.Int[at.Array, 'M'] | None = None

  def rows(self, index: jax.Array | np.ndarray) -> 'LabeledBatch':
    """The rows at `index`."""
    rows = jax.tree.map(lambda x: x[index], self.replace(vocabulary=None))
    return rows.replace(vocabulary=self.vocabulary)


def concatenate(*parts: LabeledBatch) -> LabeledBatch:
  """The rows of all parts, which are of one vocabulary."""
  bare = [part.replace(vocabulary=None) for part in parts]
  rows = jax.tree.map(lambda *x: jnp.concatenate(x), *bare)
  return rows.replace(vocabulary=parts[0].vocabulary)


def tokens_at_once(cfg: consolidation_config.SeedingConfig) -> int:
  """Tokens whose logits exist at a time, of all devices together."""
  return cfg.tokens_in_flight * sharding.num_shards('batch')


def mixture(
  share: jax.Array, current: jax.Array, previous: jax.Array
) -> jax.Array:
  """Log of share * softmax(current) + (1 - share) * softmax(previous)."""
  return jnp.logaddexp(
    jax.nn.log_softmax(current) + jnp.log(share),
    jax.nn.log_softmax(previous) + jnp.log1p(-share),
  )


def _teacher_logits(
  cfg: consolidation_config.SeedingConfig,
  share: jax.Array,
  current: jax.Array,
  previous: jax.Array | None = None,
) -> tuple[jax.Array | divergences.TopK, jax.Array, jax.Array]:
  """The teacher's logits of each token, and how the models differ there.

  `share` is how much of the next token is the current model's.

  Returns:
    Logits; KL(current || previous) in nats; whether the current model
    contradicts the previous one.
  """
  # Distillation flattens a little every night; a temperature below 1 counters.
  teacher = current / cfg.teacher_temperature
  teacher_kl, contradicted = (
    jnp.zeros(share.shape),
    jnp.zeros(share.shape, bool),
  )
  if previous is not None:
    teacher_kl = divergences.forward_kl(current, previous)
    contradicted = archive_lib.contradicted(
      cfg.contradicted, current, previous.argmax(-1)
    )
    teacher = mixture(
      share[..., None], teacher, previous / cfg.teacher_temperature
    )
  if cfg.teacher_top_k:
    teacher = divergences.top_k(teacher, cfg.teacher_top_k)
  return teacher, teacher_kl, contradicted


@functools.partial(jax.jit, static_argnums=0)
def label(
  cfg: consolidation_config.SeedingConfig,
  teachers: replay_lib.Teachers,
  tokens: at.Int[jax.Array, 'B T'],
  positions: at.Int[jax.Array, 'B T'],
  weight: at.Float[jax.Array, 'B T'],
  source: at.Float[jax.Array, 'B T'],
) -> tuple[LabeledBatch, jax.Array]:
  """Labels every token by the teacher that generated it.

  The new expert should be on where the target is the current model's and the
  two teachers disagree by more than `cfg.router_margin` nats, and off where it
  is the previous model's; elsewhere its gate has no target.

  Returns:
    The labels, and the current model's hidden states `[B, T, D]`.
  """

  prefix = teachers.current.frozen_prefix(tokens, positions)
  inputs = tokens if prefix is None else prefix

  def run(model: model_lib.Model) -> transformer.Output:
    return model.forward(inputs, positions=positions)

  out = run(teachers.current)
  previous = None if teachers.previous is None else run(teachers.previous)
  outputs = [x for x in (out, previous) if x is not None]
  next_source = jnp.pad(source[:, 1:], ((0, 0), (0, 1)))
  rule = functools.partial(_teacher_logits, cfg)
  if cfg.teacher_top_k or teachers.vocabulary is not None:
    logits_of = teachers.logits_of()

    def per_token(rows):
      hidden, share = rows
      return rule(share, *logits_of(hidden))

    teacher, teacher_kl, contradicted = divergences.chunked(
      per_token, ([x.hidden for x in outputs], next_source),
      tokens_at_once(cfg),
    )  # fmt: skip
  else:
    teacher, teacher_kl, contradicted = rule(
      next_source, *(x.logits for x in outputs)
    )
  gate, gate_weight = jnp.ones(tokens.shape), source
  next_weight = jnp.pad(weight[:, 1:], ((0, 0), (0, 1)))
  if previous is not None:
    gate = next_source
    gate_weight = jnp.where(
      next_source > 0, teacher_kl > cfg.router_margin, 1.0
    )
    # Where the teachers disagree is what must be moved, or must be kept.
    per_nat = jnp.where(next_source > 0.5, *cfg.disagreement_weight)
    next_weight *= 1.0 + per_nat * jnp.minimum(teacher_kl, _MAX_TEACHER_KL)
    next_weight *= 1.0 - contradicted * (next_source < 0.5)
  labels = LabeledBatch(
    *(tokens, positions, next_weight, teacher),
    *(gate, gate_weight * next_weight, prefix, teachers.vocabulary),
  )
  return labels, out.hidden


def label_all(
  cfg: consolidation_config.SeedingConfig,
  teachers: replay_lib.Teachers,
  replay: replay_lib.Replay,
) -> LabeledBatch:
  """`label` over all rows of D, a batch at a time."""
  columns = np.arange(replay.tokens.shape[1])
  positions = np.broadcast_to(columns, replay.tokens.shape)
  rows = replay.tokens, positions, replay.weight, replay.source
  batches = []
  for i in range(0, len(replay.tokens), LABEL_BATCH):
    batch = tuple(x[i : i + LABEL_BATCH] for x in rows)
    labels, _ = label(cfg, teachers, *sharding.shard_batch(batch, 'batch'))
    batches.append(labels)
  return concatenate(*batches)


def spliced(
  teachers: replay_lib.Teachers,
  labels: LabeledBatch,
  where: at.Int[np.ndarray, 'N T'],
) -> LabeledBatch:
  """Rows as `splicing.interleave` has them, with the labels of their tokens."""
  own = sharding.fetch(labels.replace(vocabulary=None, prefix=None))
  names = 'weight', 'teacher', 'gate', 'gate_weight'
  tokens, predictions, there = splicing.take(
    own.tokens, {name: getattr(own, name) for name in names}, where
  )
  for name in ('weight', 'gate_weight'):
    predictions[name] *= there
  labels = labels.replace(tokens=tokens, **predictions)
  if labels.prefix is None:
    return labels
  parts = []
  for i in range(0, len(tokens), LABEL_BATCH):
    rows = slice(i, i + LABEL_BATCH)
    batch = sharding.shard_batch((tokens[rows], own.positions[rows]), 'batch')
    parts.append(_prefix(teachers.current, *batch))
  return labels.replace(prefix=jnp.concatenate(parts))


@jax.jit
def _prefix(
  model: model_lib.Model, tokens: jax.Array, positions: jax.Array
) -> at.Float[jax.Array, 'B T D'] | None:
  """`Model.frozen_prefix`."""
  return model.frozen_prefix(tokens, positions)


def as_archive(
  labels: LabeledBatch, vocabulary: np.ndarray | None, night: int
) -> archive_lib.Archive:
  """Labelled dreams as an archive keeps them.

  Args:
    labels: with the likeliest tokens of each prediction.
    vocabulary: `[M]`, what tokens the labels' predictions are of; None
      where predictions are of all tokens.
    night: when they were dreamt.
  """
  assert isinstance(labels.teacher, divergences.TopK)
  teacher = labels.teacher
  if vocabulary is not None:
    tokens = vocabulary[np.asarray(teacher.tokens)]
    teacher = teacher.replace(tokens=jnp.asarray(tokens))
  nights = jnp.asarray(np.full(len(labels.tokens), night, np.int32))
  return archive_lib.Archive(labels.tokens, labels.weight, teacher, nights)


def from_archive(
  cfg: consolidation_config.SeedingConfig,
  archive: archive_lib.Archive,
  teachers: replay_lib.Teachers,
  vocabulary: np.ndarray | None,
) -> LabeledBatch:
  """Archived dreams as labels; a new expert should be off at all of them.

  Args:
    cfg: says what of them the current model overrules.
    archive: with a row at least.
    teachers: give what is computed once for a row.
    vocabulary: see `as_archive`; it has every token of the archive.
  """
  if vocabulary is not None:
    tokens = jnp.searchsorted(jnp.asarray(vocabulary), archive.teacher.tokens)
    archive = archive.replace(teacher=archive.teacher.replace(tokens=tokens))
  columns = jnp.arange(archive.tokens.shape[1])
  positions = jnp.broadcast_to(columns, archive.tokens.shape)
  likeliest, parts = archive.likeliest(), []
  for i in range(0, len(archive), LABEL_BATCH):
    rows = slice(i, i + LABEL_BATCH)
    args = archive.tokens[rows], positions[rows], likeliest[rows]
    parts.append(_read_archived(cfg, teachers, *args))
  prefix, contradicted = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  weight = archive.weight * (1.0 - contradicted)
  return LabeledBatch(
    *(archive.tokens, positions, weight, archive.teacher),
    *(jnp.zeros_like(weight), weight, prefix, teachers.vocabulary),
  )


@functools.partial(jax.jit, static_argnums=0)
def _read_archived(
  cfg: consolidation_config.SeedingConfig,
  teachers: replay_lib.Teachers,
  tokens: at.Int[jax.Array, 'B T'],
  positions: at.Int[jax.Array, 'B T'],
  likeliest: at.Int[jax.Array, 'B T'],
) -> tuple[jax.Array | None, at.Bool[jax.Array, 'B T']]:
  """Of archived rows `Model.frozen_prefix`, and what is contradicted."""
  prefix = teachers.current.frozen_prefix(tokens, positions)
  if cfg.contradicted == 1.0:
    return prefix, jnp.zeros(tokens.shape, bool)
  inputs = tokens if prefix is None else prefix
  logits_of = teachers.logits_of()
  models = [m for m in (teachers.current, teachers.previous) if m is not None]

  def per_token(rows):
    past, hidden = rows
    now, *before = logits_of(hidden)
    said = [logits.argmax(-1) for logits in before]
    return archive_lib.contradicted(cfg.contradicted, now, past, *said)

  contradicted = divergences.chunked(
    per_token,
    (
      likeliest,
      [m.forward(inputs, positions=positions).hidden for m in models],
    ),
    tokens_at_once(cfg),
  )
  return prefix, contradicted
