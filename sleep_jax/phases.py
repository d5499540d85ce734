"""A day and a night of a life, with their reports.

A night comes when it is called for, whatever the clock says.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import time

import numpy as np

from sleep_jax import config
from sleep_jax import plan as plan_lib
from sleep_jax import reports
from sleep_jax.data import documents as documents_lib
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.learners import sleep as sleep_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import night as consolidation_night
from sleep_jax.metrics import costs as costs_lib

_PHASES = ('rollout', 'teacher', 'update')  # Of a night, in `CostTracker`.


def day(
  learner: sleep_lib.Sleep,
  life: life_lib.Life,
  documents: Sequence[documents_lib.Encoded],
  plan: plan_lib.Plan,
  tell: Callable[[float], None],
) -> tuple[life_lib.Life, reports.DayReport]:
  """The life in the evening, and what it read.

  Args:
    learner: whose life it is.
    life: in the morning.
    documents: of the day.
    plan: how often they are read, and in rows of how many tokens.
    tell: told the share of the day that is done.
  """
  start, pad = time.perf_counter(), learner.setup.tokenizer.pad
  rows = documents_lib.passes(
    documents,
    (plan.passes, plan.window),
    pad,
    [int(life.clock.tokens), int(life.clock.nights)],
  )
  blocks = documents_lib.blocks(rows, learner.cfg.wake.batch)
  frames = tuple(dict.fromkeys(document.frame for document in documents))
  losses = []
  for i, (tokens, weight) in enumerate(blocks):
    block = experience_lib.Experience(tokens, weight, frames=frames)
    life, metrics = learner.wake(life, block)
    losses.append(metrics['loss'])
    tell((i + 1) / len(blocks))
  one_pass = len(blocks) // plan.passes
  return life, reports.DayReport(
    tokens=sum(map(len, documents)),
    rows=len(rows[0].tokens),
    split=rows[0].split,
    loss_first=float(np.mean(losses[:one_pass])),
    loss_last=float(np.mean(losses[-one_pass:])),
    seconds=time.perf_counter() - start,
  )


def night(
  cfg: consolidation_config.SeedingConfig,
  life: life_lib.Life,
  tokenizer: tokenizers.Tokenizer,
  costs: costs_lib.CostTracker,
) -> tuple[life_lib.Life, reports.NightReport]:
  """The life in the morning, and what the night did.

  Raises:
    ConfigError: if nothing was read since the last night, or no slot is free.
  """
  clock, start = life.clock, time.perf_counter()
  if int(clock.tokens) == int(clock.tokens_at_last_sleep):
    raise config.ConfigError(
      'nothing was read since the last night, so there is nothing to move; '
      'wake first.'
    )
  check_slot(cfg, life)
  life, metrics = consolidation_night.night(
    cfg, life, _due(life), tokenizer, costs
  )
  seconds = time.perf_counter() - start
  report = reports.night_report(int(clock.nights) + 1, metrics, seconds)
  return life_lib.end_night(life), report


def check_slot(
  cfg: consolidation_config.SeedingConfig, life: life_lib.Life
) -> None:
  """Refuses a day or a night for which no slot is free.

  Raises:
    ConfigError: with the number of slots to load the life with.
  """
  bank = life.memory.bank(_sender(life.model.cfg) + 1)
  slots = life.model.cfg.levels[_sender(life.model.cfg) + 1].slots
  if bank.num_used() == slots and cfg.slot_policy == 'error':
    raise config.ConfigError(
      f'all {slots} slots hold an expert after {int(life.clock.nights)} '
      'nights, and none is free for the next; save, and load with slots='
      f'{2 * slots}, or with a seeding whose slot_policy is merge or recycle.'
    )


def free_slots(life: life_lib.Life) -> int:
  """Nights that the life has room for, where none frees a slot."""
  level = _sender(life.model.cfg) + 1
  return life.model.cfg.levels[level].slots - life.memory.bank(level).num_used()


@contextlib.contextmanager
def watched(
  costs: costs_lib.CostTracker, flops: float, tell: Callable[[float], None]
) -> Iterator[None]:
  """Tells which share of a night's arithmetic, `flops`, is done."""

  def done() -> float:
    totals = costs.totals()
    return sum(totals[phase]['flops'] for phase in _PHASES)

  before = done()
  costs.on_phase = lambda steps: tell(min(1.0, (done() - before) / flops))
  try:
    yield
  finally:
    costs.on_phase = None


def _due(life: life_lib.Life) -> list[schedule.Transfer]:
  """What a night consolidates: what is due, or else the fastest sender."""
  cfg, clock = life.model.cfg, life.clock
  due = schedule.transfers(
    cfg, int(clock.tokens_at_last_sleep), int(clock.tokens)
  )
  return due or [schedule.Transfer(_sender(cfg), _sender(cfg) + 1)]


def _sender(cfg: config.ModelConfig) -> int:
  """The fastest level that is ever consolidated.

  Raises:
    ConfigError: if there is none.
  """
  for i, level in enumerate(cfg.levels):
    if level.sleep_every:
      return i
  raise config.ConfigError(
    'no level of this model is ever consolidated; set levels[].sleep_every.'
  )
