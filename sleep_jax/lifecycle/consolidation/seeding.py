"""Knowledge Seeding: upward distillation into one new expert (Sleep 4).

The objective, maximised in the paper and minimised here:

  J_KS = E_x[(1 - alpha) E_y~student[r(y)] - alpha E_y D(teacher || student)]

with GKD's mixture of replayed rows (1 - lambda) and the student's own rollouts
(lambda) for the divergence, and Learning to Imitate for the reward. Only the
new expert trains (or, when a full bank is folded, its level's dense base);
nothing else is differentiated.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import order as order_lib
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import rehearsal as rehearsal_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib
from sleep_jax.models import token_logits
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.training import fit


class StepMetrics(at.Pytree):
  """What one seeding step measures, before its update; nats per token."""

  loss: jax.Array
  kl: jax.Array  # KL(teacher || student) on replayed rows, whatever F is.
  divergence: jax.Array  # F on replayed rows.
  on_policy: jax.Array  # F on the student's own rollouts.
  imitation: jax.Array  # The policy-gradient loss.
  router: jax.Array  # Provenance cross-entropy.


class Seeded(NamedTuple):
  """What seeding leaves.

  curves: of `StepMetrics` (`[steps]`) together with `reward` (`[rounds]`) and
    `probe`: KL(teacher || student) before and after, on dreams of their own.
  archive: as the night leaves it, if dreams are archived.
  """

  student: model_lib.Model
  curves: dict[str, np.ndarray]
  archive: archive_lib.Archive | None


def seed(
  job: job_lib.SeedingJob, student: model_lib.Model, rng: at.Key
) -> Seeded:
  """Trains the job's target in the student by distillation from the teachers.

  Args:
    job: everything that stays as it is.
    student: the prospective model; a slot to train is already unlocked.
    rng: random key.
  """
  replay_key, order_key, roll_key, probe_key = jax.random.split(rng, 4)
  rehearsal = rehearsal_lib.prepare(job, replay_key, probe_key)
  job = dataclasses.replace(
    job, teachers=job.teachers.replace(vocabulary=rehearsal.labels.vocabulary)
  )
  cfg, target = job.cfg, job.target
  student = target.activate(student)
  trained = sharding.shard_params(jax.tree.map(jnp.copy, target.get(student)))
  state = trained, sharding.shard_params(optimizer(cfg).init(trained))
  kl_before = _probe_kl(job, state[0], student, rehearsal.probe)
  order = order_lib.numpy_rng(order_key)
  curves, rewards, rollouts = [], [], None
  for start in range(0, cfg.steps, cfg.rollout_every):
    steps = min(cfg.rollout_every, cfg.steps - start)
    if cfg.uses_rollouts:
      rollouts, reward = _imitate(
        job, target.put(student, state[0]), rehearsal.replay, order,
        jax.random.fold_in(roll_key, start),
      )  # fmt: skip
      rewards.append(reward)
    rows = _rows_of_steps(cfg, rehearsal, order, steps)
    with job.costs.phase('update') as cost:
      state, metrics = seed_steps(
        cfg, state, student, target, (rehearsal.labels, rollouts),
        sharding.shard_batch(rows, None, 'batch'),
      )  # fmt: skip
      curves.append(sharding.fetch(metrics))
      name = f'sleep, seeding of level {target.level + 1}'
      finite.check_finite(name, curves[-1].loss, state[0], first_step=start)
      per_step = cfg.batch + (rows[1].shape[1] if cfg.uses_rollouts else 0)
      cost.add_partial_training(
        steps * per_step * cfg.dream_length,
        steps=steps,
        first_layer=student.cfg.layers_of(target.level).start,
      )
    shown = {'loss': curves[-1].loss, 'kl': curves[-1].kl}
    level = f'level{target.level + 1}'
    observation.steps({f'{level}/{name}': x for name, x in shown.items()})
  kl_after = _probe_kl(job, state[0], student, rehearsal.probe)
  curves = jax.tree.map(lambda *x: np.concatenate(x), *curves)
  curves = {k: getattr(curves, k) for k in StepMetrics.__dataclass_fields__}
  curves |= {
    'reward': np.array(rewards or [0.0]),
    'probe': np.array([kl_before, kl_after]),
  }
  return Seeded(target.put(student, state[0]), curves, rehearsal.archive)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def seed_steps(
  cfg: consolidation_config.SeedingConfig,
  state: tuple[at.Tree, Any],
  student: model_lib.Model,
  target: job_lib.Target,
  data: tuple[teacher_labels.LabeledBatch, imitation.Rollouts | None],
  rows: tuple[jax.Array, jax.Array],
) -> tuple[tuple[at.Tree, Any], StepMetrics]:
  """K steps of seeding in one program; gradients exist for the target alone.

  Args:
    cfg: static.
    state: of the target, what trains and its optimizer state; donated.
    student: what it is put into.
    target: where.
    data: labelled rows of D, and the student's rollouts.
    rows: the rows of each that a step takes, `[K, B]` and `[K, R]`.

  Returns:
    The new state, and what each step measured, `[K]`.
  """
  labels, rollouts = data

  def loss_fn(trained, index):
    batch = None if rollouts is None else rollouts.rows(index[1])
    return objective(
      trained, cfg, target, student, labels.rows(index[0]), batch
    )

  trained, opt_state, metrics = fit.fit(loss_fn, optimizer(cfg), *state, rows)
  return (trained, opt_state), metrics


def objective(
  trained: at.Tree,
  cfg: consolidation_config.SeedingConfig,
  target: job_lib.Target,
  student: model_lib.Model,
  labels: teacher_labels.LabeledBatch,
  rollouts: imitation.Rollouts | None,
) -> tuple[jax.Array, StepMetrics]:
  """-J_KS of one batch, with the router's provenance loss beside it."""
  student = target.put(student, trained)
  parts = [labels] if rollouts is None else [labels, rollouts.labels]
  batch = teacher_labels.concatenate(*parts).replace(vocabulary=None)
  batch = sharding.shard_batch(batch, 'batch')
  inputs = batch.tokens if batch.prefix is None else batch.prefix
  out = student.forward(inputs, positions=batch.positions)
  size = labels.tokens.shape[0]
  measure = divergences.divergence(cfg.divergence, cfg.beta)
  divergence_of = functools.partial(_masked_divergence, cfg, student, out)
  off_policy = divergence_of(measure, labels, slice(size))
  kl = off_policy
  if cfg.divergence != 'forward_kl':
    kl = divergence_of(divergences.forward_kl, labels, slice(size))
  loss = cfg.alpha * off_policy
  on_policy, imitation_loss = jnp.zeros(()), jnp.zeros(())
  if rollouts is not None:
    loss, on_policy, imitation_loss = _with_rollouts(
      cfg, student, out, measure, off_policy, rollouts
    )
  router, gate_logits = jnp.zeros(()), target.gate_logits(out)
  if gate_logits is not None:
    gate_loss = optax.sigmoid_binary_cross_entropy(gate_logits, batch.gate)
    router = masked_mean(gate_loss.mean(0), batch.gate_weight)
  loss += cfg.router_weight * router
  return loss, StepMetrics(
    loss, kl, off_policy, on_policy, imitation_loss, router
  )


def optimizer(
  cfg: consolidation_config.SeedingConfig,
) -> optax.GradientTransformation:
  """Adam, or Muon on A and B; a short warm-up, then a cosine descent.

  With `train_expert` false, a control, everything is computed and the updates
  are zero.
  """
  warmup = min(10, cfg.steps // 10)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, cfg.learning_rate, warmup, cfg.steps, 0.05 * cfg.learning_rate
  )
  rules = {
    'adam': lambda: optax.adam(schedule),
    'muon': lambda: optax.contrib.muon(
      schedule,
      # The router learns slower than the matrices: a gate that falls below the
      # null choice gets no gradient, and never comes back.
      adam_learning_rate=lambda step: 0.25 * schedule(step),
      muon_weight_dimension_numbers=_muon_dimensions,
      consistent_rms=0.2,  # Steps of Adam's size: one learning rate for both.
    ),
  }
  rule = config.lookup(cfg.optimizer, rules, 'sleep.optimizer')
  parts = [optax.clip_by_global_norm(1.0), rule()]
  if not cfg.train_expert:
    parts.append(optax.set_to_zero())
  return optax.chain(*parts)


def _muon_dimensions(trained: at.Tree) -> at.Tree:
  """Which leaves are stacks of matrices, for Muon: `[L, in, out]`, by layer."""
  matrix = optax.contrib.MuonDimensionNumbers(1, 2)
  return jax.tree.map(lambda x: matrix if x.ndim == 3 else None, trained)


def masked_mean(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Mean of `x` by `weight`, 0 where all weights are 0."""
  return (x * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def _masked_divergence(
  cfg: consolidation_config.SeedingConfig,
  student: model_lib.Model,
  out: transformer.Output,
  measure: divergences.Divergence,
  labels: teacher_labels.LabeledBatch,
  rows: slice,
) -> jax.Array:
  """Mean divergence, in nats per token, of `rows` of the student's output."""
  head = functools.partial(replay_lib.head, student, labels.vocabulary)
  if isinstance(labels.teacher, divergences.TopK):
    per_token = divergences.from_hidden(
      measure,
      labels.teacher,
      (out.hidden[rows], head()),
      chunk=teacher_labels.tokens_at_once(cfg),
    )
  elif labels.vocabulary is not None:
    per_token = token_logits.map_tokens(
      lambda logits, teacher: measure(teacher, logits),
      *(out.hidden[rows], head(), labels.teacher),
    )
  else:
    per_token = student.map_logits(
      lambda logits, teacher: measure(teacher, logits),
      *(out.select(rows), labels.teacher),
    )
  return masked_mean(per_token, labels.weight)


def _with_rollouts(
  cfg: consolidation_config.SeedingConfig,
  student: model_lib.Model,
  out: transformer.Output,
  measure: divergences.Divergence,
  off_policy: jax.Array,
  rollouts: imitation.Rollouts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The loss with that of the rollouts, which are the last rows of `out`.

  Returns:
    The loss but for the router's; the rollouts' divergence and policy-gradient
    loss.
  """
  labels = rollouts.labels
  first = len(out.hidden) - len(labels.tokens)
  if isinstance(labels.teacher, divergences.TopK) and labels.vocabulary is None:
    loss, on_policy, imitation_loss = _rollouts_loss(
      cfg, student, out, measure, rollouts
    )
    loss += cfg.alpha * (1 - cfg.lam) * off_policy
    return loss, on_policy, imitation_loss
  on_policy = _masked_divergence(
    cfg, student, out, measure, labels, slice(first, None)
  )
  imitation_loss = policy_gradient.clipped_loss(
    _token_logprobs(cfg, student, out, first, labels.tokens),
    rollouts.old_logp[:, 1:],
    rollouts.advantage,
    # What weighs the divergence of a token says nothing of its credit.
    labels.weight[:, :-1] > 0,
  )
  distill_loss = (1 - cfg.lam) * off_policy + cfg.lam * on_policy
  loss = cfg.alpha * distill_loss + (1 - cfg.alpha) * imitation_loss
  return loss, on_policy, imitation_loss


def _rollouts_loss(
  cfg: consolidation_config.SeedingConfig,
  student: model_lib.Model,
  out: transformer.Output,
  measure: divergences.Divergence,
  rollouts: imitation.Rollouts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Both losses of the rollouts, and their sum, from one pass over logits."""
  labels = rollouts.labels

  def shift_left(x_RxT: jax.Array) -> jax.Array:
    return jnp.pad(x_RxT[:, 1:], ((0, 0), (0, 1)))

  divergence_weight = labels.weight / jnp.maximum(labels.weight.sum(), 1.0)
  predicts = jnp.arange(labels.weight.shape[1]) < labels.weight.shape[1] - 1
  gain_weight = policy_gradient.token_weights((labels.weight > 0) & predicts)
  advantage = jnp.broadcast_to(
    rollouts.advantage[:, None], divergence_weight.shape
  )
  credit = shift_left(labels.tokens), shift_left(rollouts.old_logp), advantage

  def per_token(hidden, matrix, rows):
    top, (target, old_logp, advantage), weights = rows
    logits = hidden @ matrix.T.astype(hidden.dtype)
    lumped = divergences.lump(logits, top.tokens)
    divergence = measure(top.logprobs, lumped)
    if cfg.temperature != 1.0:
      lumped = logits.astype(jnp.float32) / cfg.temperature
    # One row of the matrix for each token: no search among its logits.
    of_target = jnp.einsum(
      '...d,...d->...', hidden, matrix[target].astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    logp = of_target / cfg.temperature - jax.nn.logsumexp(lumped, axis=-1)
    gain = policy_gradient.clipped_gain(logp, old_logp, advantage)
    parts = weights[0] * divergence, -weights[1] * gain
    loss = cfg.alpha * cfg.lam * parts[0] + (1 - cfg.alpha) * parts[1]
    return loss, parts

  loss, parts = divergences.of_hidden(
    per_token, teacher_labels.tokens_at_once(cfg),
    out.hidden[-len(labels.tokens) :], student.unembedding(),
    (labels.teacher, credit, (divergence_weight, gain_weight)),
  )  # fmt: skip
  return loss.sum(), parts[0].sum(), parts[1].sum()


def _token_logprobs(
  cfg: consolidation_config.SeedingConfig,
  student: model_lib.Model,
  out: transformer.Output,
  first: int,
  tokens_RxT: jax.Array,
) -> at.Float[jax.Array, 'R _']:
  """Log-probabilities of all but the first token, in rows from `first` on.

  Of the policy that was sampled from, so at its temperature.
  """
  if not cfg.teacher_top_k:
    return student.map_logits(
      lambda logits, targets: losses.logprobs(
        logits / cfg.temperature, targets
      ),
      out.select(slice(first, None), slice(None, -1)),
      tokens_RxT[:, 1:],
    )
  matrix = student.unembedding() / cfg.temperature
  return divergences.chunked(
    lambda x: losses.logprobs(x[0] @ matrix.T.astype(x[0].dtype), x[1]),
    (out.hidden[first:, :-1], tokens_RxT[:, 1:]),
    teacher_labels.tokens_at_once(cfg),
  )


_measure = jax.jit(objective, static_argnums=1)


def _probe_kl(
  job: job_lib.SeedingJob,
  trained: at.Tree,
  student: model_lib.Model,
  probe: teacher_labels.LabeledBatch,
) -> float:
  """KL(teacher || student) on the probe's rows, nats per token."""
  with job.costs.phase('update') as cost:
    _, metrics = _measure(trained, job.cfg, job.target, student, probe, None)
    kl = float(metrics.kl)
    cost.add_forward(probe.tokens.size)
  return kl


def _imitate(
  job: job_lib.SeedingJob,
  student: model_lib.Model,
  replay: replay_lib.Replay,
  order: np.random.Generator,
  rng: at.Key,
) -> tuple[imitation.Rollouts, float]:
  """One round of on-policy rollouts, labelled, and their mean reward."""
  cfg = job.cfg
  size = cfg.prefixes * cfg.group * cfg.dream_length
  with job.costs.phase('rollout') as cost:
    rows = replay.sample_rows(order, cfg.prefixes)
    continuations = imitation.sample_continuations(
      cfg,
      job.tokenizer,
      student,
      jnp.asarray(replay.tokens[rows]),
      jnp.asarray(replay.lengths[rows]),
      rng,
    )
    jax.block_until_ready(continuations)
    cost.add_forward(size)
  with job.costs.phase('reward') as cost:
    rollouts, reward = imitation.score_rollouts(
      *(cfg, job.tokenizer.separator, job.teachers, continuations),
      imitation.judged_similarity(cfg, job.tokenizer, continuations),
    )
    mean = float(reward.mean())
    cost.add_forward(size, times=2 if job.teachers.previous is None else 5)
  return sharding.replicate(rollouts), mean


def _rows_of_steps(
  cfg: consolidation_config.SeedingConfig,
  rehearsal: rehearsal_lib.Rehearsal,
  order: np.random.Generator,
  steps: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of labels and rollouts that each step takes: `[K, B]`, `[K, R]`."""
  rows = rehearsal.sample_rows(order, steps, cfg.batch)
  groups = order.integers(0, cfg.prefixes, (steps, cfg.rollout_groups, 1))
  of_groups = (groups * cfg.group + np.arange(cfg.group)).reshape(steps, -1)
  return rows, of_groups
