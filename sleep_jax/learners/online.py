"""Learners that read with the Continuum Memory System: wake_only and sleep."""

from absl import logging
import jax
import jax.numpy as jnp

from sleep_jax import typing as t
from sleep_jax.learners import learner
from sleep_jax.lifecycle import consolidation
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.runtime import health
from sleep_jax.tasks import task


class WakeOnly:
  """Hope without distillation: fast levels learn on, nothing is moved."""

  holds_pending = False

  def __init__(self, setup: learner.Setup):
    self.setup = setup

  def init(self, rng: t.Key) -> life_lib.Life:
    return life_lib.born(self.setup.model, self.setup.params, rng)

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, learner.Metrics]:
    s = self.setup
    tokens, weight = learner.batches(experience, s.wake.lanes)
    with s.ledger.phase('wake') as account:
      memory, clock, loss = wake_lib.wake(
        s.model,
        s.wake,
        life.params,
        life.memory,
        life.clock.tokens,
        tokens,
        weight,
        hold=self.holds_pending,
      )
      loss = jax.block_until_ready(loss)
      account.online(tokens.size, steps=loss.size)
    health.check('wake', loss, memory)
    tenth = max(1, loss.size // 10)
    life = life.replace(memory=memory, clock=life.clock.replace(tokens=clock))
    return life, {
      'loss_first': float(loss[:tenth].mean()),
      'loss_last': float(loss[-tenth:].mean()),
      'loss': float(loss.mean()),
    }

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, learner.Metrics]:
    return consolidation.awaken(life), {}

  def respond(self, life, prompts, answers) -> task.Response:
    return learner.score(self.setup, life.params, life.memory, prompts, answers)


class Frozen(WakeOnly):
  """frozen: the base as it is; it reads, and learns nothing."""

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, learner.Metrics]:
    return life, {}


def told(report: consolidation.Report, steps: int) -> learner.Metrics:
  """One transfer's figures; level 0 is the states of recurrent mixers."""
  transfer, curves = report.transfer, report.curves
  name = f'{transfer.sender + 1}to{transfer.receiver + 1}'
  tenth = max(1, steps // 10)
  return {
    f'{name}/kl_first': report.kl_first,
    f'{name}/kl_last': report.kl_last,
    f'{name}/transferred': float(report.transferred),
    f'{name}/slot': float(report.slot),
    f'{name}/router': float(curves['router'][-tenth:].mean()),
    f'{name}/on_policy': float(curves['on_policy'][-tenth:].mean()),
    f'{name}/reward_first': float(curves['reward'][0]),
    f'{name}/reward_last': float(curves['reward'][-1]),
  }


class Sleep(WakeOnly):
  """Wake, then consolidate what is due, slowest first (Sleep section 5)."""

  holds_pending = True

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, learner.Metrics]:
    s, metrics = self.setup, {}
    due = schedule.transfers(
      s.model, int(life.clock.rested), int(life.clock.tokens)
    )
    if not due:
      logging.warning(
        'Night %d: no level is due; %d tokens per lane were read since the '
        'last sleep. Lower model.levels[].sleep_every, or read more.',
        int(life.clock.nights),
        int(life.clock.tokens - life.clock.rested),
      )
    rng = jax.random.fold_in(life.rng, life.clock.nights)
    for transfer in due:
      life, report = consolidation.consolidate(
        s.model,
        s.sleep,
        life,
        transfer,
        s.tokenizer,
        jax.random.fold_in(rng, transfer.sender),
        s.ledger,
      )
      metrics |= told(report, s.sleep.steps)
    metrics['transfers'] = float(len(due))
    return consolidation.awaken(life), metrics


class InContext(WakeOnly):
  """icl: nothing learns; the end of the stream stands before every question."""

  def init(self, rng: t.Key) -> life_lib.Life:
    notes = {'context': jnp.zeros((0,), jnp.int32)}
    return life_lib.born(self.setup.model, self.setup.params, rng, notes=notes)

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, learner.Metrics]:
    # The latest tokens that still leave half the window for the question.
    room = self.setup.model.max_len // 2
    read = experience.tokens[experience.weight > 0]
    read = read[read != self.setup.tokenizer.bos]
    kept = jnp.concatenate([life.notes['context'], jnp.asarray(read)])[-room:]
    clock = life.clock.replace(
      tokens=life.clock.tokens + experience.tokens.size
    )
    return life.replace(notes={'context': kept}, clock=clock), {}

  def respond(self, life, prompts, answers) -> task.Response:
    context = life.notes['context'].tolist()
    return learner.score(
      self.setup,
      life.params,
      life.memory,
      [[p[0], *context, *p[1:]] for p in prompts],
      answers,
    )
