"""One transfer: Compute, Consolidate, Update (Sleep section 4).

Knowledge moves from a fast level (the sender) into one new low-rank expert of
the next slower level (the receiver), with no outside data, just before the
sender is updated.
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
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import rehearsal as rehearsal_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import slots as slots_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib


@dataclasses.dataclass(frozen=True)
class TransferReport:
  """What one transfer did.

  kl_first, kl_last: KL(teacher || student) before and after, in nats per token,
    on the same rows: a comparison of two batches would be mostly noise.
  transferred: whether it counted; if not, the life was left as it was.
  curves: every step's measurements, see `seeding.StepMetrics`.
  freeing: of how a slot was freed before, see `slots.free_up_slot`.
  """

  transfer: schedule.Transfer
  slot: int
  kl_first: float
  kl_last: float
  transferred: bool
  curves: dict[str, np.ndarray]
  freeing: at.Metrics

  def metrics(self) -> at.Metrics:
    """Figures by name; level 0 is the states of recurrent mixers."""
    sender, receiver = self.transfer
    name = f'{sender + 1}to{receiver + 1}'
    tenth = max(1, len(self.curves['loss']) // 10)
    return {
      f'{name}/kl_first': self.kl_first,
      f'{name}/kl_last': self.kl_last,
      f'{name}/transferred': float(self.transferred),
      f'{name}/slot': float(self.slot),
      f'{name}/router': float(self.curves['router'][-tenth:].mean()),
      f'{name}/on_policy': float(self.curves['on_policy'][-tenth:].mean()),
      f'{name}/reward_first': float(self.curves['reward'][0]),
      f'{name}/reward_last': float(self.curves['reward'][-1]),
      **{f'{name}/{key}': value for key, value in self.freeing.items()},
    }


def transfer(
  cfg: consolidation_config.SeedingConfig,
  life: life_lib.Life,
  pair: schedule.Transfer,
  previous: memory_lib.Memory,
  tokenizer: tokenizers.Tokenizer,
  costs: costs_lib.CostTracker,
  rng: at.Key,
) -> tuple[life_lib.Life, TransferReport]:
  """Consolidates sender into receiver; one that fails changes nothing.

  Args:
    cfg: the settings.
    life: after its day and after the night's earlier transfers.
    pair: sender and receiver.
    previous: the memory before this day, at the start of the night.
    tokenizer: of the task.
    costs: where tokens, FLOPs and seconds are written down.
    rng: random key.

  Raises:
    ConfigError: if the receiver's bank is full and the policy is `error`.
  """
  slot_key, seed_key, free_key = jax.random.split(rng, 3)
  original = life
  life, freeing = slots_lib.free_up_slot(
    cfg, life, pair.receiver, previous, tokenizer, costs, free_key
  )

  # Compute. The teacher is the model as it runs, the sender's weights and all
  # experts included; the student is what the sender's update makes of it.
  teachers = replay_lib.Teachers(
    current=original.model.merged(),
    previous_memory=previous if cfg.teachers == 'current+previous' else None,
  )
  student = compute(cfg, life.model.merged(), pair.sender)

  # Consolidate. One new expert learns what the update is about to take away.
  bank, slot = student.bank(pair.receiver), 0
  if cfg.expand:
    slot = bank.required_free_slot()
  if int(bank.status[slot]) == memory_lib.LOCKED:
    bank = bank.unlock(slot, life.clock.nights, slot_key)
  student = student.with_level(pair.receiver, bank=bank)
  target = job_lib.WholeBank if cfg.retrain_experts else job_lib.SlotId
  job = job_lib.SeedingJob(
    cfg,
    teachers,
    target(pair.receiver, slot),
    int(life.clock.nights),
    tokenizer,
    costs,
    life.frames,
    rehearsal_lib.archive_of(cfg, life),
  )
  seeded = seeding.seed(job, student, seed_key)
  report = _report(cfg, pair, slot, seeded.curves, freeing)
  if not report.transferred:
    _warn_of_failure(cfg, report, int(life.clock.nights))
    return original, report

  # Update. The sender's new weights and the new expert come into force.
  if seeded.archive is not None:
    life = life.replace(archive=seeded.archive)
  return life.with_memory(seeded.student.required_memory()), report


def compute(
  cfg: consolidation_config.SeedingConfig, model: model_lib.Model, sender: int
) -> model_lib.Model:
  """Compute: the prospective model, theta_new of the sender, not yet applied.

  The sender's pending update (Eq. 2) goes on top of its old weights (`carry`,
  the paper's letter) or of its initial weights (`restart`: a faster level
  begins anew whenever the next slower one has been updated, NL Eq. 72). Its
  old experts are reset either way: synaptic pruning. Recurrent states hold
  nothing but what was read, so they become zero.
  """
  memory = model.required_memory()
  if sender == schedule.STATES:
    states = jax.tree.map(jnp.zeros_like, memory.states)
    return model.with_memory(memory.replace(states=states))
  level, fast = memory.levels[sender], memory.fast(sender)
  if cfg.sender_reset == 'restart':
    initial = memory_init.init_fast(model.cfg, sender)
    fast = initial.replace(grads=fast.grads, chunks=fast.chunks)
  fast = _update_if_pending(model.cfg.levels[sender], fast)
  bank = level.bank.prune() if level.bank else None
  return model.with_level(sender, fast=fast, bank=bank)


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


def _report(
  cfg: consolidation_config.SeedingConfig,
  pair: schedule.Transfer,
  slot: int,
  curves: dict[str, np.ndarray],
  freeing: at.Metrics,
) -> TransferReport:
  first, last = map(float, curves['probe'])
  done = np.isfinite(last) and last <= cfg.max_kl_share * first
  return TransferReport(
    pair, slot, first, last, bool(done or not cfg.train_expert), curves, freeing
  )


def _warn_of_failure(
  cfg: consolidation_config.SeedingConfig, report: TransferReport, night: int
) -> None:
  logging.warning(
    'Night %d: level %d could not be transferred to level %d: KL went from '
    '%.4f to %.4f, above %.0f%% of the first; the life is left as it was. '
    'Raise sleep.steps, model.levels[%d].rank or sleep.learning_rate.',
    night,
    report.transfer.sender + 1,
    report.transfer.receiver + 1,
    report.kl_first,
    report.kl_last,
    100 * cfg.max_kl_share,
    report.transfer.receiver,
  )
