"""Memory consolidation: Compute, Consolidate, Update (Sleep section 4).

Knowledge moves from a fast level (the sender) into one new low-rank expert of
the next slower level (the receiver), with no outside data, just before the
sender would be updated.
"""

import dataclasses
import functools

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib


@dataclasses.dataclass(frozen=True)
class TransferReport:
  """What one transfer did.

  kl_first, kl_last: KL(teacher || student) before and after, in nats per token,
    on the same dreams: a comparison of two batches would be mostly noise.
  transferred: whether it counted; if not, the old life was kept.
  curves: every step's measurements, see `seeding.Marks`.
  """

  transfer: schedule.Transfer
  slot: int
  kl_first: float
  kl_last: float
  transferred: bool
  curves: dict[str, np.ndarray]


def compute(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  memory: memory_lib.Memory,
  sender: int,
) -> memory_lib.Memory:
  """Compute: the prospective self, theta_new of the sender, not yet applied.

  The sender's pending update (Eq. 2) goes on top of its old weights (`carry`,
  the paper's letter) or of the weights it was born with (`restart`: a faster
  level begins anew whenever the next slower one has ticked, NL Eq. 72). Its
  old experts are reset either way: synaptic pruning. Recurrent states hold
  nothing but what was read, so they begin empty.
  """
  if sender == schedule.STATES:
    states = jax.tree.map(jnp.zeros_like, memory.states)
    return memory.replace(states=states)
  level = memory.levels[sender]
  fast = level.fast
  if how.sender_reset == 'restart':
    fresh = memory_lib.init_fast(cfg, sender)
    fast = fresh.replace(grads=fast.grads, chunks=fast.chunks)
  fast = _update_if_pending(cfg.levels[sender], fast)
  bank = level.bank.prune() if level.bank else None
  return memory.with_level(sender, fast=fast, bank=bank)


@functools.partial(jax.jit, static_argnums=0)
def _update_if_pending(
  level: config.LevelConfig, fast: memory_lib.Fast
) -> memory_lib.Fast:
  """Eq. 2's update of what has accumulated, if anything has."""
  return jax.lax.cond(
    fast.chunks > 0,
    functools.partial(wake.apply_update, level),
    lambda f: f,
    fast,
  )


def transfer(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  life: life_lib.Life,
  transfer: schedule.Transfer,
  tokenizer: tokenizers.Tokenizer,
  rng: at.Key,
  costs: costs_lib.CostTracker,
) -> tuple[life_lib.Life, TransferReport]:
  """One transfer. A sleep that fails leaves the life as it was, and says so.

  Raises:
    ConfigError: if the receiver's bank is full and the policy is `error`.
  """
  slot_key, seed_key, room_key = jax.random.split(rng, 3)
  untouched = life
  life = free_up_slot(
    cfg, how, life, transfer.receiver, tokenizer, room_key, ledger
  )

  # Compute. The teacher is the running self, the sender's old weights and
  # experts included; the student is the self that the sender's update leaves.
  selves = replay_lib.Teachers(
    awake=life.memory,
    old=life.previous_memory() if how.teachers == 'current+previous' else None,
  )
  prospective = compute(cfg, how, life.memory, transfer.sender)

  # Consolidate. One new expert learns what the update is about to take away.
  bank = prospective.levels[transfer.receiver].bank
  slot = bank.free_slot() if how.expand else 0
  if int(bank.status[slot]) == memory_lib.LOCKED:
    bank = bank.unlock(slot, life.clock.nights, slot_key)
  student = prospective.with_level(transfer.receiver, bank=bank)
  lesson = seeding.SeedingJob(
      cfg, how, life.params, selves, tokenizer, int(life.clock.nights),
      transfer.receiver, slot, ledger,
    )  # fmt: skip
  student, curves = seeding.seed(lesson, student, seed_key)
  report = _report(how, transfer, slot, curves)
  if not report.transferred:
    logging.warning(
      'Night %d: sleep could not transfer level %d to %d: KL went from %.4f '
      'to %.4f, above %.0f%% of the first; the old life is kept. Raise '
      'sleep.steps, model.levels[%d].rank or sleep.learning_rate.',
      int(life.clock.nights),
      transfer.sender + 1,
      transfer.receiver + 1,
      report.kl_first,
      report.kl_last,
      100 * how.max_kl_share,
      transfer.receiver,
    )
    return untouched, report

  # Update. The sender's new weights and the new expert come into force.
  return life.replace(memory=student), report


def _report(
  how: consolidation_config.SeedingConfig,
  transfer: schedule.Transfer,
  slot: int,
  curves: dict[str, np.ndarray],
) -> TransferReport:
  first, last = map(float, curves['probe'])
  done = np.isfinite(last) and last <= how.max_kl_share * first
  return TransferReport(
    transfer, slot, first, last, bool(done or not how.train_expert), curves
  )


def free_up_slot(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  life: life_lib.Life,
  level: int,
  tokenizer: tokenizers.Tokenizer,
  rng: at.Key,
  costs: costs_lib.CostTracker,
) -> life_lib.Life:
  """Frees a slot of a full bank as the policy says; never silently.

  `recycle` forgets the oldest expert. `merge` first teaches the next oldest
  what the oldest knows, on dreams of the self that still has both.
  """
  bank = life.memory.levels[level].bank
  if bank.free_slot() is not None or not how.expand:
    return life
  oldest, *younger = map(int, np.argsort(np.asarray(bank.created_night)))
  if how.slot_policy == 'merge' and not younger:
    raise config.ConfigError(
      f'sleep.slot_policy=merge needs two slots, but model.levels[{level}].'
      'slots=1; raise it, or set sleep.slot_policy=recycle.'
    )
  if how.slot_policy == 'error':
    raise config.ConfigError(
      f'night {int(life.clock.nights)}: all {len(bank.status)} slots of '
      f'level {level + 1} are in use; raise model.levels[{level}].slots, or '
      'set sleep.slot_policy=merge or recycle.'
    )
  logging.warning(
    'Night %d: level %d is full; slot %d is %sd.',
    int(life.clock.nights),
    level + 1,
    oldest,
    how.slot_policy,
  )
  without = bank.with_expert(
    oldest, jax.tree.map(jnp.zeros_like, bank.expert(oldest))
  ).set_status(oldest, memory_lib.LOCKED)
  memory = life.memory.with_level(level, bank=without)
  if how.slot_policy == 'merge':
    # The rested self teaches: what today brought is not the heir's business.
    rested = replay_lib.Teachers(awake=life.previous_memory(), old=None)
    gently = dataclasses.replace(how, alpha=1.0, lam=0.0, router_weight=0.0)
    lesson = seeding.SeedingJob(
      cfg, gently, life.params, rested, tokenizer, 0, level, younger[0], ledger
    )
    student, _ = seeding.seed(lesson, memory.with_fast_state(life.rested), rng)
    memory = memory.with_level(level, bank=student.levels[level].bank)
  return life.replace(memory=memory)
