"""Knowledge Seeding: upward distillation into one new expert (Sleep 4).

The objective, maximised in the paper and minimised here:

  J_KS = E_x[(1 - alpha) E_y~student[r(y)] - alpha E_y D(teacher || student)]

with GKD's mixture of dreams (1 - lambda) and the student's own rollouts
(lambda) for the divergence, and Learning to Imitate for the reward. Only the
new expert trains; everything else is an argument that nobody differentiates.
"""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import dreams
from sleep_jax.lifecycle import imitation
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient
from sleep_jax.runtime import accounts


@struct.dataclass
class Marks:
  """What one seeding step measures, before its update; nats per token."""

  loss: jax.Array
  kl: jax.Array  # KL(teacher || student) on dreams, whatever F is.
  divergence: jax.Array  # F on dreams.
  on_policy: jax.Array  # F on the student's own rollouts.
  imitation: jax.Array  # The policy-gradient loss.
  router: jax.Array  # Provenance cross-entropy.


def optimizer(how: config.SeedingConfig) -> optax.GradientTransformation:
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
      muon_weight_dimension_numbers=_matrices,
      consistent_rms=0.2,  # Steps of Adam's size: one learning rate for both.
    ),
  }
  rule = config.choose(how.optimizer, rules, 'sleep.optimizer')
  return optax.chain(optax.clip_by_global_norm(1.0), rule())


def _matrices(expert: memory_lib.Expert) -> memory_lib.Expert:
  """Which leaves are stacks of matrices, for Muon: A and B, layer by layer."""
  matrix = optax.contrib.MuonDimensionNumbers(1, 2)
  return memory_lib.Expert(a=matrix, b=matrix, router=None, bias=None)


def _weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
  return (x * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def objective(
  expert: memory_lib.Expert,
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  level: int,
  params: t.Params,
  student: memory_lib.Memory,
  slot: jax.Array,
  dreamt: dreams.Judged,
  rolled: imitation.Rollouts | None,
) -> tuple[jax.Array, Marks]:
  """-J_KS of one batch, with the router's provenance loss beside it."""
  bank = student.levels[level].bank.with_expert(slot, expert)
  memory = student.with_level(level, bank=bank)
  both = (
    dreamt
    if rolled is None
    else jax.tree.map(
      lambda a, b: jnp.concatenate([a, b]), dreamt, rolled.judged
    )
  )
  out = transformer.forward(
    cfg, params, both.tokens, memory, positions=both.positions
  )
  n = dreamt.tokens.shape[0]
  measure = divergences.divergence(how.divergence, how.beta)
  kl = divergences.forward_kl(dreamt.teacher, out.logits[:n])
  kl = _weighted(kl, dreamt.weight)
  if how.divergence == 'forward_kl':
    off_policy = kl
  else:
    off_policy = _weighted(
      measure(dreamt.teacher, out.logits[:n]), dreamt.weight
    )
  gate = optax.sigmoid_binary_cross_entropy(
    jnp.take(out.routes[level], slot, axis=-1), both.gate
  ).mean(0)
  router = _weighted(gate, both.gate_weight)
  if rolled is None:
    on_policy = reward_loss = jnp.zeros(())
    distil = off_policy
  else:
    mine = rolled.judged
    on_policy = _weighted(measure(mine.teacher, out.logits[n:]), mine.weight)
    distil = (1 - how.lam) * off_policy + how.lam * on_policy
    logp = losses.token_logprobs(out.logits[n:], mine.tokens)
    reward_loss = policy_gradient.clipped_loss(
      logp, rolled.old_logp[:, 1:], rolled.advantage, mine.weight[:, :-1]
    )
  loss = how.alpha * distil + (1 - how.alpha) * reward_loss
  loss += how.router_weight * router
  marks = Marks(loss, kl, off_policy, on_policy, reward_loss, router)
  return loss, marks


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def seed_steps(
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  level: int,
  expert: memory_lib.Expert,
  opt_state: Any,
  params: t.Params,
  student: memory_lib.Memory,
  slot: jax.Array,
  dreamt: dreams.Judged,
  rolled: imitation.Rollouts | None,
  dream_rows: t.Int[jax.Array, 'K B'],
  rollout_rows: t.Int[jax.Array, 'K R'],
) -> tuple[memory_lib.Expert, Any, Marks]:
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
    return (expert, opt_state), marks

  (expert, opt_state), marks = jax.lax.scan(
    step, (expert, opt_state), (dream_rows, rollout_rows)
  )
  return expert, opt_state, marks


def seed(
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  params: t.Params,
  selves: dreams.Selves,
  student: memory_lib.Memory,
  level: int,
  slot: int,
  tokenizer: tokenizers.Tokenizer,
  nights: int,
  rng: t.Key,
  ledger: accounts.Ledger,
) -> tuple[memory_lib.Memory, dict[str, np.ndarray]]:
  """Trains the expert in `slot` of `level` to make the student a teacher.

  Args:
    cfg: the model.
    how: the seeding's settings.
    params: backbone weights.
    selves: the teachers; never changed.
    student: the prospective self, `slot` already unlocked.
    level: index of the receiving level.
    slot: the expert to train.
    tokenizer: tells where dreams, and their segments, begin and end.
    nights: how many nights the old self speaks for.
    rng: random key.
    ledger: where tokens, FLOPs and seconds are written down.

  Returns:
    The student after seeding, and the curves of `Marks` (`[steps]`) together
    with `reward` (`[rounds]`).
  """
  dream_key, order_key, roll_key = jax.random.split(rng, 3)
  with ledger.phase('rollout') as account:
    dreamt = dreams.dream(
      cfg, how, params, selves, tokenizer, nights, dream_key
    )
    account.forward(dreamt.tokens.size)
  with ledger.phase('teacher') as account:
    judged = dreams.judge_all(cfg, how, params, selves, dreamt)
    jax.block_until_ready(judged)
    times = 1 if selves.old is None else 2
    account.forward(dreamt.tokens.size, times=times)

  # From here on the slot is routed as it will be when it is in force, so that
  # what it learns, and what it displaces, is what the next day will find.
  bank = student.levels[level].bank.mark(slot, memory_lib.ACTIVE)
  student = student.with_level(level, bank=bank)
  expert = jax.tree.map(jnp.copy, bank.expert(slot))
  opt_state = optimizer(how).init(expert)
  order = dreams.host_rng(order_key)
  imitates = how.alpha < 1.0 or how.lam > 0.0
  curves, reward_curve = [], []
  for start in range(0, how.steps, how.rollout_every):
    steps = min(how.rollout_every, how.steps - start)
    rolled = None
    if imitates:
      bank = student.levels[level].bank.with_expert(slot, expert)
      rolled, reward = _imitate(
        cfg,
        how,
        params,
        selves,
        student.with_level(level, bank=bank),
        dreamt,
        tokenizer,
        order,
        jax.random.fold_in(roll_key, start),
        ledger,
      )
      reward_curve.append(reward)
    rows = dreamt.pick(order, steps, how.batch)
    groups = order.integers(0, how.prefixes, (steps, how.rollout_groups, 1))
    of_groups = (groups * how.group + np.arange(how.group)).reshape(steps, -1)
    with ledger.phase('update') as account:
      expert, opt_state, marks = seed_steps(
        cfg,
        how,
        level,
        expert,
        opt_state,
        params,
        student,
        jnp.asarray(slot),
        judged,
        rolled,
        rows,
        of_groups,
      )
      curves.append(jax.device_get(marks))
      per_step = rows.shape[1] + (of_groups.shape[1] if imitates else 0)
      account.partial(steps * per_step * how.dream_length, steps=steps)
  bank = student.levels[level].bank.with_expert(slot, expert)
  curves = jax.tree.map(lambda *x: np.concatenate(x), *curves)
  curves = {k: getattr(curves, k) for k in Marks.__dataclass_fields__}
  curves['reward'] = np.array(reward_curve or [0.0])
  return student.with_level(level, bank=bank), curves


def _imitate(
  cfg,
  how,
  params,
  selves,
  student,
  dreamt,
  tokenizer,
  order,
  rng,
  ledger,
) -> tuple[imitation.Rollouts, float]:
  """One round of on-policy rollouts, judged and marked."""
  with ledger.phase('rollout') as account:
    pick = dreamt.pick(order, how.prefixes)
    pieces = imitation.roll_out(
      cfg,
      how,
      tokenizer,
      params,
      student,
      jnp.asarray(dreamt.tokens[pick]),
      jnp.asarray(dreamt.lengths[pick]),
      rng,
    )
    jax.block_until_ready(pieces)
    size = how.prefixes * how.group * how.dream_length
    account.forward(size)
  with ledger.phase('reward') as account:
    rolled, reward = imitation.mark(
      cfg, how, tokenizer.separator, params, selves, *pieces
    )
    reward = float(reward.mean())
    account.forward(size, times=2 if selves.old is None else 5)
  return rolled, reward
