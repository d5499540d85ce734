"""Dreaming: the model improves on what it makes up (Sleep section 6).

A night's dreaming, for every context C of the day, each with an evaluation tau:

  1. dream    sample m dreams ~ LM(. | C), one random expert mixed in
  2. weigh    omega of every dream; keep the k largest and b others
  3. try      fine-tune an isolated LoRA instance on each dream that is kept
  4. reward   1 if the instance does better under tau than untuned, Eq. 5
  5. learn    ReST^EM: supervised fine-tuning on the rewarded dreams; repeat

It follows consolidation in the same night, and like a transfer it is undone as
a whole if what the life knew before suffers.
"""

import collections
import dataclasses

from absl import logging
import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import contexts
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import importance
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import rest_em
from sleep_jax.lifecycle.dreaming import retention as retention_lib
from sleep_jax.lifecycle.dreaming import reward as reward_lib


@dataclasses.dataclass
class DreamingReport:
  """What a night's dreaming did.

  rejected: how many dreams for which reason.
  tried, rewarded: dreams that went through a trial, and that passed it.
  mark, untuned: mean marks with and without a dream.
  retention: nats per token that documents of the self before dreaming lost.
  rolled_back: whether that was too much.
  """

  dreamt: int = 0
  rejected: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  tried: int = 0
  rewarded: int = 0
  mark: float = 0.0
  untuned: float = 0.0
  retention: float = 0.0
  rolled_back: bool = False

  def metrics(self) -> dict[str, float]:
    """Figures by name."""
    reasons = ('empty', 'unreadable', 'too long', 'diverged')
    return {
      'dreams': float(self.dreamt),
      'tried': float(self.tried),
      'reward_rate': self.rewarded / max(self.tried, 1),
      'mark': self.mark,
      'untuned': self.untuned,
      'retention_loss': self.retention,
      'rolled_back': float(self.rolled_back),
    } | {
      f'rejected_{r.replace(" ", "_")}': float(self.rejected[r])
      for r in reasons
    }


def _training_rows(
  dreamer: dreamer_lib.Dreamer, worth: list[propose_lib.Dream]
) -> contexts.TrainingRows:
  """Prompt and dream as rows to be learnt."""
  end = [dreamer.format.stop] if dreamer.format.stop >= 0 else []
  pairs = [(d.context.prompt, d.tokens + end) for d in worth]
  return padding.prompt_rows(pairs, dreamer.tokenizer.pad)


def night(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life, rng: at.Key
) -> tuple[life_lib.Life, DreamingReport, list[reward_lib.TrialResult]]:
  """A night's dreaming about the contexts of the day.

  Returns:
    The life after it, what it did, and the trials of its last round.
  """
  how, before, report, tried = dreamer.how, life, DreamingReport(), []
  if not how.enabled or not life.contexts:
    return life, report, tried
  room_key, gate_key, *keys = jax.random.split(rng, 2 + how.rounds)
  life, place, start = rest_em.allocate(
    dreamer.cfg, how, dreamer.lora, life, room_key
  )
  learnt, changed, marks = start, False, []
  for key in keys:
    dream_key, weigh_key, try_key, learn_key = jax.random.split(key, 4)
    now = rest_em.commit(how, life, place, learnt) if changed else before
    dreamt = propose_lib.propose(
      dreamer, now, life.contexts, how.dreams, dream_key
    )
    (omega,) = importance.importance_scores(
      dreamer, now, dreamt, weigh_key, (how.importance,)
    ).values()
    host, chosen = order_lib.numpy_rng(weigh_key), []
    for of_one, scored in zip(dreamt, omega, strict=True):
      usable = np.array([d.usable for d in of_one])
      kept = importance.select(scored, usable, how.keep, how.keep_random, host)
      chosen += [(of_one[i], float(scored[i])) for i in kept]
    tried = reward_lib.run_trials(dreamer, now, chosen, try_key)
    worth = reward_lib.select_rewarded(how, tried)
    _count(report, dreamt, tried, marks)
    if not worth:
      logging.warning(
        'Night %d: none of %d tried dreams was rewarded; the dreamer stays as '
        'it is. Raise dreaming.dreams, or look at trial.learning_rate.',
        int(life.clock.nights),
        len(tried),
      )
      continue
    begin = start if how.restart else learnt
    learnt = rest_em.finetune(
          dreamer.cfg, how, life, place, begin, _training_rows(dreamer, worth), learn_key,
          dreamer.costs,
        )  # fmt: skip
    changed = True
  if marks:
    report.mark, report.untuned = np.mean(marks, axis=0).tolist()
  if not changed:
    return before, report, tried
  life = rest_em.commit(how, life, place, learnt)
  report.retention = retention_lib.retention_loss(
    dreamer, before, life, gate_key
  )
  # `not <=`, so that a dreamer that is no longer finite is undone too.
  if not report.retention <= how.retention_margin:
    report.rolled_back = True
    logging.warning(
      "Night %d: after dreaming, the self's own documents lost %.3f nats per "
      'token, more than dreaming.retention_margin=%.3f; the night is rolled '
      'back. Lower dreaming.learning_rate or dreaming.epochs.',
      int(life.clock.nights),
      report.retention,
      how.retention_margin,
    )
    life = before
  return life, report, tried


def _count(report, dreamt, tried, marks) -> None:
  """Adds one round to the night's report."""
  for one in (d for of_one in dreamt for d in of_one):
    report.dreamt += 1
    if not one.usable:
      report.rejected[one.edit.reason] += 1
  for x in tried:
    report.tried += 1
    report.rewarded += x.reward
    marks.append((x.mark, x.untuned))
    if x.rejected:
      report.rejected[x.rejected] += 1
