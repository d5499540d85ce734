"""A night's consolidation: every level that is due, slowest first (Sleep 5)."""

from absl import logging
import jax

from sleep_jax import array_typing as at
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.metrics import costs as costs_lib


def night(
  cfg: consolidation_config.SeedingConfig,
  life: life_lib.Life,
  due: list[schedule.Transfer],
  tokenizer: tokenizers.Tokenizer,
  costs: costs_lib.CostTracker,
) -> tuple[life_lib.Life, at.Metrics]:
  """Transfers what is due; without `cfg.consolidate` the life is left alone.

  Args:
    cfg: the settings.
    life: after its day.
    due: tonight's transfers, see `schedule.transfers`.
    tokenizer: of the task.
    costs: where tokens, FLOPs and seconds are written down.

  Returns:
    The life after them, and figures of each transfer by name.
  """
  if not cfg.consolidate:
    return life, {}
  if not due:
    logging.warning(
      'Night %d: no level is due; %d tokens per row were read since the '
      'last sleep. Lower model.levels[].sleep_every, or read more.',
      int(life.clock.nights),
      int(life.clock.tokens - life.clock.tokens_at_last_sleep),
    )
  metrics = {'transfers': float(len(due))}
  night_key = jax.random.fold_in(life.rng, life.clock.nights)
  # Taken before anything moves: after a first transfer the bank knows today.
  previous = life.previous_memory()
  for pair in due:
    # A transfer from states is the only one of its night.
    key = night_key
    if pair.sender != schedule.STATES:
      key = jax.random.fold_in(night_key, pair.sender)
    life, report = transfer_lib.transfer(
      cfg, life, pair, previous, tokenizer, costs, key
    )
    metrics |= report.metrics()
  return life, metrics
