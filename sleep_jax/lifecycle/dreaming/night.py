"""A night's dreaming (Sleep section 6).

For every context C of the day, each with an evaluation tau:

  1. propose     sample m dreams ~ LM(. | C), one random expert mixed in
  2. importance  omega of every dream; keep the k largest and b others
  3. try         fine-tune an isolated LoRA instance on each dream that is kept
  4. reward      1 if the instance does better under tau than untuned, Eq. 5
  5. learn       ReST^EM: fine-tuning on the rewarded dreams; repeat

It follows consolidation in the same night, and is undone as a whole if what the
model generated before it loses more than a margin.
"""

import collections
import dataclasses

from absl import logging
import jax
import jax.numpy as jnp
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
from sleep_jax.lifecycle.dreaming import retention
from sleep_jax.lifecycle.dreaming import reward
from sleep_jax.metrics import observation
from sleep_jax.models import model as model_lib

# Documents that are sampled for each that stands beside a batch.
_DOCUMENTS = 32


@dataclasses.dataclass
class DreamingReport:
  """What a night's dreaming did.

  dreams: how many were sampled.
  rejected: how many of them for which reason.
  tried, rewarded: dreams that went through a trial, and that passed it.
  scores: (score, baseline score) of every trial.
  retention: nats per token that documents of the model before it lost.
  rolled_back: whether that was too much.
  results: the trials of the last round.
  """

  dreams: int = 0
  rejected: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  tried: int = 0
  rewarded: int = 0
  scores: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  retention: float = 0.0
  rolled_back: bool = False
  results: list[reward.TrialResult] = dataclasses.field(default_factory=list)

  def metrics(self) -> at.Metrics:
    """Figures by name."""
    reasons = ('empty', 'unreadable', 'too long', 'diverged')
    score, baseline = np.mean(self.scores or [(0.0, 0.0)], axis=0).tolist()
    return {
      'dreams': float(self.dreams),
      'tried': float(self.tried),
      'reward_rate': self.rewarded / max(self.tried, 1),
      'score': score,
      'baseline_score': baseline,
      'retention_loss': self.retention,
      'rolled_back': float(self.rolled_back),
    } | {
      f'rejected_{r.replace(" ", "_")}': float(self.rejected[r])
      for r in reasons
    }

  def add_round(
    self,
    dreams: list[list[propose_lib.Dream]],
    results: list[reward.TrialResult],
  ) -> None:
    """Adds one round to the night's report."""
    for dream in (d for dreams_of_context in dreams for d in dreams_of_context):
      self.dreams += 1
      if isinstance(dream.update, contexts.Rejected):
        self.rejected[dream.update.reason] += 1
    for result in results:
      self.tried += 1
      self.rewarded += result.reward
      self.scores.append((result.score, result.baseline_score))
      if result.rejected:
        self.rejected[result.rejected] += 1
    self.results = results


def night(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life, rng: at.Key
) -> tuple[life_lib.Life, DreamingReport]:
  """Dreams about the contexts of the day; without any, nothing happens.

  Returns:
    The life after it, and what it did.
  """
  cfg, original, report = dreamer.cfg, life, DreamingReport()
  if not cfg.enabled or not life.contexts:
    return life, report
  target_key, retention_key, *keys, known_key = jax.random.split(
    rng, 3 + cfg.rounds
  )
  known = _known(dreamer, original.model, known_key)
  life, target, start = rest_em.allocate(dreamer, life, target_key)
  trainable, changed = start, False
  for key in keys:
    *round_keys, learn_key = jax.random.split(key, 4)
    model = original.model
    if changed:
      model = rest_em.commit(cfg, life, target, trainable).model
    dreams, results = _round(dreamer, model, life.contexts, round_keys)
    report.add_round(dreams, results)
    _show(results)
    rewarded = reward.select_rewarded(cfg, results)
    if not rewarded:
      logging.warning(
        'Night %d: none of %d tried dreams was rewarded; the model stays as '
        'it is. Raise dreaming.dreams, or see trial.learning_rate.',
        int(life.clock.nights),
        len(results),
      )
      continue
    trainable = rest_em.finetune(
      dreamer,
      life.model,
      target,
      start if cfg.restart else trainable,
      _training_rows(dreamer, rewarded),
      learn_key,
      known,
    )
    changed = True
  if not changed:
    return original, report
  life = rest_em.commit(cfg, life, target, trainable)
  report.retention = retention.retention_loss(
    dreamer, original.model, life.model, retention_key
  )
  # `not <=`, so that a model that is no longer finite is undone too.
  if not report.retention <= cfg.retention_margin:
    report.rolled_back = True
    logging.warning(
      "Night %d: after dreaming, the model's own documents lost %.3f nats per "
      'token, more than dreaming.retention_margin=%.3f; the night is rolled '
      'back. Lower dreaming.learning_rate or dreaming.epochs.',
      int(life.clock.nights),
      report.retention,
      cfg.retention_margin,
    )
    return original, report
  return life, report


def _round(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  about: tuple[contexts.Context, ...],
  keys: list[at.Key],
) -> tuple[list[list[propose_lib.Dream]], list[reward.TrialResult]]:
  """Steps 1 to 4."""
  cfg = dreamer.cfg
  dream_key, importance_key, trial_key = keys
  dreams = propose_lib.propose(dreamer, model, about, cfg.dreams, dream_key)
  (omega,) = importance.importance_scores(
    dreamer, model, dreams, importance_key, (cfg.importance,)
  ).values()
  rng, selected = order_lib.numpy_rng(importance_key), []
  for dreams_of_context, scores in zip(dreams, omega, strict=True):
    usable = np.array([d.usable for d in dreams_of_context])
    index = importance.select(scores, usable, cfg.keep, cfg.keep_random, rng)
    selected += [(dreams_of_context[i], float(scores[i])) for i in index]
  return dreams, reward.run_trials(dreamer, model, selected, trial_key)


def _show(results: list[reward.TrialResult]) -> None:
  for kind, rewarded in (('rewarded', True), ('tried, not rewarded', False)):
    dreams = [r.dream.tokens for r in results if r.reward == rewarded]
    observation.dreams(kind, dreams)


def _known(
  dreamer: dreamer_lib.Dreamer, model: model_lib.Model, rng: at.Key
) -> rest_em.Known | None:
  """Documents of the model before dreaming; None if none are rehearsed."""
  if not dreamer.cfg.rehearsed:
    return None
  model, rows = model.merged(), _DOCUMENTS * dreamer.cfg.rehearsed
  with dreamer.costs.phase('rollout') as cost:
    tokens, lengths, *_ = retention.sample_documents(dreamer, model, rows, rng)
    cost.add_forward(tokens.size)
  weight = np.arange(tokens.shape[1]) < lengths[:, None]
  return rest_em.Known(
    model, jnp.asarray(tokens), jnp.asarray(weight, jnp.float32)
  )


def _training_rows(
  dreamer: dreamer_lib.Dreamer, dreams: list[propose_lib.Dream]
) -> contexts.TrainingRows:
  """Prompt and dream as rows, the dream as target."""
  end = [dreamer.format.stop] if dreamer.format.stop >= 0 else []
  pairs = [(d.context.prompt, d.tokens + end) for d in dreams]
  return padding.prompt_rows(pairs, dreamer.tokenizer.pad)
