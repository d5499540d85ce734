"""Knowledge Seeding: upward distillation into one new expert (Sleep 4).

The objective, maximised in the paper and minimised here:

  J_KS = E_x[(1 - alpha) E_y~student[r(y)] - alpha E_y D(teacher || student)]

with GKD's mixture of dreams (1 - lambda) and the student's own rollouts
(lambda) for the divergence, and Learning to Imitate for the reward. Only the
new expert trains; everything else is an argument that nobody differentiates.
"""

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding


@struct.dataclass
class StepMetrics:
  """What one seeding step measures, before its update; nats per token."""

  loss: jax.Array
  kl: jax.Array  # KL(teacher || student) on dreams, whatever F is.
  divergence: jax.Array  # F on dreams.
  on_policy: jax.Array  # F on the student's own rollouts.
  imitation: jax.Array  # The policy-gradient loss.
  router: jax.Array  # Provenance cross-entropy.


def optimizer(
  how: consolidation_config.SeedingConfig,
) -> optax.GradientTransformation:
  """Adam, or Muon on A and B; a short warm-up, then a cosine descent."""
  warm = min(10, how.steps // 10)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, how.learning_rate, warm, how.steps, 0.05 * how.learning_rate
  )
  rules = {
    'adam': lambda: optax.adam(schedule),
    'muon': lambda: optax.contrib.muon(
      schedule,
      # The router turns slower than the matrices: a gate that falls below the
      # null choice gets no gradient, and never comes back.
      adam_learning_rate=lambda step: 0.25 * schedule(step),
      muon_weight_dimension_numbers=_muon_dimensions,
      consistent_rms=0.2,  # Steps of Adam's size: one learning rate for both.
    ),
  }
  rule = config.lookup(how.optimizer, rules, 'sleep.optimizer')
  return optax.chain(optax.clip_by_global_norm(1.0), rule())


def _muon_dimensions(expert: memory_lib.Expert) -> memory_lib.Expert:
  """Which leaves are stacks of matrices, for Muon: A and B, layer by layer."""
  matrix = optax.contrib.MuonDimensionNumbers(1, 2)
  return memory_lib.Expert(a=matrix, b=matrix, router=None, bias=None)


def masked_mean(x: jax.Array, weight: jax.Array) -> jax.Array:
  return (x * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def _token_logprobs(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  params: at.Params,
  out: transformer.Output,
  first: int,
  tokens_RxT: jax.Array,
) -> at.Float[jax.Array, 'R T-1']:
  """Log-probabilities of all but the first token, in rows from `first` on."""
  if not how.teacher_top_k:
    return losses.token_logprobs(out.logits[first:], tokens_RxT)
  matrix = transformer.unembedding(cfg, params)
  return divergences.chunked(
    lambda x: losses.logprobs(x[0] @ matrix.T.astype(x[0].dtype), x[1]),
    (out.hidden[first:, :-1], tokens_RxT[:, 1:]),
    how.tokens_in_flight,
  )


def objective(
  expert: memory_lib.Expert,
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  level: int,
  params: at.Params,
  student: memory_lib.Memory,
  slot: jax.Array,
  dreamt: teacher_labels.LabeledBatch,
  rolled: imitation.Rollouts | None,
) -> tuple[jax.Array, StepMetrics]:
  """-J_KS of one batch, with the router's provenance loss beside it."""
  bank = student.levels[level].bank.with_expert(slot, expert)
  memory = student.with_level(level, bank=bank)
  parts = [dreamt] if rolled is None else [dreamt, rolled.judged]
  both = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  both = sharding.shard_batch(both, 'batch')
  out = transformer.forward(
    cfg, params, both.tokens, memory, positions=both.positions
  )
  n = dreamt.tokens.shape[0]
  measure = divergences.divergence(how.divergence, how.beta)

  def apart(
    measure: divergences.Divergence,
    judged: teacher_labels.LabeledBatch,
    own: slice,
  ):
    if how.teacher_top_k:
      student = (out.hidden[own], transformer.unembedding(cfg, params))
      per_token = divergences.from_hidden(
        measure, judged.teacher, student, chunk=how.tokens_in_flight
      )
    else:
      per_token = measure(judged.teacher, out.logits[own])
    return masked_mean(per_token, judged.weight)

  off_policy = apart(measure, dreamt, slice(n))
  kl = off_policy
  if how.divergence != 'forward_kl':
    kl = apart(divergences.forward_kl, dreamt, slice(n))
  distil, on_policy, unlike = off_policy, jnp.zeros(()), jnp.zeros(())
  if rolled is not None:
    mine = rolled.judged
    on_policy = apart(measure, mine, slice(n, None))
    distil = (1 - how.lam) * off_policy + how.lam * on_policy
    unlike = policy_gradient.clipped_loss(
      _token_logprobs(cfg, how, params, out, n, mine.tokens),
      rolled.old_logp[:, 1:],
      rolled.advantage,
      mine.weight[:, :-1],
    )
  gate = optax.sigmoid_binary_cross_entropy(
    jnp.take(out.routes[level], slot, axis=-1), both.gate
  )
  router = masked_mean(gate.mean(0), both.gate_weight)
  loss = how.alpha * distil + (1 - how.alpha) * unlike
  loss += how.router_weight * router
  return loss, StepMetrics(loss, kl, off_policy, on_policy, unlike, router)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def seed_steps(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  level: int,
  expert: memory_lib.Expert,
  opt_state: Any,
  params: at.Params,
  student: memory_lib.Memory,
  slot: jax.Array,
  dreamt: teacher_labels.LabeledBatch,
  rolled: imitation.Rollouts | None,
  dream_rows: at.Int[jax.Array, 'K B'],
  rollout_rows: at.Int[jax.Array, 'K R'],
) -> tuple[memory_lib.Expert, Any, StepMetrics]:
  """K steps of seeding in one program; gradients exist for `expert` alone."""

  def step(carry, index):
    expert, opt_state = carry
    some = None if rolled is None else rolled.rows(index[1])
    grads, marks = jax.grad(objective, has_aux=True)(
      expert,
      cfg,
      how,
      level,
      params,
      student,
      slot,
      dreamt.rows(index[0]),
      some,
    )
    update, opt_state = optimizer(how).update(grads, opt_state, expert)
    if how.train_expert:
      expert = optax.apply_updates(expert, update)
    return sharding.shard_params((expert, opt_state)), marks

  (expert, opt_state), marks = jax.lax.scan(
    step, (expert, opt_state), (dream_rows, rollout_rows)
  )
  return expert, opt_state, marks


_PROBE_ROWS = 64  # Dreams on which a lesson is judged, before and after.
_measure = jax.jit(objective, static_argnums=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class SeedingJob:
  """Who teaches, by what settings, and which expert learns.

  cfg: the model; params: its backbone weights.
  how: the seeding's settings.
  selves: the teachers; never changed.
  tokenizer: tells where dreams, and their segments, begin and end.
  nights: how many nights the old self speaks for.
  level, slot: the expert to train.
  ledger: where tokens, FLOPs and seconds are written down.
  """

  cfg: config.ModelConfig
  how: consolidation_config.SeedingConfig
  params: at.Params
  selves: replay_lib.Teachers
  tokenizer: tokenizers.Tokenizer
  nights: int
  level: int
  slot: int
  costs: costs_lib.CostTracker

  @property
  def uses_rollouts(self) -> bool:
    """Whether the student's own rollouts are of any use."""
    return self.how.alpha < 1.0 or self.how.lam > 0.0


def seed(
  lesson: SeedingJob, student: memory_lib.Memory, rng: at.Key
) -> tuple[memory_lib.Memory, dict[str, np.ndarray]]:
  """Trains one expert of the student until the student is its teachers' equal.

  Args:
    lesson: everything that stays as it is.
    student: the prospective self, the lesson's slot already unlocked.
    rng: random key.

  Returns:
    The student after seeding, and the curves of `Marks` (`[steps]`) together
    with `reward` (`[rounds]`) and `probe`: KL(teacher || student) before and
    after, on the same dreams.
  """
  dream_key, order_key, roll_key = jax.random.split(rng, 3)
  dreamt, judged = _dream(lesson, dream_key)
  how, level, slot = lesson.how, lesson.level, lesson.slot
  # From here on the slot is routed as it will be when it is in force, so that
  # what it learns, and what it displaces, is what the next day will find.
  bank = student.levels[level].bank.mark(slot, memory_lib.ACTIVE)
  student = student.with_level(level, bank=bank)
  expert = sharding.shard_params(jax.tree.map(jnp.copy, bank.expert(slot)))
  opt_state = sharding.shard_params(optimizer(how).init(expert))
  probed = judged.rows(
    dreamt.sample_rows(order_lib.numpy_rng(jax.random.fold_in(rng, 1)), _PROBE_ROWS)
  )
  probed = sharding.shard_batch(probed, 'batch')

  def probe(expert: memory_lib.Expert) -> float:
    with lesson.costs.phase('update') as account:
      marks = _measure(
              expert, lesson.cfg, how, level, lesson.params, student,
              jnp.asarray(slot), probed, None,
            )[1]  # fmt: skip
      kl = float(marks.kl)
      account.add_forward(probed.tokens.size)
    return kl

  before = probe(expert)
  order = order_lib.numpy_rng(order_key)
  curves, rewards, rolled = [], [], None
  for start in range(0, how.steps, how.rollout_every):
    steps = min(how.rollout_every, how.steps - start)
    if lesson.uses_rollouts:
      now = student.with_level(level, bank=bank.with_expert(slot, expert))
      key = jax.random.fold_in(roll_key, start)
      rolled, reward = _imitate(lesson, now, dreamt, order, key)
      rewards.append(reward)
    rows = dreamt.sample_rows(order, steps, how.batch)
    groups = order.integers(0, how.prefixes, (steps, how.rollout_groups, 1))
    of_groups = (groups * how.group + np.arange(how.group)).reshape(steps, -1)
    with lesson.costs.phase('update') as account:
      expert, opt_state, marks = seed_steps(
              lesson.cfg, how, level, expert, opt_state, lesson.params, student,
              jnp.asarray(slot), judged, rolled,
              *sharding.shard_batch((rows, of_groups), None, 'batch'),
            )  # fmt: skip
      curves.append(sharding.fetch(marks))
      name = f'sleep, seeding of level {level + 1}'
      finite.check_finite(name, curves[-1].loss, expert, first_step=start)
      per_step = how.batch + (of_groups.shape[1] if lesson.uses_rollouts else 0)
      account.add_partial_training(steps * per_step * how.dream_length, steps=steps)
  probes = np.array([before, probe(expert)])
  student = student.with_level(level, bank=bank.with_expert(slot, expert))
  curves = jax.tree.map(lambda *x: np.concatenate(x), *curves)
  curves = {k: getattr(curves, k) for k in StepMetrics.__dataclass_fields__}
  reward = np.array(rewards or [0.0])
  return student, curves | {'reward': reward, 'probe': probes}


def _dream(
  lesson: SeedingJob, rng: at.Key
) -> tuple[replay_lib.Replay, teacher_labels.LabeledBatch]:
  """The lesson's data: dreams, and what their owners make of every token."""
  cfg, how, params, selves = (
      lesson.cfg, lesson.how, lesson.params, lesson.selves
    )  # fmt: skip
  with lesson.costs.phase('rollout') as account:
    dreamt = replay_lib.sample_replay(
      cfg, how, params, selves, lesson.tokenizer, lesson.nights, rng
    )
    account.add_forward(dreamt.tokens.size)
  with lesson.costs.phase('teacher') as account:
    judged = teacher_labels.label_all(cfg, how, params, selves, dreamt)
    # Every device has all dreams, and takes its own rows of a batch.
    judged = jax.block_until_ready(sharding.replicate(judged))
    times = 1 if selves.old is None else 2
    account.add_forward(dreamt.tokens.size, times=times)
  return dreamt, judged


def _imitate(
  lesson: SeedingJob,
  student: memory_lib.Memory,
  dreamt: replay_lib.Replay,
  order: np.random.Generator,
  rng: at.Key,
) -> tuple[imitation.Rollouts, float]:
  """One round of on-policy rollouts, judged and marked; and their reward."""
  cfg, how, params = lesson.cfg, lesson.how, lesson.params
  size = how.prefixes * how.group * how.dream_length
  with lesson.costs.phase('rollout') as account:
    pick = dreamt.sample_rows(order, how.prefixes)
    pieces = imitation.roll_out(
          cfg, how, lesson.tokenizer, params, student,
          jnp.asarray(dreamt.tokens[pick]), jnp.asarray(dreamt.lengths[pick]), rng,
        )  # fmt: skip
    jax.block_until_ready(pieces)
    account.add_forward(size)
  with lesson.costs.phase('reward') as account:
    rolled, reward = imitation.score_rollouts(
      cfg, how, lesson.tokenizer.separator, params, lesson.selves, *pieces
    )
    reward = float(reward.mean())
    account.add_forward(size, times=2 if lesson.selves.old is None else 5)
  return sharding.replicate(rolled), reward
