"""Learners that read with the Continuum Memory System: wake_only and sleep."""

from absl import logging
import jax

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.inference import scoring
from sleep_jax.learners import base as learner_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import night as consolidation_night
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib
from sleep_jax.runtime import finite


class WakeOnly:
  """Hope without distillation: fast levels learn on, nothing is moved."""

  holds_pending = False

  def __init__(self, setup: learner_lib.Setup):
    self.setup = setup

  def init(self, rng: at.Key) -> life_lib.Life:
    return life_lib.init_life(self.setup.model, self.setup.params, rng)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    s = self.setup
    tokens, weight = padding.pad_to_batches(experience, s.wake.batch)
    with s.costs.phase('wake') as account:
      memory, clock, loss = wake_lib.wake(
        s.model,
        s.wake,
        life.params,
        life.memory,
        life.clock.tokens,
        tokens,
        weight,
        defer_due_update=self.defer_due_update,
      )
      loss = jax.block_until_ready(loss)
      account.add_online(tokens.size, steps=loss.size)
    finite.check_finite('wake', loss, memory)
    tenth = max(1, loss.size // 10)
    life = life.replace(memory=memory, clock=life.clock.replace(tokens=clock))
    return life, {
      'loss_first': float(loss[:tenth].mean()),
      'loss_last': float(loss[-tenth:].mean()),
      'loss': float(loss.mean()),
    }

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    return life_lib.end_night(life), {}

  def respond(self, life, prompts, answers) -> experience_lib.Response:
    return scoring.score(self.setup, life.params, life.memory, prompts, answers)


class Sleep(WakeOnly):
  """Wake, then consolidate what is due, slowest first (Sleep section 5)."""

  holds_pending = True

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    s, metrics = self.setup, {}
    due = schedule.transfers(
      s.model, int(life.clock.tokens_at_last_sleep), int(life.clock.tokens)
    )
    if not due:
      logging.warning(
        'Night %d: no level is due; %d tokens per lane were read since the '
        'last sleep. Lower model.levels[].sleep_every, or read more.',
        int(life.clock.nights),
        int(life.clock.tokens - life.clock.tokens_at_last_sleep),
      )
    rng = jax.random.fold_in(life.rng, life.clock.nights)
    for transfer in due:
      life, report = transfer_lib.transfer(
        s.model,
        s.sleep,
        life,
        transfer,
        s.tokenizer,
        jax.random.fold_in(rng, transfer.sender),
        s.costs,
      )
      metrics |= consolidation_night.transfer_metrics(report, s.sleep.steps)
    metrics['transfers'] = float(len(due))
    return life_lib.end_night(life), metrics


class Frozen(WakeOnly):
  """frozen: the base as it is; it reads, and learns nothing."""

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    return life, {}
